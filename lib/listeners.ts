// Not the global one: under a user's fake timers it would never come.
import { setImmediate } from "node:timers/promises";
import { inspect } from "node:util";
import type * as Api from "../index";
import { AgentVmError, callSync, invalidArgument } from "./errors";
import type { native } from "./native";
import { OUTPUT_EVENTS, OutputEvents } from "./processes";

type NativeVm = InstanceType<typeof native.NativeVm>;
type NativeSubscription = ReturnType<NativeVm["subscribe"]>;
type Event = keyof Api.AgentEvents;
type Listener = (value: never) => unknown;

const EVENTS: readonly string[] = [
  "sessionEvent",
  "permissionRequest",
  "sessionStatus",
  "vmBooted",
  "vmShutdown",
  "installProgress",
  "imageProgress",
  "limitReached",
  "secretMisdirected",
  "networkDenied",
  ...OUTPUT_EVENTS,
] satisfies Event[];

/** For so long listeners run before timers, I/O and other calls get their turn. */
const SLICE_MS = 10;

/** What listeners are told. */
type Item = { [E in Event]: { type: E; value: Api.AgentEvents[E] } }[Event];

/** Consecutive events of a session, as the addon hands them over: `first` is the number of the first. */
interface Run {
  type: "sessionEvents";
  value: { sessionId: string; first: number; events: Api.JsonRpcNotification[] };
}

/** Nothing more comes after it. */
interface Failure {
  type: "error";
  value: { code: Api.ErrorCode; message: string };
}

/** One listener of one event, from `on` until `off`. */
interface Registration {
  /** For one event only. */
  once: boolean;
  /**
   * Of permission requests: those that the listener was told and that are not known to have ended, each
   * with its session. It hears of them from the list of pending ones and from batches.
   */
  told: Map<string, string>;
}

/** The listeners of a VM. All of them share one cursor of the addon, which is there while they are. */
export class Listeners {
  readonly #vm: NativeVm;
  readonly #byEvent = new Map<Event, Map<Listener, Registration>>();
  readonly #output: OutputEvents;
  #subscription: NativeSubscription | undefined;

  constructor(vm: NativeVm) {
    this.#vm = vm;
    this.#output = new OutputEvents(
      vm,
      (event) => this.has(event),
      (items) => this.#handOut(items, () => true).catch(surface),
    );
  }

  has(event: Event): boolean {
    return this.#byEvent.has(event);
  }

  add<E extends Event>(event: E, listener: Api.Listener<E>, once: boolean): () => void {
    if (!EVENTS.includes(event)) {
      throw invalidArgument("event", `${inspect(event)} is none of ${EVENTS.join(", ")}`);
    }
    if (typeof listener !== "function") {
      throw invalidArgument("listener", "must be a function");
    }
    this.#subscription ??= this.#subscribe();
    let listeners = this.#byEvent.get(event);
    if (!listeners) {
      listeners = new Map();
      this.#byEvent.set(event, listeners);
      this.#output.come(surface);
    }
    const known = listeners.get(listener);
    if (known) {
      // Who listens to every event goes on listening.
      known.once &&= once;
    } else {
      const registration = { once, told: new Map() };
      listeners.set(listener, registration);
      if (event === "permissionRequest") {
        queueMicrotask(() => this.#tellPending(listener, registration).catch(surface));
      }
    }
    return () => this.remove(event, listener);
  }

  remove<E extends Event>(event: E, listener: Api.Listener<E>): void {
    const listeners = this.#byEvent.get(event);
    if (listeners?.delete(listener) && listeners.size === 0) {
      this.#byEvent.delete(event);
      this.#output.gone();
      if (this.#byEvent.size === 0) {
        this.removeAll();
      }
    }
  }

  /** See {@link OutputEvents.settle}. */
  settleOutput(): void {
    this.#output.settle();
  }

  removeAll(): void {
    this.#byEvent.clear();
    this.#output.gone();
    this.#subscription?.close();
    this.#subscription = undefined;
  }

  #subscribe(): NativeSubscription {
    const isCurrent = () => this.#subscription === subscription;
    const subscription: NativeSubscription = callSync(() =>
      this.#vm.subscribe((batch) => this.#handOut(itemsOf(batch), isCurrent).catch(surface)),
    );
    return subscription;
  }

  /**
   * Hands out a batch. Listeners run in slices: between two, timers, I/O and other calls have their
   * turn, so that a slow listener keeps nobody from cancelling the turn that it listens to.
   */
  async #handOut(items: Iterable<Item | Failure>, isCurrent: () => boolean): Promise<void> {
    let sliceEnd = performance.now() + SLICE_MS;
    for (const item of items) {
      if (item.type === "error") {
        surface(new AgentVmError(item.value.code, item.value.message));
        if (isCurrent()) {
          this.#subscription = undefined; // the next one who comes to listen tries again
        }
        return;
      }
      if (performance.now() >= sliceEnd) {
        await setImmediate();
        sliceEnd = performance.now() + SLICE_MS;
      }
      // Who listens after the last listener had gone has a cursor of his own.
      if (!isCurrent()) {
        return;
      }
      // A copy: a listener may remove itself or others.
      for (const [listener, registration] of [...(this.#byEvent.get(item.type) ?? [])]) {
        this.#tell(item, listener, registration);
      }
      this.#forget(item);
    }
  }

  #tell(item: Item, listener: Listener, registration: Registration): void {
    if (this.#byEvent.get(item.type)?.get(listener) !== registration) {
      return; // removed meanwhile
    }
    if (item.type === "permissionRequest") {
      const { sessionId, request } = item.value;
      if (registration.told.has(request.permissionId)) {
        return;
      }
      registration.told.set(request.permissionId, sessionId);
    }
    if (registration.once) {
      this.remove(item.type, listener as Api.Listener<Event>);
    }
    try {
      listener(item.value as never);
    } catch (error) {
      surface(error);
    }
  }

  /** A new listener is asked, too, what was asked before it came: in slices, as a batch is handed out. */
  async #tellPending(listener: Listener, registration: Registration): Promise<void> {
    let sliceEnd = performance.now() + SLICE_MS;
    let after: string | undefined;
    while (this.#byEvent.get("permissionRequest")?.get(listener) === registration) {
      const next = callSync(() => this.#vm.nextPendingPermission(after));
      if (next === null) {
        return;
      }
      const value: Api.AgentEvents["permissionRequest"] = JSON.parse(next);
      after = value.request.permissionId;
      this.#tell({ type: "permissionRequest", value }, listener, registration);
      if (performance.now() >= sliceEnd) {
        await setImmediate();
        sliceEnd = performance.now() + SLICE_MS;
      }
    }
  }

  /** A request is not met again after its outcome, nor after the end of its session. */
  #forget(item: Item): void {
    if (item.type === "sessionEvent" && item.value.event.method === "_agentvm/permission_outcome") {
      const { permissionId } = item.value.event.params;
      this.#forgetWhere((told) => told === permissionId);
    } else if (item.type === "sessionStatus" && item.value.status === "destroyed") {
      const { sessionId } = item.value;
      this.#forgetWhere((_told, toldOf) => toldOf === sessionId);
    }
  }

  #forgetWhere(ended: (permissionId: string, sessionId: string) => boolean): void {
    for (const { told } of this.#byEvent.get("permissionRequest")?.values() ?? []) {
      for (const [permissionId, sessionId] of told) {
        if (ended(permissionId, sessionId)) {
          told.delete(permissionId);
        }
      }
    }
  }
}

function* itemsOf(batch: string): Generator<Item | Failure> {
  const parts: (Exclude<Item, { type: "sessionEvent" }> | Run | Failure)[] = JSON.parse(batch);
  for (const part of parts) {
    if (part.type === "sessionEvents") {
      const { sessionId, first, events } = part.value;
      let sequenceNumber = first;
      for (const event of events) {
        yield { type: "sessionEvent", value: { sessionId, sequenceNumber, event } };
        sequenceNumber += 1;
      }
    } else {
      yield part;
    }
  }
}

/** Makes an error of a listener an `uncaughtException`, after the other listeners have run. */
function surface(error: unknown): void {
  process.nextTick(() => {
    throw error;
  });
}
