/**
 * The messages that Amp writes with `--stream-json`, one per line, and the one that it reads with
 * `--stream-json-input`. https://ampcode.com/manual/appendix#stream-json-output
 */

import type { PromptPart } from "./shared/prompt.js";

export type StreamMessage =
  | SystemMessage
  | AssistantMessage
  | UserMessage
  | ResultMessage
  | { type: string; session_id?: string };

export interface SystemMessage {
  type: "system";
  subtype: string;
  /** Id of the thread, `T-…`. */
  session_id: string;
  mcp_servers?: { name: string; status: string }[];
}

export interface AssistantMessage {
  type: "assistant";
  session_id: string;
  message: {
    id?: string;
    content: Block[];
    stop_reason: string | null;
    usage?: Usage;
  };
  /** The call whose subagent speaks; null for the main thread. */
  parent_tool_use_id: string | null;
}

export interface UserMessage {
  type: "user";
  session_id: string;
  message: { content: Block[] | string };
  parent_tool_use_id: string | null;
}

export interface ResultMessage {
  type: "result";
  /** `success`, `error_during_execution` or `error_max_turns`. */
  subtype: string;
  session_id: string;
  is_error: boolean;
  error?: string;
  num_turns?: number;
}

export interface Usage {
  /** All tokens of the request, those from a cache included. */
  input_tokens: number;
  output_tokens: number;
  /** How many tokens the context can hold. */
  max_tokens?: number;
}

export type Block =
  | { type: "text"; text: string }
  | { type: "thinking"; thinking: string }
  | { type: "tool_use"; id: string; name: string; input: unknown }
  | ToolResultBlock
  | ImageBlock
  | { type: "redacted_thinking" };

export interface ToolResultBlock {
  type: "tool_result";
  tool_use_id: string;
  content: string | Block[];
  is_error: boolean;
}

export type ImageBlock = {
  type: "image";
  source: { type: "base64"; media_type: string; data: string } | { type: "url"; url: string };
};

export function isInit(message: StreamMessage): message is SystemMessage {
  return message.type === "system" && (message as SystemMessage).subtype === "init";
}

export function isResult(message: StreamMessage): message is ResultMessage {
  return message.type === "result";
}

/** The line that starts a turn. */
export function userMessage(parts: PromptPart[]): string {
  const content = parts.map((part): Block => {
    if (part.type === "text") return part;
    const { data, mimeType } = part;
    return { type: "image", source: { type: "base64", media_type: mimeType, data } };
  });
  return `${JSON.stringify({ type: "user", message: { role: "user", content } })}\n`;
}

/** Undefined: it is not a message of the stream. */
export function parseMessage(line: string): StreamMessage | undefined {
  try {
    const message: unknown = JSON.parse(line);
    const { type } = (message ?? {}) as { type?: unknown };
    return typeof type === "string" ? (message as StreamMessage) : undefined;
  } catch {
    return undefined;
  }
}
