/** Asks the client before a tool changes something. */

import type { ToolCallFields } from "./acp.js";
import { describe } from "./errors.js";
import type { Connection } from "./protocol.js";
import type { PermissionPolicy } from "./settings.js";

export interface GuardedCall {
  toolCallId: string;
  name: string;
  args: unknown;
  /**
   * What an answer "always" holds for, as nothing else is called. Default: `name`. `null`: the tool is
   * not known, and there is no "always".
   */
  scope?: string | null;
}

function optionsFor({ name }: GuardedCall, scope: string | null): object[] {
  const always = `Always allow ${name} in this session, whatever it is called with`;
  return [
    { optionId: "allow_once", name: "Allow", kind: "allow_once" },
    ...(scope === null ? [] : [{ optionId: "allow_always", name: always, kind: "allow_always" }]),
    { optionId: "reject_once", name: "Reject", kind: "reject_once" },
  ];
}

/** How a call looks to the client. */
export type DescribeCall = (name: string, args: unknown) => { title: string } & ToolCallFields;

export class Permissions {
  readonly #connection: Connection;
  readonly #sessionId: string;
  readonly #describe: DescribeCall;
  readonly #asks: boolean;
  /** Scopes that need no more asking while the session is open. */
  readonly #always = new Set<string>();

  constructor(
    connection: Connection,
    sessionId: string,
    policy: PermissionPolicy,
    describe: DescribeCall,
  ) {
    this.#connection = connection;
    this.#sessionId = sessionId;
    this.#describe = describe;
    // With "reject" the client refuses: it is the one that records what was decided.
    this.#asks = policy !== "allow";
  }

  /** Why the call must not run; undefined if it may. */
  async refusal(call: GuardedCall, signal?: AbortSignal): Promise<string | undefined> {
    const { scope = call.name } = call;
    if (!this.#asks || (scope !== null && this.#always.has(scope))) return undefined;
    let answer: unknown;
    try {
      answer = await this.#ask(call, scope, signal);
    } catch (error) {
      if (signal?.aborted) return "Cancelled";
      return `Not executed: permission could not be asked for: ${describe(error)}`;
    }
    const { outcome } = (answer ?? {}) as { outcome?: { outcome?: unknown; optionId?: unknown } };
    if (outcome?.outcome === "cancelled") return "Cancelled";
    switch (outcome?.outcome === "selected" ? outcome.optionId : undefined) {
      case "allow_once":
        return undefined;
      case "allow_always":
        if (scope === null) break; // was not offered
        this.#always.add(scope);
        return undefined;
      case "reject_once":
        return `Not executed: the user did not allow this use of ${call.name}.`;
      default:
        break;
    }
    return `Not executed: the answer to the permission request was ${JSON.stringify(answer)}`;
  }

  async #ask(call: GuardedCall, scope: string | null, signal?: AbortSignal): Promise<unknown> {
    const { toolCallId, name, args } = call;
    const described = this.#describe(name, args);
    return await this.#connection.request(
      "session/request_permission",
      {
        sessionId: this.#sessionId,
        toolCall: { toolCallId, name, status: "pending", ...described },
        options: optionsFor(call, scope),
      },
      signal,
    );
  }
}
