/** JSON-RPC 2.0, one message per line: framing, dispatch, and an output that can push back. */

import type { Readable, Writable } from "node:stream";
import { describe, ErrorCode, RpcError } from "./errors.js";

/** The longest line accepted. The host's own limit has the same default. */
const MAX_LINE_BYTES = 64 * 1024 * 1024;
const NEWLINE = 0x0a;

export type Handler = (params: unknown) => unknown;

export interface Handlers {
  requests: Record<string, Handler>;
  notifications: Record<string, Handler>;
}

type Id = string | number | null;

interface Pending {
  method: string;
  resolve: (result: unknown) => void;
  reject: (error: RpcError) => void;
}

export class Connection {
  readonly #output: Writable;
  #drained: Promise<void> | undefined;
  /** Requests of this side that the other one has not answered yet. */
  readonly #pending = new Map<Id, Pending>();
  #nextId = 1;
  #inputEnded = false;

  constructor(output: Writable) {
    this.#output = output;
  }

  notify(method: string, params: object): void {
    this.#send({ jsonrpc: "2.0", method, params });
  }

  /**
   * Asks the other side. Rejects with its error, with the signal's reason, or, when the input ends,
   * because no answer can come any more.
   */
  async request(method: string, params: object, signal?: AbortSignal): Promise<unknown> {
    signal?.throwIfAborted();
    if (this.#inputEnded) throw noAnswer(method);
    const id = this.#nextId++;
    const { promise, resolve, reject } = Promise.withResolvers<unknown>();
    const abort = () => reject(signal?.reason);
    signal?.addEventListener("abort", abort);
    this.#pending.set(id, { method, resolve, reject });
    this.#send({ jsonrpc: "2.0", id, method, params });
    try {
      return await promise;
    } finally {
      signal?.removeEventListener("abort", abort);
      this.#pending.delete(id);
    }
  }

  /** Resolves when the reader at the other end has caught up. Await it before producing more. */
  async drained(): Promise<void> {
    await this.#drained;
  }

  /** Resolves when everything sent so far has been written, or can't be any more. */
  async flush(): Promise<void> {
    if (this.#output.destroyed) return;
    await new Promise<void>((resolve) => this.#output.write("", () => resolve()));
  }

  /** Handles the messages of `input` until it ends. Requests run concurrently. */
  async serve(input: Readable, handlers: Handlers): Promise<void> {
    try {
      for await (const line of lines(input)) {
        if (line === "too long") {
          const message = `Line longer than ${MAX_LINE_BYTES} bytes`;
          this.#sendError(null, ErrorCode.invalidRequest, message);
        } else if (line.length > 0) {
          this.#receive(line, handlers);
        }
      }
    } finally {
      this.#inputEnded = true;
      for (const { method, reject } of this.#pending.values()) reject(noAnswer(method));
    }
  }

  #receive(line: Buffer, handlers: Handlers): void {
    let message: unknown;
    try {
      message = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(line));
    } catch (error) {
      this.#sendError(null, ErrorCode.parseError, `Parse error: ${describe(error)}`);
      return;
    }
    if (isResponse(message)) {
      this.#settle(message);
      return;
    }
    const request = asRequest(message);
    if (request === undefined) {
      this.#sendError(
        null,
        ErrorCode.invalidRequest,
        "Invalid request: not a JSON-RPC 2.0 message",
      );
      return;
    }
    const { id, method, params } = request;
    if (id === undefined) {
      const handler = own(handlers.notifications, method);
      if (handler) void this.#run(handler, params, method);
    } else {
      const handler = own(handlers.requests, method);
      if (handler) void this.#answer(handler, params, id);
      else this.#sendError(id, ErrorCode.methodNotFound, `Method not found: ${method}`);
    }
  }

  /** One that nobody waits for came late, after its signal, and is dropped. */
  #settle({ id, result, error }: Response): void {
    const pending = this.#pending.get(id);
    if (error === undefined || error === null) pending?.resolve(result);
    else pending?.reject(asRpcError(error));
  }

  async #run(handler: Handler, params: unknown, method: string): Promise<void> {
    try {
      await handler(params);
    } catch (error) {
      // JSON-RPC forbids an answer to a notification.
      process.stderr.write(`${method}: ${describe(error)}\n`);
    }
  }

  async #answer(handler: Handler, params: unknown, id: Id): Promise<void> {
    try {
      const result = (await handler(params)) ?? null;
      this.#send({ jsonrpc: "2.0", id, result });
    } catch (error) {
      if (error instanceof RpcError) {
        this.#sendError(id, error.code, error.message, error.data);
        return;
      }
      process.stderr.write(`${error instanceof Error ? error.stack : String(error)}\n`);
      this.#sendError(id, ErrorCode.internalError, describe(error));
    }
  }

  #sendError(id: Id, code: number, message: string, data?: object): void {
    this.#send({ jsonrpc: "2.0", id, error: { code, message, ...(data ? { data } : {}) } });
  }

  #send(message: object): void {
    if (this.#output.destroyed) return;
    if (this.#output.write(`${JSON.stringify(message)}\n`)) return;
    this.#drained ??= new Promise((resolve) => {
      const done = () => {
        this.#output.off("drain", done);
        this.#output.off("close", done);
        this.#drained = undefined;
        resolve();
      };
      this.#output.on("drain", done);
      this.#output.on("close", done);
    });
  }
}

function own(handlers: Record<string, Handler>, method: string): Handler | undefined {
  return Object.hasOwn(handlers, method) ? handlers[method] : undefined;
}

function noAnswer(method: string): RpcError {
  return new RpcError(ErrorCode.internalError, `${method}: the client has closed its end`);
}

interface Response {
  id: Id;
  result?: unknown;
  error?: unknown;
}

function isResponse(message: unknown): message is Response {
  if (typeof message !== "object" || message === null) return false;
  const { jsonrpc, method } = message as Record<string, unknown>;
  return jsonrpc === "2.0" && method === undefined && ("result" in message || "error" in message);
}

function asRpcError(error: unknown): RpcError {
  const { code, message, data } = (error ?? {}) as Record<string, unknown>;
  return new RpcError(
    typeof code === "number" ? code : ErrorCode.internalError,
    typeof message === "string" ? message : `The client answered ${JSON.stringify(error)}`,
    typeof data === "object" && data !== null ? { ...data } : undefined,
  );
}

function asRequest(
  message: unknown,
): { id: Id | undefined; method: string; params: unknown } | undefined {
  if (typeof message !== "object" || message === null || Array.isArray(message)) return undefined;
  const { jsonrpc, id, method, params } = message as Record<string, unknown>;
  if (jsonrpc !== "2.0" || typeof method !== "string") return undefined;
  if (id !== undefined && id !== null && typeof id !== "string" && typeof id !== "number") {
    return undefined;
  }
  return { id, method, params };
}

/** Splits bytes into lines. A line over the limit is dropped up to its end, and reported once. */
export async function* lines(input: Readable): AsyncGenerator<Buffer | "too long"> {
  let pending: Buffer[] = [];
  let size = 0;
  let skipping = false;

  for await (const read of input) {
    let rest: Buffer = typeof read === "string" ? Buffer.from(read) : read;
    for (let end = rest.indexOf(NEWLINE); end >= 0; end = rest.indexOf(NEWLINE)) {
      if (!skipping) yield Buffer.concat([...pending, rest.subarray(0, end)]);
      pending = [];
      size = 0;
      skipping = false;
      rest = rest.subarray(end + 1);
    }
    if (skipping || rest.length === 0) continue;
    pending.push(rest);
    size += rest.length;
    if (size > MAX_LINE_BYTES) {
      pending = [];
      size = 0;
      skipping = true;
      yield "too long";
    }
  }
  if (size > 0) yield Buffer.concat(pending);
}
