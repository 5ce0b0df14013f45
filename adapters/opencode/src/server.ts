/** OpenCode's HTTP server, which `opencode acp` has beside its standard streams. */

import { type IncomingMessage, request } from "node:http";
import { createServer } from "node:net";
import type { AgentInfo, Rule } from "./permissions.js";

const HOST = "127.0.0.1";

/** What is read of an event. */
export interface ServerEvent {
  type: string;
  // biome-ignore lint/suspicious/noExplicitAny: each type of event has its own
  properties: any;
}

/** The only events that are looked at. */
const TYPES = ["session.status", "session.created", "permission.asked"];

/** What is read of the error of an assistant's message. */
export interface MessageError {
  name: string;
  data?: { message?: string; statusCode?: number; providerID?: string };
}

/** What is read of a message. */
export interface Message {
  info: { id: string; role: string; providerID?: string; modelID?: string; error?: MessageError };
}

/** A port that nobody listens on at this moment. */
export async function freePort(): Promise<number> {
  const server = createServer();
  const port = await new Promise<number>((resolve, reject) => {
    server.once("error", reject);
    server.listen(0, HOST, () => {
      const address = server.address();
      resolve(typeof address === "object" && address !== null ? address.port : 0);
    });
  });
  await new Promise((resolve) => server.close(resolve));
  return port;
}

export class Server {
  constructor(
    readonly port: number,
    readonly password: string,
  ) {}

  /**
   * Resolves if it answers, and is ours. An error with a `code` means that it does not answer yet: it
   * forgets requests that come while it starts.
   */
  async health(signal: AbortSignal): Promise<void> {
    (await this.#send("GET", "/global/health", undefined, signal)).resume();
  }

  /** Hands on events until the stream ends. Its answer begins with the first event. */
  async events(on: (event: ServerEvent) => void): Promise<void> {
    const response = await this.#send("GET", "/global/event");
    let pending = "";
    response.setEncoding("utf8");
    for await (const piece of response) {
      const parts = (pending + piece).split("\n");
      pending = parts.pop() ?? "";
      for (const line of parts) {
        // Most are pieces of text, many a second: not worth parsing.
        if (!line.startsWith("data:") || !TYPES.some((type) => line.includes(type))) continue;
        const { payload } = JSON.parse(line.slice("data:".length)) as { payload?: ServerEvent };
        if (payload && TYPES.includes(payload.type)) on(payload);
      }
    }
  }

  async agents(directory: string): Promise<AgentInfo[]> {
    return (await this.#call("GET", "/agent", directory)) as AgentInfo[];
  }

  async mcpStatus(directory: string): Promise<Record<string, { status: string; error?: string }>> {
    return (await this.#call("GET", "/mcp", directory)) as never;
  }

  async parentOf(session: string, directory: string): Promise<string | undefined> {
    const found = await this.#call("GET", `/session/${session}`, directory);
    return (found as { parentID?: string }).parentID;
  }

  async lastMessage(session: string, directory: string): Promise<Message | undefined> {
    const path = `/session/${session}/message`;
    const messages = (await this.#call("GET", path, directory, undefined, "limit=1")) as Message[];
    return messages.at(-1);
  }

  async addRules(session: string, directory: string, permission: Rule[]): Promise<void> {
    await this.#call("PATCH", `/session/${session}`, directory, { permission });
  }

  async abort(session: string, directory: string): Promise<void> {
    await this.#call("POST", `/session/${session}/abort`, directory, {});
  }

  async answerPermission(id: string, directory: string, reply: string): Promise<void> {
    await this.#call("POST", `/permission/${id}/reply`, directory, { reply });
  }

  async #call(
    method: string,
    path: string,
    directory: string,
    body?: object,
    query?: string,
  ): Promise<unknown> {
    const where = `${path}?directory=${encodeURIComponent(directory)}${query ? `&${query}` : ""}`;
    const response = await this.#send(method, where, body);
    let text = "";
    response.setEncoding("utf8");
    for await (const piece of response) text += piece;
    return text === "" ? undefined : JSON.parse(text);
  }

  #send(
    method: string,
    path: string,
    body?: object,
    signal?: AbortSignal,
  ): Promise<IncomingMessage> {
    return new Promise((resolve, reject) => {
      const { port, password } = this;
      const headers = body ? { "content-type": "application/json" } : {};
      const auth = `opencode:${password}`;
      const options = { host: HOST, port, method, path, auth, headers, ...(signal && { signal }) };
      const sent = request(options, (response) => {
        const status = response.statusCode ?? 0;
        if (status >= 200 && status < 300) {
          resolve(response);
        } else {
          response.resume();
          reject(new Error(`${method} ${path}: OpenCode's server answered HTTP ${status}`));
        }
      });
      sent.on("error", reject);
      sent.end(body && JSON.stringify(body));
    });
  }
}
