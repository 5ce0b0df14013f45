/** Amp's messages → ACP session updates, in order. */

import { randomUUID } from "node:crypto";
import { isDeepStrictEqual } from "node:util";
import { INSTRUCTIONS_TAG } from "./instructions.js";
import type { SessionUpdate } from "./shared/acp.js";
import { within } from "./shared/deadline.js";
import { readOldText } from "./shared/old-text.js";
import type { AssistantMessage, Block, ToolResultBlock, Usage, UserMessage } from "./stream.js";
import {
  describeToolCall,
  describeToolResult,
  overwrittenFile,
  planOf,
  type ShownCall,
} from "./tools.js";

interface OpenCall extends ShownCall {
  /** Resolves when the client has been told of it. */
  announced: Promise<void>;
  /** A question that did not name its call has been about it. */
  isAsked: boolean;
}

export class Translator {
  readonly #cwd: string;
  readonly #emit: (update: SessionUpdate) => void;
  readonly #startsAtOnce: (name: string) => boolean;
  readonly #open = new Map<string, OpenCall>();
  /** For the next call. */
  readonly #waiting = new Set<() => void>();
  #lastAnswer: AssistantMessage["message"] | undefined;
  #usage: Usage | undefined;

  /** `startsAtOnce`: whether Amp runs the tool without asking. */
  constructor(
    cwd: string,
    emit: (update: SessionUpdate) => void,
    startsAtOnce: (name: string) => boolean,
  ) {
    this.#cwd = cwd;
    this.#emit = emit;
    this.#startsAtOnce = startsAtOnce;
  }

  /** Why the model has stopped, in its own words. */
  get stopReason(): string | null | undefined {
    return this.#lastAnswer?.stop_reason;
  }

  async assistant({ message, parent_tool_use_id: parent }: AssistantMessage): Promise<void> {
    if (parent === null) {
      this.#lastAnswer = message;
      this.#usage = message.usage ?? this.#usage;
    }
    const messageId = message.id ?? randomUUID();
    for (const block of message.content) {
      if (block.type === "tool_use") await this.openCall(block.id, block.name, block.input, parent);
      else if (parent === null) this.#answer(block, messageId);
      else this.#subagent(block, parent);
    }
  }

  /** Results of tools. Amp repeats the user's own words too, which a client has already. */
  user({ message }: UserMessage): void {
    if (typeof message.content === "string") return;
    for (const block of message.content) {
      if (block.type === "tool_result") this.#closeCall(block.tool_use_id, block);
    }
  }

  /** A user's message of a conversation that is told again. */
  replayUser(content: Block[] | string, messageId: string): void {
    const blocks: Block[] =
      typeof content === "string" ? [{ type: "text", text: content }] : content;
    for (const block of blocks) {
      if (block.type === "tool_result") this.#closeCall(block.tool_use_id, block);
      else if (block.type === "text" && !block.text.startsWith(INSTRUCTIONS_TAG)) {
        const { text } = block;
        this.#emit({
          sessionUpdate: "user_message_chunk",
          content: { type: "text", text },
          messageId,
        });
      } else if (block.type === "image" && block.source.type === "base64") {
        const { data, media_type: mimeType } = block.source;
        const image = { type: "image" as const, data, mimeType };
        this.#emit({ sessionUpdate: "user_message_chunk", content: image, messageId });
      }
    }
  }

  /** Announces a call, unless it is known. `parent`: the call whose subagent makes it. */
  async openCall(
    toolCallId: string,
    name: string,
    input: unknown,
    parent: string | null = null,
  ): Promise<void> {
    const open = this.#open.get(toolCallId);
    if (open) return await open.announced;
    const call: OpenCall = {
      name,
      input,
      oldText: undefined,
      announced: Promise.resolve(),
      isAsked: false,
    };
    this.#open.set(toolCallId, call);
    call.announced = this.#announce(toolCallId, call, parent);
    await call.announced;
    for (const opened of this.#waiting) opened();
  }

  startCall(toolCallId: string): void {
    if (!this.#open.has(toolCallId)) return;
    this.#emit({ sessionUpdate: "tool_call_update", toolCallId, status: "in_progress" });
  }

  /** The call that a question is about which does not name it, if one comes in time. */
  async callLike(name: string, input: unknown, timeoutMs: number): Promise<string | undefined> {
    const deadline = Date.now() + timeoutMs;
    for (;;) {
      for (const [toolCallId, call] of this.#open) {
        if (call.isAsked || call.name !== name || !isDeepStrictEqual(call.input, input)) continue;
        call.isAsked = true;
        await call.announced;
        return toolCallId;
      }
      if (!(await within(deadline - Date.now(), this.#nextCall()))) return undefined;
    }
  }

  /** Calls that will get no result any more have failed. */
  abandonCalls(reason: string): void {
    for (const toolCallId of [...this.#open.keys()]) {
      this.#closeCall(toolCallId, { content: reason, is_error: true });
    }
  }

  reportUsage(): void {
    const { input_tokens: input, output_tokens: output, max_tokens: size } = this.#usage ?? {};
    if (input === undefined || output === undefined || size === undefined) return;
    this.#emit({ sessionUpdate: "usage_update", used: input + output, size });
  }

  #nextCall(): Promise<void> {
    return new Promise((resolve) => {
      const opened = () => {
        this.#waiting.delete(opened);
        resolve();
      };
      this.#waiting.add(opened);
    });
  }

  async #announce(toolCallId: string, call: OpenCall, parent: string | null): Promise<void> {
    const { name, input } = call;
    const overwritten = overwrittenFile(name, input, this.#cwd);
    if (overwritten !== undefined) call.oldText = await readOldText(overwritten);
    this.#emit({
      sessionUpdate: "tool_call",
      toolCallId,
      status: "pending",
      ...describeToolCall(name, input, this.#cwd),
      ...(parent === null ? {} : { _meta: { agentvm: { parentToolCallId: parent } } }),
    });
    const entries = planOf(name, input);
    if (entries) this.#emit({ sessionUpdate: "plan", entries });
    if (this.#startsAtOnce(name)) this.startCall(toolCallId);
  }

  #answer(block: Block, messageId: string): void {
    const text = textOf(block);
    if (text === "") return;
    const sessionUpdate =
      block.type === "thinking" ? "agent_thought_chunk" : ("agent_message_chunk" as const);
    this.#emit({ sessionUpdate, content: { type: "text", text }, messageId });
  }

  /** What a subagent says is output of the call that has started it. */
  #subagent(block: Block, toolCallId: string): void {
    const text = textOf(block);
    if (block.type !== "text" || text === "" || !this.#open.has(toolCallId)) return;
    this.#emit({
      sessionUpdate: "tool_call_update",
      toolCallId,
      status: "in_progress",
      content: [{ type: "content", content: { type: "text", text } }],
    });
  }

  #closeCall(toolCallId: string, result: Pick<ToolResultBlock, "content" | "is_error">): void {
    const call = this.#open.get(toolCallId);
    if (!call) return;
    this.#open.delete(toolCallId);
    this.#emit({
      sessionUpdate: "tool_call_update",
      toolCallId,
      ...describeToolResult(call, result, this.#cwd),
    });
  }
}

function textOf(block: Block): string {
  if (block.type === "text") return block.text;
  return block.type === "thinking" ? block.thinking : "";
}
