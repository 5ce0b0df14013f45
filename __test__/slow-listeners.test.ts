import { performance } from "node:perf_hooks";
import { setTimeout as timer } from "node:timers/promises";
import type { SendPromptOptions } from "agentvm";
import { expect, test } from "vitest";
import { failureOf, gate, newOwnVm } from "./fixtures.js";

function block(ms: number): void {
  const until = performance.now() + ms;
  while (performance.now() < until);
}

/** A turn of so many updates, which then waits, and a listener that takes 10 ms for each. */
async function slowly(options: SendPromptOptions = {}, updates = 10_000) {
  const { agent, client, session } = await newOwnVm();
  const sessionId = await session();
  const first = gate();
  const heard: number[] = [];
  const off = agent.on("sessionEvent", ({ sequenceNumber }) => {
    first.open();
    block(10);
    heard.push(sequenceNumber);
  });
  const turn = agent.sendPrompt(sessionId, `stream ${updates}\nhold`, options);
  await first.opened;
  return { agent, client, sessionId, heard, off, turn };
}

test("a slow listener starves no timer and no other call", async () => {
  const { agent, sessionId, heard, off, turn } = await slowly();
  const before = heard.length;
  for (let i = 0; i < 10; i++) await timer(1);
  // Each waits for the event that is being told, and little more.
  expect(heard.length - before).toBeLessThan(50);
  expect((await agent.exec("echo hi")).stdout).toBe("hi\n");

  // Nor the agent: it has said everything before the listener has heard a tenth of it.
  while ((await agent.getSession(sessionId)).lastSequenceNumber < 10_002) await timer(5);
  expect(heard.length).toBeLessThan(1_000);

  off();
  await agent.cancelPrompt(sessionId);
  expect((await turn).stopReason).toBe("cancelled");
  expect(heard).toEqual(heard.map((_, index) => index + 1));
});

test("cancelPrompt waits for the agent, and not for a slow listener", async () => {
  const { agent, sessionId, heard, off, turn } = await slowly();
  const [pid] = (await agent.exec("pgrep -x node")).stdout.split("\n");
  while ((await agent.getSession(sessionId)).lastSequenceNumber < 10_002) await timer(5);

  expect(await agent.cancelPrompt(sessionId)).toEqual({ cancelled: true });

  expect(heard.length).toBeLessThan(1_000);
  expect((await agent.getSession(sessionId)).turn).toBeNull();
  // It obeyed: it is not one that had to be stopped.
  expect((await agent.exec("pgrep -x node")).stdout).toBe(`${pid}\n`);
  off();
  expect((await turn).stopReason).toBe("cancelled");
});

test("an abort ends the turn, and does not wait for a slow listener", async () => {
  const controller = new AbortController();
  const { agent, sessionId, heard, off, turn } = await slowly({ signal: controller.signal });
  const aborted = failureOf(() => turn);
  controller.abort();

  expect(await aborted).toMatchObject({ code: "ABORTED" });

  expect(heard.length).toBeLessThan(1_000);
  off();
  expect((await agent.sendPrompt(sessionId, "remember")).text).toBe("2");
});

test("close waits until a slow listener has been told everything", async () => {
  const { client, heard, turn } = await slowly({}, 200);
  await client.close();
  expect(heard).toEqual(Array.from({ length: 203 }, (_, index) => index + 1));
  expect((await turn).stopReason).toBe("cancelled");
});

test("a slow listener is told everything of a turn that a sleep has ended", async () => {
  const { agent, heard, turn } = await slowly({}, 200);
  await agent.sleep();
  // It resolves when listeners have been told.
  expect((await turn).stopReason).toBe("cancelled");
  expect(heard).toEqual(Array.from({ length: 203 }, (_, index) => index + 1));
});

test("the other listeners are told everything, in order, beside one that throws and one that is slow", async () => {
  const { agent, session } = await newOwnVm();
  const sessionId = await session();
  const heard: number[] = [];
  const uncaught: unknown[] = [];
  const before = process.listeners("uncaughtException");
  process.removeAllListeners("uncaughtException");
  process.on("uncaughtException", (error) => uncaught.push(error));
  try {
    agent.on("sessionEvent", () => {
      throw new Error("in the listener");
    });
    agent.on("sessionEvent", () => block(1));
    agent.on("sessionEvent", ({ sequenceNumber }) => heard.push(sequenceNumber));
    await agent.sendPrompt(sessionId, "stream 1000");
  } finally {
    process.removeAllListeners("uncaughtException");
    for (const listener of before) process.on("uncaughtException", listener);
  }
  const all = (await agent.getSessionEvents(sessionId)).map(({ seq }) => seq);
  expect(all).toHaveLength(1_003);
  expect(heard).toEqual(all);
  expect(uncaught).toHaveLength(1_003);
});

test("a listener that is removed in the middle of a batch is told nothing more", async () => {
  const { agent, session } = await newOwnVm();
  const sessionId = await session();
  const heard: number[] = [];
  const off = agent.on("sessionEvent", ({ sequenceNumber }) => {
    heard.push(sequenceNumber);
    if (sequenceNumber === 100) off();
  });
  agent.on("sessionEvent", () => {}); // so that the batches go on
  await agent.sendPrompt(sessionId, "stream 1000");
  expect(heard).toHaveLength(100);
});

test("who begins to listen when the last listener has just gone is told what follows, once and in order", async () => {
  const { agent, session } = await newOwnVm();
  const sessionId = await session();
  const heard: number[] = [];
  const off = agent.on("sessionEvent", ({ sequenceNumber }) => {
    if (sequenceNumber !== 100) return;
    off();
    agent.on("sessionEvent", (event) => heard.push(event.sequenceNumber));
  });
  const turn = agent.sendPrompt(sessionId, "stream 1000\nhold");
  while ((await agent.getSession(sessionId)).lastSequenceNumber < 1_002) await timer(5);
  await agent.cancelPrompt(sessionId);
  await turn;
  const [first = 0] = heard;
  expect(first).toBeGreaterThan(100);
  expect(heard).toEqual(Array.from({ length: 1_003 - first + 1 }, (_, index) => first + index));
});
