/**
 * The parts of the Agent Client Protocol (version 1) that our adapters speak.
 * https://agentclientprotocol.com/protocol/v1/schema
 */

import { invalidParams } from "./errors.js";

export const PROTOCOL_VERSION = 1;

export type ContentBlock =
  | { type: "text"; text: string }
  | { type: "image"; data: string; mimeType: string }
  | { type: "audio"; data: string; mimeType: string }
  | { type: "resource_link"; uri: string; name: string }
  | { type: "resource"; resource: EmbeddedResource };

export type EmbeddedResource =
  | { uri: string; mimeType?: string | null; text: string }
  | { uri: string; mimeType?: string | null; blob: string };

export type ToolKind =
  | "read"
  | "edit"
  | "delete"
  | "search"
  | "execute"
  | "think"
  | "fetch"
  | "other";
export type ToolStatus = "pending" | "in_progress" | "completed" | "failed";

export type ToolContent =
  | { type: "content"; content: ContentBlock }
  | { type: "diff"; path: string; oldText: string | null; newText: string };

export interface ToolLocation {
  path: string;
  line?: number;
}

export interface ToolCallFields {
  title?: string;
  kind?: ToolKind;
  status?: ToolStatus;
  content?: ToolContent[];
  locations?: ToolLocation[];
  rawInput?: unknown;
  rawOutput?: unknown;
}

export type SessionUpdate =
  | {
      sessionUpdate: "user_message_chunk" | "agent_message_chunk" | "agent_thought_chunk";
      content: ContentBlock;
      /** Equal for all chunks of one message. */
      messageId: string;
    }
  | ({ sessionUpdate: "tool_call"; toolCallId: string; title: string } & ToolCallFields)
  | ({ sessionUpdate: "tool_call_update"; toolCallId: string } & ToolCallFields)
  | { sessionUpdate: "plan"; entries: PlanEntry[] }
  | { sessionUpdate: "config_option_update"; configOptions: ConfigOption[] }
  | { sessionUpdate: "available_commands_update"; availableCommands: AvailableCommand[] }
  | { sessionUpdate: "session_info_update"; _meta: Record<string, unknown> }
  | {
      sessionUpdate: "usage_update";
      /** Tokens in the context, and how many it can hold. */
      used: number;
      size: number;
      /** Of the whole session. */
      cost?: { amount: number; currency: string };
    };

export type StopReason = "end_turn" | "max_tokens" | "max_turn_requests" | "refusal" | "cancelled";

export interface PlanEntry {
  content: string;
  priority: "high" | "medium" | "low";
  status: "pending" | "in_progress" | "completed";
}

/** A selector of a session's configuration. */
export interface ConfigOption {
  id: string;
  name: string;
  category: "model" | "thought_level";
  type: "select";
  currentValue: string;
  options: { value: string; name: string }[];
}

export interface AvailableCommand {
  /** Without the slash. */
  name: string;
  description: string;
  input?: { hint: string };
}

type Fields = Record<string, unknown>;

/** `name` of the value, for the message; "" if it is the params themselves. */
export function fields(value: unknown, name = ""): Fields {
  if (typeof value !== "object" || value === null || Array.isArray(value)) {
    throw invalidParams(`${name || "params"} must be an object`);
  }
  return value as Fields;
}

export function string(params: Fields, name: string, where = ""): string {
  const value = params[name];
  if (typeof value !== "string") throw invalidParams(`${where}${name} must be a string`);
  return value;
}

export function sessionIdOf(params: unknown): string {
  return string(fields(params), "sessionId");
}

/** Of session/set_config_option. */
export function configChangeOf(params: unknown): { configId: string; value: unknown } {
  const change = fields(params);
  return { configId: string(change, "configId"), value: change.value };
}

/** Of session/set_mode. */
export function modeIdOf(params: unknown): string {
  return string(fields(params), "modeId");
}

export function promptOf(params: unknown): ContentBlock[] {
  const { prompt } = fields(params);
  if (!Array.isArray(prompt) || prompt.length === 0) {
    throw invalidParams("prompt must be a non-empty array of content blocks");
  }
  return prompt.map((block, index) => contentBlock(block, `prompt[${index}].`));
}

export function contentBlock(value: unknown, where: string): ContentBlock {
  const block = fields(value, where.replace(/\.$/, ""));
  switch (block.type) {
    case "text":
      return { type: "text", text: string(block, "text", where) };
    case "image":
    case "audio":
      return {
        type: block.type,
        data: string(block, "data", where),
        mimeType: string(block, "mimeType", where),
      };
    case "resource_link":
      return {
        type: "resource_link",
        uri: string(block, "uri", where),
        name: string(block, "name", where),
      };
    case "resource": {
      const resource = fields(block.resource, `${where}resource`);
      const uri = string(resource, "uri", `${where}resource.`);
      const mimeType = typeof resource.mimeType === "string" ? resource.mimeType : null;
      return typeof resource.text === "string"
        ? { type: "resource", resource: { uri, mimeType, text: resource.text } }
        : {
            type: "resource",
            resource: { uri, mimeType, blob: string(resource, "blob", `${where}resource.`) },
          };
    }
    default:
      throw invalidParams(`${where}type ${JSON.stringify(block.type)} is not supported`);
  }
}
