/**
 * What a scripted reply is, and what a model API has to provide to be served: one request reader
 * and one encoder per API, so that adding an agent that speaks another API is one more file here.
 */

import type { IncomingHttpHeaders } from "node:http";

export interface ToolCallReply {
  name: string;
  /** A text is the input of a custom tool, which only the Responses API has. */
  input: Record<string, unknown> | string;
  /** Default: `call_<request index>_<position>`, unique within one server. */
  id?: string;
}

/** One answer of the model. Content is streamed in the order thinking, text, tool calls. */
export interface Reply {
  thinking?: string;
  text?: string;
  toolCalls?: ToolCallReply[];
  /** Default: `tool_use` with tool calls, else `end_turn`. */
  stopReason?: "end_turn" | "max_tokens" | "refusal";

  /** Characters per streamed chunk. Default: 24. */
  chunkSize?: number;
  /** Pause before each chunk, in milliseconds. Default: 0. */
  delayMs?: number;
  /**
   * Stops after this many chunks until the promise resolves or the client hangs up. As a function
   * it is called at that moment.
   */
  hold?: { afterChunks: number; until: Promise<unknown> | (() => Promise<unknown>) };

  /** Destroys the socket after this many chunks. */
  dropConnection?: { afterChunks: number };
  /** Writes `data` verbatim after this many chunks and ends the response there. */
  malformed?: { afterChunks: number; data: string };
  /** Answers with an HTTP error in the API's own error format, and streams nothing. */
  error?: { status: number; type: string; message: string; headers?: Record<string, string> };
  /** Sends this error as an event of the stream, after the content. */
  streamError?: { type: string; message: string };
}

/** A request as it arrived, with the parts that scripts and assertions ask about. */
export interface ModelRequest {
  /** Position among all model requests of this server, from 0. */
  index: number;
  api: string;
  path: string;
  headers: IncomingHttpHeaders;
  // biome-ignore lint/suspicious/noExplicitAny: a request body is whatever the agent sent
  body: any;
  /** Text of the last message that a user wrote (tool results are not counted). */
  userText: string;
  /** Results of the tool calls made since that message, oldest first. */
  toolResults: string[];
  /** Names of the tools that the model may call now. */
  toolNames: string[];
  /** The system prompt, and whatever else the developer of the agent says wherever it stands. */
  system: string;
  /** The conversation, oldest first; of the model's messages the text. */
  messages: Message[];
  /** Resolves when the client has received everything or has hung up. */
  closed: Promise<"finished" | "aborted">;
}

export interface Message {
  /**
   * `beside`: in one message with results of tools, as a remark of the agent on them, or as what the user
   * says after a cancel.
   */
  role: "user" | "model" | "tool" | "beside";
  text: string;
}

/** What an API's request says, in words that all of them share. */
export interface Read {
  system: string[];
  messages: Message[];
  toolNames: string[];
}

/** A piece of the response body. Chunks are counted and delayed, the framing around them is not. */
export interface Frame {
  data: string;
  chunk: boolean;
}

export interface ModelApi {
  name: string;
  path: RegExp;
  read(body: unknown): Read;
  encode(reply: Reply, request: ModelRequest): Frame[];
  encodeError(error: NonNullable<Reply["error"]>): unknown;
}

/** The parts of a request that scripts and assertions ask about. */
export function summarize({ system, messages, toolNames }: Read) {
  const last = messages.findLastIndex(({ role }) => role === "user");
  const since = messages.slice(last + 1).filter(({ role }) => role === "tool");
  return {
    system: system.filter((text) => text !== "").join("\n\n"),
    messages,
    toolNames,
    userText: messages[last]?.text ?? "",
    toolResults: since.map(({ text }) => text),
  };
}

export function chunks(text: string, size = 24): string[] {
  const pieces: string[] = [];
  for (let start = 0; start < text.length; start += size) {
    pieces.push(text.slice(start, start + size));
  }
  return pieces;
}

export function toolCallId(call: ToolCallReply, position: number, request: ModelRequest): string {
  return call.id ?? `call_${request.index}_${position}`;
}

/** The text of a message content that is a string or a list of typed parts, in any of the APIs. */
export function textOf(content: unknown): string {
  if (typeof content === "string") return content;
  if (!Array.isArray(content)) return "";
  return content
    .map((part) => (typeof part?.text === "string" ? part.text : ""))
    .filter((text) => text !== "")
    .join("\n");
}
