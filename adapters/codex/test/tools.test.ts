import { expect, test } from "vitest";
import type { CommandAction, CommandItem, FileChange } from "../src/codex.js";
import { describeCall, describeResult, toolName } from "../src/tools.js";

function command(commandLine: string, commandActions: CommandAction[] = []): CommandItem {
  return {
    type: "commandExecution",
    id: "call_1",
    command: commandLine,
    cwd: "/srv",
    status: "completed",
    commandActions,
    aggregatedOutput: "one\n",
    exitCode: 0,
  };
}

function change(changes: FileChange[]) {
  return { type: "fileChange" as const, id: "call_1", changes, status: "completed" as const };
}

test.each([
  ["/bin/bash -lc 'ls -la'", "ls -la"],
  ["/bin/bash -lc ls", "ls"],
  [`/bin/bash -lc "echo 'hi there'"`, "echo 'hi there'"],
  [`/usr/bin/zsh -c 'echo it'"'"'s'`, "echo it's"],
  ["python3 -c 'print(1)'", "python3 -c 'print(1)'"],
])("%s is shown as what the shell runs", (commandLine, shown) => {
  expect(describeCall(command(commandLine))).toMatchObject({
    title: shown,
    kind: "execute",
    rawInput: { command: shown, cwd: "/srv" },
  });
});

test("a command that only looks is of the kind of what it looks at", () => {
  const read = describeCall(command("cat a", [{ type: "read", path: "/srv/a" }]));
  expect(read).toMatchObject({ kind: "read", locations: [{ path: "/srv/a" }] });
  const list = describeCall(command("ls", [{ type: "listFiles", path: null }]));
  expect(list.kind).toBe("search");
  const both = command("cat a | tee b", [{ type: "read", path: "/srv/a" }, { type: "unknown" }]);
  expect(describeCall(both).kind).toBe("execute");
});

test("a long command has a short title", () => {
  const { title } = describeCall(command(`echo ${"x".repeat(1000)}`));
  expect(title).toHaveLength(200);
});

test("a command's result is its output and its exit code", () => {
  expect(describeResult(command("echo one"))).toEqual({
    status: "completed",
    content: [{ type: "content", content: { type: "text", text: "one\n" } }],
    rawOutput: { exitCode: 0 },
  });
  expect(describeResult({ ...command("false"), status: "failed" }).status).toBe("failed");
  expect(describeResult({ ...command("rm"), status: "declined" }).status).toBe("failed");
});

test("of an update the passages that change are shown, of a new or removed file the whole", () => {
  const { content, locations } = describeCall(
    change([
      {
        path: "/srv/a",
        kind: { type: "update", move_path: null },
        diff: "@@ -1,3 +1,3 @@\n one\n-two\n+2\n three\n@@ -9 +9,2 @@\n-nine\n\\ No newline at end of file\n+nine\n+ten\n",
      },
      { path: "/srv/b", kind: { type: "add" }, diff: "new\n" },
      { path: "/srv/c", kind: { type: "delete" }, diff: "old\n" },
      {
        path: "/srv/d",
        kind: { type: "update", move_path: "/srv/e" },
        diff: "@@ -1 +1 @@\n-a\n+b\n",
      },
    ]),
  );
  expect(content).toEqual([
    { type: "diff", path: "/srv/a", oldText: "one\ntwo\nthree\n", newText: "one\n2\nthree\n" },
    { type: "diff", path: "/srv/a", oldText: "nine\n", newText: "nine\nten\n" },
    { type: "diff", path: "/srv/b", oldText: null, newText: "new\n" },
    { type: "diff", path: "/srv/c", oldText: "old\n", newText: "" },
    { type: "diff", path: "/srv/e", oldText: "a\n", newText: "b\n" },
  ]);
  expect(locations?.map(({ path }) => path)).toEqual(["/srv/a", "/srv/b", "/srv/c", "/srv/d"]);
});

test("a tool of an MCP server shows its result, or why there is none", () => {
  const call = {
    type: "mcpToolCall" as const,
    id: "call_1",
    server: "files",
    tool: "read",
    arguments: { path: "a" },
    status: "completed" as const,
    result: { content: [{ type: "text", text: "hi" }], structuredContent: null },
    error: null,
  };
  expect(toolName(call)).toBe("files_read");
  expect(describeCall(call)).toMatchObject({ title: "files_read", rawInput: { path: "a" } });
  expect(describeResult(call)).toMatchObject({
    status: "completed",
    content: [{ type: "content", content: { type: "text", text: "hi" } }],
  });
  const structured = { content: [], structuredContent: { n: 1 } };
  expect(describeResult({ ...call, result: structured }).content).toEqual([
    { type: "content", content: { type: "text", text: '{"n":1}' } },
  ]);
  const failed = { ...call, status: "failed" as const, result: null, error: { message: "gone" } };
  expect(describeResult(failed)).toMatchObject({
    status: "failed",
    content: [{ type: "content", content: { type: "text", text: "gone" } }],
  });
});

test("a call of a tool that is not known here is shown with what it says", () => {
  const search = { type: "webSearch" as const, id: "ws_1", query: "weather", action: null };
  expect(describeCall(search)).toMatchObject({
    title: "webSearch weather",
    kind: "fetch",
    rawInput: { query: "weather" },
  });
  expect(describeResult(search).status).toBe("completed");
});
