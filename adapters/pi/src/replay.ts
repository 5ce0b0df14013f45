/** A stored Pi session → the ACP updates that tell it again. */

import type { SessionEntry } from "@earendil-works/pi-coding-agent";
import type { SessionUpdate } from "./acp.js";
import { describeToolCall, describeToolResult, type PiToolResult } from "./tools.js";

type Message = Extract<SessionEntry, { type: "message" }>["message"];

/** `branch`: the session's entries from the first to the current one. */
export function* replay(branch: SessionEntry[], cwd: string): Generator<SessionUpdate> {
  const omitted = omittedEntries(branch);
  const open = new Map<string, { name: string; args: unknown; oldText: undefined }>();

  for (const entry of branch) {
    if (entry.type !== "message" || omitted.has(entry.id)) continue;
    yield* replayMessage(entry.message, open, cwd);
  }
  // The process died while these ran.
  for (const [toolCallId, call] of open) {
    const result: PiToolResult = { content: [{ type: "text", text: "Interrupted" }] };
    const described = describeToolResult(call, result, true, cwd);
    yield { sessionUpdate: "tool_call_update", toolCallId, ...described };
  }
}

function* replayMessage(
  message: Message,
  open: Map<string, { name: string; args: unknown; oldText: undefined }>,
  cwd: string,
): Generator<SessionUpdate> {
  switch (message.role) {
    case "user":
      for (const part of parts(message.content)) {
        if (part.type === "text") yield text("user_message_chunk", part.text);
        else {
          const { data, mimeType } = part;
          const content = { type: "image" as const, data, mimeType };
          yield { sessionUpdate: "user_message_chunk", content };
        }
      }
      break;
    case "assistant":
      for (const part of message.content) {
        if (part.type === "thinking") {
          if (part.thinking) yield text("agent_thought_chunk", part.thinking);
        } else if (part.type === "text") {
          if (part.text) yield text("agent_message_chunk", part.text);
        } else {
          const { id: toolCallId, name, arguments: args } = part;
          open.set(toolCallId, { name, args, oldText: undefined });
          const described = describeToolCall(name, args, cwd);
          yield { sessionUpdate: "tool_call", toolCallId, status: "pending", ...described };
        }
      }
      break;
    case "toolResult": {
      const { toolCallId, isError } = message;
      const call = open.get(toolCallId);
      if (!call) break;
      open.delete(toolCallId);
      const described = describeToolResult(call, message as PiToolResult, isError, cwd);
      yield { sessionUpdate: "tool_call_update", toolCallId, ...described };
      break;
    }
    default:
      break; // the system prompt, summaries and extensions' messages are not part of the dialogue
  }
}

/** Attempts that Pi has withdrawn, such as a broken stream that was retried. */
function omittedEntries(branch: SessionEntry[]): Set<string> {
  const omitted = new Set<string>();
  for (const entry of branch) {
    if (entry.type === "context_edit" && entry.replacement === null) omitted.add(entry.targetId);
  }
  return omitted;
}

function parts<T>(content: string | T[]): (T | { type: "text"; text: string })[] {
  return typeof content === "string" ? [{ type: "text", text: content }] : content;
}

function text(
  sessionUpdate: "user_message_chunk" | "agent_message_chunk" | "agent_thought_chunk",
  value: string,
): SessionUpdate {
  return { sessionUpdate, content: { type: "text", text: value } };
}
