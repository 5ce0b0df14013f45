import type * as Api from "../index";
import type { NativeFileRecords } from "./binding";
import { aborted, call } from "./errors";

/** Iterates over what a listing or a watch tells. Holds one batch. */
export class FileIterator<T> implements Api.FileIterator<T> {
  readonly #begin: (() => Promise<NativeFileRecords>) | undefined;
  readonly #parse: (batch: string) => T[];
  readonly #signal: AbortSignal | undefined;
  #records: NativeFileRecords | undefined;
  #batch: T[] = [];
  #position = 0;
  #started = false;
  #state: "open" | "aborted" | "ended" = "open";
  /** The answer before: those to calls that did not wait for each other come in their order. */
  #answered: Promise<unknown> = Promise.resolve();

  /** `begin`: how to begin when somebody asks; or what has begun, and keeps its VM awake until then. */
  constructor(
    begin: NativeFileRecords | (() => Promise<NativeFileRecords>),
    parse: (batch: string) => T[],
    signal: AbortSignal | undefined,
  ) {
    this.#parse = parse;
    this.#signal = signal;
    if (typeof begin === "function") {
      this.#begin = begin;
    } else {
      this.#records = begin;
      this.#start();
    }
  }

  next(): Promise<IteratorResult<T, undefined>> {
    const answer = this.#answered.then(() => this.#next());
    this.#answered = answer.catch(() => {}); // it is the caller's
    return answer;
  }

  return(): Promise<IteratorResult<T, undefined>> {
    this.close();
    return Promise.resolve({ done: true, value: undefined });
  }

  close(): void {
    this.#end("ended");
  }

  [Symbol.asyncIterator](): this {
    return this;
  }

  [Symbol.asyncDispose](): Promise<void> {
    this.close();
    return Promise.resolve();
  }

  /** Not earlier than it must: an iterator that nobody asks is then held by no signal. */
  #start(): void {
    if (!this.#started) {
      this.#started = true;
      this.#signal?.addEventListener("abort", this.#abort, { once: true });
    }
  }

  async #next(): Promise<IteratorResult<T, undefined>> {
    this.#start();
    if (this.#signal?.aborted) this.#abort();
    while (this.#state === "open") {
      if (this.#position < this.#batch.length) {
        const value = this.#batch[this.#position] as T;
        this.#position += 1;
        return { done: false, value };
      }
      await this.#read();
    }
    if (this.#state === "aborted" && this.#signal) {
      this.#state = "ended";
      throw aborted(this.#signal);
    }
    return { done: true, value: undefined };
  }

  async #read(): Promise<void> {
    this.#batch = [];
    this.#position = 0;
    try {
      this.#records ??= await this.#begin?.();
      // It may have been ended while it began.
      if (this.#state !== "open") this.#records?.close();
      const batch = await call(this.#records?.next() ?? Promise.resolve(null));
      if (batch === null || batch === undefined) {
        this.#end("ended");
      } else {
        this.#batch = this.#parse(batch);
      }
    } catch (error) {
      if (this.#state === "open") {
        this.#end("ended");
        throw error;
      }
    }
  }

  /** Whoever is first says what it has come to. */
  #end(state: "aborted" | "ended"): void {
    if (this.#state === "open") this.#state = state;
    this.#batch = [];
    this.#position = 0;
    this.#signal?.removeEventListener("abort", this.#abort);
    // What is under way resolves to nothing.
    this.#records?.close();
  }

  readonly #abort = (): void => this.#end("aborted");
}
