/** Between the client and Claude Code's adapter: what passes, and what becomes of it. */

import type { ClaudeAcpAgent } from "@agentclientprotocol/claude-agent-acp/dist/acp-agent.js";
import { allConnected } from "./mcp.js";
import type { Message } from "./message.js";
import { metaOf } from "./options.js";
import { Permissions } from "./permissions.js";
import { type Failure, ModelRequests } from "./retries.js";
import { describe, ErrorCode, RpcError } from "./shared/errors.js";

/** Requests that open a conversation. */
const OPENING = new Set(["session/new", "session/load", "session/resume"]);

/** Updates that the answer to such a request makes superfluous. */
const SETTINGS = new Set(["current_mode_update", "config_option_update"]);

/** Claude Code's name for 'ask before everything that changes something', and for 'never ask'. */
const ASK = "default";
const NEVER_ASK = "bypassPermissions";

/** Modes in which something is done without a question: not for who wants to be asked. */
const UNASKED = new Set([NEVER_ASK, "acceptEdits", "auto"]);

type Agent = Pick<ClaudeAcpAgent, "sessions" | "setSessionMode" | "closeSession">;
type RpcErrorObject = NonNullable<Message["error"]>;
type Send = (message: Message) => void | Promise<void>;

export class Bridge {
  readonly #agent: () => Agent;
  readonly #toClient: Send;
  readonly #toAgent: Send;
  /** Ids of the client's requests that are not answered yet. */
  readonly #pending = new Set<unknown>();
  /** Requests that open a conversation, by JSON-RPC id. */
  readonly #openings = new Map<unknown, Message>();
  /** Session of each prompt, by JSON-RPC id. */
  readonly #prompts = new Map<unknown, string>();
  /** Sessions whose opening is not answered yet. */
  readonly #beingOpened = new Set<string>();
  readonly #open = new Set<string>();
  readonly #modelRequests = new Map<string, ModelRequests>();
  readonly #permissions = new Map<string, Permissions>();
  /** Sessions whose client wants to be asked. */
  readonly #asking = new Set<string>();
  /** Session of each permission request, by its JSON-RPC id. */
  readonly #asked = new Map<unknown, string>();

  constructor(agent: () => Agent, toClient: Send, toAgent: Send) {
    this.#agent = agent;
    this.#toClient = toClient;
    this.#toAgent = toAgent;
  }

  /** A message of the client. */
  async fromClient(message: Message): Promise<void> {
    const { id, method, params } = message;
    if (method === undefined) {
      const asking = this.#asked.get(id);
      this.#asked.delete(id);
      const permissions = asking === undefined ? undefined : this.#permissions.get(asking);
      await this.#toAgent(permissions?.answer(message) ?? message);
      return;
    }
    if (id !== undefined) this.#pending.add(id);
    if (method === "initialize") {
      // Otherwise a warning is a piece of the answer's text.
      const { session, ...capabilities } = params.clientCapabilities ?? {};
      params.clientCapabilities = { ...capabilities, session: { ...session, notices: {} } };
    } else if (OPENING.has(method)) {
      params._meta = { ...params._meta, claudeCode: metaOf(policyOf(params), process.env) };
      this.#openings.set(id, message);
    } else if (method === "session/prompt") {
      this.#prompts.set(id, params.sessionId);
      this.#requestsOf(params.sessionId).failure = undefined;
    } else if (method === "session/close") {
      this.#open.delete(params.sessionId);
      this.#permissions.delete(params.sessionId);
    }
    const mode = modeOf(message);
    if (mode !== undefined && UNASKED.has(mode) && this.#asking.has(params.sessionId)) {
      const problem = `${mode} acts without asking, which the session's permission policy rules out`;
      const error = { code: ErrorCode.invalidParams, message: problem };
      await this.#respond({ jsonrpc: "2.0", id: id ?? null, error });
      return;
    }
    await this.#toAgent(message);
  }

  /** A message of the adapter. */
  async fromAgent(message: Message): Promise<void> {
    if (message.method === undefined) {
      await this.#answer(message);
    } else if (message.method === "_claude/sdkMessage") {
      const { sessionId, message: sdkMessage } = message.params;
      const retry = this.#requestsOf(sessionId).observe(sdkMessage);
      if (retry) await this.#notify("_agentvm/retry", { sessionId, ...retry });
    } else if (message.method === "session/request_permission") {
      await this.#ask(message);
    } else if (!this.#isSuperfluous(message)) {
      await this.#toClient(message);
    }
  }

  /**
   * Whether the program `claude` of an open session has ended. The adapter refuses all further prompts then,
   * whereas a client resumes the sessions of an agent whose whole process has ended.
   */
  hasLost(): boolean {
    const { sessions } = this.#agent();
    const isLost = (id: string) => sessions[id] === undefined || sessions[id].queryClosed === true;
    return this.#pending.size === 0 && [...this.#open].some(isLost);
  }

  async #answer(message: Message): Promise<void> {
    const { id, error } = message;
    const opening = this.#openings.get(id);
    const prompted = this.#prompts.get(id);
    this.#openings.delete(id);
    this.#prompts.delete(id);
    if (opening && !error) {
      // What it waits for needs messages that come after this one.
      void this.#finishOpening(opening, message);
      return;
    }
    if (error && this.#isLastWord(id)) return;
    const failure = prompted === undefined ? undefined : this.#requestsOf(prompted).failure;
    await this.#respond(error ? { ...message, error: explain(error, failure) } : message);
  }

  /** That the process ends says more than an error of a session that is no use any more. */
  #isLastWord(id: Message["id"]): boolean {
    this.#pending.delete(id);
    return this.hasLost();
  }

  async #respond(answer: Message): Promise<void> {
    await this.#toClient(answer);
    this.#pending.delete(answer.id);
  }

  async #ask(message: Message): Promise<void> {
    const { sessionId } = message.params;
    const permissions = memo(this.#permissions, sessionId, () => new Permissions());
    const request = permissions.request(message);
    if ("answer" in request) {
      await this.#toAgent(request.answer);
      return;
    }
    this.#asked.set(message.id, sessionId);
    await this.#toClient(request.ask);
  }

  async #finishOpening(opening: Message, answer: Message): Promise<void> {
    const { id, result } = answer;
    const { method, params } = opening;
    const sessionId: string = result.sessionId ?? params.sessionId;
    this.#beingOpened.add(sessionId);
    try {
      await allConnected(this.#session(sessionId), params.mcpServers ?? []);
      if (method === "session/new") await this.#chooseMode(sessionId, params);
      const { modes, configOptions } = this.#session(sessionId);
      const asks = policyOf(params) !== "allow";
      if (asks) this.#asking.add(sessionId);
      const availableModes = modes.availableModes.filter(({ id }) => !(asks && UNASKED.has(id)));
      const opened = { ...result, modes: { ...modes, availableModes }, configOptions };
      this.#open.add(sessionId);
      await this.#respond({ jsonrpc: "2.0", id: id ?? null, result: opened });
    } catch (problem) {
      await this.#agent().closeSession({ sessionId });
      await this.#respond({ jsonrpc: "2.0", id: id ?? null, error: rpcError(problem) });
    } finally {
      this.#beingOpened.delete(sessionId);
    }
  }

  /**
   * The mode of a new session follows its permission policy, not the settings files that lie about: left
   * to itself Claude Code begins in `auto`, where a model judges what is allowed.
   */
  async #chooseMode(sessionId: string, params: Message["params"]): Promise<void> {
    const { modes } = this.#session(sessionId);
    // Settings may forbid it; then the client answers what is asked.
    const offered = modes.availableModes.some(({ id }) => id === NEVER_ASK);
    const modeId = policyOf(params) === "allow" && offered ? NEVER_ASK : ASK;
    if (modes.currentModeId !== modeId) await this.#agent().setSessionMode({ sessionId, modeId });
  }

  #session(sessionId: string) {
    const session = this.#agent().sessions[sessionId];
    if (!session) throw new RpcError(ErrorCode.internalError, "The session was closed meanwhile");
    return session;
  }

  #isSuperfluous({ method, params }: Message): boolean {
    if (method !== "session/update" || !this.#beingOpened.has(params.sessionId)) return false;
    return SETTINGS.has(params.update.sessionUpdate);
  }

  #requestsOf(sessionId: string): ModelRequests {
    return memo(this.#modelRequests, sessionId, () => new ModelRequests());
  }

  async #notify(method: string, params: object): Promise<void> {
    await this.#toClient({ jsonrpc: "2.0", method, params });
  }
}

/** What a request wants the mode to be. */
function modeOf({ method, params }: Message): string | undefined {
  if (method === "session/set_mode") return params.modeId;
  const isMode = method === "session/set_config_option" && params.configId === "mode";
  return isMode ? params.value : undefined;
}

function policyOf(params: Message["params"]): unknown {
  return params._meta?.agentvm?.permissionPolicy ?? "ask";
}

/** The adapter's error, with what is known of the model request that failed, if one did. */
function explain(error: RpcErrorObject, failure: Failure | undefined): RpcErrorObject {
  if (error.code === ErrorCode.authRequired && failure?.status === undefined) {
    // No service has refused it: it has asked none.
    const said = failure?.message ?? error.message;
    const message = `no key: set ANTHROPIC_API_KEY in the session's env (Claude Code says: ${said})`;
    return { ...error, message };
  }
  if (!failure) return error;
  const refused = failure.status === 401 || failure.status === 403;
  const status = failure.status === undefined ? "" : ` (HTTP ${failure.status})`;
  return {
    code: refused ? ErrorCode.authRequired : error.code,
    message: `The model request failed${status}: ${failure.message}`,
    data: failure,
  };
}

function memo<K, V>(map: Map<K, V>, key: K, make: () => V): V {
  let value = map.get(key);
  if (value === undefined) {
    value = make();
    map.set(key, value);
  }
  return value;
}

function rpcError(problem: unknown): RpcErrorObject {
  if (!(problem instanceof RpcError)) {
    return { code: ErrorCode.internalError, message: describe(problem) };
  }
  const { code, message, data } = problem;
  return data === undefined ? { code, message } : { code, message, data };
}
