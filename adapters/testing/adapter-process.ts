/** A compiled adapter as a client sees it: a process that speaks JSON-RPC lines. */

import { type ChildProcess, spawn } from "node:child_process";
import { readFileSync } from "node:fs";
import { rm } from "node:fs/promises";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { fileURLToPath } from "node:url";

const ROOT = fileURLToPath(new URL("..", import.meta.url));
export const NODE = join(ROOT, `node_modules/node-linux-${process.arch}/bin/node`);

// biome-ignore-start lint/suspicious/noExplicitAny: tests look into messages of any shape
export interface RpcMessage {
  id?: number | string | null;
  method?: string;
  params?: any;
  result?: any;
  error?: { code: number; message: string; data?: any };
}

export interface AdapterOptions {
  env?: Record<string, string | undefined>;
  /** Directory of the adapter below `adapters/`. */
  adapter: string;
  /** Reuse a home directory, as after a restart. Default: a fresh one, removed at the end. */
  home?: string;
}

export class AdapterProcess implements AsyncDisposable {
  readonly home: string;
  readonly child: ChildProcess;
  /** Every line of standard output. */
  readonly lines: string[] = [];
  stderr = "";
  readonly exited: Promise<{ code: number | null; signal: string | null }>;
  readonly #ownsHome: boolean;
  readonly #waiting = new Set<() => void>();
  #nextId = 1;

  protected constructor(home: string, options: AdapterOptions) {
    this.home = home;
    this.#ownsHome = options.home === undefined;
    const env: Record<string, string | undefined> = {
      PATH: process.env.PATH,
      HOME: home,
      NODE_COMPILE_CACHE: join(ROOT, "node_modules/.cache/compile"),
      ...options.env,
    };
    this.child = spawn(NODE, [join(ROOT, options.adapter, "dist/main.js")], {
      cwd: home,
      env,
      stdio: "pipe",
    });
    this.child.stderr?.setEncoding("utf8").on("data", (text: string) => {
      this.stderr += text;
    });
    if (this.child.stdout) {
      createInterface({ input: this.child.stdout }).on("line", (line) => {
        this.lines.push(line);
        for (const check of this.#waiting) check();
      });
    }
    this.exited = new Promise((resolve) => {
      this.child.once("close", (code, signal) => resolve({ code, signal }));
    });
    void this.exited.then(() => {
      for (const check of this.#waiting) check();
    });
  }

  get messages(): RpcMessage[] {
    return this.lines.map((line) => JSON.parse(line));
  }

  get updates(): any[] {
    return this.messages
      .filter((message) => message.method === "session/update")
      .map((message) => message.params.update);
  }

  updatesOf(kind: string): any[] {
    return this.updates.filter((update) => update.sessionUpdate === kind);
  }

  textOf(kind: string): string {
    return this.updatesOf(kind)
      .map((update) => update.content.text)
      .join("");
  }

  write(text: string): void {
    this.child.stdin?.write(text);
  }

  send(message: object): void {
    this.write(`${JSON.stringify({ jsonrpc: "2.0", ...message })}\n`);
  }

  async call(method: string, params: object = {}): Promise<RpcMessage> {
    const id = this.#nextId++;
    this.send({ id, method, params });
    return await this.message((message) => message.id === id && message.method === undefined);
  }

  /** The result of a call that is expected to succeed. */
  async request(method: string, params: object = {}): Promise<any> {
    const { result, error } = await this.call(method, params);
    if (error) throw new Error(`${method}: ${JSON.stringify(error)}\n${this.stderr}`);
    return result;
  }

  async newSession(settings: object = {}): Promise<string> {
    const params = { cwd: this.home, mcpServers: [], ...settings };
    const { sessionId } = await this.request("session/new", params);
    return sessionId;
  }

  prompt(sessionId: string, text: string): Promise<RpcMessage> {
    return this.call("session/prompt", { sessionId, prompt: [{ type: "text", text }] });
  }

  /** The first message, past or coming, for which `test` holds. */
  async message(test: (message: RpcMessage) => boolean): Promise<RpcMessage> {
    let checked = 0;
    return await new Promise((resolve, reject) => {
      const check = () => {
        while (checked < this.lines.length) {
          const message: RpcMessage = JSON.parse(this.lines[checked++] as string);
          if (!test(message)) continue;
          this.#waiting.delete(check);
          resolve(message);
          return;
        }
        if (this.child.exitCode !== null || this.child.signalCode !== null) {
          this.#waiting.delete(check);
          reject(new Error(`The adapter has ended (${this.child.exitCode}): ${this.stderr}`));
        }
      };
      this.#waiting.add(check);
      check();
    });
  }

  async update(test: (update: any) => boolean): Promise<any> {
    const found = await this.message(
      ({ method, params }) => method === "session/update" && test(params.update),
    );
    return found.params.update;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.child.stdin?.end();
    await this.exited;
    if (this.#ownsHome) await rm(this.home, { recursive: true, force: true });
  }
}
// biome-ignore-end lint/suspicious/noExplicitAny: see above

/** A killed process may stay as a zombie until its new parent has asked for its exit code. */
export function isAlive(pid: number): boolean {
  try {
    return !/\) Z /.test(readFileSync(`/proc/${pid}/stat`, "utf8"));
  } catch {
    return false;
  }
}

/** A promise to resolve by hand. */
export function gate(): { opened: Promise<void>; open(): void } {
  let open = () => {};
  const opened = new Promise<void>((resolve) => {
    open = resolve;
  });
  return { opened, open };
}
