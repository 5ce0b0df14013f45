/**
 * 'Always' for every tool call, while the session is open. Claude Code's own option for it, if there is
 * one, writes a rule into the project's settings, where it counts in all sessions and for good; only its
 * rules for reading and editing files are kept in memory.
 */

import type { Message } from "./message.js";

const ALWAYS = { optionId: "agentvm-always", kind: "allow_always" };

/** Tools whose rules Claude Code keeps in memory. */
const OF_FILES = new Set(["Read", "Glob", "Grep", "Edit", "Write", "NotebookEdit"]);

interface Option {
  optionId: string;
  kind: string;
}

/** Of one session. */
export class Permissions {
  readonly #allowed = new Set<string>();
  /** Requests that got the option, by JSON-RPC id. */
  readonly #open = new Map<unknown, { call: string; once: Option }>();

  /** What to send to the client, or an answer that the agent has already. */
  request(message: Message): { ask: Message } | { answer: Message } {
    const { id, params } = message;
    const { toolCall } = params;
    // A plan is approved once, and what follows from it is another matter.
    if (toolCall.name === "ExitPlanMode") return { ask: message };
    const offered: Option[] = params.options;
    const once = offered.find(({ kind }) => kind === "allow_once");
    const hasRule = offered.some(({ kind }) => kind === ALWAYS.kind);
    if (!once || (hasRule && OF_FILES.has(toolCall.name))) return { ask: message };
    const call = sameCall(toolCall);
    if (this.#allowed.has(call)) return { answer: selected(id, once) };
    this.#open.set(id, { call, once });
    const options = offered.filter(({ kind }) => kind !== ALWAYS.kind);
    const always = {
      ...ALWAYS,
      name: `Yes, and don't ask again for ${scope(toolCall)} during this session`,
    };
    options.splice(options.indexOf(once) + 1, 0, always);
    return { ask: { ...message, params: { ...params, options } } };
  }

  /** The client's answer, in options that the agent knows; the same message if it is about another. */
  answer(message: Message): Message {
    const asked = this.#open.get(message.id);
    this.#open.delete(message.id);
    if (!asked || message.result?.outcome?.optionId !== ALWAYS.optionId) return message;
    this.#allowed.add(asked.call);
    return selected(message.id, asked.once);
  }
}

interface ToolCall {
  name: string;
  rawInput: object;
}

/** A tool of an MCP server is allowed as such, as Claude Code has it too; of others, the same call. */
function sameCall(toolCall: ToolCall): string {
  const { name, rawInput } = toolCall;
  if (isMcp(toolCall)) return JSON.stringify([name]);
  // Without the model's words for it.
  return JSON.stringify([name, { ...rawInput, description: undefined }]);
}

function scope(toolCall: ToolCall): string {
  return isMcp(toolCall) ? toolCall.name : "the same call";
}

function isMcp({ name }: ToolCall): boolean {
  return name.startsWith("mcp__");
}

function selected(id: Message["id"], { optionId }: Option): Message {
  return {
    jsonrpc: "2.0",
    id: id ?? null,
    result: { outcome: { outcome: "selected", optionId } },
  };
}
