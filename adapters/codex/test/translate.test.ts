import { expect, test } from "vitest";
import type { Item, Notification, ToolItem } from "../src/codex.js";
import type { SessionUpdate } from "../src/shared/acp.js";
import { TurnTranslator } from "../src/translate.js";

const threadId = "thread";

function newTranslator() {
  const updates: SessionUpdate[] = [];
  const translator = new TurnTranslator((update) => updates.push(update));
  const tell = (...notifications: Notification[]) => {
    for (const notification of notifications) translator.translate(notification);
  };
  return { translator, updates, tell };
}

const started = (item: Item): Notification => ({
  method: "item/started",
  params: { threadId, item },
});
const completed = (item: Item): Notification => ({
  method: "item/completed",
  params: { threadId, item },
});
const said = (itemId: string, delta: string): Notification => ({
  method: "item/agentMessage/delta",
  params: { threadId, itemId, delta },
});

const sleep: ToolItem = {
  type: "commandExecution",
  id: "call_1",
  command: "/bin/bash -lc 'sleep 600'",
  cwd: "/srv",
  status: "inProgress",
  commandActions: [],
  aggregatedOutput: null,
  exitCode: null,
};

test("text and thoughts are chunks of the message that they belong to", () => {
  const { updates, tell } = newTranslator();
  tell(
    {
      method: "item/reasoning/summaryPartAdded",
      params: { threadId, itemId: "rs", summaryIndex: 0 },
    },
    { method: "item/reasoning/summaryTextDelta", params: { threadId, itemId: "rs", delta: "Hm." } },
    {
      method: "item/reasoning/summaryPartAdded",
      params: { threadId, itemId: "rs", summaryIndex: 1 },
    },
    { method: "item/reasoning/summaryTextDelta", params: { threadId, itemId: "rs", delta: "So." } },
    said("msg", "Hello"),
    said("msg", ""),
  );
  const text = (update: SessionUpdate) => "content" in update && update.content;
  expect(updates.map((update) => [update.sessionUpdate, text(update)])).toEqual([
    ["agent_thought_chunk", { type: "text", text: "Hm." }],
    ["agent_thought_chunk", { type: "text", text: "\n\n" }],
    ["agent_thought_chunk", { type: "text", text: "So." }],
    ["agent_message_chunk", { type: "text", text: "Hello" }],
  ]);
});

test("a message is unfinished from its first text to its end", () => {
  const { translator, tell } = newTranslator();
  tell(started({ type: "agentMessage", id: "msg" }));
  expect(translator.unfinishedMessage).toBeUndefined();
  tell(said("msg", "Hel"));
  expect(translator.unfinishedMessage).toBe("msg");
  tell(completed({ type: "agentMessage", id: "msg" }));
  expect(translator.unfinishedMessage).toBeUndefined();
});

test("an item that is told only when it is complete is a whole call", () => {
  const { updates, tell } = newTranslator();
  tell(completed({ type: "webSearch", id: "ws" }));
  expect(updates.map(({ sessionUpdate }) => sessionUpdate)).toEqual([
    "tool_call",
    "tool_call_update",
  ]);
});

test("a command that outlives its turn was left running, unless the turn was cancelled", () => {
  for (const [cancelled, status] of [
    [false, "completed"],
    [true, "failed"],
  ] as const) {
    const { translator, updates, tell } = newTranslator();
    tell(started(sleep), {
      method: "item/commandExecution/outputDelta",
      params: { threadId, itemId: sleep.id, delta: "serving" },
    });
    translator.finish(cancelled);
    expect(updates.at(-1)).toMatchObject({ toolCallId: sleep.id, status });
    expect(JSON.stringify(updates.at(-1))).toContain("serving");
    // Its end is told in another turn, which has not shown its beginning.
    expect(translator.tool(sleep.id)).toBeUndefined();
    expect(translator.hasStarted(sleep.id)).toBe(true);
  }
});

test("a plan and the fill of the context are told", () => {
  const { translator, updates, tell } = newTranslator();
  tell(
    {
      method: "turn/plan/updated",
      params: {
        threadId,
        plan: [
          { step: "Look", status: "completed" },
          { step: "Leap", status: "inProgress" },
        ],
      },
    },
    {
      method: "thread/tokenUsage/updated",
      params: { threadId, tokenUsage: { last: { totalTokens: 20 }, modelContextWindow: 1000 } },
    },
  );
  translator.finish(false);
  expect(updates).toEqual([
    {
      sessionUpdate: "plan",
      entries: [
        { content: "Look", priority: "medium", status: "completed" },
        { content: "Leap", priority: "medium", status: "in_progress" },
      ],
    },
    { sessionUpdate: "usage_update", used: 20, size: 1000 },
  ]);
});

test("the call that a server asks about is found by its arguments, else the newest of the server", () => {
  const { translator, tell } = newTranslator();
  const call = (id: string, tool: string, path: string) =>
    started({
      type: "mcpToolCall",
      id,
      server: "files",
      tool,
      arguments: { path },
    } as unknown as Item);
  const found = (server: string, args: string) => {
    const { item, isCertain } = translator.mcpCall(server, args) ?? {};
    return item && [item.id, isCertain];
  };
  tell(call("one", "read", "a"), call("two", "read", "b"));
  expect(found("files", '{"path":"a"}')).toEqual(["one", true]);
  expect(found("files", "{}")).toEqual(["two", false]);
  expect(found("other", "{}")).toBeUndefined();

  tell(call("three", "remove", "a"));
  expect(found("files", '{"path":"a"}')).toEqual(["three", false]);
  expect(found("files", '{"path":"b"}')).toEqual(["two", true]);
});
