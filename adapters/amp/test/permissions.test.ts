import { existsSync } from "node:fs";
import { mkdir, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { expect, test } from "vitest";
import { startModelServer, type ToolCallReply } from "../../../__test__/model-server.js";
import { Adapter, ASK, run, service } from "./adapter.js";

const RUN = run("touch ran");

function calling(...calls: ToolCallReply[]) {
  return [...calls.map((call) => ({ toolCalls: [call] })), { text: "Done." }];
}

function ran(amp: Adapter): boolean {
  return existsSync(join(amp.home, "ran"));
}

test("a call waits for the answer, which it is announced before", async () => {
  await using server = await startModelServer({ script: calling(RUN) });
  await using amp = await Adapter.start({ env: service(server) });
  const sessionId = await amp.newSession(ASK);
  const turn = amp.prompt(sessionId, "Run");
  const request = await amp.asked();

  expect(request.params).toEqual({
    sessionId,
    toolCall: {
      toolCallId: "run",
      name: "shell_command",
      title: "touch ran",
      kind: "execute",
      status: "pending",
      rawInput: { command: "touch ran" },
    },
    options: [
      { optionId: "allow_once", name: "Allow", kind: "allow_once" },
      {
        optionId: "allow_always",
        name: "Always allow shell_command in this session, whatever it is called with",
        kind: "allow_always",
      },
      { optionId: "reject_once", name: "Reject", kind: "reject_once" },
    ],
  });
  expect(amp.updatesOf("tool_call")).toMatchObject([{ toolCallId: "run", status: "pending" }]);
  expect(amp.updatesOf("tool_call_update")).toEqual([]);
  expect(ran(amp)).toBe(false);

  amp.select(request, "allow_once");
  expect((await turn).result).toEqual({ stopReason: "end_turn" });
  expect(ran(amp)).toBe(true);
  expect(amp.updatesOf("tool_call_update")).toMatchObject([
    { status: "in_progress" },
    { status: "completed" },
  ]);
});

test("a rejected call fails with the reason, and the turn goes on", async () => {
  await using server = await startModelServer({ script: calling(RUN) });
  await using amp = await Adapter.start({ env: service(server) });
  const turn = amp.prompt(await amp.newSession(ASK), "Run");
  amp.select(await amp.asked(), "reject_once");

  expect((await turn).result).toEqual({ stopReason: "end_turn" });
  expect(amp.textOf("agent_message_chunk")).toBe("Done.");
  expect(ran(amp)).toBe(false);
  expect(server.requests[1]?.toolResults[0]).toContain(
    "Not executed: the user did not allow this use of shell_command.",
  );
  expect(amp.updatesOf("tool_call_update")).toMatchObject([{ status: "failed" }]);
});

test("always is for one tool, in this session, also in later turns", async () => {
  const edit = { id: "e", name: "create_file", input: { path: "a.txt", content: "" } };
  await using server = await startModelServer({
    script: [...calling(RUN, run("echo", "b2"), edit), ...calling(run("echo", "b3"))],
  });
  await using amp = await Adapter.start({ env: service(server) });
  const sessionId = await amp.newSession(ASK);
  const turn = amp.prompt(sessionId, "Run twice, write once");
  amp.select(await amp.asked(), "allow_always");
  const second = await amp.asked(1);
  expect(second.params.toolCall.name).toBe("create_file");
  amp.select(second, "allow_once");
  await turn;
  await amp.prompt(sessionId, "And again");
  expect(amp.requests).toHaveLength(2);
});

test("calls of one message are asked about one after the other", async () => {
  await using server = await startModelServer({
    script: [{ toolCalls: [RUN, run("echo", "b2")] }, { text: "Done." }],
  });
  await using amp = await Adapter.start({ env: service(server) });
  const turn = amp.prompt(await amp.newSession(ASK), "Run twice");
  amp.select(await amp.asked(), "allow_always");
  await turn;
  expect(amp.requests).toHaveLength(1);
  expect(server.requests[1]?.toolResults).toHaveLength(2);
});

test("a question that does not name its call is about the one that looks like it", async () => {
  await using server = await startModelServer({
    script: [{ toolCalls: [RUN, { ...RUN, id: "again" }] }, { text: "Done." }],
  });
  await using amp = await Adapter.start({
    env: { ...service(server), STAND_IN_NAMES_NO_CALL: "1" },
  });
  const turn = amp.prompt(await amp.newSession(ASK), "Run twice");
  amp.select(await amp.asked(), "allow_once");
  amp.select(await amp.asked(1), "reject_once");
  await turn;
  const ids = amp.requests.map(({ params }) => params.toolCall.toolCallId);
  expect(ids).toEqual(["run", "again"]);
  expect(amp.updatesOf("tool_call")).toHaveLength(2);
});

test("tools that only look do not ask, those of a subagent do", async () => {
  const read = { id: "r", name: "Read", input: { path: "a.txt" } };
  const task = { id: "task", name: "Task", input: { prompt: "Run" } };
  await using server = await startModelServer({
    script: [
      { toolCalls: [read] },
      { toolCalls: [task] },
      { toolCalls: [RUN] },
      { text: "Not allowed." },
      { text: "Done." },
    ],
  });
  await using amp = await Adapter.start({ env: service(server) });
  await writeFile(join(amp.home, "a.txt"), "one\n");
  const turn = amp.prompt(await amp.newSession(ASK), "Go");
  const first = await amp.asked();
  expect(first.params.toolCall.toolCallId).toBe("task");
  amp.select(first, "allow_once");
  const second = await amp.asked(1);
  expect(second.params.toolCall.toolCallId).toBe("run");
  amp.select(second, "reject_once");
  await turn;
  expect(server.requests[1]?.toolResults).toEqual(["one\n"]);
  expect(ran(amp)).toBe(false);
});

test("what the user's settings forbid is not even asked about, and they stay as they are", async () => {
  await using server = await startModelServer({ script: calling(RUN) });
  await using amp = await Adapter.start({ env: service(server) });
  await mkdir(join(amp.home, ".config/amp"), { recursive: true });
  await writeFile(
    join(amp.home, ".config/amp/settings.json"),
    `{
      // As people write it
      "amp.showCosts": false,
      "amp.permissions": [
        { "tool": "shell_*", "action": "reject", "message": "no // shells" },
        { "tool": "*", "action": "allow" },
      ],
      "amp.dangerouslyAllowAll": true,
    }`,
  );
  const sessionId = await amp.newSession(ASK);
  await amp.prompt(sessionId, "Run");
  expect(amp.requests).toEqual([]);
  expect(server.requests[1]?.toolResults[0]).toContain("no // shells");
  const settings = JSON.parse((await amp.kept(sessionId))["settings.json"] ?? "");
  expect(settings).toMatchObject({ "amp.showCosts": false, "amp.updates.mode": "disabled" });
});

test("settings that can't be read are an error that names them", async () => {
  await using amp = await Adapter.start();
  await mkdir(join(amp.home, ".config/amp"), { recursive: true });
  const path = join(amp.home, ".config/amp/settings.json");
  await writeFile(path, "{ broken");
  const { error } = await amp.call("session/new", { cwd: amp.home, mcpServers: [] });
  expect(error).toMatchObject({ code: -32603, data: { type: "amp_settings", path } });
});

test("cancel while a permission is asked for ends the turn, and a late answer changes nothing", async () => {
  await using server = await startModelServer({ script: calling(RUN, RUN) });
  await using amp = await Adapter.start({ env: service(server) });
  const sessionId = await amp.newSession(ASK);
  const turn = amp.prompt(sessionId, "Run");
  const request = await amp.asked();
  amp.send({ method: "session/cancel", params: { sessionId } });
  expect((await turn).result).toEqual({ stopReason: "cancelled" });
  amp.select(request, "allow_always");

  const next = amp.prompt(sessionId, "Run");
  amp.select(await amp.asked(1), "reject_once");
  expect((await next).result).toEqual({ stopReason: "end_turn" });
  expect(ran(amp)).toBe(false);
});

test.for<[string, object, string]>([
  ["an error", { error: { code: -32601, message: "Method not found" } }, "Method not found"],
  ["an unknown option", { result: { outcome: { outcome: "selected", optionId: "x" } } }, '"x"'],
  ["null", { result: null }, "null"],
])("%s in place of an answer does not permit anything", async ([, answer, reason]) => {
  await using server = await startModelServer({ script: calling(RUN) });
  await using amp = await Adapter.start({ env: service(server) });
  const turn = amp.prompt(await amp.newSession(ASK), "Run");
  amp.send({ id: (await amp.asked()).id as number, ...answer });
  expect((await turn).result).toEqual({ stopReason: "end_turn" });
  expect(server.requests[1]?.toolResults[0]).toContain(reason);
  expect(ran(amp)).toBe(false);
});

test("the adapter ends when its client goes while a permission is asked for", async () => {
  await using server = await startModelServer({ script: calling(RUN) });
  await using amp = await Adapter.start({ env: service(server) });
  amp.prompt(await amp.newSession(ASK), "Run").catch(() => {}); // may be answered or not
  await amp.asked();
  amp.child.stdin?.end();
  expect(await amp.exited).toEqual({ code: 0, signal: null });
  expect(ran(amp)).toBe(false);
});

test("with allow nothing is asked", async () => {
  await using server = await startModelServer({ script: calling(RUN) });
  await using amp = await Adapter.start({ env: service(server) });
  await amp.prompt(await amp.newSession(), "Run");
  expect(amp.requests).toEqual([]);
  expect(ran(amp)).toBe(true);
});

test("with reject it is the client that refuses", async () => {
  await using server = await startModelServer({ script: calling(RUN) });
  await using amp = await Adapter.start({ env: service(server) });
  const policy = { _meta: { agentvm: { permissionPolicy: "reject" } } };
  const turn = amp.prompt(await amp.newSession(policy), "Run");
  amp.select(await amp.asked(), "reject_once");
  await turn;
  expect(ran(amp)).toBe(false);
});
