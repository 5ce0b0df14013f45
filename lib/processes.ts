/** What processes and shells write, on its way to listeners. */

import type * as Api from "../index";
import { told } from "./arguments";
import { callSync, invalidArgument } from "./errors";
import type { native } from "./native";

type NativeVm = InstanceType<typeof native.NativeVm>;
type NativeSubscription = ReturnType<NativeVm["subscribeOutput"]>;
type NativeBatch = Parameters<Parameters<NativeVm["subscribeOutput"]>[0]>[0];
type NativeEnd = Awaited<ReturnType<NativeVm["waitProcess"]>>;

/** Events that do not come from the log of sessions. */
export const OUTPUT_EVENTS = ["processOutput", "processExit", "shellData", "shellExit"] as const;

type OutputEvent = (typeof OUTPUT_EVENTS)[number];
export type OutputItem = {
  [E in OutputEvent]: { type: E; value: Api.AgentEvents[E] };
}[OutputEvent];

/** The addon's end of the listeners to output. It knows who is there: for whom to wait, and for whom to keep. */
export class OutputEvents {
  readonly #vm: NativeVm;
  readonly #has: (event: OutputEvent) => boolean;
  readonly #deliver: (items: OutputItem[]) => Promise<void>;
  #subscription: NativeSubscription | undefined;
  #isChanging = false;
  /** The batch before: that of a subscription which is closed is handed out to its end, too. */
  #delivered: Promise<void> = Promise.resolve();

  constructor(
    vm: NativeVm,
    has: (event: OutputEvent) => boolean,
    deliver: (items: OutputItem[]) => Promise<void>,
  ) {
    this.#vm = vm;
    this.#has = has;
    this.#deliver = deliver;
  }

  /**
   * Somebody has come. Told to the addon when the caller's code has run: who adds a listener for the
   * output and one for the end gets both in their order, whichever he adds first.
   */
  come(onError: (error: unknown) => void): void {
    if (this.#isChanging) {
      return;
    }
    this.#isChanging = true;
    queueMicrotask(() => {
      try {
        this.settle();
      } catch (error) {
        onError(error);
      }
    });
  }

  /** Somebody has gone: what is written from now on is kept for who comes next. */
  gone(): void {
    this.#isChanging = true;
    this.settle();
  }

  /** Who has come is known to the addon from here on: a call that waits for listeners waits for them too. */
  settle(): void {
    if (this.#isChanging) {
      this.#isChanging = false;
      this.#change();
    }
  }

  #change(): void {
    const wanted = OUTPUT_EVENTS.filter(this.#has);
    if (wanted.length === 0) {
      this.#subscription?.close();
      this.#subscription = undefined;
      return;
    }
    this.#subscription ??= callSync(() =>
      this.#vm.subscribeOutput((batch) => {
        this.#delivered = this.#delivered.then(() => this.#deliver(batch.map(itemOf)));
        return this.#delivered;
      }),
    );
    this.#subscription.setInterest(wanted);
  }
}

function itemOf(output: NativeBatch[number]): OutputItem {
  const { pid, shellId, isStdout, data = new Uint8Array(), droppedBytes, end } = output;
  if (pid !== undefined) {
    return end
      ? { type: "processExit", value: { pid, ...processEnd(end) } }
      : {
          type: "processOutput",
          value: { pid, stream: isStdout ? "stdout" : "stderr", data, droppedBytes },
        };
  }
  const id = shellId as string; // one of the two is there
  return end
    ? { type: "shellExit", value: { shellId: id, ...shellEnd(end) } }
    : { type: "shellData", value: { shellId: id, data, droppedBytes } };
}

export function shellEnd(end: NativeEnd): Api.ShellEnd {
  const { exitCode, signal, vmEnded } = processEnd(end);
  return { exitCode, signal, vmEnded };
}

export function processEnd(end: NativeEnd): Api.ProcessEnd {
  return {
    exitCode: end.exitCode ?? null,
    signal: end.signal ?? null,
    timedOut: end.timedOut,
    vmEnded: end.vmEnded,
  };
}

export function requirePid(pid: unknown): void {
  if (!Number.isInteger(pid) || (pid as number) < 1 || (pid as number) > 0x7fff_ffff) {
    throw invalidArgument("pid", `must be a positive whole number, not ${told(pid)}`);
  }
}

/** Parents with their children. One whose parent is not in the list is a root. */
export function treeOf(processes: Api.VmProcess[]): Api.ProcessTree[] {
  const nodes = new Map<number, Api.ProcessTree>();
  for (const process of processes) {
    nodes.set(process.pid, { ...process, children: [] });
  }
  const roots: Api.ProcessTree[] = [];
  for (const node of nodes.values()) {
    (nodes.get(node.ppid)?.children ?? roots).push(node);
  }
  return roots;
}
