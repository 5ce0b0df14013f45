/** How Pi's tools look in ACP: kind, title, places touched, diff. */

import { homedir } from "node:os";
import { resolve } from "node:path";
import type { ToolCallFields, ToolContent, ToolKind, ToolLocation } from "./shared/acp.js";

/** Results of Pi's tools: text and images for the model, `details` for whoever displays them. */
export interface PiToolResult {
  content?: ({ type: "text"; text: string } | { type: "image"; data: string; mimeType: string })[];
  details?: unknown;
}

/** Of Pi's own tools, those that only look. */
export const READING_TOOLS: ReadonlySet<string> = new Set(["read", "grep", "find", "ls"]);

type Args = Record<string, unknown>;

const MAX_TITLE = 200;

const KINDS: Record<string, ToolKind> = {
  read: "read",
  write: "edit",
  edit: "edit",
  bash: "execute",
  grep: "search",
  find: "search",
  ls: "search",
};

export function describeToolCall(
  name: string,
  rawInput: unknown,
  cwd: string,
): { title: string } & ToolCallFields {
  const args = asArgs(rawInput);
  const locations = locationsOf(args, cwd);
  return {
    title: title(name, args),
    kind: Object.hasOwn(KINDS, name) ? (KINDS[name] as ToolKind) : "other",
    ...(locations.length > 0 ? { locations } : {}),
    rawInput: rawInput ?? {},
  };
}

function title(name: string, args: Args): string {
  const { path, command, pattern } = args;
  const text =
    name === "bash" && typeof command === "string"
      ? command
      : [name, pattern, path].filter((part) => typeof part === "string" && part !== "").join(" ");
  const line = text.replace(/\s+/g, " ").trim() || name;
  return line.length > MAX_TITLE ? `${line.slice(0, MAX_TITLE - 1)}…` : line;
}

function locationsOf(args: Args, cwd: string): ToolLocation[] {
  const path = pathOf(args, cwd);
  if (path === undefined) return [];
  const { offset } = args;
  return [typeof offset === "number" ? { path, line: offset } : { path }];
}

/** Absolute path that a tool call is about, if it is about one. */
export function pathOf(args: unknown, cwd: string): string | undefined {
  const { path } = asArgs(args);
  if (typeof path !== "string" || path === "") return undefined;
  // As Pi's tools read it: `~` is the home directory, and models may quote a mention with `@`.
  const plain = path.replace(/^@/, "").replace(/^~(?=\/|$)/, homedir());
  return resolve(cwd, plain);
}

export function describeToolResult(
  call: { name: string; args: unknown; oldText: string | null | undefined },
  result: PiToolResult | undefined,
  isError: boolean,
  cwd: string,
): ToolCallFields {
  const content: ToolContent[] = isError ? [] : diffs(call, cwd);
  for (const part of result?.content ?? []) {
    if (part.type === "text") {
      content.push({ type: "content", content: { type: "text", text: part.text } });
    } else {
      const { data, mimeType } = part;
      content.push({ type: "content", content: { type: "image", data, mimeType } });
    }
  }
  const path = pathOf(call.args, cwd);
  const line = (result?.details as { firstChangedLine?: unknown } | undefined)?.firstChangedLine;
  return {
    status: isError ? "failed" : "completed",
    content,
    ...(path !== undefined && typeof line === "number" ? { locations: [{ path, line }] } : {}),
    rawOutput: { output: textOf(result), details: result?.details ?? null },
  };
}

function textOf(result: PiToolResult | undefined): string {
  return (result?.content ?? []).map((part) => (part.type === "text" ? part.text : "")).join("");
}

/** `write` shows the whole file, `edit` the passages that it replaced. */
function diffs(
  call: { name: string; args: unknown; oldText: string | null | undefined },
  cwd: string,
): ToolContent[] {
  const args = asArgs(call.args);
  const path = pathOf(args, cwd);
  if (path === undefined) return [];
  if (call.name === "write" && typeof args.content === "string" && call.oldText !== undefined) {
    return [{ type: "diff", path, oldText: call.oldText, newText: args.content }];
  }
  if (call.name !== "edit") return [];
  const edits = Array.isArray(args.edits) ? args.edits : [args];
  return edits.flatMap((edit: unknown): ToolContent[] => {
    const { oldText, newText } = asArgs(edit);
    return typeof oldText === "string" && typeof newText === "string"
      ? [{ type: "diff", path, oldText, newText }]
      : [];
  });
}

function asArgs(value: unknown): Args {
  return typeof value === "object" && value !== null && !Array.isArray(value)
    ? (value as Args)
    : {};
}
