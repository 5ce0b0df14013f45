/** One run of Amp's program. */

import { type ChildProcess, spawn } from "node:child_process";
import type { Readable } from "node:stream";
import { groupsBelow, killGroup } from "./process-tree.js";
import { within } from "./shared/deadline.js";
import { ErrorCode, RpcError } from "./shared/errors.js";
import { lines } from "./shared/protocol.js";
import { parseMessage, type StreamMessage } from "./stream.js";

/** How much of standard error is kept, to say why Amp has ended. */
const STDERR_BYTES = 4096;
/** What Amp may take to end after SIGTERM, in which it can tell its service, in milliseconds. */
const TERM_GRACE_MS = 1500;
/** How long output may follow the end of the process: what it started may hold the pipe open. */
const OUTPUT_GRACE_MS = 1000;

export interface RunOptions {
  cwd: string;
  env: NodeJS.ProcessEnv;
}

/** How a run has ended. */
export interface End {
  code: number | null;
  signal: NodeJS.Signals | null;
  /** The last words on standard error. */
  stderr: string;
}

export class AmpProcess {
  readonly #child: ChildProcess;
  readonly #stdout: Readable;
  readonly #exited: Promise<void>;
  readonly #ended: Promise<End>;
  #stderr = "";
  #hasExited = false;

  /** `input` is all that the program reads from its standard input. */
  constructor(program: string, args: string[], input: string, { cwd, env }: RunOptions) {
    // In a process group of its own, so that a signal reaches its helpers too.
    const child = spawn(program, args, { cwd, env, stdio: "pipe", detached: true });
    this.#child = child;
    this.#stdout = child.stdout;
    const failed = new Promise<never>((_, reject) => {
      child.once("error", (error) => reject(notStarted(program, error)));
    });
    const exited = new Promise<void>((resolve) => child.once("exit", () => resolve()));
    this.#exited = Promise.race([exited, failed]);
    const closed = new Promise<void>((resolve) => child.once("close", () => resolve()));
    this.#ended = Promise.race([
      closed.then(() => ({
        code: child.exitCode,
        signal: child.signalCode,
        stderr: this.#stderr.trim(),
      })),
      failed,
    ]);
    this.#exited.catch(() => {}); // told to whoever awaits the end
    this.#ended.catch(() => {});
    child.once("exit", () => {
      this.#hasExited = true;
      setTimeout(() => {
        child.stdout.destroy();
        child.stderr.destroy();
      }, OUTPUT_GRACE_MS).unref();
    });
    child.stderr.setEncoding("utf8").on("data", (text: string) => {
      this.#stderr = (this.#stderr + text).slice(-STDERR_BYTES);
    });
    child.stdin.on("error", () => {}); // it has ended early, which `ended` tells
    child.stdin.end(input);
  }

  /** Rejects if the program could not be started. */
  get ended(): Promise<End> {
    return this.#ended;
  }

  /** What it writes, as fast as it is taken. */
  async *messages(): AsyncGenerator<StreamMessage> {
    for await (const line of this.#lines()) {
      if (line === "too long") throw notAStream("a line is too long");
      const text = line.toString("utf8").trim();
      if (text === "") continue;
      const message = parseMessage(text);
      if (message === undefined) throw notAStream(text.slice(0, 200));
      yield message;
    }
  }

  async output(): Promise<string> {
    const chunks: Buffer[] = [];
    for await (const line of this.#lines()) {
      if (line === "too long") throw notAStream("a line is too long");
      chunks.push(line);
    }
    return Buffer.concat(chunks).toString("utf8");
  }

  /** Ends it with everything that runs below it. */
  async stop(): Promise<void> {
    const { pid } = this.#child;
    if (pid === undefined || this.#hasExited) return;
    const groups = groupsBelow(pid).add(pid);
    this.#child.kill("SIGTERM");
    await within(TERM_GRACE_MS, this.#exited);
    for (const group of groups) killGroup(group, "SIGKILL");
    await this.#exited;
  }

  async *#lines(): AsyncGenerator<Buffer | "too long"> {
    try {
      yield* lines(this.#stdout);
    } catch (error) {
      const { code } = error as NodeJS.ErrnoException;
      if (code !== "ERR_STREAM_PREMATURE_CLOSE") throw error; // after OUTPUT_GRACE_MS
    }
  }
}

function notStarted(program: string, error: Error): RpcError {
  return new RpcError(
    ErrorCode.internalError,
    `Amp's program can't be started: ${program}: ${error.message}`,
    { type: "amp_not_started" },
  );
}

function notAStream(line: string): RpcError {
  return new RpcError(
    ErrorCode.internalError,
    `Amp has written something that is no message of its JSON stream: ${line}`,
    { type: "amp_protocol" },
  );
}
