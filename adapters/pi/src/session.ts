/** One Pi session and its turns. */

import type {
  AgentSession,
  AgentSessionEvent,
  CreateAgentSessionOptions,
  SessionManager,
} from "@earendil-works/pi-coding-agent";
import { availableCommands } from "./commands.js";
import { Configuration } from "./configuration.js";
import type { McpServers } from "./mcp.js";
import { modelError, readModelFailure } from "./model-failure.js";
import { applyRetryLimits, createModelRuntime, requireKey, wholeNumber } from "./models.js";
import { Modes, type ModesState } from "./modes.js";
import { toPiPrompt } from "./prompt.js";
import { replay } from "./replay.js";
import type { Sdk } from "./sdk.js";
import type { ConfigOption, ContentBlock, SessionUpdate, StopReason } from "./shared/acp.js";
import { busy, describe } from "./shared/errors.js";
import { Permissions } from "./shared/permissions.js";
import type { Connection } from "./shared/protocol.js";
import type { SessionSettings } from "./shared/settings.js";
import { describeToolCall, READING_TOOLS } from "./tools.js";
import { TurnTranslator } from "./translate.js";

type AssistantMessage = Extract<
  Extract<AgentSessionEvent, { type: "message_end" }>["message"],
  { role: "assistant" }
>;

interface Turn {
  translator: TurnTranslator;
  cancelled: boolean;
  lastAnswer: AssistantMessage | undefined;
}

type BeforeToolCall = NonNullable<AgentSession["agent"]["beforeToolCall"]>;

/** A server of `npx` is first downloaded. */
const MCP_TIMEOUT_MS = 120_000;

export interface SessionOptions {
  sdk: Sdk;
  env: NodeJS.ProcessEnv;
  manager: SessionManager;
  connection: Connection;
  settings: SessionSettings;
}

export class Session {
  readonly id: string;
  readonly settings: SessionSettings;
  readonly #pi: AgentSession;
  readonly #mcp: McpServers | undefined;
  readonly #env: NodeJS.ProcessEnv;
  readonly #connection: Connection;
  readonly #permissions: Permissions;
  readonly #configuration: Configuration;
  readonly #modes: Modes;
  #turn: Turn | undefined;

  private constructor(pi: AgentSession, mcp: McpServers | undefined, options: SessionOptions) {
    const { env, connection, settings } = options;
    this.id = pi.sessionId;
    this.settings = settings;
    this.#pi = pi;
    this.#mcp = mcp;
    this.#env = env;
    this.#connection = connection;
    const cwd = pi.sessionManager.getCwd();
    this.#permissions = new Permissions(
      connection,
      this.id,
      settings.permissionPolicy,
      (name, args) => describeToolCall(name, args, cwd),
    );
    this.#modes = new Modes(pi);
    this.#configuration = new Configuration(pi, (configOptions) =>
      this.#update({ sessionUpdate: "config_option_update", configOptions }),
    );
    pi.subscribe((event) => this.#onEvent(event));
    // Unlike those of `pi.subscribe`, these listeners are awaited: Pi does not read on from the
    // model, and does not start a tool, before they are done.
    pi.agent.subscribe(async (event) => {
      if (event.type === "agent_start" && this.#turn?.cancelled) void this.#abort();
      await connection.drained();
    });
    const byExtensions = pi.agent.beforeToolCall;
    pi.agent.beforeToolCall = async (call, signal) => {
      // First the extensions, which may change the input: what is asked about is what will run.
      const decided = await byExtensions?.(call, signal);
      return decided?.block ? decided : await this.#beforeToolCall(call, signal);
    };
  }

  static async open(options: SessionOptions): Promise<Session> {
    const { env, settings } = options;
    const connecting = connectMcp(settings, env);
    try {
      const pi = await createPiSession(options, connecting);
      const session = new Session(pi, await connecting, options);
      await pi.bindExtensions({
        mode: "print",
        onError: ({ extensionPath, error }) =>
          process.stderr.write(`extension ${extensionPath}: ${error}\n`),
      });
      return session;
    } catch (error) {
      await connecting?.then((mcp) => mcp.close()).catch(() => {}); // it has failed by itself
      throw error;
    }
  }

  get busy(): boolean {
    return this.#turn !== undefined;
  }

  /** Throws `auth_required` if no prompt could succeed. */
  async requireKey(): Promise<void> {
    await requireKey(this.#pi, this.#env);
  }

  /** For the answer to the request that has opened the session. */
  configOptions(): ConfigOption[] {
    return this.#configuration.report();
  }

  async setConfigOption(configId: string, value: unknown): Promise<ConfigOption[]> {
    return await this.#configuration.set(configId, value);
  }

  modes(): ModesState {
    return this.#modes.report();
  }

  setMode(modeId: string): void {
    this.#modes.set(modeId);
  }

  announceCommands(): void {
    const commands = availableCommands(this.#pi);
    if (commands.length === 0) return;
    this.#update({ sessionUpdate: "available_commands_update", availableCommands: commands });
  }

  async replay(): Promise<void> {
    const { sessionManager } = this.#pi;
    for (const update of replay(sessionManager.getBranch(), sessionManager.getCwd())) {
      this.#update(update);
      await this.#connection.drained();
    }
  }

  async prompt(blocks: ContentBlock[]): Promise<StopReason> {
    if (this.#turn) throw busy(this.id);
    const cwd = this.#pi.sessionManager.getCwd();
    const translator = new TurnTranslator(cwd, (update) => this.#update(update));
    const turn: Turn = { translator, cancelled: false, lastAnswer: undefined };
    this.#turn = turn;
    try {
      const { text, images } = toPiPrompt(blocks);
      await this.requireKey();
      if (!turn.cancelled) await this.#pi.prompt(text, { images, source: "rpc" });
      this.#reportUsage();
      return stopReason(turn);
    } catch (error) {
      if (turn.cancelled) return "cancelled";
      throw error;
    } finally {
      translator.abandonCalls(turn.cancelled ? "Cancelled" : "Not executed");
      this.#configuration.announce(); // a command or an extension may have changed the model
      this.#turn = undefined;
    }
  }

  /** The pending {@link prompt} answers `cancelled` once everything of the turn has ended. */
  async cancel(): Promise<void> {
    if (!this.#turn) return;
    this.#turn.cancelled = true;
    await this.#abort();
  }

  /** Ends the turn, if one is running, and MCP servers; lets extensions put away what they hold. */
  async close(): Promise<void> {
    await this.cancel();
    try {
      await this.#pi.extensionRunner.emit({ type: "session_shutdown", reason: "quit" });
      this.#pi.dispose();
    } finally {
      await this.#mcp?.close();
    }
  }

  async #abort(): Promise<void> {
    try {
      await this.#pi.abort();
    } catch (error) {
      process.stderr.write(`abort: ${describe(error)}\n`);
    }
  }

  async #beforeToolCall(
    { toolCall: { id: toolCallId, name }, args }: Parameters<BeforeToolCall>[0],
    signal: AbortSignal | undefined,
  ): ReturnType<BeforeToolCall> {
    if (!this.#onlyReads(name)) {
      if (this.#modes.isPlan) return { block: true, reason: "Not executed: the mode is plan" };
      await this.#connection.drained();
      const scope = this.#mcp?.originOf(name) ?? name;
      const reason = await this.#permissions.refusal({ toolCallId, name, args, scope }, signal);
      if (reason !== undefined) return { block: true, reason };
    }
    await this.#turn?.translator.startCall(toolCallId);
    return undefined;
  }

  #onlyReads(name: string): boolean {
    const tool = this.#pi.getAllTools().find((candidate) => candidate.name === name);
    return READING_TOOLS.has(name) && tool?.sourceInfo.source === "builtin";
  }

  #reportUsage(): void {
    const context = this.#pi.getContextUsage();
    if (!context || context.tokens === null) return;
    this.#update({
      sessionUpdate: "usage_update",
      used: context.tokens,
      size: context.contextWindow,
      cost: { amount: this.#pi.getSessionStats().cost, currency: "USD" },
    });
  }

  #onEvent(event: AgentSessionEvent): void {
    if (event.type === "thinking_level_changed") this.#configuration.announce();
    const turn = this.#turn;
    if (!turn) return; // Pi works only within a prompt; what an extension does alone is not shown
    if (event.type === "message_end" && event.message.role === "assistant") {
      turn.lastAnswer = event.message;
    }
    if (event.type === "auto_retry_start") this.#announceRetry(event, turn);
    turn.translator.translate(event);
  }

  #announceRetry(
    event: Extract<AgentSessionEvent, { type: "auto_retry_start" }>,
    { translator, lastAnswer }: Turn,
  ): void {
    const { messageId } = translator;
    translator.abandonCalls("The answer broke off and is repeated");
    this.#connection.notify("_agentvm/retry", {
      sessionId: this.id,
      attempt: event.attempt,
      maxAttempts: event.maxAttempts,
      delayMs: event.delayMs,
      ...(messageId === undefined ? {} : { discardedMessageId: messageId }),
      error: lastAnswer ? readModelFailure(lastAnswer) : { message: event.errorMessage },
    });
  }

  #update(update: SessionUpdate): void {
    this.#connection.notify("session/update", { sessionId: this.id, update });
  }
}

/** Undefined without servers: then nothing of MCP is even loaded. */
function connectMcp(
  { mcpServers, cwd }: SessionSettings,
  env: NodeJS.ProcessEnv,
): Promise<McpServers> | undefined {
  if (mcpServers.length === 0) return undefined;
  const timeoutMs = wholeNumber(env, "AGENTVM_MCP_TIMEOUT_MS") ?? MCP_TIMEOUT_MS;
  return import("./mcp.js").then(({ McpServers }) =>
    McpServers.connect(mcpServers, { cwd, env, timeoutMs }),
  );
}

async function createPiSession(
  { sdk, env, manager, settings }: SessionOptions,
  connecting: Promise<McpServers> | undefined,
): Promise<AgentSession> {
  const cwd = manager.getCwd();
  const agentDir = sdk.getAgentDir();
  const { instructions, permissionPolicy } = settings;
  // What a project has in `.pi` may run code as soon as it is loaded, about which nobody is asked.
  const settingsManager = sdk.SettingsManager.create(cwd, agentDir, {
    projectTrusted: permissionPolicy === "allow",
  });
  const resourceLoader = new sdk.DefaultResourceLoader({
    cwd,
    agentDir,
    settingsManager,
    // Beside Pi's own APPEND_SYSTEM.md, not in its place.
    appendSystemPromptOverride: (own) => (instructions ? [...own, instructions] : own),
    extensionFactories: connecting
      ? [{ name: "mcp", factory: async (pi) => (await connecting).register(pi), hidden: true }]
      : [],
  });
  const parts = [
    createModelRuntime(sdk, env),
    resourceLoader.reload(),
    connecting, // whose failure must not pass for that of an extension
  ] as const;
  // What fails ends this process, which would leave locks of files behind that the others hold.
  await Promise.allSettled(parts);
  const [modelRuntime] = await Promise.all(parts);
  applyRetryLimits(settingsManager, env); // after reload(), which reads the settings anew
  for (const { path, error } of resourceLoader.getExtensions().errors) {
    process.stderr.write(`extension ${path}: ${error}\n`);
  }
  const { session, modelFallbackMessage } = await sdk.createAgentSession({
    cwd,
    agentDir,
    modelRuntime,
    settingsManager,
    resourceLoader,
    sessionManager: manager,
    ...choiceBeforeFirstPrompt(manager, modelRuntime),
  });
  if (modelFallbackMessage) process.stderr.write(`${modelFallbackMessage}\n`);
  return session;
}

/** Pi itself restores what was chosen only for sessions that have messages. */
function choiceBeforeFirstPrompt(
  manager: SessionManager,
  runtime: AgentSession["modelRuntime"],
): Pick<CreateAgentSessionOptions, "model" | "thinkingLevel"> {
  const { messages, model: chosen, thinkingLevel } = manager.buildSessionContext();
  if (messages.length > 0 || !chosen) return {};
  const model = runtime.getModel(chosen.provider, chosen.modelId);
  if (!model || !runtime.hasConfiguredAuth(model.provider)) return {};
  return { model, thinkingLevel: thinkingLevel as AgentSession["thinkingLevel"] };
}

function stopReason({ cancelled, lastAnswer }: Turn): StopReason {
  if (cancelled) return "cancelled";
  switch (lastAnswer?.stopReason) {
    case "aborted":
      return "cancelled";
    case "length":
      return "max_tokens";
    case "error":
      if (lastAnswer.rawStopReason === "refusal") return "refusal";
      throw modelError(readModelFailure(lastAnswer));
    default:
      return "end_turn"; // also when a slash command has answered without the model
  }
}
