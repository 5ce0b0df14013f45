/**
 * The MCP servers of a session, and their tools as Pi's. Import this only when a session has servers:
 * the client library takes longer to load than the rest of the adapter.
 */

import type { ExtensionAPI, ToolDefinition } from "@earendil-works/pi-coding-agent";
import {
  Client,
  type JsonSchemaValidatorResult,
  type jsonSchemaValidator,
  SdkHttpError,
  SSEClientTransport,
  StreamableHTTPClientTransport,
  type Tool,
  type Transport,
} from "@modelcontextprotocol/client";
import { StdioTransport } from "./mcp-stdio.js";
import { toolName, toolParameters, toPiResult } from "./mcp-tools.js";
import { within } from "./shared/deadline.js";
import { describe, ErrorCode, RpcError } from "./shared/errors.js";
import type { McpServer } from "./shared/settings.js";

/** A tool may take as long as it needs: the turn can be cancelled. The longest timer of Node. */
const NO_TIMEOUT_MS = 2 ** 31 - 1;

/** How long the end of a session waits for a remote server to hear of it. */
const GOODBYE_MS = 1000;

/** Results go to a model, which takes what it gets. */
const UNCHECKED: jsonSchemaValidator = { getValidator: () => unchecked };

function unchecked<T>(input: unknown): JsonSchemaValidatorResult<T> {
  return { valid: true, data: input as T, errorMessage: undefined };
}

export interface McpOptions {
  cwd: string;
  env: NodeJS.ProcessEnv;
  /** How long a server may take to start and to list its tools, in milliseconds. */
  timeoutMs: number;
}

interface Connected {
  name: string;
  client: Client;
  transport: Transport;
  tools: Tool[];
}

export class McpServers {
  readonly #servers: Connected[] = [];
  /** Server and tool by the tool's name for the model. */
  readonly #origins = new Map<string, string>();
  #pi: ExtensionAPI | undefined;
  #closed = false;

  private constructor() {}

  /** Connects to all servers at once. If one fails, the others are closed and the error names it. */
  static async connect(servers: McpServer[], options: McpOptions): Promise<McpServers> {
    const all = new McpServers();
    for (const server of servers) all.#servers.push(all.#prepare(server, options));
    try {
      await Promise.all(servers.map((server, index) => all.#connect(server, index, options)));
      return all;
    } catch (error) {
      await all.close();
      throw error;
    }
  }

  /** As an extension of Pi, which calls this whenever it loads its extensions. */
  register(pi: ExtensionAPI): void {
    this.#pi = pi;
    for (const tool of this.#definitions()) pi.registerTool(tool);
  }

  /** Ends the connections, and the servers that are child processes. */
  async close(): Promise<void> {
    this.#closed = true;
    await Promise.all(this.#servers.map(closeServer));
  }

  async #connect(server: McpServer, index: number, options: McpOptions): Promise<void> {
    const first = this.#servers[index] as Connected;
    try {
      await ready(first, options.timeoutMs);
    } catch (error) {
      if (server.type !== "http" || !server.guessed || !isUnknownTransport(error)) {
        throw unusable(server, first, error);
      }
      await closeServer(first);
      const older = this.#prepare({ ...server, type: "sse" }, options);
      this.#servers[index] = older;
      try {
        await ready(older, options.timeoutMs);
      } catch (later) {
        const both = new Error(
          `over streamable HTTP: ${reasonOf(error, first.transport)}; over SSE: ${reasonOf(later, older.transport)}`,
        );
        throw unusable(server, older, both);
      }
    }
  }

  #prepare(server: McpServer, options: McpOptions): Connected {
    const client = new Client(
      { name: "agentvm", version: "1" },
      {
        jsonSchemaValidator: UNCHECKED,
        listChanged: {
          tools: { onChanged: (error, tools) => this.#toolsChanged(connected, error, tools) },
        },
      },
    );
    const transport = transportOf(server, options);
    const connected: Connected = { name: server.name, client, transport, tools: [] };
    return connected;
  }

  /**
   * What is the same for the same tool only: its name for the model may be that of another tool once a
   * server has others. Undefined if the name is of no server's tool.
   */
  originOf(name: string): string | undefined {
    return this.#origins.get(name);
  }

  #toolsChanged(server: Connected, error: Error | null, tools: Tool[] | null): void {
    if (this.#closed) return;
    if (error || !tools) {
      process.stderr.write(`MCP server ${server.name}: tools/list: ${describe(error)}\n`);
      return;
    }
    const before = new Set(this.#definitions().map(({ name }) => name));
    server.tools = tools;
    const definitions = this.#definitions();
    const names = definitions.map(({ name }) => name);
    try {
      // The model is told with its next request.
      for (const tool of definitions) this.#pi?.registerTool(tool);
      const others = this.#pi?.getActiveTools().filter((name) => !before.has(name)) ?? [];
      this.#pi?.setActiveTools([...new Set([...others, ...names])]);
    } catch (failed) {
      // Pi is loading its extensions anew, and then asks for the tools again.
      process.stderr.write(`MCP server ${server.name}: ${describe(failed)}\n`);
    }
  }

  #definitions(): ToolDefinition[] {
    const taken = new Set<string>();
    return this.#servers.flatMap((server) =>
      server.tools.map((tool) => {
        const name = toolName(server.name, tool.name, taken);
        taken.add(name);
        this.#origins.set(name, JSON.stringify([server.name, tool.name]));
        return definition(name, server, tool);
      }),
    );
  }
}

function transportOf(server: McpServer, { cwd, env }: McpOptions): Transport {
  if (server.type === "stdio") {
    const { command, args } = server;
    return new StdioTransport({ command, args, cwd, env: { ...env, ...server.env } });
  }
  const url = new URL(server.url);
  const options = { requestInit: { headers: server.headers } };
  return server.type === "http"
    ? (new StreamableHTTPClientTransport(url, options) as Transport)
    : new SSEClientTransport(url, options);
}

async function ready(connected: Connected, timeoutMs: number): Promise<void> {
  const { client, transport } = connected;
  const listed = async () => {
    await client.connect(transport, { timeout: NO_TIMEOUT_MS });
    connected.tools = (await client.listTools(undefined, { timeout: NO_TIMEOUT_MS })).tools;
  };
  if (!(await within(timeoutMs, listed()))) {
    throw new Error(`not ready after ${timeoutMs} ms (AGENTVM_MCP_TIMEOUT_MS)`);
  }
}

/** What MCP names as the signs of a server from before streamable HTTP. */
function isUnknownTransport(error: unknown): boolean {
  for (let at = error; at instanceof Error; at = at.cause) {
    if (at instanceof SdkHttpError) return [400, 404, 405].includes(at.status ?? 0);
  }
  return false;
}

function unusable(server: McpServer, { transport }: Connected, error: unknown): RpcError {
  const reason = reasonOf(error, transport);
  return new RpcError(
    ErrorCode.internalError,
    `MCP server "${server.name}" (${placeOf(server)}) can't be used: ${reason}`,
    { type: "mcp_server_failed", server: server.name, transport: server.type, reason },
  );
}

/** Without arguments and query, which may hold secrets. */
function placeOf(server: McpServer): string {
  if (server.type === "stdio") return server.command;
  const { origin, pathname } = new URL(server.url);
  return `${origin}${pathname}`;
}

/** A child's last words, else the error with its causes: `fetch` says why only there. */
function reasonOf(error: unknown, transport: Transport): string {
  if (transport instanceof StdioTransport && transport.end !== undefined) return transport.end;
  const reasons: string[] = [];
  for (let at = error; at instanceof Error; at = at.cause) {
    const status = at instanceof SdkHttpError ? `HTTP ${at.status}: ` : "";
    const reason = status + (at.message || (at as NodeJS.ErrnoException).code || at.name);
    if (!reasons.includes(reason)) reasons.push(reason);
  }
  return reasons.join(": ") || String(error);
}

async function closeServer({ client, transport }: Connected): Promise<void> {
  try {
    if (transport instanceof StreamableHTTPClientTransport) {
      await within(GOODBYE_MS, transport.terminateSession());
    }
  } catch {
    // Gone, or it keeps no sessions: there is nothing to end.
  }
  try {
    await client.close();
    await transport.close(); // when it was never connected, the client does not know it
  } catch (error) {
    process.stderr.write(`MCP: close: ${describe(error)}\n`);
  }
}

function definition(
  name: string,
  { name: server, client, transport }: Connected,
  tool: Tool,
): ToolDefinition {
  return {
    name,
    label: tool.title ?? tool.annotations?.title ?? tool.name,
    description: tool.description ?? tool.title ?? `${tool.name} of ${server}`,
    parameters: toolParameters(tool),
    async execute(_toolCallId, input, signal, onUpdate) {
      try {
        const result = await client.callTool(
          { name: tool.name, arguments: input as Record<string, unknown> },
          {
            timeout: NO_TIMEOUT_MS,
            ...(signal ? { signal } : {}),
            onprogress: ({ progress, total, message }) => {
              const text = message ?? (total ? `${progress} of ${total}` : `${progress}`);
              onUpdate?.({ content: [{ type: "text", text }], details: {} });
            },
          },
        );
        return await toPiResult(result);
      } catch (error) {
        signal?.throwIfAborted();
        if (!(transport instanceof StdioTransport) || transport.end === undefined) throw error;
        throw new Error(`MCP server "${server}" is not running: ${transport.end}`);
      }
    },
  };
}
