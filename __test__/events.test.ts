import type { AgentEvents, JsonRpcNotification } from "agentvm";
import { expect, test } from "vitest";
import {
  failureOf,
  gate,
  newDirectory,
  newPiSession,
  newPiVm,
  newVm,
  runNode,
} from "./fixtures.js";
import { quickstartScript } from "./model-server.js";

type SessionEvent = AgentEvents["sessionEvent"];

test("events of a session are numbered 1, 2, 3, …, and all are there when sendPrompt resolves", async () => {
  const { agent, sessionId } = await newPiSession(quickstartScript());
  const events: SessionEvent[] = [];
  agent.on("sessionEvent", (event) => events.push(event));

  await agent.sendPrompt(sessionId, "Say hello");

  expect(events.at(-1)?.event.method).toBe("_agentvm/turn_end");
  expect(events.map(({ sequenceNumber }) => sequenceNumber)).toEqual(events.map((_, i) => i + 1));
  expect(events.every((event) => event.sessionId === sessionId)).toBe(true);
});

test("the history is what the listeners were told", async () => {
  const { agent, sessionId } = await newPiSession(quickstartScript());
  const told: SessionEvent[] = [];
  agent.on("sessionEvent", (event) => told.push(event));
  const before = Date.now();
  await agent.sendPrompt(sessionId, "Say hello");

  const history = await agent.getSessionEvents(sessionId);

  const asTold = history.map(({ sessionId, seq, event }) => ({
    sessionId,
    sequenceNumber: seq,
    event,
  }));
  expect(asTold).toEqual(told);
  for (const { createdAt } of history) {
    expect(createdAt).toBeGreaterThanOrEqual(before);
    expect(createdAt).toBeLessThanOrEqual(Date.now());
  }
});

test("an event is the agent's message, with the public session id in place of its own", async () => {
  const { agent, sessionId } = await newPiSession([{ text: "Hello." }]);
  await agent.sendPrompt(sessionId, "Say hello");

  const events = (await agent.getSessionEvents(sessionId)).map(({ event }) => event);

  for (const { jsonrpc, params } of events) {
    expect(jsonrpc).toBe("2.0");
    expect(params.sessionId).toBe(sessionId);
  }
  const message = events.find(
    ({ params }) => params.update?.sessionUpdate === "agent_message_chunk",
  );
  expect(message).toMatchObject({
    method: "session/update",
    params: {
      update: { content: { type: "text", text: "Hello." }, messageId: expect.any(String) },
    },
  });
  expect(message?.params._meta?.agentvm).toBeUndefined();
});

test("the log alone is a transcript: it has the prompt, and how the turn began and ended", async () => {
  const { agent, sessionId } = await newPiSession([{ text: "Hello." }]);
  await agent.sendPrompt(sessionId, "Say hello");

  const added = (await agent.getSessionEvents(sessionId))
    .map(({ event }) => event)
    .filter(({ params }) => params._meta?.agentvm);

  expect(added).toMatchObject([
    { method: "_agentvm/turn_start", params: { turnId: expect.any(String) } },
    {
      method: "session/update",
      params: {
        update: {
          sessionUpdate: "user_message_chunk",
          content: { type: "text", text: "Say hello" },
        },
      },
    },
    {
      method: "_agentvm/turn_end",
      params: { stopReason: "end_turn", response: { stopReason: "end_turn" } },
    },
  ]);
  const [start, , end] = added;
  expect(end?.params.turnId).toBe(start?.params.turnId);
});

test("since and limit page through the history", async () => {
  const { agent, sessionId } = await newPiSession(quickstartScript());
  await agent.sendPrompt(sessionId, "Say hello");
  const all = await agent.getSessionEvents(sessionId);

  const pages = [];
  for (let since = 0; since < all.length; since = pages.at(-1)?.seq ?? 0) {
    const page = await agent.getSessionEvents(sessionId, { since, limit: 5 });
    expect(page).toHaveLength(Math.min(5, all.length - since));
    pages.push(...page);
  }

  expect(pages).toEqual(all);
  expect(await agent.getSessionEvents(sessionId, { since: all.length })).toEqual([]);
  expect(await agent.getSessionEvents(sessionId, { limit: 0 })).toEqual([]);
});

test("a since beyond the last event is SEQ_AHEAD", async () => {
  const { agent, sessionId } = await newPiSession([{ text: "Hello." }]);
  await agent.sendPrompt(sessionId, "Say hello");
  const last = (await agent.getSessionEvents(sessionId)).length;

  const error = await failureOf(() => agent.getSessionEvents(sessionId, { since: last + 1 }));

  expect(error.code).toBe("SEQ_AHEAD");
  expect(error.message).toContain(String(last));
});

test("a turn that fails has an end in the log, with the error", async () => {
  const { agent, sessionId } = await newPiSession([
    { error: { status: 500, type: "api_error", message: "the model is on fire" } },
  ]);
  await failureOf(() => agent.sendPrompt(sessionId, "Say hello"));

  const end = (await agent.getSessionEvents(sessionId)).at(-1)?.event;

  expect(end).toMatchObject({
    method: "_agentvm/turn_end",
    params: { error: { code: "AGENT_ERROR", message: expect.stringContaining("on fire") } },
  });
  expect(end?.params.stopReason).toBeUndefined();
});

test("events of several sessions of a VM arrive, each numbered on its own", async () => {
  const { agent, session } = await newPiVm(({ userText }) => ({ text: `You said ${userText}.` }));
  const bySession = new Map<string, number[]>();
  agent.on("sessionEvent", ({ sessionId, sequenceNumber }) => {
    bySession.set(sessionId, [...(bySession.get(sessionId) ?? []), sequenceNumber]);
  });
  const sessions = await Promise.all([session(), session()]);

  await Promise.all(sessions.map(({ sessionId }) => agent.sendPrompt(sessionId, "hi")));

  expect([...bySession.keys()].sort()).toEqual(sessions.map((s) => s.sessionId).sort());
  for (const numbers of bySession.values()) {
    expect(numbers).toEqual(numbers.map((_, index) => index + 1));
  }
});

test("a listener that blocks the event loop loses nothing and keeps the order", async () => {
  const text = "x".repeat(1_000);
  const { agent, sessionId } = await newPiSession([{ text, chunkSize: 1 }]);
  const numbers: number[] = [];
  agent.on("sessionEvent", ({ sequenceNumber }) => {
    const until = performance.now() + 0.5;
    while (performance.now() < until);
    numbers.push(sequenceNumber);
  });

  const turn = await agent.sendPrompt(sessionId, "Say much");

  expect(turn.text).toBe(text);
  const history = await agent.getSessionEvents(sessionId);
  expect(history.length).toBeGreaterThan(1_000);
  expect(numbers).toEqual(history.map(({ seq }) => seq));
});

test("a listener that comes in the middle of a turn is told what follows, without a gap", async () => {
  const [listening, streaming] = [gate(), gate()];
  const { agent, sessionId } = await newPiSession([
    { text: "before and after", chunkSize: 7, hold: { afterChunks: 1, until: listening.opened } },
  ]);
  agent.once("sessionEvent", () => streaming.open());
  const turn = agent.sendPrompt(sessionId, "Say hello");
  await streaming.opened;
  const numbers: number[] = [];
  agent.on("sessionEvent", ({ sequenceNumber }) => numbers.push(sequenceNumber));
  listening.open();
  await turn;

  const all = (await agent.getSessionEvents(sessionId)).map(({ seq }) => seq);
  expect(numbers.length).toBeGreaterThan(0);
  expect(numbers).toEqual(all.slice(all.length - numbers.length));
});

test("once is told one event; off, and the function that on returns, end the listening", async () => {
  const { agent, sessionId } = await newPiSession([{ text: "One." }, { text: "Two." }]);
  const calls = { once: 0, off: 0, returned: 0, stays: 0 };
  const off = () => {
    calls.off += 1;
  };
  agent.once("sessionEvent", () => {
    calls.once += 1;
  });
  agent.on("sessionEvent", off);
  const unsubscribe = agent.on("sessionEvent", () => {
    calls.returned += 1;
  });
  agent.on("sessionEvent", () => {
    calls.stays += 1;
  });
  await agent.sendPrompt(sessionId, "one");
  const first = calls.stays;

  agent.off("sessionEvent", off);
  unsubscribe();
  unsubscribe();
  await agent.sendPrompt(sessionId, "two");

  expect(calls).toEqual({ once: 1, off: first, returned: first, stays: expect.any(Number) });
  expect(calls.stays).toBeGreaterThan(first);
});

test("once can be taken back with off", async () => {
  const { agent, sessionId } = await newPiSession([{ text: "One." }]);
  const told: JsonRpcNotification[] = [];
  const listener = ({ event }: SessionEvent) => told.push(event);
  agent.once("sessionEvent", listener);
  agent.off("sessionEvent", listener);
  await agent.sendPrompt(sessionId, "one");
  expect(told).toEqual([]);
});

test("a VM tells when it boots and when it shuts down, and why", async () => {
  const agent = await newVm();
  const told: unknown[] = [];
  const slept = gate();
  agent.on("vmBooted", (value) => told.push(["vmBooted", value]));
  agent.on("vmShutdown", (value) => {
    told.push(["vmShutdown", value]);
    slept.open();
  });

  await agent.wake();
  await agent.sleep();
  await slept.opened;

  expect(told).toEqual([
    ["vmBooted", { baseChanged: false, layersSuspect: false }],
    ["vmShutdown", { reason: "sleep" }],
  ]);
});

test("an error of a listener is an uncaughtException, and the other listeners are called all the same", async () => {
  const program = `
    import { createClient } from "agentvm";
    const client = createClient({ dataDir: process.argv[1] });
    const agent = client.vm.getOrCreate("vm");
    process.on("uncaughtException", ({ message }) => console.log("uncaught:", message));
    agent.on("vmBooted", () => { console.log("first"); throw new Error("in the listener"); });
    const told = new Promise((resolve) => agent.on("vmBooted", () => { console.log("second"); resolve(); }));
    await agent.wake();
    await told;
    await client.close();
  `;
  const { code, stdout, stderr } = await runNode(program, await newDirectory());
  expect({ code, stdout, stderr }).toEqual({
    code: 0,
    stdout: "first\nsecond\nuncaught: in the listener\n",
    stderr: "",
  });
});
