/** A client of the Model Context Protocol: tools over stdio, or streamable HTTP without sessions. */

import { type ChildProcess, spawn } from "node:child_process";
import { createInterface } from "node:readline";
import type { Tool } from "./tools.mts";

interface Config {
  command?: string;
  args?: string[];
  env?: Record<string, string>;
  url?: string;
  headers?: Record<string, string>;
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
    const call = config.url === undefined ? await this.#stdio(config) : http(config);
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
    const waiting = new Map<number, PromiseWithResolvers<unknown>>();
    createInterface({ input: child.stdout }).on("line", (line) => {
      const { id, result, error } = JSON.parse(line);
      if (error) waiting.get(id)?.reject(new Error(error.message));
      else waiting.get(id)?.resolve(result);
    });
    child.once("exit", () => {
      for (const { reject } of waiting.values()) reject(new Error("the server has ended"));
    });
    let nextId = 1;
    return async (method, params) => {
      const isRequest = !method.startsWith("notifications/");
      const id = isRequest ? { id: nextId++ } : {};
      const answer = Promise.withResolvers<unknown>();
      if (id.id !== undefined) waiting.set(id.id, answer);
      child.stdin.write(`${JSON.stringify({ jsonrpc: "2.0", ...id, method, params })}\n`);
      return isRequest ? await answer.promise : undefined;
    };
  }
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
