/** The agent side of ACP: its methods over the open sessions. */

import { isDeepStrictEqual } from "node:util";
import { DEFAULT_MODE, modeOf, modeState } from "./modes.js";
import { programVersion } from "./program.js";
import { Session } from "./session.js";
import { SessionDirectory } from "./session-directory.js";
import { PROTOCOL_VERSION, promptOf, sessionIdOf } from "./shared/acp.js";
import { busy, notOpen } from "./shared/errors.js";
import type { Connection, Handlers } from "./shared/protocol.js";
import { type SessionSettings, sessionSettingsOf } from "./shared/settings.js";

export class Agent {
  readonly #connection: Connection;
  readonly #env: NodeJS.ProcessEnv;
  readonly #sessions = new Map<string, Session>();
  /** Stored sessions that are being opened, so that none is opened twice. */
  readonly #opening = new Map<string, Promise<Session>>();

  constructor(connection: Connection, env: NodeJS.ProcessEnv) {
    this.#connection = connection;
    this.#env = env;
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
        "session/set_mode": (params) => this.#setMode(params),
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
      agentInfo: { name: "amp", title: "Amp", version: programVersion(this.#env) },
      agentCapabilities: {
        loadSession: true,
        promptCapabilities: { image: true, audio: false, embeddedContext: true },
        mcpCapabilities: { http: true, sse: true },
        sessionCapabilities: { resume: {}, close: {} },
      },
      authMethods: [],
    };
  }

  async #newSession(params: unknown): Promise<object> {
    const settings = sessionSettingsOf(params);
    const directory = SessionDirectory.create(this.#env, { mode: DEFAULT_MODE });
    try {
      const session = await this.#open(directory, settings);
      return { sessionId: session.id, modes: modeState(session.mode) };
    } catch (error) {
      directory.remove();
      throw error;
    }
  }

  async #loadSession(params: unknown): Promise<object> {
    const session = await this.#reopen(params);
    await session.replay();
    return { modes: modeState(session.mode) };
  }

  async #resumeSession(params: unknown): Promise<object> {
    const session = await this.#reopen(params);
    return { modes: modeState(session.mode) };
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

  #setMode(params: unknown): object {
    this.#session(params).setMode(modeOf(params));
    return {};
  }

  /** Opens a stored session. One that is open already stays open, unless its settings are others. */
  async #reopen(params: unknown): Promise<Session> {
    const sessionId = sessionIdOf(params);
    const settings = sessionSettingsOf(params);
    const open = this.#sessions.get(sessionId);
    if (open?.busy) throw busy(sessionId);
    if (open && isDeepStrictEqual(open.settings, settings)) return open;
    const opening = this.#opening.get(sessionId) ?? this.#openStored(sessionId, settings, open);
    this.#opening.set(sessionId, opening);
    try {
      return await opening;
    } finally {
      this.#opening.delete(sessionId);
    }
  }

  async #openStored(
    sessionId: string,
    settings: SessionSettings,
    before: Session | undefined,
  ): Promise<Session> {
    const directory = SessionDirectory.open(this.#env, sessionId);
    if (before) {
      this.#sessions.delete(sessionId);
      await before.close();
    }
    return await this.#open(directory, settings);
  }

  async #open(directory: SessionDirectory, settings: SessionSettings): Promise<Session> {
    const [env, connection] = [this.#env, this.#connection];
    const session = await Session.open({ env, connection, directory, settings });
    this.#sessions.set(session.id, session);
    return session;
  }

  #session(params: unknown): Session {
    const sessionId = sessionIdOf(params);
    const session = this.#sessions.get(sessionId);
    if (session) return session;
    throw notOpen(sessionId);
  }
}
