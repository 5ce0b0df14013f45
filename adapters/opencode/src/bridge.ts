/**
 * Between a client and `opencode acp`: every line goes through as it is, but for what OpenCode's ACP
 * leaves out and its HTTP server tells. Those are retries of the model, the reason why a turn failed,
 * MCP servers that can't be used, permission requests of subagents (which would wait for ever), and
 * prompts that begin with a slash and are no command (which would vanish).
 */

import type { Readable, Writable } from "node:stream";
import {
  type ErrorObject,
  type ModelFailure,
  mcpFailure,
  missingKey,
  modelError,
  readModelFailure,
} from "./errors.js";
import { lines, writeLine } from "./lines.js";
import { sessionRules } from "./permissions.js";
import type { Server, ServerEvent } from "./server.js";
import { describe, ErrorCode } from "./shared/errors.js";
import { OPTIONS, toolCall } from "./subagents.js";

/** How often OpenCode repeats a model request, with 2 to 30 seconds between. */
const MAX_RETRIES = 5;

/** Of our own requests to the client: OpenCode's ids are numbers. */
const OWN_ID = "agentvm-";

/** How long a prompt with a slash waits for the list of commands, which follows `session/new`. */
const COMMANDS_GRACE_MS = 1000;

// biome-ignore lint/suspicious/noExplicitAny: messages of any shape
type Message = any;

interface Session {
  id: string;
  cwd: string;
  /** Of the agent that it runs, as OpenCode calls it: its mode. */
  mode?: string;
  /** Nothing answers prompts. */
  hasNoModel: boolean;
  /** Names without the slash, once they are known. */
  commands: Promise<Set<string>>;
  setCommands: (commands: Set<string>) => void;
  turn?: Turn;
}

interface Turn {
  /** Of the message that is being written. */
  messageId?: string;
  /** Why it was ended by us. */
  failure?: ModelFailure;
  /** OpenCode pauses before it repeats a request. */
  isPausing: boolean;
  isCancelled: boolean;
}

/** A request of the client whose answer has to be looked at. */
interface Asked {
  method: string;
  params: Message;
  turn?: Turn;
}

export interface BridgeOptions {
  server: Server;
  /** Of the client. */
  input: Readable;
  output: Writable;
  /** Of OpenCode. */
  child: { stdin: Writable; stdout: Readable };
  /** Whether the agent has to ask before it changes anything. */
  asks: boolean;
  /** Default: {@link MAX_RETRIES}, and not more. */
  maxRetries?: number | undefined;
}

export class Bridge {
  readonly #options: BridgeOptions;
  readonly #asked = new Map<unknown, Asked>();
  readonly #sessions = new Map<string, Session>();
  /** Sessions of subagents, with the one that started them. */
  readonly #parents = new Map<string, string>();
  /** Our own requests to the client. */
  readonly #waiting = new Map<unknown, (answer: Message) => void>();
  /** Whether the client writes files for its agents. */
  #clientWrites = false;
  #nextId = 1;

  constructor(options: BridgeOptions) {
    this.#options = options;
  }

  /** From the client to OpenCode, until the client closes its end. */
  async serveClient(): Promise<void> {
    const { input, child } = this.#options;
    for await (const line of lines(input)) {
      const message = parse(line);
      const own = this.#waiting.get(message?.id);
      if (own && message.method === undefined) {
        own(message);
        continue;
      }
      const changed = await this.#fromClient(message);
      if (changed !== undefined) await writeLine(child.stdin, changed ?? line);
    }
    child.stdin.end();
  }

  /** From OpenCode to the client, until OpenCode closes its end. */
  async serveAgent(): Promise<void> {
    const { output, child } = this.#options;
    for await (const line of lines(child.stdout)) {
      const message = parse(line);
      const asked = message?.method === undefined ? this.#asked.get(message?.id) : undefined;
      if (asked) {
        this.#asked.delete(message.id);
        await this.#answer(asked, message, line);
      } else {
        if (message?.method === "session/update") this.#observe(message.params);
        // It asks for an edit to be written that it writes itself, also where nobody has offered that.
        if (message?.method === WRITE && !this.#clientWrites) await this.#refuse(message);
        else await writeLine(output, line);
      }
    }
  }

  /** What OpenCode's server tells. */
  onEvent({ type, properties }: ServerEvent): void {
    if (type === "session.created") {
      const { id, parentID } = properties.info ?? {};
      if (parentID !== undefined) this.#parents.set(id, parentID);
    } else if (type === "session.status") {
      const { sessionID, status } = properties;
      const turn = this.#sessions.get(sessionID)?.turn;
      if (turn && status?.type !== "idle") turn.isPausing = status?.type === "retry";
      if (status?.type === "retry") void this.#onRetry(sessionID, status).catch(report);
    } else if (type === "permission.asked" && !this.#sessions.has(properties.sessionID)) {
      void this.#askForSubagent(properties).catch(report);
    }
  }

  /** The message to send instead; `null`: as it is; `undefined`: nothing. */
  async #fromClient(message: Message): Promise<string | null | undefined> {
    const { id, method, params } = message ?? {};
    if (method === "session/cancel") {
      const turn = this.#sessions.get(params?.sessionId)?.turn;
      if (turn) turn.isCancelled = true;
      return null;
    }
    if (id === undefined || method === undefined) return null;
    if (method === "initialize") {
      this.#clientWrites = params?.clientCapabilities?.fs?.writeTextFile === true;
    }
    if (method !== "session/prompt") {
      if (LOOKED_AT.has(method)) this.#asked.set(id, { method, params });
      return null;
    }
    const session = this.#sessions.get(params?.sessionId);
    if (!session) return null;
    if (session.hasNoModel) {
      await this.#send({ id, error: missingKey() });
      return undefined;
    }
    const turn: Turn = { isPausing: false, isCancelled: false };
    session.turn = turn;
    this.#asked.set(id, { method, params, turn });
    if (!(await isUnknownCommand(params.prompt, session))) return null;
    // A text for the user alone does not reach the model, and hides the slash from OpenCode.
    const hidden = { type: "text", text: "Not a command: ", annotations: { audience: ["user"] } };
    return JSON.stringify({
      ...message,
      params: { ...params, prompt: [hidden, ...params.prompt] },
    });
  }

  async #answer(asked: Asked, message: Message, line: Buffer): Promise<void> {
    let error: ErrorObject | undefined;
    try {
      error = asked.turn
        ? await this.#whyTurnFailed(asked, asked.turn, message)
        : message.error
          ? undefined
          : await this.#afterChange(asked, message.result);
    } catch (failed) {
      if (asked.turn) {
        report(failed);
      } else {
        // Without it, the session would not be what the client was promised.
        error = { code: ErrorCode.internalError, message: describe(failed) };
      }
    }
    const { turn } = asked;
    if (error) {
      await this.#send({ id: message.id, error });
    } else if (turn?.isCancelled && turn.isPausing && message.result) {
      // OpenCode calls that an ordinary end.
      await this.#send({ id: message.id, result: { ...message.result, stopReason: "cancelled" } });
    } else {
      await writeLine(this.#options.output, line);
    }
  }

  /** The error that is to be the answer to a prompt instead. */
  async #whyTurnFailed(
    { params }: Asked,
    turn: Turn,
    message: Message,
  ): Promise<ErrorObject | undefined> {
    const session = this.#sessions.get(params.sessionId);
    if (session?.turn === turn) delete session.turn;
    if (turn.failure && !turn.isCancelled) return modelError(turn.failure);
    if (!message.error || !session) return undefined;
    // OpenCode keeps of a failure the text only.
    const last = await this.#options.server.lastMessage(session.id, session.cwd);
    if (!last?.info.error) return undefined;
    return modelError(readModelFailure(last.info.error, last.info));
  }

  /** What has to be done after a success, before the client hears of it. */
  async #afterChange({ method, params }: Asked, result: Message): Promise<ErrorObject | undefined> {
    if (OPENING.has(method)) return await this.#opened(params, result);
    const session = this.#sessions.get(params.sessionId);
    if (!session) return undefined;
    const chosen =
      method === "session/set_mode"
        ? params.modeId
        : params.configId === "mode"
          ? params.value
          : undefined;
    if (typeof chosen === "string") {
      session.mode = chosen;
      await this.#applyRules(session);
    }
    return undefined;
  }

  async #opened(params: Message, result: Message): Promise<ErrorObject | undefined> {
    const { promise, resolve } = Promise.withResolvers<Set<string>>();
    const value = (id: string) =>
      result?.configOptions?.find((option: Message) => option.id === id)?.currentValue;
    const id: string = result?.sessionId ?? params.sessionId;
    const known = this.#sessions.get(id);
    const session: Session = {
      id,
      cwd: params.cwd,
      mode: value("mode"),
      hasNoModel: value("model") === "unknown/unknown",
      commands: known?.commands ?? promise,
      setCommands: known?.setCommands ?? resolve,
    };
    this.#sessions.set(id, session);
    await this.#applyRules(session);
    return await this.#failedServer(params);
  }

  async #applyRules({ id, cwd, mode }: Session): Promise<void> {
    if (!this.#options.asks) return;
    const { server } = this.#options;
    const agents = await server.agents(cwd);
    const agent = agents.find(({ name }) => name === mode);
    if (!agent) throw new Error(`OpenCode has no agent ${mode}, whose permissions could be set`);
    await server.addRules(id, cwd, sessionRules(agent, agents));
  }

  async #failedServer({ cwd, mcpServers }: Message): Promise<ErrorObject | undefined> {
    if (!Array.isArray(mcpServers) || mcpServers.length === 0) return undefined;
    const status = await this.#options.server.mcpStatus(cwd);
    for (const server of mcpServers) {
      const { status: state, error } = status[server.name] ?? { status: "not started" };
      if (state !== "connected") return mcpFailure(server, error ?? state);
    }
    return undefined;
  }

  /** Learns from an update of OpenCode. */
  #observe({ sessionId, update }: Message): void {
    if (update?.sessionUpdate === "available_commands_update") {
      const names = update.availableCommands?.map(({ name }: Message) => name);
      this.#sessions.get(sessionId)?.setCommands(new Set(names));
    } else if (update?.sessionUpdate === "agent_message_chunk") {
      const turn = this.#sessions.get(sessionId)?.turn;
      if (turn) turn.messageId = update.messageId;
    }
  }

  async #onRetry(
    sessionId: string,
    status: { attempt: number; message: string; next: number },
  ): Promise<void> {
    const session = await this.#rootOf(sessionId);
    const turn = session?.turn;
    if (!turn || turn.failure) return;
    const maxRetries = Math.min(this.#options.maxRetries ?? MAX_RETRIES, MAX_RETRIES);
    if (status.attempt > maxRetries) {
      turn.failure = { message: status.message };
      await this.#options.server.abort(session.id, session.cwd);
      return;
    }
    const isOwn = session.id === sessionId && turn.messageId !== undefined;
    await this.#send({
      method: "_agentvm/retry",
      params: {
        sessionId: session.id,
        attempt: status.attempt,
        maxAttempts: maxRetries,
        delayMs: Math.max(0, Math.round(status.next - Date.now())),
        ...(isOwn ? { discardedMessageId: turn.messageId } : {}),
        error: { message: status.message },
      },
    });
  }

  /** OpenCode asks its client for the sessions that the client opened, and for no others. */
  async #askForSubagent(asked: Message): Promise<void> {
    const session = await this.#rootOf(asked.sessionID);
    if (!session) return;
    const answer = await this.#ask("session/request_permission", {
      sessionId: session.id,
      toolCall: toolCall(asked),
      options: OPTIONS,
    });
    const { outcome, optionId } = answer.result?.outcome ?? {};
    const reply = outcome === "selected" ? optionId : "reject";
    await this.#options.server.answerPermission(asked.id, session.cwd, reply);
  }

  async #refuse({ id, method }: Message): Promise<void> {
    const error = { code: ErrorCode.methodNotFound, message: `Method not found: ${method}` };
    await writeLine(this.#options.child.stdin, JSON.stringify({ jsonrpc: "2.0", id, error }));
  }

  /** The session of the client in which something happens. */
  async #rootOf(id: string): Promise<Session | undefined> {
    for (let at: string | undefined = id; at !== undefined; ) {
      const session = this.#sessions.get(at);
      if (session) return session;
      const cwd = [...this.#sessions.values()][0]?.cwd ?? process.cwd();
      const parent: string | undefined =
        this.#parents.get(at) ?? (await this.#options.server.parentOf(at, cwd));
      if (parent !== undefined) this.#parents.set(at, parent);
      at = parent;
    }
    return undefined;
  }

  async #ask(method: string, params: object): Promise<Message> {
    const id = `${OWN_ID}${this.#nextId++}`;
    const { promise, resolve } = Promise.withResolvers<Message>();
    this.#waiting.set(id, resolve);
    try {
      await this.#send({ id, method, params });
      return await promise;
    } finally {
      this.#waiting.delete(id);
    }
  }

  async #send(message: object): Promise<void> {
    await writeLine(this.#options.output, JSON.stringify({ jsonrpc: "2.0", ...message }));
  }
}

const WRITE = "fs/write_text_file";
const OPENING = new Set(["session/new", "session/load", "session/resume"]);
const LOOKED_AT = new Set([...OPENING, "session/set_mode", "session/set_config_option"]);

/** Whether OpenCode would take the prompt for a command that it has not. */
async function isUnknownCommand(prompt: Message, { commands }: Session): Promise<boolean> {
  if (!Array.isArray(prompt)) return false;
  const texts = prompt.filter(({ type }) => type === "text").map(({ text }) => text);
  const name = /^\s*\/(\S*)/.exec(texts.join(""))?.[1];
  if (name === undefined) return false;
  const { promise: late, resolve } = Promise.withResolvers<Set<string>>();
  const timer = setTimeout(() => resolve(new Set()), COMMANDS_GRACE_MS);
  const known = await Promise.race([commands, late]);
  clearTimeout(timer);
  return name !== "compact" && !known.has(name);
}

function parse(line: Buffer): Message {
  try {
    const message: unknown = JSON.parse(line.toString());
    return typeof message === "object" && message !== null ? message : undefined;
  } catch {
    return undefined; // no protocol: for whoever reads it to say so
  }
}

function report(error: unknown): void {
  process.stderr.write(`${describe(error)}\n`);
}
