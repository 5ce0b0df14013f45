import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { expect, test } from "vitest";
import { startModelServer } from "../../../__test__/model-server.js";
import { Adapter, anthropic, gate, isAlive } from "./adapter.js";

const never = gate().opened;

async function expectDead(pids: number[]): Promise<void> {
  await expect.poll(() => pids.filter(isAlive)).toEqual([]);
}

/** Starts a turn whose command writes its pids and then sleeps for ten minutes. */
async function startSleeping(pi: Adapter, sessionId: string) {
  const turn = pi.prompt(sessionId, "Sleep");
  const { toolCallId } = await pi.update(
    ({ status, content }) =>
      status === "in_progress" && content?.[0]?.content.text.includes("sleeping"),
  );
  const pids = (await readFile(join(pi.home, "pids"), "utf8")).trim().split("\n").map(Number);
  expect(pids.map(isAlive)).toEqual([true, true]);
  return { turn, toolCallId, pids };
}

const SLEEP = "sleep 600 & echo $! > pids; echo $$ >> pids; echo sleeping; wait";

test("cancel while the model streams closes the stream and answers cancelled", async () => {
  await using server = await startModelServer({
    script: [{ text: "a long answer ".repeat(20), hold: { afterChunks: 2, until: never } }],
  });
  await using pi = await Adapter.start({ env: anthropic(server) });
  const sessionId = await pi.newSession();
  const turn = pi.prompt(sessionId, "Talk");
  await pi.update(({ sessionUpdate }) => sessionUpdate === "agent_message_chunk");
  pi.send({ method: "session/cancel", params: { sessionId } });

  expect((await turn).result).toEqual({ stopReason: "cancelled" });
  expect(await server.requests[0]?.closed).toBe("aborted");
});

test("cancel sent together with the prompt still ends the turn", async () => {
  await using server = await startModelServer({
    script: [{ text: "never seen", hold: { afterChunks: 0, until: never } }],
  });
  await using pi = await Adapter.start({ env: anthropic(server) });
  const sessionId = await pi.newSession();
  const turn = pi.prompt(sessionId, "Talk");
  pi.send({ method: "session/cancel", params: { sessionId } });
  expect((await turn).result).toEqual({ stopReason: "cancelled" });
});

test("cancel kills the running command and its children", async () => {
  await using server = await startModelServer({
    script: [{ toolCalls: [{ name: "bash", input: { command: SLEEP } }] }],
  });
  await using pi = await Adapter.start({ env: anthropic(server) });
  const sessionId = await pi.newSession();
  const { turn, toolCallId, pids } = await startSleeping(pi, sessionId);
  pi.send({ method: "session/cancel", params: { sessionId } });

  expect((await turn).result).toEqual({ stopReason: "cancelled" });
  await expectDead(pids);
  expect(pi.updatesOf("tool_call_update").at(-1)).toMatchObject({ toolCallId, status: "failed" });
  expect(server.requests).toHaveLength(1);
});

test("a session works on after a cancelled turn", async () => {
  await using server = await startModelServer({
    script: [
      { text: "one two three four five six", hold: { afterChunks: 1, until: never } },
      { text: "Here again." },
    ],
  });
  await using pi = await Adapter.start({ env: anthropic(server) });
  const sessionId = await pi.newSession();
  const turn = pi.prompt(sessionId, "Talk");
  await pi.update(({ sessionUpdate }) => sessionUpdate === "agent_message_chunk");
  pi.send({ method: "session/cancel", params: { sessionId } });
  await turn;

  const { result } = await pi.prompt(sessionId, "Still there?");
  expect(result).toEqual({ stopReason: "end_turn" });
  expect(pi.textOf("agent_message_chunk")).toContain("Here again.");
});

test("cancel with no turn running, or of an unknown session, does nothing", async () => {
  await using server = await startModelServer({ script: [{ text: "Fine." }] });
  await using pi = await Adapter.start({ env: anthropic(server) });
  const sessionId = await pi.newSession();
  pi.send({ method: "session/cancel", params: { sessionId } });
  pi.send({ method: "session/cancel", params: { sessionId: "unknown" } });
  expect((await pi.prompt(sessionId, "Hello")).result).toEqual({ stopReason: "end_turn" });
});

test("the end of standard input ends the turn, its processes and the adapter", async () => {
  await using server = await startModelServer({
    script: [{ toolCalls: [{ name: "bash", input: { command: SLEEP } }] }],
  });
  await using pi = await Adapter.start({ env: anthropic(server) });
  const { turn, pids } = await startSleeping(pi, await pi.newSession());
  pi.child.stdin?.end();

  expect((await turn).result).toEqual({ stopReason: "cancelled" });
  expect(await pi.exited).toEqual({ code: 0, signal: null });
  await expectDead(pids);
});

test("SIGTERM ends the processes too", async () => {
  await using server = await startModelServer({
    script: [{ toolCalls: [{ name: "bash", input: { command: SLEEP } }] }],
  });
  await using pi = await Adapter.start({ env: anthropic(server) });
  const { turn, pids } = await startSleeping(pi, await pi.newSession());
  pi.child.kill("SIGTERM");

  expect(await pi.exited).toEqual({ code: 143, signal: null });
  await expectDead(pids);
  expect((await turn).result).toEqual({ stopReason: "cancelled" });
});

test("a process that a finished command left in the background outlives the turn", async () => {
  const command = "setsid sleep 600 >/dev/null 2>&1 & echo $! > pids";
  await using server = await startModelServer({
    script: [{ toolCalls: [{ name: "bash", input: { command } }] }, { text: "Running." }],
  });
  await using pi = await Adapter.start({ env: anthropic(server) });
  await pi.prompt(await pi.newSession(), "Start it");
  const pid = Number(await readFile(join(pi.home, "pids"), "utf8"));
  expect(isAlive(pid)).toBe(true);
  process.kill(pid, "SIGKILL");
});
