/** MCP servers of ACP → those of Codex's configuration. */

import type { Json } from "./codex.js";
import { invalidParams } from "./shared/errors.js";
import type { McpServer, SessionSettings } from "./shared/settings.js";

/** A server of `npx` is first downloaded. */
const STARTUP_SECONDS = 120;
/** Codex wants a limit for a call. This is a week. */
const CALL_SECONDS = 7 * 24 * 60 * 60;

/**
 * `taken`: names of servers that Codex is configured with. Theirs and a session's of the same name would
 * be mixed.
 */
export function mcpConfig(
  { mcpServers, cwd, permissionPolicy }: SessionSettings,
  env: NodeJS.ProcessEnv,
  startupSeconds = STARTUP_SECONDS,
  taken: Iterable<string> = [],
): Record<string, Json> {
  const names = new Set(taken);
  const servers: Record<string, Json> = {};
  for (const server of mcpServers) {
    const name = unique(server.name, names);
    names.add(name);
    servers[name] = {
      ...transport(server, cwd, env),
      // Without it the session has not what its owner has asked for.
      required: true,
      startup_timeout_sec: startupSeconds,
      tool_timeout_sec: CALL_SECONDS,
      // The model sees the tools themselves, and need not search for them.
      omit_tools_from: ["deferred"],
      // A server's word that a tool only reads is not enough.
      default_tools_approval_mode: permissionPolicy === "allow" ? "approve" : "prompt",
    };
  }
  return servers;
}

function transport(server: McpServer, cwd: string, env: NodeJS.ProcessEnv): Record<string, Json> {
  if (server.type === "stdio") {
    const { command, args } = server;
    // By name: values may be secrets, which have no place in a configuration.
    const env_vars = Object.keys(env).filter((name) => !Object.hasOwn(server.env, name));
    return { command, args, cwd, env: server.env, env_vars };
  }
  if (server.type === "sse") {
    throw invalidParams(
      `mcpServers: "${server.name}" speaks SSE, which Codex does not; it takes stdio and http`,
    );
  }
  return { url: server.url, http_headers: server.headers };
}

/** As Codex allows it, and like no other. */
function unique(name: string, taken: ReadonlySet<string>): string {
  const allowed = name.replace(/[^a-zA-Z0-9_-]/g, "_");
  if (!taken.has(allowed)) return allowed;
  for (let number = 2; ; number++) {
    if (!taken.has(`${allowed}_${number}`)) return `${allowed}_${number}`;
  }
}
