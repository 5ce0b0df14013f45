/** What a client says about a session when it makes one or opens one again. */

import { statSync } from "node:fs";
import { isAbsolute } from "node:path";
import { contentBlock, fields, string } from "./acp.js";
import { invalidParams } from "./errors.js";

export type McpServer =
  | {
      type: "stdio";
      name: string;
      command: string;
      args: string[];
      env: Record<string, string>;
    }
  | {
      /** `http`: streamable HTTP. `sse`: the transport of protocol 2024-11-05. */
      type: "http" | "sse";
      /** `http` is a guess: SSE is tried where the server does not know it. */
      guessed: boolean;
      name: string;
      url: string;
      headers: Record<string, string>;
    };

/** Who decides about tools that change something: nobody, or the client, each time anew. */
export type PermissionPolicy = "ask" | "allow" | "reject";

export interface SessionSettings {
  cwd: string;
  mcpServers: McpServer[];
  /** Appended to the system prompt. */
  instructions: string | undefined;
  permissionPolicy: PermissionPolicy;
}

/** The parameters that session/new, session/load and session/resume have in common. */
export function sessionSettingsOf(params: unknown): SessionSettings {
  const given = fields(params);
  const meta = fields(given._meta ?? {}, "_meta");
  const cwd = string(given, "cwd");
  if (!isAbsolute(cwd)) throw invalidParams(`cwd must be an absolute path, not ${cwd}`);
  if (!statSync(cwd, { throwIfNoEntry: false })?.isDirectory()) {
    throw invalidParams(`cwd is not a directory: ${cwd}`);
  }
  return {
    cwd,
    mcpServers: mcpServers(given.mcpServers ?? []),
    instructions: instructions(given.systemPrompt, meta),
    permissionPolicy: permissionPolicy(meta),
  };
}

function mcpServers(value: unknown): McpServer[] {
  if (!Array.isArray(value)) throw invalidParams("mcpServers must be an array");
  const servers = value.map((server, index) => mcpServer(server, `mcpServers[${index}]`));
  const names = new Set<string>();
  for (const { name } of servers) {
    if (names.has(name)) throw invalidParams(`mcpServers: two servers are named "${name}"`);
    names.add(name);
  }
  return servers;
}

function mcpServer(value: unknown, where: string): McpServer {
  const server = fields(value, where);
  const name = string(server, "name", `${where}.`);
  if (name === "") throw invalidParams(`${where}.name must not be empty`);
  switch (server.type) {
    case undefined: // ACP has no type for stdio
    case "stdio":
      return {
        type: "stdio",
        name,
        command: string(server, "command", `${where}.`),
        args: strings(server.args ?? [], `${where}.args`),
        env: pairs(server.env ?? [], `${where}.env`),
      };
    case "http":
    case "sse":
      return {
        type: server.type,
        guessed: server.type === "http" && isGuessed(server._meta, `${where}._meta`),
        name,
        url: httpUrl(string(server, "url", `${where}.`), `${where}.url`),
        headers: httpHeaders(server.headers ?? [], `${where}.headers`),
      };
    default:
      throw invalidParams(`${where}.type must be "stdio", "http" or "sse"`);
  }
}

/** Whether the client has chosen the transport itself, because its caller did not say. */
function isGuessed(meta: unknown, name: string): boolean {
  return fields(fields(meta ?? {}, name).agentvm ?? {}, `${name}.agentvm`).transport === "auto";
}

function strings(value: unknown, name: string): string[] {
  if (Array.isArray(value) && value.every((item) => typeof item === "string")) return value;
  throw invalidParams(`${name} must be an array of strings`);
}

/** ACP writes environments and headers as lists of `{ name, value }`. */
function pairs(value: unknown, where: string): Record<string, string> {
  if (!Array.isArray(value)) throw invalidParams(`${where} must be an array`);
  return Object.fromEntries(
    value.map((item, index) => {
      const pair = fields(item, `${where}[${index}]`);
      const at = `${where}[${index}].`;
      return [string(pair, "name", at), string(pair, "value", at)];
    }),
  );
}

function httpUrl(url: string, name: string): string {
  const protocol = URL.canParse(url) ? new URL(url).protocol : undefined;
  if (protocol === "http:" || protocol === "https:") return url;
  throw invalidParams(`${name} must be an http or https URL`);
}

function httpHeaders(value: unknown, where: string): Record<string, string> {
  const headers = pairs(value, where);
  for (const [name, content] of Object.entries(headers)) {
    try {
      new Headers([[name, content]]);
    } catch {
      throw invalidParams(`${where}: "${name}" has a name or a value that HTTP does not allow`);
    }
  }
  return headers;
}

/** `systemPrompt` of ACP, or what clients sent before it was there. */
function instructions(systemPrompt: unknown, meta: Record<string, unknown>): string | undefined {
  if (systemPrompt === undefined || systemPrompt === null) {
    if (meta.systemPrompt === undefined) return undefined;
    const { append } = fields(meta.systemPrompt, "_meta.systemPrompt");
    if (append === undefined || typeof append === "string") return append || undefined;
    throw invalidParams("_meta.systemPrompt.append must be a string");
  }
  const { mode, content } = fields(systemPrompt, "systemPrompt");
  if (mode !== "append") {
    throw invalidParams(`systemPrompt.mode must be "append", not ${JSON.stringify(mode)}`);
  }
  if (!Array.isArray(content)) throw invalidParams("systemPrompt.content must be an array");
  const texts = content.map((item, index) => {
    const block = contentBlock(item, `systemPrompt.content[${index}].`);
    if (block.type === "text") return block.text;
    throw invalidParams(`systemPrompt.content[${index}].type must be "text", not "${block.type}"`);
  });
  return texts.join("\n\n") || undefined;
}

function permissionPolicy(meta: Record<string, unknown>): PermissionPolicy {
  const { permissionPolicy: policy = "allow" } = fields(meta.agentvm ?? {}, "_meta.agentvm");
  if (policy === "ask" || policy === "allow" || policy === "reject") return policy;
  throw invalidParams('_meta.agentvm.permissionPolicy must be "ask", "allow" or "reject"');
}
