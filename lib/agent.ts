import { inspect } from "node:util";
import type * as Api from "../index";
import { bytes, json, refuseMore, requireOptions, requireString } from "./arguments";
import { AgentVmError, aborted, call, callSync, invalidArgument } from "./errors";
import { native } from "./native";

type NativeVm = InstanceType<typeof native.NativeVm>;
type NativeSubscription = ReturnType<NativeVm["subscribe"]>;
type Listener = (value: never) => void;

const EVENTS: readonly string[] = [
  "sessionEvent",
  "vmBooted",
  "vmShutdown",
  "installProgress",
] satisfies (keyof Api.AgentEvents)[];

/** An item of a batch from the addon. */
interface Item {
  type: keyof Api.AgentEvents | "error";
  value: unknown;
}

export class Agent implements Api.Agent {
  readonly key: readonly string[];
  readonly #vm: NativeVm;
  /** By event. `true`: for one event only. */
  readonly #listeners = new Map<string, Map<Listener, boolean>>();
  #subscription: NativeSubscription | undefined;

  constructor(vm: NativeVm, key: readonly string[]) {
    this.#vm = vm;
    this.key = Object.freeze(key);
  }

  // Sessions

  async createSession(
    agentType: string,
    options: Api.CreateSessionOptions = {},
  ): Promise<Api.Session> {
    requireString("agentType", agentType);
    const { signal, ...rest } = requireOptions(options);
    return JSON.parse(
      await abortable(signal, (abort) =>
        this.#vm.createSession(agentType, json("options", rest), abort),
      ),
    );
  }

  async sendPrompt(
    sessionId: string,
    text: string | readonly Api.ContentBlock[],
    options: Api.SendPromptOptions = {},
  ): Promise<Api.PromptResult> {
    requireString("sessionId", sessionId);
    const { signal, ...more } = requireOptions(options);
    refuseMore(more);
    if (signal) {
      throwIfAborted(signal);
    }
    if (typeof text !== "string" && !Array.isArray(text)) {
      throw invalidArgument("text", "must be a string or an array of content blocks");
    }
    const turn = call(this.#vm.sendPrompt(sessionId, json("text", text)));
    if (!signal) {
      return JSON.parse(await turn);
    }
    // An abort ends the turn itself, not only the wait for it.
    let cancelling: Promise<unknown> | undefined;
    const abort = () => {
      cancelling = this.cancelPrompt(sessionId);
      cancelling.catch(() => {}); // the turn reports what went wrong
    };
    signal.addEventListener("abort", abort, { once: true });
    try {
      const result = await turn;
      if (signal.aborted) {
        throw aborted(signal);
      }
      return JSON.parse(result);
    } catch (error) {
      throw signal.aborted ? aborted(signal) : error;
    } finally {
      signal.removeEventListener("abort", abort);
      await cancelling?.catch(() => {});
    }
  }

  async cancelPrompt(sessionId: string): Promise<Api.CancelResult> {
    requireString("sessionId", sessionId);
    return { cancelled: await call(this.#vm.cancelPrompt(sessionId)) };
  }

  async resumeSession(
    sessionId: string,
    options: Api.ResumeSessionOptions = {},
  ): Promise<Api.PersistedSession> {
    requireString("sessionId", sessionId);
    const rest = requireOptions(options);
    return JSON.parse(await call(this.#vm.resumeSession(sessionId, json("options", rest))));
  }

  async closeSession(sessionId: string): Promise<void> {
    requireString("sessionId", sessionId);
    await call(this.#vm.closeSession(sessionId));
  }

  async listPersistedSessions(): Promise<Api.PersistedSession[]> {
    return JSON.parse(await call(this.#vm.listPersistedSessions()));
  }

  async getSessionEvents(
    sessionId: string,
    options: Api.GetSessionEventsOptions = {},
  ): Promise<Api.PersistedEvent[]> {
    requireString("sessionId", sessionId);
    const query = json("options", requireOptions(options));
    return JSON.parse(await call(this.#vm.getSessionEvents(sessionId, query)));
  }

  // Processes and files

  async exec(command: string, options: Api.ExecOptions = {}): Promise<Api.ExecResult> {
    requireString("command", command);
    const { signal, stdin, ...rest } = requireOptions(options);
    const input = stdin === undefined ? undefined : bytes("stdin", stdin);
    const result = await abortable(signal, (abort) =>
      this.#vm.exec(command, json("options", rest), input, abort),
    );
    return {
      stdout: result.stdout.toString("utf8"),
      stderr: result.stderr.toString("utf8"),
      exitCode: result.exitCode ?? null,
      signal: result.signal ?? null,
      truncated: result.truncated,
    };
  }

  async readFile(path: string, options: Api.FileOptions = {}): Promise<Uint8Array> {
    requireString("path", path);
    return await call(this.#vm.readFile(path, json("options", requireOptions(options))));
  }

  async writeFile(
    path: string,
    content: string | Uint8Array,
    options: Api.FileOptions = {},
  ): Promise<void> {
    requireString("path", path);
    const data = bytes("content", content);
    await call(this.#vm.writeFile(path, data, json("options", requireOptions(options))));
  }

  // Life

  async sleep(): Promise<void> {
    await call(this.#vm.sleep());
  }

  async wake(): Promise<void> {
    await call(this.#vm.wake());
  }

  async destroy(): Promise<void> {
    await call(this.#vm.destroy());
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.sleep();
  }

  // Events

  on<E extends keyof Api.AgentEvents>(
    event: E,
    listener: (value: Api.AgentEvents[E]) => void,
  ): () => void {
    return this.#listen(event, listener, false);
  }

  once<E extends keyof Api.AgentEvents>(
    event: E,
    listener: (value: Api.AgentEvents[E]) => void,
  ): () => void {
    return this.#listen(event, listener, true);
  }

  off<E extends keyof Api.AgentEvents>(
    event: E,
    listener: (value: Api.AgentEvents[E]) => void,
  ): void {
    const listeners = this.#listeners.get(event);
    if (listeners?.delete(listener as Listener) && listeners.size === 0) {
      this.#listeners.delete(event);
      if (this.#listeners.size === 0) {
        this.stopListening();
      }
    }
  }

  #listen<E extends keyof Api.AgentEvents>(
    event: E,
    listener: (value: Api.AgentEvents[E]) => void,
    once: boolean,
  ): () => void {
    if (!EVENTS.includes(event)) {
      throw invalidArgument("event", `${inspect(event)} is none of ${EVENTS.join(", ")}`);
    }
    if (typeof listener !== "function") {
      throw invalidArgument("listener", "must be a function");
    }
    this.#subscription ??= callSync(() => this.#vm.subscribe((batch) => this.#deliver(batch)));
    let listeners = this.#listeners.get(event);
    if (!listeners) {
      listeners = new Map();
      this.#listeners.set(event, listeners);
    }
    // Who listens to every event goes on listening.
    listeners.set(listener, once && (listeners.get(listener) ?? true));
    return () => this.off(event, listener);
  }

  stopListening(): void {
    this.#listeners.clear();
    this.#subscription?.close();
    this.#subscription = undefined;
  }

  #deliver(batch: string): void {
    for (const item of JSON.parse(batch) as Item[]) {
      if (item.type === "error") {
        const { code, message } = item.value as { code: Api.ErrorCode; message: string };
        surface(new AgentVmError(code, message));
        continue;
      }
      // A copy: a listener may remove itself or others.
      for (const [listener, once] of [...(this.#listeners.get(item.type) ?? [])]) {
        if (once) {
          this.off(item.type, listener as never);
        }
        try {
          listener(item.value as never);
        } catch (error) {
          surface(error);
        }
      }
    }
  }
}

/** Makes an error of a listener an `uncaughtException`, after the other listeners have run. */
function surface(error: unknown): void {
  process.nextTick(() => {
    throw error;
  });
}

async function abortable<T>(
  signal: AbortSignal | undefined,
  run: (abort: InstanceType<typeof native.NativeAbort>) => Promise<T>,
): Promise<T> {
  const abort = new native.NativeAbort();
  if (!signal) {
    return await call(run(abort));
  }
  throwIfAborted(signal);
  const onAbort = () => abort.abort();
  signal.addEventListener("abort", onAbort, { once: true });
  try {
    return await call(run(abort));
  } catch (error) {
    throw signal.aborted ? aborted(signal) : error;
  } finally {
    signal.removeEventListener("abort", onAbort);
  }
}

function throwIfAborted(signal: AbortSignal): void {
  if (signal.aborted) {
    throw aborted(signal);
  }
}
