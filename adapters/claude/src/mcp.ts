/** MCP servers: a session begins when all of them can be used. */

import { setTimeout as sleep } from "node:timers/promises";
import type { OpenSession } from "@agentclientprotocol/claude-agent-acp/dist/acp-agent.js";
import { ErrorCode, RpcError } from "./shared/errors.js";

const POLL_MS = 50;

/** As a client lists it in `session/new`. */
export interface McpServer {
  name: string;
  /** Absent for a program on stdio. */
  type?: "http" | "sse";
}

/**
 * Resolves when all servers are connected, and rejects as soon as it is known of one that it can't be
 * used. Claude Code itself gives each of them `MCP_TIMEOUT` milliseconds, and would go on without those
 * that failed.
 */
export async function allConnected(session: OpenSession, servers: McpServer[]): Promise<void> {
  for (;;) {
    const known = servers.length === 0 ? [] : await session.query.mcpServerStatus();
    const statuses = servers.map(({ name }) => known.find((status) => status.name === name));
    for (const [index, status] of statuses.entries()) {
      const { name, type = "stdio" } = servers[index] as McpServer;
      const reason = status ? (status.error ?? PROBLEMS[status.status]) : "Claude Code ignores it";
      if (reason === undefined) continue;
      throw new RpcError(ErrorCode.internalError, `Can't use the MCP server ${name}: ${reason}`, {
        type: "mcp_server_failed",
        server: name,
        transport: type,
        reason,
      });
    }
    if (statuses.every((status) => status?.status === "connected")) return;
    await sleep(POLL_MS);
  }
}

const PROBLEMS: Record<string, string | undefined> = {
  failed: "it could not be started or reached",
  "needs-auth": "it wants an authorisation, which its headers have to bring",
  disabled: "Claude Code's settings have switched it off",
};
