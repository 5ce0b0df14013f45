/** The agent side of ACP: its methods over the open sessions. */

import { isDeepStrictEqual } from "node:util";
import { loadSdk, type Sdk, sdkVersion } from "./sdk.js";
import { Session } from "./session.js";
import { SessionFiles } from "./session-files.js";
import { configChangeOf, modeIdOf, PROTOCOL_VERSION, promptOf, sessionIdOf } from "./shared/acp.js";
import { busy, notOpen } from "./shared/errors.js";
import type { Connection, Handlers } from "./shared/protocol.js";
import { type SessionSettings, sessionSettingsOf } from "./shared/settings.js";

export class Agent {
  readonly #connection: Connection;
  readonly #env: NodeJS.ProcessEnv;
  readonly #sdk: Promise<Sdk>;
  readonly #sessions = new Map<string, Session>();
  /** Stored sessions that are being opened, so that no file is opened twice. */
  readonly #opening = new Map<string, Promise<Session>>();
  /** All that are being made or opened. */
  readonly #starting = new Set<Promise<Session>>();

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
        "session/set_config_option": (params) => this.#setConfigOption(params),
        "session/set_mode": (params) => this.#setMode(params),
      },
      notifications: {
        "session/cancel": (params) => this.#session(params).cancel(),
      },
    };
  }

  /** Ends all turns and the processes that they run. */
  async close(): Promise<void> {
    // Pi has locks of files while it opens one.
    await Promise.allSettled(this.#starting);
    await Promise.all([...this.#sessions.values()].map((session) => session.close()));
  }

  #initialize(): object {
    return {
      protocolVersion: PROTOCOL_VERSION,
      agentInfo: { name: "pi", title: "Pi", version: sdkVersion() },
      agentCapabilities: {
        loadSession: true,
        promptCapabilities: { image: true, audio: false, embeddedContext: true },
        mcpCapabilities: { http: true, sse: true },
        sessionCapabilities: { resume: {}, close: {}, systemPrompt: {} },
      },
      authMethods: [],
    };
  }

  async #newSession(params: unknown): Promise<object> {
    const settings = sessionSettingsOf(params);
    const files = await this.#files();
    const manager = files.create(settings.cwd);
    let session: Session | undefined;
    try {
      session = await this.#open(manager, settings);
      await session.requireKey();
    } catch (error) {
      await session?.close();
      files.remove(manager);
      throw error;
    }
    this.#sessions.set(session.id, session);
    return { sessionId: session.id, ...opened(session) };
  }

  async #loadSession(params: unknown): Promise<object> {
    const session = await this.#reopen(params);
    await session.replay();
    return opened(session);
  }

  async #resumeSession(params: unknown): Promise<object> {
    return opened(await this.#reopen(params));
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

  async #setConfigOption(params: unknown): Promise<object> {
    const { configId, value } = configChangeOf(params);
    return { configOptions: await this.#session(params).setConfigOption(configId, value) };
  }

  #setMode(params: unknown): object {
    this.#session(params).setMode(modeIdOf(params));
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
    if (before) {
      this.#sessions.delete(sessionId);
      await before.close();
    }
    const files = await this.#files();
    const session = await this.#open(files.open(sessionId, settings.cwd), settings);
    this.#sessions.set(session.id, session);
    return session;
  }

  async #open(
    manager: ReturnType<SessionFiles["create"]>,
    settings: SessionSettings,
  ): Promise<Session> {
    const [sdk, env, connection] = [await this.#sdk, this.#env, this.#connection];
    const opening = Session.open({ sdk, env, manager, connection, settings });
    this.#starting.add(opening);
    try {
      return await opening;
    } finally {
      this.#starting.delete(opening);
    }
  }

  async #files(): Promise<SessionFiles> {
    return new SessionFiles(await this.#sdk, this.#env.AGENTVM_STATE_DIR);
  }

  #session(params: unknown): Session {
    const sessionId = sessionIdOf(params);
    const session = this.#sessions.get(sessionId);
    if (session) return session;
    throw notOpen(sessionId);
  }
}

/** What the answer says of an open session. Its commands follow the answer. */
function opened(session: Session): object {
  setImmediate(() => session.announceCommands());
  return { modes: session.modes(), configOptions: session.configOptions() };
}
