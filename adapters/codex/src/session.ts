/** One thread of Codex and its turns. */

import { setTimeout as sleep } from "node:timers/promises";
import type { AppServer } from "./app-server.js";
import type {
  CompletedTurn,
  Json,
  Model,
  Notification,
  Notifications,
  OpenedThread,
  Question,
} from "./codex.js";
import { Configuration, type ModesState } from "./configuration.js";
import {
  isRateLimit,
  isRefusal,
  type ModelFailure,
  modelError,
  readTurnError,
} from "./model-failure.js";
import { toInput } from "./prompt.js";
import type { RetryLimits } from "./provider.js";
import { Questions } from "./questions.js";
import type { ConfigOption, ContentBlock, SessionUpdate, StopReason } from "./shared/acp.js";
import { busy, describe, ErrorCode, RpcError } from "./shared/errors.js";
import type { Connection } from "./shared/protocol.js";
import type { SessionSettings } from "./shared/settings.js";
import { TurnTranslator } from "./translate.js";

interface Turn {
  translator: TurnTranslator;
  /** Aborted by a cancel. */
  cancel: AbortController;
  /** The turn of Codex that is under way: one after the other, if the first is repeated. */
  codex: CodexTurn;
  /** The end that this adapter has made of it. */
  failure: ModelFailure | undefined;
  /** Of the request to the model that is under way. */
  retries: number;
  interrupting: Promise<void> | undefined;
}

interface CodexTurn {
  /** As soon as it has one. */
  id: string | undefined;
  started: PromiseWithResolvers<void>;
  completed: PromiseWithResolvers<CompletedTurn>;
}

export interface SessionOptions {
  server: AppServer;
  connection: Connection;
  settings: SessionSettings;
  /** Of failed requests; undefined: Codex decides. */
  retry: RetryLimits | undefined;
  models: Model[];
  thread: OpenedThread;
}

/**
 * What Codex may do by itself. Its own sandbox would be one inside ours: what it does not ask for,
 * it does.
 */
export function permissionsOf({ permissionPolicy }: SessionSettings): Record<string, Json> {
  // With "reject" it is the client that refuses, so that it can record it.
  const approvalPolicy = permissionPolicy === "allow" ? "never" : "untrusted";
  return { approvalPolicy, approvalsReviewer: "user" };
}

export class Session {
  readonly id: string;
  readonly #settings: SessionSettings;
  readonly #server: AppServer;
  readonly #connection: Connection;
  readonly #retry: RetryLimits | undefined;
  readonly #questions: Questions;
  readonly #configuration: Configuration;
  /** Turns of subagents that are under way, by their thread. */
  readonly #childTurns = new Map<string, string>();
  #turn: Turn | undefined;

  constructor({ server, connection, settings, retry, models, thread }: SessionOptions) {
    this.id = thread.thread.id;
    this.#settings = settings;
    this.#server = server;
    this.#connection = connection;
    this.#retry = retry;
    this.#questions = new Questions(connection, this.id, settings.permissionPolicy);
    this.#configuration = new Configuration(models, thread);
  }

  /** Whether the turn of this id is under way. */
  isIn(turnId: string): boolean {
    return this.#turn?.codex.id === turnId;
  }

  modes(): ModesState {
    return this.#configuration.modes();
  }

  setMode(modeId: string): void {
    this.#configuration.setMode(modeId);
  }

  configOptions(): ConfigOption[] {
    return this.#configuration.options();
  }

  setConfigOption(configId: string, value: unknown): ConfigOption[] {
    return this.#configuration.set(configId, value);
  }

  async prompt(blocks: ContentBlock[]): Promise<StopReason> {
    if (this.#turn) throw busy(this.id);
    const turn: Turn = {
      translator: new TurnTranslator((update) => this.#update(update)),
      cancel: new AbortController(),
      codex: newCodexTurn(),
      failure: undefined,
      retries: 0,
      interrupting: undefined,
    };
    this.#turn = turn;
    const cancelled = () => turn.cancel.signal.aborted;
    try {
      let end = await this.#run(turn, toInput(blocks));
      while (await this.#isToBeRepeated(turn, end)) {
        turn.codex = newCodexTurn();
        // Without another word of the user's the model answers what it has been told before.
        end = await this.#run(turn, []);
      }
      await turn.interrupting;
      return this.#stopReason(turn, end);
    } catch (error) {
      if (cancelled()) return "cancelled";
      throw error;
    } finally {
      turn.translator.finish(cancelled());
      this.#turn = undefined;
    }
  }

  /** The pending {@link prompt} answers `cancelled` once the turn and its commands have ended. */
  cancel(): void {
    if (!this.#turn) return;
    this.#turn.cancel.abort();
    this.#interrupt(this.#turn);
  }

  async close(): Promise<void> {
    this.cancel();
    await this.#turn?.codex.completed.promise;
  }

  /** Of this thread, or of one of its subagents. */
  observe(notification: Notification): void {
    const { threadId } = notification.params as { threadId?: string | null };
    if (threadId !== this.id) {
      this.#observeChild(notification);
      return;
    }
    const turn = this.#turn;
    if (!turn) return; // Codex works only within a prompt
    switch (notification.method) {
      case "turn/started":
        hasStarted(turn.codex, notification.params.turn.id);
        break;
      case "turn/completed":
        turn.codex.completed.resolve(notification.params.turn);
        break;
      case "error":
        this.#observeError(notification.params, turn);
        break;
      default:
        // It is told with the end of each answer of the model.
        if (notification.method === "thread/tokenUsage/updated") turn.retries = 0;
        turn.translator.translate(notification);
    }
  }

  async answer(question: Question): Promise<object> {
    const turn = this.#turn;
    const asking = turn && { translator: turn.translator, signal: turn.cancel.signal };
    return await this.#questions.answer(question, asking);
  }

  async #run(turn: Turn, input: object[]): Promise<CompletedTurn> {
    const answer = await this.#server.request<{ turn: { id: string } }>("turn/start", {
      threadId: this.id,
      input,
      ...permissionsOf(this.#settings),
      sandboxPolicy: { type: "dangerFullAccess" },
      ...this.#configuration.forTurn(),
    });
    hasStarted(turn.codex, answer.turn.id);
    return await turn.codex.completed.promise;
  }

  /**
   * Waits until it is time, if so. Codex repeats what a service or a network breaks, but takes a rate
   * limit for the end of a turn.
   */
  async #isToBeRepeated(turn: Turn, { error }: CompletedTurn): Promise<boolean> {
    const { signal } = turn.cancel;
    if (signal.aborted || turn.failure || !error || !this.#retry) return false;
    const failure = readTurnError(error, this.#configuration.model);
    if (!isRateLimit(failure) || turn.retries >= this.#retry.maxRetries) return false;
    const delayMs = this.#retry.delayMs * 2 ** turn.retries;
    this.#tellRetry(turn, failure, delayMs);
    await sleep(delayMs, undefined, { signal }).catch(() => {}); // a cancel ends the wait
    return !signal.aborted;
  }

  #stopReason(turn: Turn, { status, error }: CompletedTurn): StopReason {
    if (turn.cancel.signal.aborted) return "cancelled";
    if (turn.failure) throw modelError(turn.failure);
    if (error) throw modelError(readTurnError(error, this.#configuration.model));
    if (status === "completed") return "end_turn";
    throw new RpcError(ErrorCode.internalError, `Codex ended the turn as ${status}`);
  }

  #observeError({ error, willRetry }: Notifications["error"], turn: Turn): void {
    if (!willRetry) return; // the turn's end says it again
    const failure = readTurnError(error, this.#configuration.model);
    if (isRefusal(failure)) {
      turn.failure = failure;
      this.#interrupt(turn);
      return;
    }
    this.#tellRetry(turn, failure);
  }

  #tellRetry(turn: Turn, failure: ModelFailure, delayMs?: number): void {
    turn.retries += 1;
    const { unfinishedMessage } = turn.translator;
    this.#connection.notify("_agentvm/retry", {
      sessionId: this.id,
      attempt: turn.retries,
      ...(this.#retry ? { maxAttempts: this.#retry.maxRetries } : {}),
      ...(delayMs === undefined ? {} : { delayMs }),
      ...(unfinishedMessage === undefined ? {} : { discardedMessageId: unfinishedMessage }),
      error: failure,
    });
  }

  #observeChild({ method, params }: Notification): void {
    if (method === "turn/started") this.#childTurns.set(params.threadId, params.turn.id);
    else if (method === "turn/completed") this.#childTurns.delete(params.threadId);
  }

  #interrupt(turn: Turn): void {
    turn.interrupting ??= this.#endTurn(turn).catch((error: unknown) => {
      process.stderr.write(`interrupt: ${describe(error)}\n`);
    });
  }

  /** Codex leaves the commands of an interrupted turn running. */
  async #endTurn(turn: Turn): Promise<void> {
    await turn.codex.started.promise;
    const turns = [...this.#childTurns, [this.id, turn.codex.id] as const];
    await Promise.allSettled(
      turns.map(([threadId, turnId]) =>
        this.#server.request("turn/interrupt", { threadId, turnId }),
      ),
    );
    const { data } = await this.#server.request<{
      data: { itemId: string; processId: string }[];
    }>("thread/backgroundTerminals/list", { threadId: this.id });
    const own = data.filter(({ itemId }) => turn.translator.hasStarted(itemId));
    await Promise.allSettled(
      own.map(({ processId }) =>
        this.#server.request("thread/backgroundTerminals/terminate", {
          threadId: this.id,
          processId,
        }),
      ),
    );
  }

  #update(update: SessionUpdate): void {
    this.#connection.notify("session/update", { sessionId: this.id, update });
  }
}

function newCodexTurn(): CodexTurn {
  return { id: undefined, started: Promise.withResolvers(), completed: Promise.withResolvers() };
}

function hasStarted(turn: CodexTurn, id: string): void {
  turn.id = id;
  turn.started.resolve();
}
