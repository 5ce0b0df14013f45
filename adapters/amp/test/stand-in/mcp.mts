/** A client of the Model Context Protocol: tools over stdio, HTTP without sessions, or SSE. */

import { type ChildProcess, spawn } from "node:child_process";
import { createInterface } from "node:readline";
import type { Tool } from "./tools.mts";

interface Config {
  command?: string;
  args?: string[];
  env?: Record<string, string>;
  url?: string;
  headers?: Record<string, string>;
  transport?: string;
}

// biome-ignore-start lint/suspicious/noExplicitAny: results of many shapes
type Call = (method: string, params: object) => Promise<any>;
// biome-ignore-end lint/suspicious/noExplicitAny: see above

const INITIALIZE = {
  protocolVersion: "2025-06-18",
  capabilities: {},
  clientInfo: { name: "amp-stand-in", version: "1" },
};

export class McpServers {
  readonly tools: Tool[] = [];
  readonly states: { name: string; status: string }[] = [];
  readonly #children: ChildProcess[] = [];

  static async connect(configs: Record<string, unknown>): Promise<McpServers> {
    const servers = new McpServers();
    for (const [name, config] of Object.entries(configs)) {
      try {
        await servers.#add(name, config as Config);
        servers.states.push({ name, status: "connected" });
      } catch {
        servers.states.push({ name, status: "failed" });
      }
    }
    return servers;
  }

  close(): void {
    for (const child of this.#children) child.kill();
  }

  async #add(server: string, config: Config): Promise<void> {
    const call = config.url === undefined ? await this.#stdio(config) : await remote(config);
    await call("initialize", INITIALIZE);
    await call("notifications/initialized", {});
    const { tools } = await call("tools/list", {});
    for (const { name, description = "", inputSchema } of tools) {
      this.tools.push({
        name: `mcp__${word(server)}__${word(name)}`,
        description,
        inputSchema,
        execute: async (input) => {
          const { content, isError } = await call("tools/call", { name, arguments: input });
          const text = content.map((part: { text?: string }) => part.text ?? "").join("");
          if (isError) throw new Error(text);
          return text;
        },
      });
    }
  }

  async #stdio({ command = "", args = [], env }: Config): Promise<Call> {
    const child = spawn(command, args, {
      env: { ...process.env, ...env },
      stdio: ["pipe", "pipe", "ignore"],
    });
    this.#children.push(child);
    await new Promise((resolve, reject) => child.once("spawn", resolve).once("error", reject));
    const answers = new Answers();
    createInterface({ input: child.stdout }).on("line", (line) => answers.take(line));
    child.once("exit", () => answers.end());
    return answers.caller((message) => void child.stdin.write(`${message}\n`));
  }
}

/** Of a transport whose answers come on a stream. */
class Answers {
  readonly #waiting = new Map<number, PromiseWithResolvers<unknown>>();
  #nextId = 1;

  caller(send: (message: string) => void | Promise<void>): Call {
    return async (method, params) => {
      const isRequest = !method.startsWith("notifications/");
      const id = isRequest ? { id: this.#nextId++ } : {};
      const answer = Promise.withResolvers<unknown>();
      if (id.id !== undefined) this.#waiting.set(id.id, answer);
      await send(JSON.stringify({ jsonrpc: "2.0", ...id, method, params }));
      return isRequest ? await answer.promise : undefined;
    };
  }

  take(text: string): void {
    const { id, result, error } = JSON.parse(text);
    if (error) this.#waiting.get(id)?.reject(new Error(error.message));
    else this.#waiting.get(id)?.resolve(result);
  }

  end(): void {
    for (const { reject } of this.#waiting.values()) reject(new Error("the server has ended"));
  }
}

/** Streamable HTTP, or the older SSE where the server does not know it. */
async function remote(config: Config): Promise<Call> {
  if (config.transport !== "sse") {
    const call = http(config);
    try {
      await call("initialize", INITIALIZE);
      return call;
    } catch (error) {
      if (!/^HTTP 40[045]$/.test((error as Error).message)) throw error;
    }
  }
  return await sse(config);
}

async function sse({ url = "", headers = {} }: Config): Promise<Call> {
  const answers = new Answers();
  const response = await fetch(url, { headers: { accept: "text/event-stream", ...headers } });
  if (!response.ok || response.body === null) throw new Error(`HTTP ${response.status}`);
  const endpoint = Promise.withResolvers<URL>();
  const follow = async (body: ReadableStream<Uint8Array>) => {
    let pending = "";
    for await (const piece of body.pipeThrough(new TextDecoderStream())) {
      const frames = (pending + piece).split("\n\n");
      pending = frames.pop() ?? "";
      for (const frame of frames) {
        const data = /^data: (.*)$/m.exec(frame)?.[1] ?? "";
        if (/^event: endpoint$/m.test(frame)) endpoint.resolve(new URL(data, url));
        else answers.take(data);
      }
    }
  };
  follow(response.body)
    .catch(() => {})
    .finally(() => answers.end());
  const address = await endpoint.promise;
  return answers.caller(async (body) => {
    const type = { "content-type": "application/json" };
    await fetch(address, { method: "POST", headers: { ...type, ...headers }, body });
  });
}

function http({ url = "", headers = {} }: Config): Call {
  let nextId = 1;
  return async (method, params) => {
    const id = method.startsWith("notifications/") ? {} : { id: nextId++ };
    const response = await fetch(url, {
      method: "POST",
      headers: {
        "content-type": "application/json",
        accept: "application/json, text/event-stream",
        ...headers,
      },
      body: JSON.stringify({ jsonrpc: "2.0", ...id, method, params }),
    });
    if (!response.ok) throw new Error(`HTTP ${response.status}`);
    if (id.id === undefined) return undefined;
    const text = await response.text();
    const data = /^data: (.*)$/m.exec(text)?.[1] ?? text;
    const { result, error } = JSON.parse(data);
    if (error) throw new Error(error.message);
    return result;
  };
}

/** As Amp writes names. */
function word(name: string): string {
  return name.replace(/[^\w]/g, "_");
}
