import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { expect, test } from "vitest";
import { startModelServer } from "../../../__test__/model-server.js";
import { Adapter, gate, isAlive, run, service } from "./adapter.js";

const never = gate().opened;

const SLEEP = run("sleep 600 & echo $! > pids; echo $$ >> pids; wait");

async function pidsOf(amp: Adapter): Promise<number[]> {
  const file = join(amp.home, "pids");
  const pids = async () => (await readFile(file, "utf8")).trim().split("\n").map(Number);
  await expect.poll(pids, { timeout: 20_000 }).toHaveLength(2);
  return await pids();
}

async function expectDead(pids: number[]): Promise<void> {
  await expect.poll(() => pids.filter(isAlive)).toEqual([]);
}

test("cancel while the model is asked ends its request, and the session works on", async () => {
  await using server = await startModelServer({
    script: [{ text: "never seen", hold: { afterChunks: 0, until: never } }, { text: "Here." }],
  });
  await using amp = await Adapter.start({ env: service(server) });
  const sessionId = await amp.newSession();
  const turn = amp.prompt(sessionId, "Talk");
  await server.request(0);
  amp.send({ method: "session/cancel", params: { sessionId } });

  expect((await turn).result).toEqual({ stopReason: "cancelled" });
  expect(await server.requests[0]?.closed).toBe("aborted");
  expect((await amp.prompt(sessionId, "Still there?")).result).toEqual({ stopReason: "end_turn" });
  expect(amp.textOf("agent_message_chunk")).toBe("Here.");
});

test("cancel sent together with the prompt still ends the turn", async () => {
  await using server = await startModelServer({
    script: [{ text: "never seen", hold: { afterChunks: 0, until: never } }],
  });
  await using amp = await Adapter.start({ env: service(server) });
  const sessionId = await amp.newSession();
  const turn = amp.prompt(sessionId, "Talk");
  amp.send({ method: "session/cancel", params: { sessionId } });
  expect((await turn).result).toEqual({ stopReason: "cancelled" });
});

test("cancel kills the running command and its children, and the thread goes on", async () => {
  await using server = await startModelServer({
    script: [{ toolCalls: [SLEEP] }, { text: "What was it?" }],
  });
  await using amp = await Adapter.start({ env: service(server) });
  const sessionId = await amp.newSession();
  const turn = amp.prompt(sessionId, "Sleep");
  const pids = await pidsOf(amp);
  amp.send({ method: "session/cancel", params: { sessionId } });

  expect((await turn).result).toEqual({ stopReason: "cancelled" });
  await expectDead(pids);
  expect(amp.updatesOf("tool_call_update").at(-1)).toMatchObject({
    toolCallId: "run",
    status: "failed",
  });
  await amp.prompt(sessionId, "Go on");
  expect(JSON.stringify(server.requests[1]?.body.messages)).toContain("Sleep");
});

test("cancel with no turn running, or of an unknown session, does nothing", async () => {
  await using server = await startModelServer({ script: [{ text: "Fine." }] });
  await using amp = await Adapter.start({ env: service(server) });
  const sessionId = await amp.newSession();
  amp.send({ method: "session/cancel", params: { sessionId } });
  amp.send({ method: "session/cancel", params: { sessionId: "unknown" } });
  expect((await amp.prompt(sessionId, "Hello")).result).toEqual({ stopReason: "end_turn" });
});

test("the end of standard input ends the turn, its processes and the adapter", async () => {
  await using server = await startModelServer({ script: [{ toolCalls: [SLEEP] }] });
  await using amp = await Adapter.start({ env: service(server) });
  const turn = amp.prompt(await amp.newSession(), "Sleep");
  const pids = await pidsOf(amp);
  amp.child.stdin?.end();

  expect((await turn).result).toEqual({ stopReason: "cancelled" });
  expect(await amp.exited).toEqual({ code: 0, signal: null });
  await expectDead(pids);
});

test("SIGTERM ends the processes too", async () => {
  await using server = await startModelServer({ script: [{ toolCalls: [SLEEP] }] });
  await using amp = await Adapter.start({ env: service(server) });
  const turn = amp.prompt(await amp.newSession(), "Sleep");
  const pids = await pidsOf(amp);
  amp.child.kill("SIGTERM");

  expect(await amp.exited).toEqual({ code: 143, signal: null });
  await expectDead(pids);
  expect((await turn).result).toEqual({ stopReason: "cancelled" });
});

test("a process that a finished command left in the background outlives the turn", async () => {
  const command = "setsid sleep 600 >/dev/null 2>&1 & echo $! > pids; echo 0 >> pids";
  await using server = await startModelServer({
    script: [{ toolCalls: [run(command)] }, { text: "Running." }],
  });
  await using amp = await Adapter.start({ env: service(server) });
  await amp.prompt(await amp.newSession(), "Start it");
  const [pid = 0] = await pidsOf(amp);
  expect(isAlive(pid)).toBe(true);
  process.kill(pid, "SIGKILL");
});
