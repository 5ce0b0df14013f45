/** The stdio transport of MCP: a server as a child process. */

import { type ChildProcess, spawn } from "node:child_process";
import type { Readable, Writable } from "node:stream";
import {
  type JSONRPCMessage,
  parseJSONRPCMessage,
  type Transport,
} from "@modelcontextprotocol/client";
import { within } from "./shared/deadline.js";
import { describe } from "./shared/errors.js";
import { lines } from "./shared/protocol.js";

/** How much of standard error is kept, to say why a server has ended. */
const STDERR_BYTES = 4096;
/** What a server may take to end after its input has, and then after SIGTERM, in milliseconds. */
const CLOSE_GRACE_MS = 1000;
const TERM_GRACE_MS = 500;

export interface StdioOptions {
  command: string;
  args: string[];
  cwd: string;
  env: NodeJS.ProcessEnv;
}

/**
 * Our own, because the client library's signals only the process that it started: behind `npx` or a
 * shell the server itself would live on. Here each server has its own process group, all of which
 * ends when the session closes.
 */
export class StdioTransport implements Transport {
  onclose?: () => void;
  onerror?: (error: Error) => void;
  onmessage?: (message: JSONRPCMessage) => void;
  readonly #options: StdioOptions;
  #child: ChildProcess | undefined;
  #exited: Promise<void> = Promise.resolve();
  /** After the end of the process, and of its output. */
  #closed: Promise<void> = Promise.resolve();
  #stderr = "";
  #end: string | undefined;

  constructor(options: StdioOptions) {
    this.#options = options;
  }

  /** How the server has ended, with the last words that it wrote to standard error. */
  get end(): string | undefined {
    const words = this.#stderr.trim();
    return this.#end && words ? `${this.#end}: ${words}` : this.#end;
  }

  async start(): Promise<void> {
    const { command, args, cwd, env } = this.#options;
    const child = spawn(command, args, { cwd, env, stdio: "pipe", detached: true });
    this.#child = child;
    this.#exited = new Promise((resolve) => child.once("exit", () => resolve()));
    child.once("exit", (code, signal) => {
      this.#end = signal ? `killed by ${signal}` : `exited with code ${code}`;
      this.#kill("SIGKILL"); // what is left of its group, while the group can't be another's
    });
    this.#closed = new Promise((resolve) => child.once("close", () => resolve()));
    void this.#closed.then(() => this.onclose?.());
    child.stdin.on("error", () => {}); // told to whoever sends
    child.stderr.setEncoding("utf8").on("data", (text: string) => {
      this.#stderr = (this.#stderr + text).slice(-STDERR_BYTES);
    });
    await new Promise<void>((resolve, reject) => {
      child.once("spawn", resolve);
      child.once("error", (error: NodeJS.ErrnoException) => {
        reject(error.code === "ENOENT" ? new Error(`command not found: ${command}`) : error);
      });
    });
    void this.#read(child.stdout);
  }

  async send(message: JSONRPCMessage): Promise<void> {
    const stdin: Writable | null | undefined = this.#child?.stdin;
    if (!stdin?.writable) throw new Error(this.end ?? "not running");
    const failure = await new Promise<Error | null | undefined>((resolve) => {
      stdin.write(`${JSON.stringify(message)}\n`, resolve);
    });
    if (!failure) return;
    await within(CLOSE_GRACE_MS, this.#closed); // how it has ended says more than "broken pipe"
    throw failure;
  }

  /** Ends the server: its input, then SIGTERM, then SIGKILL. */
  async close(): Promise<void> {
    const child = this.#child;
    if (child?.pid === undefined) return;
    child.stdin?.end();
    if (!(await within(CLOSE_GRACE_MS, this.#exited))) this.#kill("SIGTERM");
    if (!(await within(TERM_GRACE_MS, this.#exited))) this.#kill("SIGKILL");
    await this.#exited;
  }

  #kill(signal: NodeJS.Signals): void {
    const pid = this.#child?.pid;
    if (pid === undefined) return;
    try {
      process.kill(-pid, signal);
    } catch {
      // nothing of the group is left
    }
  }

  async #read(stdout: Readable): Promise<void> {
    try {
      for await (const line of lines(stdout)) this.#receive(line);
    } catch (error) {
      this.onerror?.(error as Error);
    }
  }

  #receive(line: Buffer | "too long"): void {
    if (line === "too long") {
      this.onerror?.(new Error("a message is too long"));
      return;
    }
    try {
      this.onmessage?.(parseJSONRPCMessage(JSON.parse(line.toString("utf8"))));
    } catch (error) {
      // Servers print greetings and logs there, against the rules.
      this.onerror?.(new Error(`not a message of MCP: ${describe(error)}`));
    }
  }
}
