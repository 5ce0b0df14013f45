import { expect, test } from "vitest";
import { parseJsonc } from "../src/jsonc.js";
import { parsePatch } from "../src/patch.js";
import { replay } from "../src/replay.js";
import type { SessionUpdate } from "../src/shared/acp.js";
import { isAmbiguous } from "../src/tools.js";
import { Translator } from "../src/translate.js";

test("settings may have comments and trailing commas", () => {
  const text = `\uFEFF// a comment, with "quotes"
  {
    "url": "https://example.com/*not a comment*/", // here
    "list": [1, 2, /* , */ ], /* and
    here */
    "comma": ",}",
  }`;
  expect(parseJsonc(text)).toEqual({
    url: "https://example.com/*not a comment*/",
    list: [1, 2],
    comma: ",}",
  });
  expect(() => parseJsonc("{")).toThrow();
});

test("a patch is shown by its passages", () => {
  const patch = `*** Begin Patch
*** Add File: new.txt
+one
+two
*** Update File: src/old.ts
*** Move to: src/moved.ts
@@ class A
 a
-b
+c
 d
@@
-e
*** Delete File: gone.txt
*** End Patch`;
  expect(parsePatch(patch)).toEqual([
    { path: "new.txt", passages: [{ oldText: null, newText: "one\ntwo\n" }] },
    {
      path: "src/old.ts",
      passages: [
        { oldText: "a\nb\nd\n", newText: "a\nc\nd\n" },
        { oldText: "e\n", newText: "" },
      ],
    },
    { path: "gone.txt", passages: [] },
  ]);
});

test("results are understood as they are stored, too", async () => {
  const updates: SessionUpdate[] = [];
  const translator = new Translator(
    "/",
    (update) => updates.push(update),
    () => false,
  );
  const call = (id: string) => ({ type: "tool_use", id, name: "Bash", input: { cmd: "ls" } });
  const messages = [
    { role: "assistant", content: ["done", "failed", "cancelled", "never"].map(call) },
    {
      role: "user",
      content: [
        {
          type: "tool_result",
          toolUseID: "done",
          run: { status: "done", result: { output: "a.txt", exitCode: 0 } },
        },
        {
          type: "tool_result",
          toolUseID: "failed",
          run: { status: "error", error: { message: "no such file" } },
        },
        { type: "tool_result", toolUseID: "cancelled", status: "cancelled" },
      ],
    },
    { role: "info", content: [{ type: "text", text: "not part of the dialogue" }] },
  ];
  await replay(JSON.stringify({ messages }), translator, async () => {});
  const shown = updates.flatMap((update) =>
    update.sessionUpdate === "tool_call_update"
      ? [[update.toolCallId, update.status, update.content?.[0]]]
      : [],
  );
  const text = (text: string) => ({ type: "content", content: { type: "text", text } });
  expect(shown).toEqual([
    ["done", "completed", text("a.txt")],
    ["failed", "failed", text("no such file")],
    ["cancelled", "failed", text("cancelled")],
    ["never", "failed", text("Interrupted")],
  ]);
});

test("a tool's name may be that of one of several servers", () => {
  const servers = [{ name: "a" }, { name: "a__b" }, { name: "other" }];
  expect(isAmbiguous("mcp__a__b__c", servers)).toBe(true);
  expect(isAmbiguous("mcp__a__c", servers)).toBe(false);
  expect(isAmbiguous("shell_command", servers)).toBe(false);
});
