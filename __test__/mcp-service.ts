/** `mcp-server.mjs` as a service on loopback. */

import {
  createServer,
  type IncomingMessage,
  type RequestListener,
  type ServerResponse,
} from "node:http";
import type { AddressInfo } from "node:net";
import { onTestFinished } from "vitest";
import { answer } from "./mcp-server.mjs";

export interface McpService {
  url: string;
  port: number;
  /** The `Authorization` of every message, as far as they differ. */
  authorizations: Set<string | undefined>;
}

/** Streamable HTTP, without sessions and streams. */
export async function newMcpService(): Promise<McpService> {
  const authorizations = new Set<string | undefined>();
  const port = await listen(async (request, response) => {
    if (request.method !== "POST" || request.url !== "/mcp") {
      response.writeHead(request.url === "/mcp" ? 405 : 404).end();
      return;
    }
    authorizations.add(request.headers.authorization);
    const reply = answer(await messageIn(request));
    if (reply) {
      response.setHeader("content-type", "application/json").end(JSON.stringify(reply));
    } else {
      response.writeHead(202).end();
    }
  });
  return { url: `http://127.0.0.1:${port}/mcp`, port, authorizations };
}

/** HTTP with SSE, as the protocol had it until 2025: answers come on a stream that the client opens first. */
export async function newSseMcpService(): Promise<McpService> {
  const authorizations = new Set<string | undefined>();
  const streams = new Map<string, ServerResponse>();
  const port = await listen(async (request, response) => {
    const { pathname, search } = new URL(request.url ?? "/", "http://localhost");
    if (request.method === "GET" && pathname === "/sse") {
      authorizations.add(request.headers.authorization);
      const id = `?stream=${streams.size}`;
      streams.set(id, response);
      response.writeHead(200, { "content-type": "text/event-stream" });
      response.write(`event: endpoint\ndata: /messages${id}\n\n`);
    } else if (request.method === "POST" && pathname === "/messages") {
      authorizations.add(request.headers.authorization);
      const reply = answer(await messageIn(request));
      response.writeHead(202).end();
      if (reply) streams.get(search)?.write(`event: message\ndata: ${JSON.stringify(reply)}\n\n`);
    } else {
      response.writeHead(pathname === "/sse" ? 405 : 404).end();
    }
  });
  return { url: `http://127.0.0.1:${port}/sse`, port, authorizations };
}

async function listen(serve: RequestListener): Promise<number> {
  const server = createServer(serve);
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  onTestFinished(() => void server.close().closeAllConnections());
  return (server.address() as AddressInfo).port;
}

async function messageIn(request: IncomingMessage) {
  let body = "";
  for await (const piece of request) body += piece;
  return JSON.parse(body);
}
