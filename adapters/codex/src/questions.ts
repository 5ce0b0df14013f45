/** What Codex asks: for permission, which is the client's to give. */

import { randomUUID } from "node:crypto";
import type { Question, ToolItem } from "./codex.js";
import { ErrorCode, RpcError } from "./shared/errors.js";
import { Permissions } from "./shared/permissions.js";
import type { Connection } from "./shared/protocol.js";
import type { PermissionPolicy } from "./shared/settings.js";
import { describeCall, scopeOf, toolName } from "./tools.js";
import type { TurnTranslator } from "./translate.js";

/** Of the turn that is under way. */
export interface Asking {
  translator: TurnTranslator;
  signal: AbortSignal;
}

export class Questions {
  readonly #permissions: Permissions;
  readonly #threadId: string;

  constructor(connection: Connection, sessionId: string, policy: PermissionPolicy) {
    this.#threadId = sessionId;
    this.#permissions = new Permissions(connection, sessionId, policy, (_name, item) =>
      describeCall(item as ToolItem),
    );
  }

  /** Codex's own word for the answer. */
  async answer(question: Question, turn: Asking | undefined): Promise<object> {
    switch (question.method) {
      case "item/commandExecution/requestApproval": {
        const { itemId, command, cwd } = question.params;
        // That of a subagent has not been announced.
        const item = turn?.translator.tool(itemId) ?? {
          type: "commandExecution" as const,
          id: itemId,
          command: command ?? "",
          cwd: cwd ?? "",
          status: "inProgress" as const,
          commandActions: [],
          aggregatedOutput: null,
          exitCode: null,
        };
        return { decision: await this.#decide(item, turn) };
      }
      case "item/fileChange/requestApproval": {
        const { itemId } = question.params;
        const item = turn?.translator.tool(itemId) ?? {
          type: "fileChange" as const,
          id: itemId,
          changes: [],
          status: "inProgress" as const,
        };
        return { decision: await this.#decide(item, turn) };
      }
      case "mcpServer/elicitation/request": {
        const { threadId, serverName, message, _meta: meta } = question.params;
        if (meta?.codex_approval_kind !== "mcp_tool_call") {
          process.stderr.write(`MCP server ${serverName} asks, and nobody answers: ${message}\n`);
          return { action: "decline", content: null };
        }
        const args = JSON.stringify(meta.tool_params ?? {});
        // Of a subagent's call only the server is known.
        const isOwn = threadId === this.#threadId;
        const known = isOwn ? turn?.translator.mcpCall(serverName, args) : undefined;
        const item = known?.item ?? {
          type: "mcpToolCall" as const,
          id: randomUUID(),
          server: serverName,
          tool: "tool",
          status: "inProgress" as const,
          arguments: meta.tool_params ?? {},
          result: null,
          error: null,
        };
        const action = await this.#decide(item, turn, known?.isCertain ? scopeOf(item) : null);
        return { action, content: action === "accept" ? {} : null };
      }
      case "item/permissions/requestApproval":
        // Nothing is forbidden that could be granted.
        return { permissions: {}, scope: "turn" };
      case "item/tool/requestUserInput":
        return { answers: {} };
      default: {
        const { method } = question as { method: string };
        throw new RpcError(ErrorCode.methodNotFound, `Method not found: ${method}`);
      }
    }
  }

  /** `decline` tells the model, and the turn goes on; `cancel` ends it. */
  async #decide(
    item: ToolItem,
    turn: Asking | undefined,
    scope: string | null = scopeOf(item),
  ): Promise<"accept" | "decline" | "cancel"> {
    const call = { toolCallId: item.id, name: toolName(item), args: item, scope };
    const refusal = await this.#permissions.refusal(call, turn?.signal);
    if (turn?.signal.aborted) return "cancel";
    return refusal === undefined ? "accept" : "decline";
  }
}
