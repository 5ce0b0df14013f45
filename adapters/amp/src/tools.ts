/** How Amp's tools look in ACP: kind, title, places touched, diffs, plan. */

import { homedir } from "node:os";
import { resolve } from "node:path";
import { type FileChange, parsePatch } from "./patch.js";
import type {
  PlanEntry,
  ToolCallFields,
  ToolContent,
  ToolKind,
  ToolLocation,
} from "./shared/acp.js";
import type { Block, ToolResultBlock } from "./stream.js";

type Args = Record<string, unknown>;

const MAX_TITLE = 200;

/** The tools that Amp has, or has had: which of them there are depends on the mode. */
const KINDS: Record<string, ToolKind> = {
  Read: "read",
  read_thread: "read",
  view_media: "read",
  look_at: "read",
  create_file: "edit",
  edit_file: "edit",
  apply_patch: "edit",
  undo_edit: "edit",
  delete_file: "delete",
  Bash: "execute",
  shell_command: "execute",
  async_shell_command: "execute",
  shell_command_status: "execute",
  shell_command_kill: "execute",
  Grep: "search",
  Glob: "search",
  glob: "search",
  finder: "search",
  list_directory: "search",
  find_thread: "search",
  web_search: "fetch",
  read_web_page: "fetch",
  Task: "think",
  oracle: "think",
  librarian: "think",
};

/** Of Amp's own tools, those that only look at what is in this machine. */
export const READING_TOOLS: ReadonlySet<string> = new Set([
  ...["Read", "view_media", "look_at", "Grep", "Glob", "glob", "finder", "list_directory"],
  ...["get_diagnostics", "shell_command_status", "skill", "todo_read", "todo_write"],
]);

/** Whether the name could be that of a tool of more than one server: `mcp__<server>__<tool>`. */
export function isAmbiguous(tool: string, servers: { name: string }[]): boolean {
  const plain = (text: string) => text.replace(/[^A-Za-z0-9]/g, "_");
  return servers.filter(({ name }) => plain(tool).startsWith(plain(`mcp__${name}__`))).length > 1;
}

/** Arguments that say what a call is about, the first one first. */
const SUBJECTS = [
  ...["cmd", "command", "path", "pattern", "filePattern", "query", "objective", "url"],
  ...["description", "task", "prompt", "name"],
];

/** Tools whose command is their title. */
const SHELLS: ReadonlySet<string> = new Set(["Bash", "shell_command", "async_shell_command"]);

export function describeToolCall(
  name: string,
  rawInput: unknown,
  cwd: string,
): { title: string } & ToolCallFields {
  const args = asArgs(rawInput);
  const locations = locationsOf(name, args, cwd);
  return {
    title: title(name, args),
    kind: Object.hasOwn(KINDS, name) ? (KINDS[name] as ToolKind) : "other",
    ...(locations.length > 0 ? { locations } : {}),
    rawInput: rawInput ?? {},
  };
}

function title(name: string, args: Args): string {
  const files = changesOf(name, args).map(({ path }) => path);
  const subject = SUBJECTS.map((key) => args[key]).find((value) => typeof value === "string");
  const about = files.length > 0 ? files.join(", ") : (subject ?? "");
  const text = SHELLS.has(name) && about !== "" ? about : `${name} ${about}`;
  const line = text.replace(/\s+/g, " ").trim();
  return line.length > MAX_TITLE ? `${line.slice(0, MAX_TITLE - 1)}…` : line;
}

function locationsOf(name: string, args: Args, cwd: string): ToolLocation[] {
  const changes = changesOf(name, args);
  if (changes.length > 0) return changes.map(({ path }) => ({ path: absolute(path, cwd) }));
  if (typeof args.path !== "string" || args.path === "") return [];
  const path = absolute(args.path, cwd);
  const [line] = Array.isArray(args.read_range) ? args.read_range : [];
  return [typeof line === "number" ? { path, line } : { path }];
}

/** The file that the call replaces as a whole. */
export function overwrittenFile(name: string, rawInput: unknown, cwd: string): string | undefined {
  const { path } = asArgs(rawInput);
  if (name !== "create_file" || typeof path !== "string") return undefined;
  return absolute(path, cwd);
}

export interface ShownCall {
  name: string;
  input: unknown;
  /** What the file held before `create_file`: null if it did not exist, undefined if it is not shown. */
  oldText: string | null | undefined;
}

export function describeToolResult(
  call: ShownCall,
  result: Pick<ToolResultBlock, "content" | "is_error">,
  cwd: string,
): ToolCallFields {
  const content: ToolContent[] = result.is_error ? [] : diffs(call, cwd);
  const blocks: Block[] =
    typeof result.content === "string" ? [{ type: "text", text: result.content }] : result.content;
  for (const block of blocks) {
    if (block.type === "text") {
      const text = outputOf(block.text);
      if (text !== "") content.push({ type: "content", content: { type: "text", text } });
    } else if (block.type === "image" && block.source.type === "base64") {
      const { data, media_type: mimeType } = block.source;
      content.push({ type: "content", content: { type: "image", data, mimeType } });
    }
  }
  return {
    status: result.is_error ? "failed" : "completed",
    content,
    rawOutput: result.content,
  };
}

/** The results of many tools are JSON: `{"output": "…", "exitCode": 0}`. */
function outputOf(text: string): string {
  if (!text.startsWith("{")) return text;
  try {
    const { output } = JSON.parse(text) as Args;
    return typeof output === "string" ? output : text;
  } catch {
    return text;
  }
}

function diffs({ name, input, oldText }: ShownCall, cwd: string): ToolContent[] {
  const args = asArgs(input);
  return changesOf(name, args).flatMap((change) => {
    const path = absolute(change.path, cwd);
    if (name === "create_file") {
      const [passage] = change.passages;
      if (oldText === undefined || passage === undefined) return [];
      const { newText } = passage;
      // Amp does not wait for us, unless it asks: what we have read may be what it has written.
      return [{ type: "diff", path, oldText: oldText === newText ? null : oldText, newText }];
    }
    return change.passages.map((passage): ToolContent => ({ type: "diff", path, ...passage }));
  });
}

/** What a call changes, as far as its input says. */
function changesOf(name: string, args: Args): FileChange[] {
  const { path, content, old_str: oldText, new_str: newText, patchText } = args;
  switch (name) {
    case "apply_patch":
      return typeof patchText === "string" ? parsePatch(patchText) : [];
    case "create_file":
      return typeof path === "string" && typeof content === "string"
        ? [{ path, passages: [{ oldText: null, newText: content }] }]
        : [];
    case "edit_file":
      return typeof path === "string" && typeof oldText === "string" && typeof newText === "string"
        ? [{ path, passages: [{ oldText, newText }] }]
        : [];
    default:
      return [];
  }
}

/** ACP's plan, if the call writes one. */
export function planOf(name: string, input: unknown): PlanEntry[] | undefined {
  const { todos } = asArgs(input);
  if (name !== "todo_write" || !Array.isArray(todos)) return undefined;
  return todos.map(asArgs).map(({ content, status, priority }) => ({
    content: String(content ?? ""),
    priority: priority === "high" || priority === "low" ? priority : "medium",
    status:
      status === "completed" ? "completed" : status === "in-progress" ? "in_progress" : "pending",
  }));
}

function absolute(path: string, cwd: string): string {
  return resolve(cwd, path.replace(/^~(?=\/|$)/, homedir()));
}

function asArgs(value: unknown): Args {
  return typeof value === "object" && value !== null && !Array.isArray(value)
    ? (value as Args)
    : {};
}
