/** How Codex's tools look in ACP: kind, title, places touched, diff. */

import type { CommandItem, FileChange, Item, Json, McpItem, ToolItem } from "./codex.js";
import type { ToolCallFields, ToolContent, ToolKind, ToolLocation } from "./shared/acp.js";

const MAX_TITLE = 200;

/** Items of a thread that are no tool calls. */
const NO_TOOLS: ReadonlySet<string> = new Set([
  "userMessage",
  "hookPrompt",
  "agentMessage",
  "functionCallOutput",
  "plan",
  "reasoning",
  "enteredReviewMode",
  "exitedReviewMode",
]);

export function isTool(item: Item): item is ToolItem {
  return !NO_TOOLS.has(item.type);
}

/** What the model calls it, for permission requests. */
export function toolName(item: ToolItem): string {
  switch (item.type) {
    case "commandExecution":
      return "exec_command";
    case "fileChange":
      return "apply_patch";
    case "mcpToolCall":
      return `${item.server}_${item.tool}`;
    default:
      return item.type;
  }
}

/** What an answer "always" to it holds for. Names of servers and tools may hold any character. */
export function scopeOf(item: ToolItem): string {
  return item.type === "mcpToolCall" ? JSON.stringify([item.server, item.tool]) : toolName(item);
}

export function describeCall(item: ToolItem): { title: string } & ToolCallFields {
  switch (item.type) {
    case "commandExecution":
      return describeCommand(item);
    case "fileChange": {
      const paths = item.changes.map(({ path }) => path);
      return {
        title: line(`apply_patch ${paths.join(" ")}`),
        kind: "edit",
        locations: paths.map((path) => ({ path })),
        rawInput: { changes: item.changes },
        content: item.changes.flatMap(diffs),
      };
    }
    case "mcpToolCall":
      return { title: toolName(item), kind: "other", rawInput: item.arguments ?? {} };
    default:
      return describeOther(item);
  }
}

function describeCommand(item: CommandItem): { title: string } & ToolCallFields {
  const command = shellCommand(item.command);
  const kinds = new Set(item.commandActions.map(({ type }) => ACTION_KINDS[type]));
  const [kind = "execute"] = kinds;
  const locations: ToolLocation[] = item.commandActions.flatMap((action) =>
    action.type === "read" ? [{ path: action.path }] : [],
  );
  return {
    title: line(command),
    kind: kinds.size > 1 ? "execute" : kind,
    ...(locations.length > 0 ? { locations } : {}),
    rawInput: { command, cwd: item.cwd },
  };
}

const ACTION_KINDS = {
  read: "read",
  listFiles: "search",
  search: "search",
  unknown: "execute",
} as const satisfies Record<string, ToolKind>;

/** Codex shows the whole command line of the shell, quoted for one. */
function shellCommand(commandLine: string): string {
  const wrapped = /^\S*\/(?:ba|z)?sh -l?c (['"])([\s\S]*)\1$/.exec(commandLine);
  if (!wrapped) return commandLine.replace(/^\S*\/(?:ba|z)?sh -l?c (?=\S+$)/, "");
  const [, quote, script = ""] = wrapped;
  return quote === "'"
    ? script.replaceAll(`'\\''`, "'").replaceAll(`'"'"'`, "'")
    : script.replace(/\\(["\\$`])/g, "$1");
}

function describeOther(item: Exclude<ToolItem, { status: string }>) {
  const { type, id, startedAtMs, completedAtMs, ...rawInput } = item;
  const { query, path, prompt, agentPath, tool } = rawInput;
  const [subject = ""] = [query, path, prompt, agentPath, tool].filter(
    (value) => typeof value === "string",
  );
  return {
    title: line(`${type} ${subject}`),
    kind: OTHER_KINDS[type] ?? ("other" as const),
    rawInput,
    ...(typeof path === "string" ? { locations: [{ path }] } : {}),
  };
}

const OTHER_KINDS: Partial<Record<string, ToolKind>> = {
  webSearch: "fetch",
  imageView: "read",
  collabAgentToolCall: "think",
  subAgentActivity: "think",
};

export function describeResult(item: ToolItem): ToolCallFields {
  switch (item.type) {
    case "commandExecution":
      return {
        ...ended(item.status),
        content: texts([item.aggregatedOutput]),
        // Without the output, which may be a megabyte.
        rawOutput: { exitCode: item.exitCode },
      };
    case "fileChange":
      return { ...ended(item.status), content: item.changes.flatMap(diffs), rawOutput: null };
    case "mcpToolCall":
      return {
        ...ended(item.status),
        content: item.result ? contentOf(item.result) : texts([item.error?.message ?? null]),
        rawOutput: item.result ?? item.error,
      };
    default: {
      const { type, id, ...rawOutput } = item;
      return { ...ended(statusOf(item.status)), rawOutput };
    }
  }
}

function statusOf(status: unknown): string {
  return typeof status === "string" ? status : "completed";
}

function ended(status: string): { status: "completed" | "failed" } {
  return { status: status === "failed" || status === "declined" ? "failed" : "completed" };
}

function texts(values: (string | null)[]): ToolContent[] {
  return values.flatMap((text) =>
    text ? [{ type: "content" as const, content: { type: "text" as const, text } }] : [],
  );
}

/** MCP's content blocks are ACP's. */
function contentOf({ content, structuredContent }: NonNullable<McpItem["result"]>): ToolContent[] {
  if (content.length === 0 && structuredContent !== null) {
    return texts([JSON.stringify(structuredContent)]);
  }
  return content.flatMap((block: Json) => {
    const { type } = (block ?? {}) as { type?: Json };
    if (typeof type !== "string") return [];
    return [{ type: "content", content: block } as unknown as ToolContent];
  });
}

/** A new file as a whole, of an updated one the passages that are replaced. */
function diffs({ path, kind, diff }: FileChange): ToolContent[] {
  switch (kind.type) {
    case "add":
      return [{ type: "diff", path, oldText: null, newText: diff }];
    case "delete":
      return [{ type: "diff", path, oldText: diff, newText: "" }];
    case "update":
      return hunks(diff).map((hunk) => ({ type: "diff", path: kind.move_path ?? path, ...hunk }));
  }
}

function hunks(diff: string): { oldText: string; newText: string }[] {
  const found: { oldText: string; newText: string }[] = [];
  for (const text of diff.split(/^@@.*\n/m).slice(1)) {
    const lines = text.split(/(?<=\n)/).filter((one) => !one.startsWith("\\"));
    const side = (mark: string) =>
      lines.flatMap((one) => (one[0] === " " || one[0] === mark ? [one.slice(1)] : [])).join("");
    found.push({ oldText: side("-"), newText: side("+") });
  }
  return found;
}

function line(text: string): string {
  const title = text.replace(/\s+/g, " ").trim();
  return title.length > MAX_TITLE ? `${title.slice(0, MAX_TITLE - 1)}…` : title;
}
