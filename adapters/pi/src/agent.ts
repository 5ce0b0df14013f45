/** The agent side of ACP: its methods over the open sessions. */

import { statSync } from "node:fs";
import { cwdOf, PROTOCOL_VERSION, promptOf, sessionIdOf } from "./acp.js";
import { busy, ErrorCode, invalidParams, RpcError } from "./errors.js";
import type { Connection, Handlers } from "./protocol.js";
import { loadSdk, type Sdk, sdkVersion } from "./sdk.js";
import { Session } from "./session.js";
import { SessionFiles } from "./session-files.js";

export class Agent {
  readonly #connection: Connection;
  readonly #env: NodeJS.ProcessEnv;
  readonly #sdk: Promise<Sdk>;
  readonly #sessions = new Map<string, Session>();
  /** Stored sessions that are being opened, so that no file is opened twice. */
  readonly #opening = new Map<string, Promise<Session>>();

  constructor(connection: Connection, env: NodeJS.ProcessEnv) {
    this.#connection = connection;
    this.#env = env;
    this.#sdk = loadSdk();
    this.#sdk.catch(() => {}); // reported to whoever asks for a session
  }

  handlers(): Handlers {
    return {
      requests: {
        initialize: () => this.#initialize(),
        "session/new": (params) => this.#newSession(params),
        "session/load": (params) => this.#loadSession(params),
        "session/resume": (params) => this.#resumeSession(params),
        "session/close": (params) => this.#closeSession(params),
        "session/prompt": (params) => this.#prompt(params),
      },
      notifications: {
        "session/cancel": (params) => this.#session(params).cancel(),
      },
    };
  }

  /** Ends all turns and the processes that they run. */
  async close(): Promise<void> {
    await Promise.all([...this.#sessions.values()].map((session) => session.close()));
  }

  #initialize(): object {
    return {
      protocolVersion: PROTOCOL_VERSION,
      agentInfo: { name: "pi", title: "Pi", version: sdkVersion() },
      agentCapabilities: {
        loadSession: true,
        promptCapabilities: { image: true, audio: false, embeddedContext: true },
        mcpCapabilities: { http: false, sse: false },
        sessionCapabilities: { resume: {}, close: {} },
      },
      authMethods: [],
    };
  }

  async #newSession(params: unknown): Promise<object> {
    const cwd = existingDirectory(cwdOf(params));
    const files = await this.#files();
    const manager = files.create(cwd);
    try {
      const session = await this.#open(manager);
      await session.requireKey();
      this.#sessions.set(session.id, session);
      return { sessionId: session.id };
    } catch (error) {
      files.remove(manager);
      throw error;
    }
  }

  async #loadSession(params: unknown): Promise<object> {
    const session = await this.#reopen(params);
    await session.replay();
    return {};
  }

  async #resumeSession(params: unknown): Promise<object> {
    await this.#reopen(params);
    return {};
  }

  async #closeSession(params: unknown): Promise<object> {
    const session = this.#session(params);
    this.#sessions.delete(session.id);
    await session.close();
    return {};
  }

  async #prompt(params: unknown): Promise<object> {
    const session = this.#session(params);
    return { stopReason: await session.prompt(promptOf(params)) };
  }

  /** Opens a stored session. One that is open already stays open. */
  async #reopen(params: unknown): Promise<Session> {
    const sessionId = sessionIdOf(params);
    const cwd = existingDirectory(cwdOf(params));
    const opened = this.#sessions.get(sessionId);
    if (opened?.busy) throw busy(sessionId);
    if (opened) return opened;
    const opening = this.#opening.get(sessionId) ?? this.#openStored(sessionId, cwd);
    this.#opening.set(sessionId, opening);
    try {
      return await opening;
    } finally {
      this.#opening.delete(sessionId);
    }
  }

  async #openStored(sessionId: string, cwd: string): Promise<Session> {
    const files = await this.#files();
    const session = await this.#open(files.open(sessionId, cwd));
    this.#sessions.set(session.id, session);
    return session;
  }

  async #open(manager: ReturnType<SessionFiles["create"]>): Promise<Session> {
    const sdk = await this.#sdk;
    return await Session.open({ sdk, env: this.#env, manager, connection: this.#connection });
  }

  async #files(): Promise<SessionFiles> {
    return new SessionFiles(await this.#sdk, this.#env.AGENTVM_STATE_DIR);
  }

  #session(params: unknown): Session {
    const sessionId = sessionIdOf(params);
    const session = this.#sessions.get(sessionId);
    if (session) return session;
    throw new RpcError(ErrorCode.resourceNotFound, `Session not open: ${sessionId}`, {
      type: "session_not_found",
      sessionId,
    });
  }
}

function existingDirectory(cwd: string): string {
  if (!statSync(cwd, { throwIfNoEntry: false })?.isDirectory()) {
    throw invalidParams(`cwd is not a directory: ${cwd}`);
  }
  return cwd;
}
