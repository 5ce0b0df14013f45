import type * as Api from "../index";
import type { NativeEventStream } from "./binding";
import { aborted, call } from "./errors";

/**
 * Iterates over a stream of the addon.
 *
 * Not an async generator: that would answer `return()` only after a `next()` that is under way, and
 * one that follows a quiet session may be under way for ever.
 */
export class SessionEvents implements Api.SessionEventIterator {
  readonly #stream: NativeEventStream;
  readonly #signal: AbortSignal | undefined;
  /** What was read and not asked for yet, from `#position` on. */
  #batch: Api.PersistedEvent[] = [];
  #position = 0;
  #state: "new" | "open" | "ended" = "new";
  /** Ends the read that is under way. */
  #interrupt: (() => void) | undefined;
  /** The answer before: those to calls that did not wait for each other come in their order. */
  #answered: Promise<unknown> = Promise.resolve();

  constructor(stream: NativeEventStream, signal: AbortSignal | undefined) {
    this.#stream = stream;
    this.#signal = signal;
  }

  next(): Promise<IteratorResult<Api.PersistedEvent, undefined>> {
    const answer = this.#answered.then(() => this.#next());
    this.#answered = answer.catch(() => {}); // it is the caller's
    return answer;
  }

  return(): Promise<IteratorResult<Api.PersistedEvent, undefined>> {
    this.#end();
    return Promise.resolve({ done: true, value: undefined });
  }

  [Symbol.asyncIterator](): this {
    return this;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.return();
  }

  async #next(): Promise<IteratorResult<Api.PersistedEvent, undefined>> {
    this.#start();
    while (this.#state !== "ended") {
      if (this.#signal?.aborted) {
        this.#end();
        throw aborted(this.#signal);
      }
      const event = this.#batch[this.#position];
      if (event !== undefined) {
        this.#position += 1;
        return { done: false, value: event };
      }
      await this.#read();
    }
    return { done: true, value: undefined };
  }

  /** Not earlier: an iterator that nobody asks is then held by no signal. */
  #start(): void {
    if (this.#state === "new") {
      this.#state = "open";
      this.#signal?.addEventListener("abort", this.#wake);
    }
  }

  async #read(): Promise<void> {
    this.#batch = [];
    this.#position = 0;
    try {
      const batch = await new Promise<string | null | undefined>((resolve, reject) => {
        this.#interrupt = () => resolve("[]");
        call(this.#stream.next()).then((batch) => resolve(batch ?? null), reject);
      });
      if (batch === null || batch === undefined) {
        this.#end();
      } else {
        this.#batch = JSON.parse(batch);
      }
    } catch (error) {
      this.#end();
      throw error;
    } finally {
      this.#interrupt = undefined;
    }
  }

  #end(): void {
    this.#state = "ended";
    this.#batch = [];
    this.#signal?.removeEventListener("abort", this.#wake);
    this.#stream.close();
    this.#wake();
  }

  readonly #wake = (): void => this.#interrupt?.();
}
