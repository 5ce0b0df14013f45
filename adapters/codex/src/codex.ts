/**
 * The parts of the protocol of `codex app-server` that this adapter speaks: those fields that it reads.
 * `codex app-server generate-ts --experimental` prints the whole of it.
 */

export type Json = null | boolean | number | string | Json[] | { [name: string]: Json };

export interface Model {
  model: string;
  displayName: string;
  description: string;
  hidden: boolean;
  isDefault: boolean;
  defaultReasoningEffort: string;
  supportedReasoningEfforts: { reasoningEffort: string; description: string }[];
}

/** Of thread/start and thread/resume. */
export interface OpenedThread {
  thread: { id: string };
  model: string;
  modelProvider: string;
  reasoningEffort: string | null;
  collaborationMode?: { mode: string } | null;
}

export type Status = "inProgress" | "completed" | "failed" | "declined";

export type CommandAction =
  | { type: "read"; path: string }
  | { type: "listFiles" | "search"; path: string | null }
  | { type: "unknown" };

export interface CommandItem {
  type: "commandExecution";
  id: string;
  command: string;
  cwd: string;
  status: Status;
  commandActions: CommandAction[];
  aggregatedOutput: string | null;
  exitCode: number | null;
}

export interface FileChange {
  path: string;
  kind: { type: "add" } | { type: "delete" } | { type: "update"; move_path: string | null };
  /** Of an update: unified, hunks only. Else the whole file. */
  diff: string;
}

export interface FileChangeItem {
  type: "fileChange";
  id: string;
  changes: FileChange[];
  status: Status;
}

export interface McpItem {
  type: "mcpToolCall";
  id: string;
  server: string;
  tool: string;
  status: Status;
  arguments: Json;
  result: { content: Json[]; structuredContent: Json } | null;
  error: { message: string } | null;
}

/** What has neither a result worth showing nor fields that matter here, beside its own. */
export interface OtherItem {
  type:
    | "webSearch"
    | "imageView"
    | "imageGeneration"
    | "sleep"
    | "contextCompaction"
    | "dynamicToolCall"
    | "collabAgentToolCall"
    | "subAgentActivity";
  id: string;
  [field: string]: unknown;
}

/** An item of a thread that is a tool call for ACP. */
export type ToolItem = CommandItem | FileChangeItem | McpItem | OtherItem;

export interface Item {
  type: string;
  id: string;
}

export interface TurnError {
  message: string;
  codexErrorInfo: string | Record<string, { httpStatusCode?: number | null } | null> | null;
  additionalDetails: string | null;
}

export interface CompletedTurn {
  id: string;
  status: "completed" | "interrupted" | "failed" | "inProgress";
  error: TurnError | null;
}

/** Notifications by method. */
export interface Notifications {
  /** `rootTurnId`: of a subagent's turn, that of the session which it works for. */
  "turn/started": { threadId: string; turn: { id: string; rootTurnId: string | null } };
  "turn/completed": { threadId: string; turn: CompletedTurn };
  "turn/plan/updated": {
    threadId: string;
    plan: { step: string; status: "pending" | "inProgress" | "completed" }[];
  };
  "item/started": { threadId: string; item: Item };
  "item/completed": { threadId: string; item: Item };
  "item/agentMessage/delta": { threadId: string; itemId: string; delta: string };
  "item/plan/delta": { threadId: string; itemId: string; delta: string };
  "item/reasoning/textDelta": { threadId: string; itemId: string; delta: string };
  "item/reasoning/summaryTextDelta": { threadId: string; itemId: string; delta: string };
  "item/reasoning/summaryPartAdded": { threadId: string; itemId: string; summaryIndex: number };
  "item/commandExecution/outputDelta": { threadId: string; itemId: string; delta: string };
  "thread/tokenUsage/updated": {
    threadId: string;
    tokenUsage: { last: { totalTokens: number }; modelContextWindow: number | null };
  };
  error: { threadId: string; error: TurnError; willRetry: boolean };
  warning: { threadId: string | null; message: string };
  "model/rerouted": { threadId: string; fromModel: string; toModel: string };
}

export type Notification = {
  [Method in keyof Notifications]: { method: Method; params: Notifications[Method] };
}[keyof Notifications];

/** Requests of Codex by method. */
export interface Questions {
  "item/commandExecution/requestApproval": {
    threadId: string;
    itemId: string;
    command?: string | null;
    cwd?: string | null;
    reason?: string | null;
  };
  "item/fileChange/requestApproval": { threadId: string; itemId: string; reason?: string | null };
  "mcpServer/elicitation/request": {
    threadId: string;
    serverName: string;
    message: string;
    _meta: {
      codex_approval_kind?: string;
      tool_params?: Json;
      persist?: string | string[];
    } | null;
  };
  "item/permissions/requestApproval": { threadId: string };
  "item/tool/requestUserInput": { threadId: string };
}

export type Question = {
  [Method in keyof Questions]: { method: Method; params: Questions[Method] };
}[keyof Questions];
