/** One Pi session and its turns. */

import type {
  AgentSession,
  AgentSessionEvent,
  SessionManager,
} from "@earendil-works/pi-coding-agent";
import type { ContentBlock, SessionUpdate, StopReason } from "./acp.js";
import { busy, describe, modelError, readModelFailure } from "./errors.js";
import { applyRetryLimits, createModelRuntime, requireKey } from "./models.js";
import { toPiPrompt } from "./prompt.js";
import type { Connection } from "./protocol.js";
import { replay } from "./replay.js";
import type { Sdk } from "./sdk.js";
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

export interface SessionOptions {
  sdk: Sdk;
  env: NodeJS.ProcessEnv;
  manager: SessionManager;
  connection: Connection;
}

export class Session {
  readonly id: string;
  readonly #pi: AgentSession;
  readonly #env: NodeJS.ProcessEnv;
  readonly #connection: Connection;
  #turn: Turn | undefined;

  private constructor(pi: AgentSession, { env, connection }: SessionOptions) {
    this.id = pi.sessionId;
    this.#pi = pi;
    this.#env = env;
    this.#connection = connection;
    pi.subscribe((event) => this.#onEvent(event));
    // Unlike those of `pi.subscribe`, these listeners are awaited: Pi does not read on from the
    // model, and does not start a tool, before they are done.
    pi.agent.subscribe(async (event) => {
      if (event.type === "agent_start" && this.#turn?.cancelled) void this.#abort();
      if (event.type === "tool_execution_start") {
        await this.#turn?.translator.beforeTool(event.toolCallId);
      }
      await connection.drained();
    });
  }

  static async open(options: SessionOptions): Promise<Session> {
    const { sdk, env, manager } = options;
    const cwd = manager.getCwd();
    const agentDir = sdk.getAgentDir();
    const settingsManager = sdk.SettingsManager.create(cwd, agentDir);
    const resourceLoader = new sdk.DefaultResourceLoader({ cwd, agentDir, settingsManager });
    const [modelRuntime] = await Promise.all([
      createModelRuntime(sdk, env),
      resourceLoader.reload(),
    ]);
    applyRetryLimits(settingsManager, env); // after reload(), which reads the settings anew
    for (const { path, error } of resourceLoader.getExtensions().errors) {
      process.stderr.write(`extension ${path}: ${error}\n`);
    }

    const { session: pi } = await sdk.createAgentSession({
      cwd,
      agentDir,
      modelRuntime,
      settingsManager,
      resourceLoader,
      sessionManager: manager,
    });
    const session = new Session(pi, options);
    await pi.bindExtensions({
      mode: "print",
      onError: ({ extensionPath, error }) =>
        process.stderr.write(`extension ${extensionPath}: ${error}\n`),
    });
    return session;
  }

  get busy(): boolean {
    return this.#turn !== undefined;
  }

  /** Throws `auth_required` if no prompt could succeed. */
  async requireKey(): Promise<void> {
    await requireKey(this.#pi, this.#env);
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
      return stopReason(turn);
    } catch (error) {
      if (turn.cancelled) return "cancelled";
      throw error;
    } finally {
      translator.abandonCalls(turn.cancelled ? "Cancelled" : "Not executed");
      this.#turn = undefined;
    }
  }

  /** The pending {@link prompt} answers `cancelled` once everything of the turn has ended. */
  async cancel(): Promise<void> {
    if (!this.#turn) return;
    this.#turn.cancelled = true;
    await this.#abort();
  }

  /** Ends the turn, if one is running, and lets extensions put away what they hold. */
  async close(): Promise<void> {
    await this.cancel();
    await this.#pi.extensionRunner.emit({ type: "session_shutdown", reason: "quit" });
    this.#pi.dispose();
  }

  async #abort(): Promise<void> {
    try {
      await this.#pi.abort();
    } catch (error) {
      process.stderr.write(`abort: ${describe(error)}\n`);
    }
  }

  #onEvent(event: AgentSessionEvent): void {
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
