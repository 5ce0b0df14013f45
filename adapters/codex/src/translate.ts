/** Codex's notifications of a running turn → ACP session updates, in order. */

import type { Item, McpItem, Notification, ToolItem } from "./codex.js";
import type { SessionUpdate } from "./shared/acp.js";
import { describeCall, describeResult, isTool } from "./tools.js";

/** Output of a running command is passed on at most this often: each update is stored for good. */
const OUTPUT_INTERVAL_MS = 500;
/** Characters of a running command's output that are shown: the last ones. Its result has all of it. */
const MAX_RUNNING_OUTPUT = 16 * 1024;

interface OpenToolCall {
  item: ToolItem;
  output: string;
  /** When its output was last passed on. */
  outputAt: number;
  pendingOutput: NodeJS.Timeout | undefined;
}

export class TurnTranslator {
  readonly #emit: (update: SessionUpdate) => void;
  readonly #open = new Map<string, OpenToolCall>();
  /** Commands that the turn has started. */
  readonly #commands = new Set<string>();
  #messageId: string | undefined;
  #usage: SessionUpdate | undefined;

  constructor(emit: (update: SessionUpdate) => void) {
    this.#emit = emit;
  }

  /** The message of which text or thoughts have been sent, and which is not complete. */
  get unfinishedMessage(): string | undefined {
    return this.#messageId;
  }

  tool(itemId: string): ToolItem | undefined {
    return this.#open.get(itemId)?.item;
  }

  /**
   * The call that a server's request for permission is about: the request names neither it nor its tool.
   * `isCertain`: no call of another tool of the server can be meant.
   */
  mcpCall(server: string, args: string): { item: McpItem; isCertain: boolean } | undefined {
    const calls = [...this.#open.values()].map(({ item }) => item).reverse();
    const ofServer = calls.filter(
      (item): item is McpItem => item.type === "mcpToolCall" && item.server === server,
    );
    const exact = ofServer.filter((item) => JSON.stringify(item.arguments) === args);
    const [item] = exact.length > 0 ? exact : ofServer;
    if (!item) return undefined;
    return { item, isCertain: exact.length > 0 && exact.every(({ tool }) => tool === item.tool) };
  }

  hasStarted(itemId: string): boolean {
    return this.#commands.has(itemId);
  }

  translate({ method, params }: Notification): void {
    switch (method) {
      case "item/started":
        this.#openCall(params.item);
        break;
      case "item/completed":
        if (params.item.id === this.#messageId) this.#messageId = undefined;
        this.#closeCall(params.item);
        break;
      case "item/agentMessage/delta":
      case "item/plan/delta":
        this.#chunk("agent_message_chunk", params.itemId, params.delta);
        break;
      case "item/reasoning/textDelta":
      case "item/reasoning/summaryTextDelta":
        this.#chunk("agent_thought_chunk", params.itemId, params.delta);
        break;
      case "item/reasoning/summaryPartAdded":
        if (params.summaryIndex > 0) this.#chunk("agent_thought_chunk", params.itemId, "\n\n");
        break;
      case "item/commandExecution/outputDelta":
        this.#output(params.itemId, params.delta);
        break;
      case "turn/plan/updated":
        this.#emit({
          sessionUpdate: "plan",
          entries: params.plan.map(({ step, status }) => ({
            content: step,
            priority: "medium",
            status: status === "inProgress" ? "in_progress" : status,
          })),
        });
        break;
      case "thread/tokenUsage/updated": {
        const { last, modelContextWindow } = params.tokenUsage;
        if (modelContextWindow === null) break;
        const [used, size] = [last.totalTokens, modelContextWindow];
        this.#usage = { sessionUpdate: "usage_update", used, size };
        break;
      }
      case "warning":
        this.#emit({
          sessionUpdate: "session_info_update",
          _meta: { codex: { warning: params.message } },
        });
        break;
      case "model/rerouted":
        this.#emit({
          sessionUpdate: "session_info_update",
          _meta: { codex: { rerouted: params } },
        });
        break;
      default:
        break;
    }
  }

  /** Closes what is still open, and says how full the context is. */
  finish(cancelled: boolean): void {
    for (const [toolCallId, call] of this.#open) {
      clearTimeout(call.pendingOutput);
      // A command that runs on without its turn is one that the model has left running.
      const runsOn = call.item.type === "commandExecution" && !cancelled;
      const text = `${call.output}${runsOn ? "\n[runs on in the background]" : ""}`.trimStart();
      this.#emit({
        sessionUpdate: "tool_call_update",
        toolCallId,
        status: runsOn ? "completed" : "failed",
        ...(text ? { content: [{ type: "content", content: { type: "text", text } }] } : {}),
      });
    }
    this.#open.clear();
    if (this.#usage) this.#emit(this.#usage);
  }

  #chunk(
    sessionUpdate: "agent_message_chunk" | "agent_thought_chunk",
    messageId: string,
    text: string,
  ): void {
    if (text === "") return;
    this.#messageId = messageId;
    this.#emit({ sessionUpdate, content: { type: "text", text }, messageId });
  }

  #openCall(item: Item): void {
    if (!isTool(item) || this.#open.has(item.id)) return;
    if (item.type === "commandExecution") this.#commands.add(item.id);
    this.#open.set(item.id, { item, output: "", outputAt: Date.now(), pendingOutput: undefined });
    this.#emit({
      sessionUpdate: "tool_call",
      toolCallId: item.id,
      status: "in_progress",
      ...describeCall(item),
    });
  }

  /** Passes the newest output on, now or when the interval is over. */
  #output(toolCallId: string, delta: string): void {
    const call = this.#open.get(toolCallId);
    if (!call) return;
    call.output = (call.output + delta).slice(-MAX_RUNNING_OUTPUT);
    if (call.pendingOutput) return;
    const send = () => {
      call.pendingOutput = undefined;
      call.outputAt = Date.now();
      this.#emit({
        sessionUpdate: "tool_call_update",
        toolCallId,
        status: "in_progress",
        content: [{ type: "content", content: { type: "text", text: call.output } }],
      });
    };
    const wait = call.outputAt + OUTPUT_INTERVAL_MS - Date.now();
    if (wait <= 0) send();
    else call.pendingOutput = setTimeout(send, wait);
  }

  #closeCall(item: Item): void {
    if (!isTool(item)) return;
    // Some items come complete only.
    this.#openCall(item);
    clearTimeout(this.#open.get(item.id)?.pendingOutput);
    this.#open.delete(item.id);
    this.#emit({
      sessionUpdate: "tool_call_update",
      toolCallId: item.id,
      ...describeResult(item),
    });
  }
}
