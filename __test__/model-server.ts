/**
 * A model service on loopback whose every answer a test has written: Anthropic Messages, OpenAI
 * Chat Completions and OpenAI Responses, streamed as the real services do.
 *
 * It is our own because the tests turn on exact moments: hold a stream open until something else
 * has happened, cut it after the third chunk, put broken bytes there, know when the client hung up.
 * The ready-made mock servers (`@copilotkit/aimock` 1.43 was tried) offer pauses and probabilities.
 *
 * ```ts
 * await using server = await startModelServer({ script: [{ text: "Hello" }] });
 * const env = { ANTHROPIC_BASE_URL: server.url, ANTHROPIC_API_KEY: "test" };
 * // … let an agent answer a prompt …
 * server.requests[0]?.userText;
 * ```
 */

import { createServer, type IncomingMessage, type ServerResponse } from "node:http";
import { createServer as createTlsServer } from "node:https";
import type { AddressInfo } from "node:net";
import { setTimeout as sleep } from "node:timers/promises";
import { anthropicMessages } from "./model-server/anthropic-messages.js";
import { answerHousekeeping } from "./model-server/housekeeping.js";
import { openaiChat } from "./model-server/openai-chat.js";
import { openaiResponses } from "./model-server/openai-responses.js";
import { type ModelApi, type ModelRequest, type Reply, summarize } from "./model-server/reply.js";

export { quickstartScript } from "./model-server/quickstart-script.js";
export type { Message, ModelRequest, Reply, ToolCallReply } from "./model-server/reply.js";

/** Replies in the order of the requests, or a function that answers each request. */
export type Script = Reply[] | ((request: ModelRequest) => Reply | Promise<Reply>);

export interface ModelServerOptions {
  script: Script;
  /** Default: a free port. */
  port?: number;
  /** To be `https://localhost`. As PEM. */
  tls?: { key: string; cert: string };
}

export interface ModelServer {
  /** For `ANTHROPIC_BASE_URL`. `OPENAI_BASE_URL` ends in `/v1`: see {@link openaiUrl}. */
  url: string;
  openaiUrl: string;
  port: number;
  /** Every model request so far. */
  requests: ModelRequest[];
  /** Every request that the server has no answer to, as `METHOD path`. */
  unexpected: string[];
  /** The request of that index, as soon as it has arrived. */
  request(index: number): Promise<ModelRequest>;
  /** Ends open streams and frees the port. */
  close(): Promise<void>;
  [Symbol.asyncDispose](): Promise<void>;
}

const APIS: ModelApi[] = [anthropicMessages, openaiChat, openaiResponses];

export async function startModelServer(options: ModelServerOptions): Promise<ModelServer> {
  const requests: ModelRequest[] = [];
  const unexpected: string[] = [];
  const arrivals = new Set<() => void>();

  const handle = (incoming: IncomingMessage, response: ServerResponse) => {
    serve(incoming, response).catch((error: unknown) => {
      // A script that throws is a mistake in the test: tell the agent, which tells the test.
      if (!response.headersSent) response.writeHead(400, { "content-type": "text/plain" });
      response.end(`model server: ${error instanceof Error ? error.stack : String(error)}`);
    });
  };
  const server = options.tls ? createTlsServer(options.tls, handle) : createServer(handle);

  async function serve(incoming: IncomingMessage, response: ServerResponse): Promise<void> {
    const path = new URL(incoming.url ?? "/", "http://localhost").pathname;
    const text = await readBody(incoming);
    const api = incoming.method === "POST" && APIS.find((candidate) => candidate.path.test(path));
    if (!api) {
      const { method = "" } = incoming;
      if (answerHousekeeping(method, path, response)) return;
      unexpected.push(`${incoming.method} ${path}`);
      response.writeHead(404, { "content-type": "application/json" });
      response.end(JSON.stringify({ error: { type: "not_found_error", message: path } }));
      return;
    }

    const body: unknown = JSON.parse(text);
    const request: ModelRequest = {
      index: requests.length,
      api: api.name,
      path,
      headers: incoming.headers,
      body,
      ...summarize(api.read(body)),
      closed: new Promise((resolve) => {
        response.once("close", () => resolve(response.writableFinished ? "finished" : "aborted"));
      }),
    };
    requests.push(request);
    for (const arrived of arrivals) arrived();

    const reply = await replyTo(options.script, request);
    if (reply.error) {
      const { status, headers } = reply.error;
      response.writeHead(status, { "content-type": "application/json", ...headers });
      response.end(JSON.stringify(api.encodeError(reply.error)));
      return;
    }
    await stream(api, reply, request, response);
  }

  await new Promise<void>((resolve, reject) => {
    server.once("error", reject);
    server.listen(options.port ?? 0, "127.0.0.1", resolve);
  });
  const { port } = server.address() as AddressInfo;

  const close = (): Promise<void> =>
    new Promise((resolve) => {
      server.close(() => resolve());
      server.closeAllConnections();
    });

  const url = options.tls ? `https://localhost:${port}` : `http://127.0.0.1:${port}`;
  return {
    url,
    openaiUrl: `${url}/v1`,
    port,
    requests,
    unexpected,
    request: (index) =>
      new Promise((resolve) => {
        const check = () => {
          const request = requests[index];
          if (!request) return;
          arrivals.delete(check);
          resolve(request);
        };
        arrivals.add(check);
        check();
      }),
    close,
    [Symbol.asyncDispose]: close,
  };
}

async function replyTo(script: Script, request: ModelRequest): Promise<Reply> {
  if (typeof script === "function") return await script(request);
  const message = `The script has ${script.length} replies, this is request ${request.index + 1}`;
  // 400, so that no agent takes it for an overload and tries again.
  return script[request.index] ?? { error: { status: 400, type: "script_exhausted", message } };
}

async function stream(
  api: ModelApi,
  reply: Reply,
  request: ModelRequest,
  response: ServerResponse,
): Promise<void> {
  response.writeHead(200, {
    "content-type": "text/event-stream",
    "cache-control": "no-cache",
    "request-id": `req_${request.index}`,
  });
  response.flushHeaders();

  /** Does what the script says about this point of the stream; false ends the stream. */
  const reached = async (chunksSent: number): Promise<boolean> => {
    if (reply.hold?.afterChunks === chunksSent) {
      const { until } = reply.hold;
      await Promise.race([typeof until === "function" ? until() : until, request.closed]);
    }
    if (reply.dropConnection?.afterChunks === chunksSent) {
      response.destroy();
    } else if (reply.malformed?.afterChunks === chunksSent) {
      response.end(reply.malformed.data);
    }
    return !response.writableEnded && !response.destroyed;
  };

  let chunksSent = 0;
  if (!(await reached(chunksSent))) return;
  for (const frame of api.encode(reply, request)) {
    if (frame.chunk && reply.delayMs) await sleep(reply.delayMs);
    await new Promise((resolve) => response.write(frame.data, resolve));
    if (!frame.chunk) continue;
    chunksSent += 1;
    if (!(await reached(chunksSent))) return;
  }
  response.end();
}

async function readBody(incoming: IncomingMessage): Promise<string> {
  const pieces: Buffer[] = [];
  for await (const piece of incoming) pieces.push(piece as Buffer);
  return Buffer.concat(pieces).toString("utf8");
}
