/** A stored Pi session → the ACP updates that tell it again. */

import type { SessionEntry } from "@earendil-works/pi-coding-agent";
import type { ContentBlock, SessionUpdate } from "./shared/acp.js";
import { describeToolCall, describeToolResult, type PiToolResult } from "./tools.js";

type Message = Extract<SessionEntry, { type: "message" }>["message"];

/** `branch`: the session's entries from the first to the current one. */
export function* replay(branch: SessionEntry[], cwd: string): Generator<SessionUpdate> {
  const omitted = omittedEntries(branch);
  const open = new Map<string, { name: string; args: unknown; oldText: undefined }>();

  for (const entry of branch) {
    if (entry.type !== "message" || omitted.has(entry.id)) continue;
    yield* replayMessage(entry.message, entry.id, open, cwd);
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
  messageId: string,
  open: Map<string, { name: string; args: unknown; oldText: undefined }>,
  cwd: string,
): Generator<SessionUpdate> {
  switch (message.role) {
    case "user":
      for (const part of parts(message.content)) {
        const content: ContentBlock =
          part.type === "text"
            ? { type: "text", text: part.text }
            : { type: "image", data: part.data, mimeType: part.mimeType };
        yield { sessionUpdate: "user_message_chunk", content, messageId };
      }
      break;
    case "assistant":
      for (const part of message.content) {
        if (part.type === "thinking") {
          const content: ContentBlock = { type: "text", text: part.thinking };
          if (part.thinking) yield { sessionUpdate: "agent_thought_chunk", content, messageId };
        } else if (part.type === "text") {
          const content: ContentBlock = { type: "text", text: part.text };
          if (part.text) yield { sessionUpdate: "agent_message_chunk", content, messageId };
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
