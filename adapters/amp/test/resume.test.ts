import { expect, test } from "vitest";
import { startModelServer } from "../../../__test__/model-server.js";
import { Adapter, run, service } from "./adapter.js";

const NOWHERE = "00000000-0000-4000-8000-000000000000";

test("a new process goes on with the thread and the mode", async () => {
  await using server = await startModelServer({ script: [{ text: "Noted." }, { text: "Blue." }] });
  await using before = await Adapter.start({ env: service(server) });
  const sessionId = await before.newSession();
  await before.request("session/set_mode", { sessionId, modeId: "high" });
  await before.prompt(sessionId, "My colour is blue");
  before.child.kill("SIGKILL");
  await before.exited;

  await using after = await Adapter.start({ env: service(server), home: before.home });
  const params = { sessionId, cwd: after.home, mcpServers: [] };
  const { modes } = await after.request("session/resume", params);
  expect(modes.currentModeId).toBe("high");
  expect(after.updates).toEqual([]);
  await after.prompt(sessionId, "Which one is it?");
  expect(server.requests[1]?.body.model).toBe("amp-high");
  expect(JSON.stringify(server.requests[1]?.body.messages)).toContain("My colour is blue");
});

test("a session without a turn yet can be resumed, too", async () => {
  await using server = await startModelServer({ script: [{ text: "Hello." }] });
  await using amp = await Adapter.start({ env: service(server) });
  const sessionId = await amp.newSession();
  await amp.request("session/close", { sessionId });
  await amp.request("session/load", { sessionId, cwd: amp.home, mcpServers: [] });
  expect((await amp.prompt(sessionId, "Hello")).result).toEqual({ stopReason: "end_turn" });
});

test("session/load tells the conversation again, without the instructions", async () => {
  await using server = await startModelServer({
    script: [
      { thinking: "Hm.", text: "I look.", toolCalls: [run("echo one"), run("exit 0", "b2")] },
      { text: "It says one." },
    ],
  });
  await using before = await Adapter.start({ env: service(server) });
  const instructions = { _meta: { systemPrompt: { append: "Be brief." } } };
  const sessionId = await before.newSession(instructions);
  await before.prompt(sessionId, "Look");

  await using after = await Adapter.start({ env: service(server), home: before.home });
  const params = { sessionId, cwd: after.home, mcpServers: [], ...instructions };
  await after.request("session/load", params);
  expect(after.updates).toMatchObject([
    { sessionUpdate: "user_message_chunk", content: { text: "Look" } },
    { sessionUpdate: "agent_thought_chunk", content: { text: "Hm." } },
    { sessionUpdate: "agent_message_chunk", content: { text: "I look." } },
    { sessionUpdate: "tool_call", toolCallId: "run", status: "pending" },
    { sessionUpdate: "tool_call", toolCallId: "b2", status: "pending" },
    {
      sessionUpdate: "tool_call_update",
      toolCallId: "run",
      status: "completed",
      content: [{ content: { text: "one\n" } }],
    },
    { sessionUpdate: "tool_call_update", toolCallId: "b2", status: "completed" },
    { sessionUpdate: "agent_message_chunk", content: { text: "It says one." } },
  ]);
});

test.for(["session/load", "session/resume"])(
  "%s of an unknown session is an error",
  async (method) => {
    await using amp = await Adapter.start();
    for (const sessionId of [NOWHERE, "../../etc"]) {
      const { error } = await amp.call(method, { sessionId, cwd: amp.home, mcpServers: [] });
      expect(error).toMatchObject({ code: -32002, data: { type: "session_not_found", sessionId } });
    }
  },
);

test("a prompt to a session that is not open is an error", async () => {
  await using amp = await Adapter.start();
  const { error } = await amp.prompt(NOWHERE, "Hello");
  expect(error).toMatchObject({ code: -32002, data: { type: "session_not_found" } });
});
