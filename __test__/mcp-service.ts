/** `mcp-server.mjs` as a service on loopback: streamable HTTP without sessions and streams. */

import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { onTestFinished } from "vitest";
import { answer } from "./mcp-server.mjs";

export interface McpService {
  url: string;
  port: number;
  /** The `Authorization` of every message, as far as they differ. */
  authorizations: Set<string | undefined>;
}

export async function newMcpService(): Promise<McpService> {
  const authorizations = new Set<string | undefined>();
  const server = createServer(async (request, response) => {
    if (request.method !== "POST" || request.url !== "/mcp") {
      response.writeHead(request.url === "/mcp" ? 405 : 404).end();
      return;
    }
    authorizations.add(request.headers.authorization);
    let body = "";
    for await (const piece of request) body += piece;
    const reply = answer(JSON.parse(body));
    if (reply) {
      response.setHeader("content-type", "application/json").end(JSON.stringify(reply));
    } else {
      response.writeHead(202).end();
    }
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  onTestFinished(() => void server.close().closeAllConnections());
  const { port } = server.address() as AddressInfo;
  return { url: `http://127.0.0.1:${port}/mcp`, port, authorizations };
}
