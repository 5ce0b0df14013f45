/** The agent side of ACP: its methods over the threads of one `codex app-server`. */

import { AppServer } from "./app-server.js";
import type { Json, Model, Notification, Notifications, OpenedThread, Question } from "./codex.js";
import { prepareHome } from "./home.js";
import { mcpConfig } from "./mcp.js";
import { type Overrides, overridesOf, QUIET, toArguments } from "./overrides.js";
import { codexProgram, codexVersion } from "./program.js";
import { trustLevel } from "./project.js";
import { noKey, type Provider, providerOf, wholeNumber } from "./provider.js";
import { permissionsOf, Session } from "./session.js";
import { configChangeOf, modeIdOf, PROTOCOL_VERSION, promptOf, sessionIdOf } from "./shared/acp.js";
import { ErrorCode, notOpen, RpcError } from "./shared/errors.js";
import type { Connection, Handlers } from "./shared/protocol.js";
import { type SessionSettings, sessionSettingsOf } from "./shared/settings.js";

/** The parts of Codex's configuration that matter here. */
interface Config {
  developer_instructions: string | null;
  mcp_servers: Record<string, Json> | null;
  /** By directory; what the user has decided. */
  projects: Record<string, Json> | null;
}

export class Agent {
  /** Resolves, with a description, when Codex has ended though nobody has asked for that. */
  readonly lost: Promise<string>;
  readonly #connection: Connection;
  readonly #env: NodeJS.ProcessEnv;
  readonly #provider: Provider;
  readonly #server: AppServer;
  readonly #ready: Promise<void>;
  readonly #models: Promise<Model[]>;
  readonly #sessions = new Map<string, Session>();
  /** Threads of subagents, and the session that each works for. */
  readonly #children = new Map<string, string>();
  #closing = false;

  constructor(connection: Connection, env: NodeJS.ProcessEnv) {
    this.#connection = connection;
    this.#env = env;
    const home = prepareHome(env);
    const setup = setUp(env, home);
    this.#provider = setup.provider;
    this.#server = new AppServer({
      program: codexProgram(),
      args: toArguments(setup.overrides),
      env: { ...env, CODEX_HOME: home },
      onNotification: (method, params) => this.#observe({ method, params } as Notification),
      onRequest: (method, params) => this.#answer({ method, params } as Question),
    });
    this.lost = new Promise((resolve) => {
      void this.#server.ended.then((end) => this.#closing || resolve(end));
    });
    this.#ready = setup.problem ? Promise.reject(setup.problem) : this.#shakeHands();
    this.#models = this.#ready.then(() => this.#listModels());
    for (const begun of [this.#ready, this.#models]) {
      begun.catch(() => {}); // reported to whoever asks for a session
    }
  }

  handlers(): Handlers {
    return {
      requests: {
        initialize: () => this.#initialize(),
        "session/new": (params) => this.#newSession(params),
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

  /** Ends all turns, and Codex. */
  async close(): Promise<void> {
    this.#closing = true;
    await Promise.all([...this.#sessions.values()].map((session) => session.close()));
    await this.#server.close();
  }

  async #shakeHands(): Promise<void> {
    await this.#server.request("initialize", {
      clientInfo: { name: "agentvm", title: "agentvm", version: codexVersion() },
      capabilities: { experimentalApi: true, requestAttestation: false },
    });
    this.#server.notify("initialized");
  }

  async #listModels(): Promise<Model[]> {
    const params = { includeHidden: true, limit: 1000 };
    const { data } = await this.#server.request<{ data: Model[] }>("model/list", params);
    return data;
  }

  #initialize(): object {
    return {
      protocolVersion: PROTOCOL_VERSION,
      agentInfo: { name: "codex", title: "Codex", version: codexVersion() },
      agentCapabilities: {
        loadSession: false,
        promptCapabilities: { image: true, audio: false, embeddedContext: true },
        mcpCapabilities: { http: true, sse: false },
        sessionCapabilities: { resume: {}, close: {}, systemPrompt: {} },
      },
      authMethods: [],
    };
  }

  async #newSession(params: unknown): Promise<object> {
    const settings = sessionSettingsOf(params);
    const thread = await this.#openThread("thread/start", settings);
    // Codex keeps a thread from its first prompt on, or from when it has a name: without one, a
    // session that is closed before it is prompted could not be resumed.
    const threadId = thread.thread.id;
    await this.#server.request("thread/name/set", { threadId, name: "agentvm" });
    const session = await this.#open(settings, thread);
    return { sessionId: session.id, ...opened(session) };
  }

  async #resumeSession(params: unknown): Promise<object> {
    const threadId = sessionIdOf(params);
    if (this.#sessions.has(threadId)) {
      throw new RpcError(ErrorCode.invalidRequest, `Session ${threadId} is open already`);
    }
    const settings = sessionSettingsOf(params);
    const known = { threadId, excludeTurns: true };
    const thread = await this.#openThread("thread/resume", settings, known);
    return opened(await this.#open(settings, thread));
  }

  async #closeSession(params: unknown): Promise<object> {
    const session = this.#session(params);
    this.#sessions.delete(session.id);
    await session.close();
    await this.#server.request("thread/unsubscribe", { threadId: session.id });
    return {};
  }

  async #prompt(params: unknown): Promise<object> {
    const session = this.#session(params);
    return { stopReason: await session.prompt(promptOf(params)) };
  }

  #setConfigOption(params: unknown): object {
    const { configId, value } = configChangeOf(params);
    return { configOptions: this.#session(params).setConfigOption(configId, value) };
  }

  #setMode(params: unknown): object {
    this.#session(params).setMode(modeIdOf(params));
    return {};
  }

  async #openThread(
    method: "thread/start" | "thread/resume",
    settings: SessionSettings,
    known: Record<string, Json> = {},
  ): Promise<OpenedThread> {
    await this.#ready;
    if (this.#provider.id === undefined) await this.#requireLogin();
    const params = { ...known, ...(await this.#setup(settings)) };
    return await this.#server.request<OpenedThread>(method, params);
  }

  async #setup(settings: SessionSettings): Promise<Record<string, Json>> {
    const { cwd, instructions } = settings;
    const { config } = await this.#server.request<{ config: Config }>("config/read", { cwd });
    const startupSeconds = mcpStartupSeconds(this.#env);
    const taken = Object.keys(config.mcp_servers ?? {});
    const told = [config.developer_instructions, instructions].filter((text) => text);
    return {
      cwd,
      ...permissionsOf(settings),
      sandbox: "danger-full-access",
      ...(told.length > 0 ? { developerInstructions: told.join("\n\n") } : {}),
      config: {
        mcp_servers: mcpConfig(settings, this.#env, startupSeconds, taken),
        ...(config.projects?.[cwd]
          ? {}
          : { projects: { [cwd]: { trust_level: trustLevel(settings) } } }),
      },
    };
  }

  /** Throws `auth_required` if no prompt could succeed. */
  async #requireLogin(): Promise<void> {
    const { account, requiresOpenaiAuth } = await this.#server.request<{
      account: object | null;
      requiresOpenaiAuth: boolean;
    }>("account/read", { refreshToken: false });
    if (requiresOpenaiAuth && account === null) throw noKey();
  }

  async #open(settings: SessionSettings, thread: OpenedThread): Promise<Session> {
    const [server, connection, models] = [this.#server, this.#connection, await this.#models];
    const { retry } = this.#provider;
    const session = new Session({ server, connection, settings, retry, models, thread });
    this.#sessions.set(session.id, session);
    return session;
  }

  async #observe(notification: Notification): Promise<void> {
    const { method, params } = notification;
    if (method === "turn/started") this.#adopt(params);
    const { threadId } = (params ?? {}) as { threadId?: string | null };
    this.#sessionOf(threadId)?.observe(notification);
    await this.#connection.drained();
  }

  /** A subagent works in a thread of its own, for a turn of the session's. */
  #adopt({ threadId, turn: { rootTurnId } }: Notifications["turn/started"]): void {
    if (this.#sessions.has(threadId) || rootTurnId === null) return;
    for (const session of this.#sessions.values()) {
      if (session.isIn(rootTurnId)) this.#children.set(threadId, session.id);
    }
  }

  async #answer(question: Question): Promise<object> {
    const session = this.#sessionOf(question.params.threadId);
    if (session) return await session.answer(question);
    const message = `${question.method}: no session is open for this thread`;
    throw new RpcError(ErrorCode.invalidRequest, message);
  }

  #sessionOf(threadId: string | null | undefined): Session | undefined {
    if (!threadId) return undefined;
    return this.#sessions.get(this.#children.get(threadId) ?? threadId);
  }

  #session(params: unknown): Session {
    const sessionId = sessionIdOf(params);
    const session = this.#sessions.get(sessionId);
    if (session) return session;
    throw notOpen(sessionId);
  }
}

interface Setup {
  provider: Provider;
  overrides: Overrides;
  /** Of the environment. Codex is started all the same: there are requests to answer. */
  problem?: unknown;
}

function setUp(env: NodeJS.ProcessEnv, home: string): Setup {
  try {
    const provider = providerOf(env, home);
    return { provider, overrides: { ...QUIET, ...provider.overrides, ...overridesOf(env) } };
  } catch (problem) {
    const provider = { id: undefined, overrides: {}, retry: undefined };
    return { provider, overrides: QUIET, problem };
  }
}

/** What the answer says of an open session. */
function opened(session: Session): object {
  return { modes: session.modes(), configOptions: session.configOptions() };
}

function mcpStartupSeconds(env: NodeJS.ProcessEnv): number | undefined {
  const milliseconds = wholeNumber(env, "AGENTVM_MCP_TIMEOUT_MS");
  return milliseconds === undefined ? undefined : Math.max(1, Math.ceil(milliseconds / 1000));
}
