/**
 * 'Always' for every tool call. Claude Code offers it where it has a rule for it, and has none for the
 * likes of `touch`: there the same call is not asked about again while the session is open.
 */

import type { Message } from "./message.js";

const ALWAYS = {
  optionId: "agentvm-always",
  kind: "allow_always",
  name: "Yes, and don't ask again for the same call during this session",
};

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
    const options: Option[] = params.options;
    const once = options.find(({ kind }) => kind === "allow_once");
    const isSettled = options.some(({ kind }) => kind === ALWAYS.kind);
    // A plan is approved once, and what follows from it is another matter.
    if (!once || isSettled || params.toolCall.name === "ExitPlanMode") return { ask: message };
    const call = sameCall(params.toolCall);
    if (this.#allowed.has(call)) return { answer: selected(id, once) };
    this.#open.set(id, { call, once });
    const at = options.indexOf(once) + 1;
    return {
      ask: { ...message, params: { ...params, options: options.toSpliced(at, 0, ALWAYS) } },
    };
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

/** Without the model's words for it. */
function sameCall({ name, rawInput }: { name: string; rawInput: object }): string {
  return JSON.stringify([name, { ...rawInput, description: undefined }]);
}

function selected(id: Message["id"], { optionId }: Option): Message {
  return {
    jsonrpc: "2.0",
    id: id ?? null,
    result: { outcome: { outcome: "selected", optionId } },
  };
}
