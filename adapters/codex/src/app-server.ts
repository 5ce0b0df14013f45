/** `codex app-server` as a child process: JSON-RPC without the version, one message per line. */

import { type ChildProcess, spawn } from "node:child_process";
import { describe, ErrorCode, RpcError } from "./shared/errors.js";
import { lines } from "./shared/protocol.js";

export interface AppServerOptions {
  program: string;
  args: string[];
  env: NodeJS.ProcessEnv;
  /** What it tells, in order: nothing more is read before this has resolved. */
  onNotification: (method: string, params: unknown) => Promise<void>;
  /** What it asks; requests are answered concurrently. */
  onRequest: (method: string, params: unknown) => Promise<unknown>;
}

interface Pending {
  resolve: (result: unknown) => void;
  reject: (error: RpcError) => void;
}

type Fields = Record<string, unknown>;

/** Its end ends whoever uses it: what it has not answered then stays without an answer. */
export class AppServer {
  /** Resolves with a description of its end, when everything that it has said is handled. */
  readonly ended: Promise<string>;
  readonly #child: ChildProcess;
  readonly #options: AppServerOptions;
  readonly #pending = new Map<unknown, Pending>();
  #nextId = 1;

  constructor(options: AppServerOptions) {
    const { program, args, env } = options;
    this.#options = options;
    // In this process's session, so that whoever ends that ends both. What it has to say about itself
    // goes where this process's own words go.
    this.#child = spawn(program, ["app-server", ...args], {
      env,
      stdio: ["pipe", "pipe", "inherit"],
    });
    const exited = new Promise<string>((resolve) => {
      this.#child.once("error", (error) => resolve(`can't run ${program}: ${error.message}`));
      this.#child.once("exit", (code, signal) =>
        resolve(signal ? `Codex was killed by ${signal}` : `Codex exited with code ${code}`),
      );
    });
    // A write after its end fails here: that it has ended is known by then.
    this.#child.stdin?.on("error", () => {});
    const read = this.#read();
    this.ended = exited.then(async (end) => {
      await read;
      return end;
    });
  }

  async request<Result>(method: string, params: object): Promise<Result> {
    const id = this.#nextId++;
    const { promise, resolve, reject } = Promise.withResolvers<unknown>();
    this.#pending.set(id, { resolve, reject });
    this.#send({ id, method, params });
    return (await promise.finally(() => this.#pending.delete(id))) as Result;
  }

  notify(method: string): void {
    this.#send({ method });
  }

  /** It ends, with what runs in it, when nobody talks to it any more. */
  async close(): Promise<void> {
    this.#child.stdin?.end();
    await this.ended;
  }

  #send(message: object): void {
    this.#child.stdin?.write(`${JSON.stringify(message)}\n`);
  }

  async #read(): Promise<void> {
    const { stdout } = this.#child;
    if (!stdout) return;
    for await (const line of lines(stdout)) {
      if (line === "too long") process.stderr.write("Codex: a line that is too long is dropped\n");
      else if (line.length > 0) await this.#receive(line);
    }
  }

  async #receive(line: Buffer): Promise<void> {
    let message: Fields;
    try {
      message = JSON.parse(line.toString("utf8"));
    } catch (error) {
      process.stderr.write(`Codex: a line that is no JSON: ${describe(error)}\n`);
      return;
    }
    const { id, method, params } = message;
    if (typeof method !== "string") this.#settle(message);
    else if (id !== undefined) void this.#answer(id, method, params);
    else await this.#options.onNotification(method, params);
  }

  #settle({ id, result, error }: Fields): void {
    const pending = this.#pending.get(id);
    if (error === undefined) {
      pending?.resolve(result);
      return;
    }
    const { code, message } = error as { code: number; message: string };
    pending?.reject(new RpcError(code, message));
  }

  async #answer(id: unknown, method: string, params: unknown): Promise<void> {
    try {
      this.#send({ id, result: await this.#options.onRequest(method, params) });
    } catch (error) {
      const code = error instanceof RpcError ? error.code : ErrorCode.internalError;
      this.#send({ id, error: { code, message: describe(error) } });
    }
  }
}
