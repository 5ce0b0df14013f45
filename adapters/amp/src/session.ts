/** One Amp session and its turns: each turn is a run of Amp's program on the session's thread. */

import { randomUUID } from "node:crypto";
import { setImmediate } from "node:timers/promises";
import { AmpProcess, type End } from "./amp-process.js";
import { mcpConfig, settingsFile } from "./configuration.js";
import { instructionsPart } from "./instructions.js";
import { DEFAULT_MODE } from "./modes.js";
import { PermissionSocket, type Question } from "./permission-socket.js";
import { programPath, requireKey } from "./program.js";
import { refuseUnasked } from "./project.js";
import { replay } from "./replay.js";
import type { SessionDirectory } from "./session-directory.js";
import type { ContentBlock, SessionUpdate, StopReason } from "./shared/acp.js";
import { busy, ErrorCode, RpcError } from "./shared/errors.js";
import { Permissions } from "./shared/permissions.js";
import { type PromptPart, promptParts } from "./shared/prompt.js";
import type { Connection } from "./shared/protocol.js";
import type { SessionSettings } from "./shared/settings.js";
import {
  type AssistantMessage,
  isInit,
  isResult,
  type ResultMessage,
  type StreamMessage,
  type SystemMessage,
  type UserMessage,
  userMessage,
} from "./stream.js";
import { describeToolCall, isAmbiguous, READING_TOOLS } from "./tools.js";
import { Translator } from "./translate.js";

/** How long Amp may go on after its result, in milliseconds: it may still write to its service. */
const GOODBYE_MS = 10_000;

/** States of an MCP server from which Amp does not reach it any more. */
const UNUSABLE = new Set([
  ...["failed", "error", "connection-failed", "denied", "disabled", "blocked-by-registry"],
]);

/** How long a question that does not name its call waits for one that it can be about. */
const UNSEEN_CALL_MS = 2000;

const SETTINGS_FILE = "settings.json";
const MCP_FILE = "mcp.json";

export interface SessionOptions {
  env: NodeJS.ProcessEnv;
  connection: Connection;
  directory: SessionDirectory;
  settings: SessionSettings;
}

interface Turn {
  translator: Translator;
  amp: AmpProcess | undefined;
  /** Whether Amp has begun to work on the thread. */
  begun: boolean;
  cancel: AbortController;
  /** Questions are put to the client one after the other. */
  asking: Promise<unknown>;
}

export class Session {
  readonly settings: SessionSettings;
  readonly #env: NodeJS.ProcessEnv;
  readonly #connection: Connection;
  readonly #directory: SessionDirectory;
  readonly #permissions: Permissions;
  #socket: PermissionSocket | undefined;
  #turn: Turn | undefined;
  #turnEnded: Promise<StopReason> | undefined;

  private constructor({ env, connection, directory, settings }: SessionOptions) {
    this.settings = settings;
    this.#env = env;
    this.#connection = connection;
    this.#directory = directory;
    const { cwd, permissionPolicy } = settings;
    this.#permissions = new Permissions(connection, this.id, permissionPolicy, (name, args) =>
      describeToolCall(name, args, cwd),
    );
  }

  static async open(options: SessionOptions): Promise<Session> {
    requireKey(options.env);
    programPath(options.env); // now, not with the first prompt
    refuseUnasked(options.settings);
    const session = new Session(options);
    await session.#configure();
    return session;
  }

  get id(): string {
    return this.#directory.sessionId;
  }

  get busy(): boolean {
    return this.#turn !== undefined;
  }

  get #asks(): boolean {
    return this.settings.permissionPolicy !== "allow";
  }

  get mode(): string {
    return this.#directory.record.mode;
  }

  /** From the next turn on. */
  setMode(mode: string): void {
    this.#directory.update({ mode });
  }

  /** Tells the conversation again, as Amp's service has it. */
  async replay(): Promise<void> {
    const { threadId } = this.#directory.record;
    if (threadId === undefined) return;
    const exporting = this.#run(["threads", "export", threadId], "");
    const text = await exporting.output();
    const end = await exporting.ended;
    if (end.code !== 0) throw ampEnded(end, false);
    const translator = this.#translator(() => false);
    await replay(text, translator, () => this.#connection.drained());
  }

  async prompt(blocks: ContentBlock[]): Promise<StopReason> {
    if (this.#turn) throw busy(this.id);
    const turn: Turn = {
      translator: this.#translator((name) => !this.#asks || READING_TOOLS.has(name)),
      amp: undefined,
      begun: false,
      cancel: new AbortController(),
      asking: Promise.resolve(),
    };
    this.#turn = turn;
    this.#turnEnded = this.#take(turn, blocks);
    return await this.#turnEnded;
  }

  /** The pending {@link prompt} answers `cancelled` once everything of the turn has ended. */
  async cancel(): Promise<void> {
    this.#turn?.cancel.abort();
    await this.#turn?.amp?.stop();
  }

  /** Ends the turn, if one is running, and lets its prompt be answered. */
  async close(): Promise<void> {
    await this.cancel();
    await this.#turnEnded?.catch(() => {}); // told to whoever has prompted
    await setImmediate();
    this.#socket?.close();
    this.#directory.removeFile(MCP_FILE);
    this.#directory.removeFile(SETTINGS_FILE);
  }

  async #take(turn: Turn, blocks: ContentBlock[]): Promise<StopReason> {
    const { signal } = turn.cancel;
    try {
      requireKey(this.#env);
      refuseUnasked(this.settings); // a turn before may have brought it
      const input = userMessage([...this.#untoldInstructions(), ...promptParts(blocks)]);
      turn.amp = this.#run(this.#turnArguments(), input);
      const stopReason = await this.#follow(turn, turn.amp);
      turn.translator.reportUsage();
      return signal.aborted ? "cancelled" : stopReason;
    } catch (error) {
      if (signal.aborted) return "cancelled";
      throw error;
    } finally {
      turn.translator.abandonCalls(signal.aborted ? "Cancelled" : "Not executed");
      turn.cancel.abort(); // what Amp still asks is of no interest any more
      this.#turn = undefined;
    }
  }

  async #configure(): Promise<void> {
    const { mcpServers } = this.settings;
    if (this.#asks) {
      this.#socket = await PermissionSocket.listen(this.#directory, (question, signal) =>
        this.#decide(question, signal),
      );
    }
    try {
      this.#directory.write(SETTINGS_FILE, settingsFile(this.#env, this.#socket?.asker));
      if (mcpServers.length > 0) this.#directory.write(MCP_FILE, mcpConfig(mcpServers));
      else this.#directory.removeFile(MCP_FILE);
    } catch (error) {
      this.#socket?.close();
      throw error;
    }
  }

  #turnArguments(): string[] {
    const { threadId, mode } = this.#directory.record;
    const { mcpServers } = this.settings;
    const { path } = this.#directory;
    return [
      ...(threadId === undefined ? [] : ["threads", "continue", threadId]),
      ...["--execute", "--stream-json", "--stream-json-thinking", "--stream-json-input"],
      ...["--no-ide", "--no-notifications", "--no-color"],
      // Amp archives a thread that `--execute` has made. This one goes on.
      ...(threadId === undefined ? ["--no-archive-after-execute"] : []),
      ...(mode === DEFAULT_MODE ? [] : ["--mode", mode]),
      ...["--settings-file", `${path}/${SETTINGS_FILE}`],
      ...(mcpServers.length > 0 ? ["--mcp-config", `${path}/${MCP_FILE}`] : []),
      // The settings say it too; a project's own could say otherwise.
      ...(this.#asks ? [] : ["--dangerously-allow-all"]),
      // Amp's permissions are one of its plugins: no turn without it.
      ...(this.#asks ? ["--plugin-ready-timeout", "300"] : []),
    ];
  }

  #run(args: string[], input: string): AmpProcess {
    const { cwd } = this.settings;
    return new AmpProcess(programPath(this.#env), args, input, { cwd, env: this.#env });
  }

  #untoldInstructions(): PromptPart[] {
    const { instructions } = this.settings;
    if (instructions === undefined || instructions === this.#directory.record.instructions) {
      return [];
    }
    return [instructionsPart(instructions)];
  }

  async #follow(turn: Turn, amp: AmpProcess): Promise<StopReason> {
    let result: ResultMessage | undefined;
    let goodbye: NodeJS.Timeout | undefined;
    try {
      for await (const message of amp.messages()) {
        await this.#receive(turn, message);
        if (isResult(message)) {
          result = message;
          goodbye ??= setTimeout(() => void amp.stop(), GOODBYE_MS);
        }
        await this.#connection.drained();
      }
    } catch (error) {
      await amp.stop();
      throw error;
    } finally {
      clearTimeout(goodbye);
    }
    const end = await amp.ended;
    if (!result) throw ampEnded(end, turn.begun);
    return stopReasonOf(result, turn.translator);
  }

  async #receive(turn: Turn, message: StreamMessage): Promise<void> {
    if (isInit(message)) this.#begin(turn, message);
    else if (message.type === "assistant") {
      await turn.translator.assistant(message as AssistantMessage);
    } else if (message.type === "user") turn.translator.user(message as UserMessage);
  }

  #begin(turn: Turn, { session_id: threadId, mcp_servers: servers = [] }: SystemMessage): void {
    turn.begun = true;
    const { instructions } = this.settings;
    this.#directory.update({ threadId, ...(instructions === undefined ? {} : { instructions }) });
    const names = new Set(this.settings.mcpServers.map(({ name }) => name));
    const unusable = servers.find(({ name, status }) => names.has(name) && UNUSABLE.has(status));
    if (!unusable) return;
    const { name: server, status } = unusable;
    throw new RpcError(
      ErrorCode.internalError,
      `MCP server "${server}" can't be used: Amp says "${status}"`,
      { type: "mcp_server_failed", server, reason: status },
    );
  }

  /** Why a call must not run; undefined if it may. */
  async #decide(question: Question, gone: AbortSignal): Promise<string | undefined> {
    const turn = this.#turn;
    if (!turn) return "Not executed: no prompt is running";
    const before = turn.asking;
    const decided = (async () => {
      await before;
      return await this.#ask(turn, question, AbortSignal.any([turn.cancel.signal, gone]));
    })();
    turn.asking = decided.catch(() => {});
    return await decided;
  }

  async #ask(
    { translator }: Turn,
    { name, toolCallId, input }: Question,
    signal: AbortSignal,
  ): Promise<string | undefined> {
    // Amp may ask before the message with the call has come through the stream. It does not always say
    // which call it asks about.
    if (toolCallId) await translator.openCall(toolCallId, name, input);
    const id =
      toolCallId || (await translator.callLike(name, input, UNSEEN_CALL_MS)) || randomUUID();
    await this.#connection.drained();
    const scope = isAmbiguous(name, this.settings.mcpServers) ? null : name;
    const refusal = await this.#permissions.refusal(
      { toolCallId: id, name, args: input, scope },
      signal,
    );
    if (refusal === undefined) translator.startCall(id);
    return refusal;
  }

  #translator(startsAtOnce: (name: string) => boolean): Translator {
    return new Translator(this.settings.cwd, (update) => this.#update(update), startsAtOnce);
  }

  #update(update: SessionUpdate): void {
    this.#connection.notify("session/update", { sessionId: this.id, update });
  }
}

function stopReasonOf(result: ResultMessage, { stopReason }: Translator): StopReason {
  if (result.subtype === "error_max_turns") return "max_turn_requests";
  if (result.is_error) {
    const message = result.error ?? result.subtype;
    const data = { type: result.subtype, message };
    throw new RpcError(ErrorCode.internalError, `Amp failed: ${message}`, data);
  }
  return stopReason === "max_tokens" || stopReason === "refusal" ? stopReason : "end_turn";
}

/** A run that has ended without a result. */
function ampEnded({ code, signal, stderr }: End, begun: boolean): RpcError {
  const how = signal ? `was killed by ${signal}` : `has ended with exit code ${code}`;
  const words = stderr === "" ? "" : `: ${stderr}`;
  const data = { exitCode: code, signal, stderr };
  // A refused key has no other sign than these words, before the stream begins.
  if (!begun && /\bAPI key\b/i.test(stderr)) {
    const refused = { type: "api_key_refused", ...data };
    return new RpcError(ErrorCode.authRequired, `Amp ${how}${words}`, refused);
  }
  const during = begun ? " before its turn had a result" : "";
  return new RpcError(ErrorCode.internalError, `Amp ${how}${during}${words}`, {
    type: "amp_exited",
    ...data,
  });
}
