import { mkdir, mkdtemp, readdir, rm, symlink } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, expect, test } from "vitest";
import { startModelServer } from "../../../__test__/model-server.js";
import { Adapter, anthropic, gate } from "./adapter.js";

let home: string;
beforeEach(async () => {
  home = await mkdtemp(join(tmpdir(), "pi-adapter-home-"));
});
afterEach(async () => {
  await rm(home, { recursive: true, force: true });
});

test("a loaded session replays its history and the model remembers it", async () => {
  await using server = await startModelServer({
    script: [
      {
        thinking: "Look around.",
        text: "Let me see.",
        toolCalls: [{ name: "bash", input: { command: "echo treasure" }, id: "t1" }],
      },
      { text: "I found treasure." },
      { text: "As I said: treasure." },
    ],
  });
  let sessionId: string;
  {
    await using pi = await Adapter.start({ home, env: anthropic(server) });
    sessionId = await pi.newSession();
    await pi.prompt(sessionId, "What is there?");
  }

  await using pi = await Adapter.start({ home, env: anthropic(server) });
  await pi.request("session/load", { sessionId, cwd: home, mcpServers: [] });
  expect(pi.updates).toMatchObject([
    { sessionUpdate: "user_message_chunk", content: { text: "What is there?" } },
    { sessionUpdate: "agent_thought_chunk", content: { text: "Look around." } },
    { sessionUpdate: "agent_message_chunk", content: { text: "Let me see." } },
    { sessionUpdate: "tool_call", toolCallId: "t1", status: "pending", title: "echo treasure" },
    { sessionUpdate: "tool_call_update", toolCallId: "t1", status: "completed" },
    { sessionUpdate: "agent_message_chunk", content: { text: "I found treasure." } },
  ]);

  await pi.prompt(sessionId, "What was it?");
  const conversation = JSON.stringify(server.requests[2]?.body.messages);
  expect(conversation).toContain("What is there?");
  expect(conversation).toContain("I found treasure.");
});

test("resume restores the conversation without replaying it", async () => {
  await using server = await startModelServer({ script: [{ text: "Noted." }, { text: "Blue." }] });
  let sessionId: string;
  {
    await using pi = await Adapter.start({ home, env: anthropic(server) });
    sessionId = await pi.newSession();
    await pi.prompt(sessionId, "My colour is blue");
  }
  await using pi = await Adapter.start({ home, env: anthropic(server) });
  await pi.request("session/resume", { sessionId, cwd: home, mcpServers: [] });
  expect(pi.updates).toEqual([]);
  await pi.prompt(sessionId, "Which colour?");
  expect(JSON.stringify(server.requests[1]?.body.messages)).toContain("My colour is blue");
});

test("a session that was never prompted can be loaded", async () => {
  await using server = await startModelServer({ script: [{ text: "Hello." }] });
  let sessionId: string;
  {
    await using pi = await Adapter.start({ home, env: anthropic(server) });
    sessionId = await pi.newSession();
  }
  await using pi = await Adapter.start({ home, env: anthropic(server) });
  await pi.request("session/load", { sessionId, cwd: home, mcpServers: [] });
  expect((await pi.prompt(sessionId, "Hi")).result).toEqual({ stopReason: "end_turn" });
});

test("a prompt survives a crash in the middle of the first answer", async () => {
  await using server = await startModelServer({
    script: [
      { text: "I was about to …", hold: { afterChunks: 0, until: gate().opened } },
      { text: "Yes." },
    ],
  });
  let sessionId: string;
  {
    await using pi = await Adapter.start({ home, env: anthropic(server) });
    sessionId = await pi.newSession();
    const turn = pi.prompt(sessionId, "Remember the milk").catch(() => {});
    await server.request(0);
    pi.child.kill("SIGKILL");
    await turn;
  }
  await using pi = await Adapter.start({ home, env: anthropic(server) });
  await pi.request("session/load", { sessionId, cwd: home, mcpServers: [] });
  expect(pi.updates).toMatchObject([{ content: { text: "Remember the milk" } }]);
  expect((await pi.prompt(sessionId, "Do you?")).result).toEqual({ stopReason: "end_turn" });
});

test("a tool call that a crash interrupted is replayed as failed", async () => {
  await using server = await startModelServer({
    script: [
      { toolCalls: [{ name: "bash", input: { command: "echo up; kill -9 $PPID" }, id: "x" }] },
    ],
  });
  let sessionId: string;
  {
    await using pi = await Adapter.start({ home, env: anthropic(server) });
    sessionId = await pi.newSession();
    await pi.prompt(sessionId, "Go").catch(() => {});
  }
  await using pi = await Adapter.start({ home, env: anthropic(server) });
  await pi.request("session/load", { sessionId, cwd: home, mcpServers: [] });
  expect(pi.updates).toMatchObject([
    { sessionUpdate: "user_message_chunk" },
    { sessionUpdate: "tool_call", toolCallId: "x" },
    { sessionUpdate: "tool_call_update", toolCallId: "x", status: "failed" },
  ]);
});

test("the history can be loaded without an API key; a prompt then needs one", async () => {
  await using server = await startModelServer({ script: [{ text: "Hello." }] });
  let sessionId: string;
  {
    await using pi = await Adapter.start({ home, env: anthropic(server) });
    sessionId = await pi.newSession();
    await pi.prompt(sessionId, "Hi");
  }
  await using pi = await Adapter.start({ home, env: { ANTHROPIC_API_KEY: undefined } });
  await pi.request("session/load", { sessionId, cwd: home, mcpServers: [] });
  expect(pi.textOf("agent_message_chunk")).toBe("Hello.");
  expect((await pi.prompt(sessionId, "Hi")).error).toMatchObject({ code: -32000 });
});

test("AGENTVM_STATE_DIR holds the session files, whatever the working directory", async () => {
  await using server = await startModelServer({ script: [{ text: "Hello." }] });
  const state = join(home, "state");
  const cwd = join(home, "project");
  await mkdir(cwd);
  const env = { ...anthropic(server), AGENTVM_STATE_DIR: state };
  let sessionId: string;
  {
    await using pi = await Adapter.start({ home, env });
    sessionId = (await pi.request("session/new", { cwd, mcpServers: [] })).sessionId;
    await pi.prompt(sessionId, "Hi");
  }
  expect(await readdir(join(state, "sessions"))).toEqual([
    expect.stringMatching(new RegExp(`_${sessionId}\\.jsonl$`)),
  ]);
  await using pi = await Adapter.start({ home, env });
  await pi.request("session/load", { sessionId, cwd: home, mcpServers: [] });
  expect(pi.textOf("agent_message_chunk")).toBe("Hello.");
});

test.for([["unknown"], ["../../etc/passwd"], [""]])(
  "loading the unknown session %j is an error that names it",
  async ([sessionId]) => {
    await using pi = await Adapter.start({ home });
    const { error } = await pi.call("session/load", { sessionId, cwd: home, mcpServers: [] });
    expect(error).toMatchObject({ code: -32002, data: { type: "session_not_found", sessionId } });
  },
);

test("a session that is loaded twice at once is opened once", async () => {
  await using server = await startModelServer({ script: () => ({ text: "Hello." }) });
  let sessionId: string;
  {
    await using pi = await Adapter.start({ home, env: anthropic(server) });
    sessionId = await pi.newSession();
  }
  await using pi = await Adapter.start({ home, env: anthropic(server) });
  const params = { sessionId, cwd: home, mcpServers: [] };
  await Promise.all([pi.request("session/load", params), pi.request("session/load", params)]);
  const answers = await Promise.all([pi.prompt(sessionId, "One"), pi.prompt(sessionId, "Two")]);
  expect(answers.map(({ error }) => error?.code)).toEqual([undefined, -32600]);
});

test("a closed session takes no prompts until it is loaded again", async () => {
  await using server = await startModelServer({ script: [{ text: "Hello." }] });
  await using pi = await Adapter.start({ home, env: anthropic(server) });
  const sessionId = await pi.newSession();
  await pi.request("session/close", { sessionId });
  expect((await pi.prompt(sessionId, "Hi")).error).toMatchObject({ code: -32002 });
  await pi.request("session/load", { sessionId, cwd: home, mcpServers: [] });
  expect(await pi.prompt(sessionId, "Hi")).toMatchObject({ result: { stopReason: "end_turn" } });
});

test("a session finds its key each time it is opened", async () => {
  await using server = await startModelServer({ script: () => ({ text: "Hello." }) });
  await using pi = await Adapter.start({ home, env: anthropic(server) });
  const sessionId = await pi.newSession();
  for (let time = 0; time < 20; time++) {
    await pi.request("session/close", { sessionId });
    await pi.request("session/resume", { sessionId, cwd: home, mcpServers: [] });
    expect(await pi.prompt(sessionId, "Hi")).not.toHaveProperty("error");
  }
});

test("two adapters of one home use their own services and sessions", async () => {
  await using left = await startModelServer({ script: () => ({ text: "left" }) });
  await using right = await startModelServer({ script: () => ({ text: "right" }) });
  await using a = await Adapter.start({ home, env: anthropic(left) });
  await using b = await Adapter.start({ home, env: anthropic(right) });
  const turn = async (pi: Adapter) => await pi.prompt(await pi.newSession(), "Which one?");
  await Promise.all([turn(a), turn(b), turn(a), turn(b)]);

  expect(a.textOf("agent_message_chunk")).toBe("leftleft");
  expect(b.textOf("agent_message_chunk")).toBe("rightright");
  const files = await readdir(home, { recursive: true });
  expect(files.filter((file) => file.endsWith(".jsonl"))).toHaveLength(4);
});

test("a session file that can't be written is an error of the prompt", async () => {
  await using server = await startModelServer({ script: () => ({ text: "Hello." }) });
  await using pi = await Adapter.start({ home, env: anthropic(server) });
  const sessionId = await pi.newSession();
  const files = await readdir(home, { recursive: true });
  const file = join(home, files.find((name) => name.endsWith(".jsonl")) ?? "");
  await rm(file);
  await symlink("/dev/full", file);

  const { error } = await pi.prompt(sessionId, "Hi");
  expect(error).toMatchObject({ code: -32603, message: expect.stringContaining("ENOSPC") });
  expect(await pi.newSession()).not.toBe(sessionId);
});
