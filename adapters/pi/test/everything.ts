/** The reference server of MCP, on each of its transports. */

import { spawn } from "node:child_process";
import { on, once } from "node:events";
import { createServer, type IncomingHttpHeaders, request } from "node:http";
import { type AddressInfo, createServer as createTcpServer } from "node:net";
import { createInterface } from "node:readline";
import { fileURLToPath } from "node:url";
import { NODE } from "./adapter.js";

const MAIN = fileURLToPath(
  new URL(
    "../../node_modules/@modelcontextprotocol/server-everything/dist/index.js",
    import.meta.url,
  ),
);

/** For `mcpServers`: as a child process. */
export const everythingStdio = {
  name: "everything",
  command: NODE,
  args: [MAIN, "stdio"],
  env: [],
};

interface Received {
  method: string;
  headers: IncomingHttpHeaders;
  body: string;
}

/** The server as one on the network, behind a proxy that sees what it gets. */
export class RemoteEverything implements AsyncDisposable {
  readonly received: Received[] = [];
  readonly #close: () => Promise<void>;
  readonly #url: string;
  readonly #type: "http" | "sse";

  private constructor(type: "http" | "sse", port: number, close: () => Promise<void>) {
    this.#type = type;
    this.#url = `http://127.0.0.1:${port}${type === "http" ? "/mcp" : "/sse"}`;
    this.#close = close;
  }

  static async start(type: "http" | "sse"): Promise<RemoteEverything> {
    const port = await freePort();
    const child = spawn(NODE, [MAIN, type === "http" ? "streamableHttp" : "sse"], {
      env: { ...process.env, PORT: String(port) },
      stdio: ["ignore", "ignore", "pipe"],
    });
    const lines = createInterface({ input: child.stderr });
    for await (const [line] of on(lines, "line")) {
      if (/on port \d+/.test(line)) break;
    }
    lines.on("line", () => {});

    const proxy = createServer((incoming, response) => {
      const { method = "", url = "", headers } = incoming;
      const seen = { method, headers, body: "" };
      server.received.push(seen);
      const outgoing = request(
        { port, host: "127.0.0.1", method, path: url, headers },
        (answer) => {
          response.writeHead(answer.statusCode ?? 502, answer.headers);
          answer.pipe(response);
        },
      );
      outgoing.on("error", () => response.destroy());
      response.on("close", () => outgoing.destroy());
      incoming.on("data", (data) => {
        seen.body += data;
      });
      incoming.pipe(outgoing);
    });
    proxy.listen(0, "127.0.0.1");
    await once(proxy, "listening");
    const server = new RemoteEverything(type, (proxy.address() as AddressInfo).port, async () => {
      proxy.closeAllConnections();
      proxy.close();
      child.kill("SIGKILL");
      await once(child, "exit");
    });
    return server;
  }

  /** For `mcpServers`. */
  settings(headers: { name: string; value: string }[] = []): object {
    return { type: this.#type, name: "everything", url: this.#url, headers };
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#close();
  }
}

async function freePort(): Promise<number> {
  const server = createTcpServer().listen(0, "127.0.0.1");
  await once(server, "listening");
  const { port } = server.address() as AddressInfo;
  server.close();
  await once(server, "close");
  return port;
}
