/// <reference lib="esnext.disposable" />

/**
 * agentvm: coding agents in isolated Linux VMs, inside the Node process that asks for them.
 *
 * ```ts
 * import { createClient } from "agentvm";
 *
 * const client = createClient();
 * const agent = client.vm.getOrCreate(["my-agent"]);
 * const session = await agent.createSession("pi", {
 *   env: { ANTHROPIC_API_KEY: process.env.ANTHROPIC_API_KEY! },
 * });
 * agent.on("sessionEvent", ({ event }) => console.log(event.method, event.params));
 * const { text } = await agent.sendPrompt(session.sessionId, "Write a hello world to hello.js");
 * ```
 *
 * Every promise of this package rejects with an {@link AgentVmError}.
 */

/**
 * Opens a data directory. Does no I/O: a directory that can't be used is reported by the first call
 * that needs it. Clients of one process on the same directory share its VMs.
 *
 * @throws {AgentVmError} `INVALID_ARGUMENT`, naming the option
 */
export declare function createClient(options?: ClientOptions): Client;

export interface ClientOptions {
  /**
   * Directory of VMs, sessions and events, made with mode 0700 when it is first needed.
   * Default: `$AGENTVM_DATA_DIR`, else `$XDG_DATA_HOME/agentvm`, else `~/.local/share/agentvm`.
   */
  dataDir?: string;
  /**
   * Where installed agents are, shared by all data directories of this user.
   * Default: `$AGENTVM_CACHE_DIR/agents`, else `$XDG_CACHE_HOME/agentvm/agents`, else
   * `~/.cache/agentvm/agents`.
   */
  agentStoreDir?: string;
  /**
   * Whether `createSession` installs an agent that is missing. Otherwise it rejects with
   * `AGENT_NOT_INSTALLED`. Default: `true`.
   */
  autoInstall?: boolean;
  /**
   * What a power cut may take back. `"normal"`: the end of a turn that had not resolved yet;
   * `"full"`: nothing, every batch of events is synced to the disk before it is emitted. The death of
   * the process takes back nothing in either. Default: `"normal"`.
   */
  durability?: "normal" | "full";
  /**
   * TCP ports that programs in a VM reach on its 127.0.0.1 and ::1, but on the *host's* loopback: a
   * model server, a database. Default: none; everything of the host is refused.
   */
  loopbackExemptPorts?: readonly number[];
  /** Longest line, in bytes, that an agent may send; a longer one ends it. Default: 64 MiB. */
  maxMessageBytes?: number;
}

export interface Client extends AsyncDisposable {
  readonly vm: {
    /**
     * The VM of this key, the same one after a restart of the process. `"a"` equals `["a"]`. Does no
     * I/O: a VM boots when something needs it.
     *
     * @throws {AgentVmError} `INVALID_ARGUMENT`, `CLIENT_CLOSED`
     */
    getOrCreate(key: string | readonly string[]): Agent;
  };
  /**
   * Ends agents and VMs of this client, except those that another open client of this process uses.
   * Running turns are cancelled. Deletes nothing. Later calls reject with `CLIENT_CLOSED`.
   */
  close(): Promise<void>;
}

/** A VM and the sessions in it. Disposing it puts it to sleep. */
export interface Agent extends AsyncDisposable {
  readonly key: readonly string[];

  /**
   * Launches an agent inside the VM. If it fails, nothing of the session is left.
   *
   * @throws {AgentVmError} `AGENT_UNKNOWN`, `AGENT_NOT_INSTALLED`, `INSTALL_FAILED`,
   * `AGENT_EXITED` (with the end of its stderr), `AGENT_PROTOCOL`, `AUTH_REQUIRED`, `VM_UNSUPPORTED`,
   * `VM_BUSY`, `INVALID_ARGUMENT`, `ABORTED`, …
   */
  createSession(agentType: AgentType, options?: CreateSessionOptions): Promise<Session>;

  /**
   * Sends a message and resolves when the turn has ended, every event of it is on disk, and the
   * listeners that are there have been handed them. A session that is closed is resumed first.
   *
   * @param text the message, or ACP content blocks
   * @throws {AgentVmError} `AGENT_ERROR` or `AUTH_REQUIRED` with the agent's own code and data when the
   * model or the agent failed, `SESSION_BUSY` while another turn runs, `AGENT_EXITED`,
   * `SESSION_NOT_FOUND`, `ABORTED`, …
   */
  sendPrompt(
    sessionId: string,
    text: string | readonly ContentBlock[],
    options?: SendPromptOptions,
  ): Promise<PromptResult>;

  /**
   * Ends the turn that is under way: its `sendPrompt` resolves with `stopReason: "cancelled"`. An agent
   * that does not obey within 5 s is stopped. Resolves when the turn has ended; with no turn under way,
   * `cancelled` is `false`.
   */
  cancelPrompt(sessionId: string): Promise<CancelResult>;

  /**
   * Starts the agent of a session that was closed, with the conversation it had. Does nothing to a
   * session that is live.
   */
  resumeSession(sessionId: string, options?: ResumeSessionOptions): Promise<PersistedSession>;

  /**
   * Ends the session's agent, after cancelling its turn. Everything persisted stays; a later prompt
   * resumes the session. Idempotent.
   */
  closeSession(sessionId: string): Promise<void>;

  /** All sessions of this VM, newest first. Boots nothing. */
  listPersistedSessions(): Promise<PersistedSession[]>;

  /**
   * The persisted events of a session, in order. Boots nothing.
   *
   * @throws {AgentVmError} `SESSION_NOT_FOUND`; `SEQ_AHEAD` for a `since` beyond the last event;
   * `RESULT_TOO_LARGE` over 256 MiB: page with `limit` and `since`
   */
  getSessionEvents(sessionId: string, options?: GetSessionEventsOptions): Promise<PersistedEvent[]>;

  /**
   * Runs `sh -c command` in the VM. A non-zero exit code resolves. Resolves when the shell exits: what
   * it left running in the background may go on.
   *
   * @throws {AgentVmError} `TIMEOUT` (with the output until then in `data`), `ABORTED`, an errno name
   * as `ENOENT` for a `cwd` that does not exist, …
   */
  exec(command: string, options?: ExecOptions): Promise<ExecResult>;

  /**
   * Reads a regular file of at most 2 GiB, of `/proc` none. A relative path starts at `/home/user`.
   *
   * @throws {AgentVmError} with the errno's name as code: `ENOENT`, `EACCES`, `EISDIR`, …
   */
  readFile(path: string, options?: FileOptions): Promise<Uint8Array>;

  /**
   * Makes a file or replaces what it holds. A string is written as UTF-8. A relative path starts at
   * `/home/user`.
   *
   * @throws {AgentVmError} with the errno's name as code: `ENOENT`, `EACCES`, `ENOSPC`, …
   */
  writeFile(path: string, content: string | Uint8Array, options?: FileOptions): Promise<void>;

  /** Ends agents and processes; keeps files and sessions. The next call that needs the VM wakes it. */
  sleep(): Promise<void>;

  /** Boots the VM if it does not run. */
  wake(): Promise<void>;

  /** Deletes the VM with all its files and sessions. A later call starts with an empty one. */
  destroy(): Promise<void>;

  /**
   * Calls `listener` for everything that happens from now on. A listener that throws does not keep
   * others from theirs; its error surfaces as `uncaughtException`. Listening does not keep Node alive.
   *
   * @returns a function that removes the listener
   */
  on<E extends keyof AgentEvents>(event: E, listener: (value: AgentEvents[E]) => void): () => void;
  /** Like `on`, for one event. */
  once<E extends keyof AgentEvents>(
    event: E,
    listener: (value: AgentEvents[E]) => void,
  ): () => void;
  off<E extends keyof AgentEvents>(event: E, listener: (value: AgentEvents[E]) => void): void;
}

/** `"pi"`; other names are for later versions and reject with `AGENT_UNSUPPORTED` or `AGENT_UNKNOWN`. */
export type AgentType = "pi" | (string & {});

export interface CreateSessionOptions {
  /**
   * Environment of the agent process. Nothing of `process.env` is inherited: pass API keys here.
   * `ANTHROPIC_BASE_URL` and `OPENAI_BASE_URL` point the agent to another server.
   */
  env?: Readonly<Record<string, string>>;
  /** Working directory inside the VM, made if it is missing. Default: `/home/user`. */
  cwd?: string;
  /**
   * Who answers an agent that asks for permission: `"allow"` or `"reject"` every request. The VM is the
   * boundary, hence the default `"allow"`.
   */
  permissionPolicy?: "allow" | "reject";
  /**
   * Keep `env`, in a file of mode 0600 beside the VM, so that the session can be resumed without it.
   * Default: `true`.
   */
  persistEnv?: boolean;
  /** Aborting rejects with `ABORTED` and leaves nothing of the session. */
  signal?: AbortSignal;
}

export interface ResumeSessionOptions {
  /** Replaces the environment that was kept; needed if none was (`ENV_REQUIRED`). */
  env?: Readonly<Record<string, string>>;
}

export interface SendPromptOptions {
  /** Aborting cancels the turn and rejects with `ABORTED`. */
  signal?: AbortSignal;
}

export interface GetSessionEventsOptions {
  /** Only events after this number. Default: 0, all. */
  since?: number;
  /** At most so many events. Default: all. */
  limit?: number;
}

export interface Session {
  /** Permanent, and public: the agent's own id of the conversation is another one. */
  sessionId: string;
  agentType: string;
  /** What the agent says it can do: ACP's `agentCapabilities`, as it came. */
  capabilities: JsonObject | null;
  /** ACP's `agentInfo`, as it came. */
  agentInfo: JsonObject | null;
}

export interface PersistedSession extends Session {
  cwd: string;
  /**
   * `"open"`: its agent runs, or ran when the host process died; `"closed"`: by `closeSession`;
   * `"suspended"`: its agent ended otherwise. A prompt resumes all three.
   */
  status: "open" | "closed" | "suspended";
  /** Number of its last event; 0 if it has none. */
  lastSequenceNumber: number;
  /** Milliseconds since the epoch. */
  createdAt: number;
  /** Milliseconds since the epoch: of its last event or change. */
  updatedAt: number;
}

export interface PromptResult {
  /** The agent's answer to `session/prompt`, as it came. */
  response: JsonObject;
  /**
   * The agent's message text of this turn, with a blank line between messages; of more than 16 MiB
   * the beginning. The events have all of it.
   */
  text: string;
  /** `"end_turn"`, `"max_tokens"`, `"max_turn_requests"`, `"refusal"` or `"cancelled"`. */
  stopReason: string;
}

export interface CancelResult {
  /** Whether a turn was under way. */
  cancelled: boolean;
}

export interface PersistedEvent {
  sessionId: string;
  /** 1, 2, 3, … without gaps; the `sequenceNumber` of `sessionEvent`. */
  seq: number;
  event: JsonRpcNotification;
  /** Milliseconds since the epoch. */
  createdAt: number;
}

/**
 * A message of the agent, exactly as it came but for `params.sessionId`, or one that agentvm adds so
 * that the log alone is a transcript: `session/update` with a `user_message_chunk` for each block of a
 * prompt, `_agentvm/turn_start`, `_agentvm/turn_end` (with `stopReason`, `error` or `interrupted`),
 * `_agentvm/permission`. Added ones have `params._meta.agentvm`.
 */
export interface JsonRpcNotification {
  jsonrpc: "2.0";
  method: string;
  // biome-ignore lint/suspicious/noExplicitAny: agents send fields that no version of ACP knows
  params?: any;
}

/** ACP content: <https://agentclientprotocol.com/protocol/content>. */
export type ContentBlock =
  | { type: "text"; text: string }
  | { type: "image"; data: string; mimeType: string; uri?: string }
  | { type: "audio"; data: string; mimeType: string }
  | { type: "resource_link"; uri: string; name: string; mimeType?: string }
  | {
      type: "resource";
      resource: { uri: string; mimeType?: string } & ({ text: string } | { blob: string });
    };

export interface ExecOptions {
  /** Added to the VM's own defaults (`PATH`, `HOME`, …). Nothing of the host's. */
  env?: Readonly<Record<string, string>>;
  /** Default: `/home/user`. */
  cwd?: string;
  /** `"root"` is the VM's root, never the host's; it exists where the host process is root. */
  user?: "user" | "root";
  /** Written to the command's stdin, which is closed then. */
  stdin?: string | Uint8Array;
  /** Kills the command with everything it started, after so many milliseconds (≥ 1). Default: none. */
  timeoutMs?: number;
  /** Kept of stdout and stderr each; the rest is dropped and `truncated` is set. Default: 16 MiB. */
  maxOutputBytes?: number;
  /** Aborting kills the command and rejects with `ABORTED`. */
  signal?: AbortSignal;
}

export interface ExecResult {
  /** Decoded as UTF-8. */
  stdout: string;
  stderr: string;
  /** `null` when a signal ended it. */
  exitCode: number | null;
  /** Name of the signal that ended it, as `"SIGKILL"`. */
  signal: string | null;
  truncated: boolean;
}

export interface FileOptions {
  /** Who opens the file. Default: `"user"`. */
  user?: "user" | "root";
}

export interface AgentEvents {
  /** An event of any session of this VM, after it is committed. */
  sessionEvent: {
    sessionId: string;
    /** 1, 2, 3, … without gaps within a session. */
    sequenceNumber: number;
    event: JsonRpcNotification;
  };
  vmBooted: {
    /** The host's programs changed since this VM last booted. */
    baseChanged: boolean;
    /** The host crashed while it ran: writes outside of `/home/user`, `/root` and `/var` may be lost. */
    layersSuspect: boolean;
  };
  vmShutdown: { reason: "sleep" | "destroy" | "close" | "error" };
  installProgress: InstallProgress;
}

export interface InstallProgress {
  agentType: string;
  /** `"waiting"` for another installer; `"runtime"`: Node and npm; `"agent"`: its packages. */
  step: "waiting" | "runtime" | "agent";
  /** One line for a person. */
  message: string;
  /** Packages that have arrived, of `total`. */
  done: number;
  total: number;
  /** Bytes written so far in this step. */
  bytes: number;
}

/** Stable: programs may depend on it. */
export type ErrorCode =
  | "SESSION_NOT_FOUND"
  | "SESSION_BUSY"
  | "AGENT_UNKNOWN"
  | "AGENT_NOT_INSTALLED"
  | "INSTALL_FAILED"
  | "AGENT_EXITED"
  | "AGENT_PROTOCOL"
  | "AGENT_ERROR"
  | "AGENT_UNSUPPORTED"
  | "AUTH_REQUIRED"
  | "ENV_REQUIRED"
  | "VM_UNSUPPORTED"
  | "VM_BUSY"
  | "VM_EXITED"
  | "TIMEOUT"
  | "INVALID_ARGUMENT"
  | "SEQ_AHEAD"
  | "RESULT_TOO_LARGE"
  | "STORE_CORRUPT"
  | "STORE_FULL"
  | "CLIENT_CLOSED"
  | "ABORTED"
  | "INTERNAL"
  /** Names of errnos, as `"ENOENT"`, for files and processes. */
  | (string & {});

/** What every promise of this package rejects with. `name` is `"AbortError"` for `ABORTED`. */
export declare class AgentVmError extends Error {
  private constructor();
  readonly code: ErrorCode;
  /**
   * `AGENT_ERROR`, `AUTH_REQUIRED`: the agent's `{ code, data }`. `TIMEOUT` of `exec`:
   * `{ stdout, stderr }`.
   */
  readonly data?: unknown;
}

export type JsonObject = { [key: string]: JsonValue };
export type JsonValue = string | number | boolean | null | JsonValue[] | JsonObject;
