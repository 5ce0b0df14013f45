/** Pi's events of a running turn → ACP session updates, in order. */

import { randomUUID } from "node:crypto";
import type { AgentSessionEvent } from "@earendil-works/pi-coding-agent";
import type { SessionUpdate } from "./shared/acp.js";
import { readOldText } from "./shared/old-text.js";
import { describeToolCall, describeToolResult, type PiToolResult, pathOf } from "./tools.js";

/** Output of a running command is passed on at most this often: each update is stored for good. */
const OUTPUT_INTERVAL_MS = 500;

interface OpenToolCall {
  name: string;
  args: unknown;
  /** What the file held before `write`: null if it did not exist, undefined if it is not shown. */
  oldText: string | null | undefined;
  /** When the call started, then when its output was last passed on. */
  outputAt: number;
  pendingOutput: NodeJS.Timeout | undefined;
}

export class TurnTranslator {
  readonly #cwd: string;
  readonly #emit: (update: SessionUpdate) => void;
  readonly #open = new Map<string, OpenToolCall>();
  #messageId = randomUUID();
  #messageHasText = false;

  constructor(cwd: string, emit: (update: SessionUpdate) => void) {
    this.#cwd = cwd;
    this.#emit = emit;
  }

  /** The assistant message of which text or thoughts have been sent last, if any were. */
  get messageId(): string | undefined {
    return this.#messageHasText ? this.#messageId : undefined;
  }

  translate(event: AgentSessionEvent): void {
    switch (event.type) {
      case "message_start":
        if (event.message.role !== "assistant") break;
        this.#messageId = randomUUID();
        this.#messageHasText = false;
        break;
      case "message_update": {
        const part = event.assistantMessageEvent;
        if (part.type === "text_delta") this.#chunk("agent_message_chunk", part.delta);
        else if (part.type === "thinking_delta") this.#chunk("agent_thought_chunk", part.delta);
        else if (part.type === "toolcall_end") {
          this.#openCall(part.toolCall.id, part.toolCall.name, part.toolCall.arguments);
        }
        break;
      }
      case "tool_execution_start":
        this.#openCall(event.toolCallId, event.toolName, event.args);
        break;
      case "tool_execution_update":
        this.#output(event.toolCallId, event.partialResult as PiToolResult);
        break;
      case "tool_execution_end":
        this.#closeCall(event.toolCallId, event.result as PiToolResult, event.isError);
        break;
      default:
        break;
    }
  }

  /** Call before a permitted tool runs. Keeps what it is about to overwrite, for the diff. */
  async startCall(toolCallId: string): Promise<void> {
    const call = this.#open.get(toolCallId);
    if (!call) return;
    call.outputAt = Date.now();
    this.#emit({ sessionUpdate: "tool_call_update", toolCallId, status: "in_progress" });
    if (call.name !== "write") return;
    const path = pathOf(call.args, this.#cwd);
    if (path !== undefined) call.oldText = await readOldText(path);
  }

  /** Calls that will get no result any more have failed. */
  abandonCalls(reason: string): void {
    for (const toolCallId of [...this.#open.keys()]) {
      this.#closeCall(toolCallId, { content: [{ type: "text", text: reason }] }, true);
    }
  }

  #chunk(sessionUpdate: "agent_message_chunk" | "agent_thought_chunk", text: string): void {
    if (text === "") return;
    this.#messageHasText = true;
    const messageId = this.#messageId;
    this.#emit({ sessionUpdate, content: { type: "text", text }, messageId });
  }

  #openCall(toolCallId: string, name: string, args: unknown): OpenToolCall {
    const open = this.#open.get(toolCallId);
    if (open) return open;
    const call = { name, args, oldText: undefined, outputAt: 0, pendingOutput: undefined };
    this.#open.set(toolCallId, call);
    this.#emit({
      sessionUpdate: "tool_call",
      toolCallId,
      status: "pending",
      ...describeToolCall(name, args, this.#cwd),
    });
    return call;
  }

  /** Passes the newest output on, now or when the interval is over. */
  #output(toolCallId: string, partial: PiToolResult): void {
    const call = this.#open.get(toolCallId);
    const text = partial.content?.map((part) => (part.type === "text" ? part.text : "")).join("");
    if (!call || !text) return;
    clearTimeout(call.pendingOutput);
    const send = () => {
      call.outputAt = Date.now();
      this.#emit({
        sessionUpdate: "tool_call_update",
        toolCallId,
        status: "in_progress",
        content: [{ type: "content", content: { type: "text", text } }],
      });
    };
    const wait = call.outputAt + OUTPUT_INTERVAL_MS - Date.now();
    if (wait <= 0) send();
    else call.pendingOutput = setTimeout(send, wait);
  }

  #closeCall(toolCallId: string, result: PiToolResult | undefined, isError: boolean): void {
    const call = this.#open.get(toolCallId);
    if (!call) return;
    clearTimeout(call.pendingOutput);
    this.#open.delete(toolCallId);
    this.#emit({
      sessionUpdate: "tool_call_update",
      toolCallId,
      ...describeToolResult(call, result, isError, this.#cwd),
    });
  }
}
