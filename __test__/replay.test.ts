import { readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";
import type { PersistedEvent } from "agentvm";
import { expect, test } from "vitest";
import { elements } from "../lib/parts.js";
import { agentStoreDir, failureOf, newOwnVm, runNode, told } from "./fixtures.js";

/** What the numbers of so many events are. */
const upTo = (last: number) => Array.from({ length: last }, (_, index) => index + 1);

async function collect<T>(values: AsyncIterable<T>): Promise<T[]> {
  const collected: T[] = [];
  for await (const value of values) collected.push(value);
  return collected;
}

test("getEvents, getSequencedEvents and getSessionEvents tell the same", async () => {
  const { agent, session } = await newOwnVm();
  const id = await session();
  await agent.sendPrompt(id, "stream 20");
  const persisted = await agent.getSessionEvents(id);
  expect(persisted).toHaveLength(23);

  expect(await agent.getEvents(id)).toEqual(persisted.map(({ event }) => event));
  const sequenced = persisted.map(({ seq, event }) => ({
    sequenceNumber: seq,
    notification: event,
  }));
  expect(await agent.getSequencedEvents(id)).toEqual(sequenced);
  expect(await agent.getSequencedEvents(id, { since: 0 })).toEqual(sequenced);
  expect(await agent.getSequencedEvents(id, { since: 21 })).toEqual(sequenced.slice(21));
});

test("since, method and limit choose together, in each of them", async () => {
  const { agent, session } = await newOwnVm();
  const id = await session();
  await agent.sendPrompt(id, "stream 5");
  await agent.sendPrompt(id, "stream 5");
  const all = await agent.getSessionEvents(id);
  const ends = all.filter(({ event }) => event.method === "_agentvm/turn_end");
  expect(ends).toHaveLength(2);

  expect(await agent.getSessionEvents(id, { method: "_agentvm/turn_end" })).toEqual(ends);
  const since = ends[0]?.seq ?? 0;
  expect(await agent.getSessionEvents(id, { method: "_agentvm/turn_end", since })).toEqual([
    ends[1],
  ]);
  expect(await agent.getEvents(id, { method: "_agentvm/turn_end", limit: 1 })).toEqual([
    ends[0]?.event,
  ]);
  const query = { method: "session/update", since: 2, limit: 3 };
  expect((await agent.getSequencedEvents(id, query)).map((e) => e.sequenceNumber)).toEqual([
    3, 4, 5,
  ]);
  expect(await agent.getEvents(id, { method: "session/nothing" })).toEqual([]);
});

test("a history of more values than a process should read at once is refused", async () => {
  const { agent, session } = await newOwnVm();
  const id = await session();
  await agent.sendPrompt(id, "values 90000 50");

  const events = await agent.getSequencedEvents(id);
  expect(events.map(({ sequenceNumber }) => sequenceNumber)).toEqual(upTo(53));

  await agent.sendPrompt(id, "values 90000 6");
  const { code, message } = await failureOf(() => agent.getEvents(id));
  expect({ code, message }).toMatchObject({
    code: "RESULT_TOO_LARGE",
    message: expect.stringContaining("5000000 JSON values"),
  });
  expect(await collect(agent.sessionEvents(id))).toHaveLength(62);
});

test("what comes in parts is read in turns with others", async () => {
  const part = JSON.stringify(Array(20_000).fill({ a: "b" }));
  let [turns, done] = [0, false];
  const count = () => {
    turns++;
    if (!done) setImmediate(count);
  };
  setImmediate(count);
  expect(await elements([part, part, part, part], 0)).toHaveLength(80_000);
  done = true;
  expect(turns).toBeGreaterThanOrEqual(3);
});

test("a message of more values than a process should read ends its agent alone", async () => {
  const { agent, session } = await newOwnVm();
  const id = await session();
  const { code, message } = await failureOf(() => agent.sendPrompt(id, "values 100000"));
  expect({ code, message }).toMatchObject({
    code: "AGENT_PROTOCOL",
    message: expect.stringContaining("100000 values"),
  });
  expect((await agent.sendPrompt(id, "say again")).text).toBe("again");
});

test("sessionEvents without follow is the history, and ends", async () => {
  const { agent, session } = await newOwnVm();
  const id = await session();
  await agent.sendPrompt(id, "stream 2000");
  const history = await agent.getSessionEvents(id);

  expect(await collect(agent.sessionEvents(id))).toEqual(history);
  expect(await collect(agent.sessionEvents(id, { since: 1990 }))).toEqual(history.slice(1990));
  expect(await collect(agent.sessionEvents(id, { since: history.length }))).toEqual([]);
});

test("with follow it goes on with what comes, each event once, over sleep and resume", async () => {
  const { agent, session } = await newOwnVm();
  const id = await session();
  await agent.sendPrompt(id, "stream 1000");
  const seen: PersistedEvent[] = [];
  const following = (async () => {
    for await (const event of agent.sessionEvents(id, { follow: true })) {
      seen.push(event);
      if (event.event.params.update?.content?.text === "the end") break;
    }
  })();
  await agent.sendPrompt(id, "stream 1000");
  await agent.sleep();
  await agent.sendPrompt(id, "stream 10\nsay the end");
  await following;

  const history = await agent.getSessionEvents(id);
  expect(seen).toEqual(history.slice(0, seen.length));
  expect(seen.map(({ seq }) => seq)).toEqual(upTo(seen.length));
});

test("return ends an iteration, also while it waits for an event", async () => {
  const { agent, session } = await newOwnVm();
  const events = agent.sessionEvents(await session(), { follow: true });
  const next = events.next();
  const after = events.next();

  expect(await events.return()).toEqual({ done: true, value: undefined });

  expect(await next).toEqual({ done: true, value: undefined });
  expect(await after).toEqual({ done: true, value: undefined });
  expect(await events.next()).toEqual({ done: true, value: undefined });
});

test("calls of next that do not wait for each other get the events in order", async () => {
  const { agent, session } = await newOwnVm();
  const id = await session();
  await agent.sendPrompt(id, "stream 10");
  await using events = agent.sessionEvents(id);
  const answers = await Promise.all(upTo(13).map(() => events.next()));
  expect(answers.map(({ value }) => value?.seq)).toEqual(upTo(13));
  expect(await events.next()).toEqual({ done: true, value: undefined });
});

test("an abort ends an iteration with ABORTED, before it and while it waits", async () => {
  const { agent, session } = await newOwnVm();
  const id = await session();
  const controller = new AbortController();
  const events = agent.sessionEvents(id, { follow: true, signal: controller.signal });
  const waiting = failureOf(() => events.next());
  const reason = new Error("the user left");
  controller.abort(reason);

  expect(await waiting).toMatchObject({ name: "AbortError", code: "ABORTED", cause: reason });
  expect(await events.next()).toEqual({ done: true, value: undefined });

  const late = agent.sessionEvents(id, { signal: controller.signal });
  expect(await failureOf(() => late.next())).toMatchObject({ code: "ABORTED" });
});

test("an iteration ends when its session is destroyed, and fails when the client is closed", async () => {
  const { agent, session, client } = await newOwnVm();
  const id = await session();
  await agent.sendPrompt(id, "say one");
  const ending = collect(agent.sessionEvents(id, { follow: true }));
  await agent.destroySession(id);
  expect((await ending).map(({ seq }) => seq)).toEqual(upTo((await ending).length));

  const failing = agent.sessionEvents(await session(), { follow: true });
  const next = failureOf(() => failing.next());
  await client.close();
  expect(await next).toMatchObject({ code: "CLIENT_CLOSED" });
});

test("an iteration names what it can't read", async () => {
  const { agent, session } = await newOwnVm();
  const id = await session();
  const first = (events: AsyncIterator<PersistedEvent>) => failureOf(() => events.next());
  const unknown = agent.sessionEvents("01a20f17-a84e-70d6-a176-692da91130ed");
  expect((await first(unknown)).code).toBe("SESSION_NOT_FOUND");
  expect((await first(agent.sessionEvents(id, { since: 1 }))).code).toBe("SEQ_AHEAD");
});

test("an iteration neither boots a VM nor keeps one awake", async () => {
  const { agent, session } = await newOwnVm({ sleepAfterMs: 100 });
  const slept = told(agent, "vmShutdown");
  const id = await session();
  await agent.sendPrompt(id, "stream 10");
  const events = agent.sessionEvents(id, { follow: true });
  for (const seq of upTo(13)) expect((await events.next()).value?.seq).toBe(seq);
  const next = events.next();

  expect(await slept).toEqual({ reason: "sleep" });

  const booted: unknown[] = [];
  agent.on("vmBooted", (value) => booted.push(value));
  expect(await collect(agent.sessionEvents(id))).toHaveLength(13);
  expect(booted).toEqual([]);
  await events.return();
  await next;
});

test("a follower that reconnects by its last number has seen each event once, though it was killed again and again", async () => {
  const { session, dataDir, client } = await newOwnVm();
  const id = await session();
  await client.close();

  // Each time it takes what the file says it has seen, and goes on from there until it is killed.
  const follower = `
    import { appendFileSync, readFileSync } from "node:fs";
    import { createClient } from "agentvm";
    const [dataDir, agentStoreDir, id, file] = process.argv.slice(1);
    const agents = { own: { command: "node", args: ["/home/user/own-agent.mjs"] } };
    const agent = createClient({ dataDir, agentStoreDir, agents }).vm.getOrCreate("vm");
    const since = readFileSync(file, "utf8").trim().split("\\n").filter(Boolean).length;
    agent.sendPrompt(id, "stream 2000").catch(() => {});
    for await (const { seq } of agent.sessionEvents(id, { since, follow: true })) {
      appendFileSync(file, seq + "\\n");
      if (seq === since + 300) process.kill(process.pid, "SIGKILL");
    }
  `;
  const file = join(dataDir, "seen");
  await writeFile(file, "");
  for (let round = 0; round < 4; round++) {
    const killed = await runNode(follower, dataDir, agentStoreDir, id, file);
    expect(killed).toMatchObject({ signal: "SIGKILL", stderr: "" });
  }

  const seen = (await readFile(file, "utf8")).trim().split("\n").map(Number);
  expect(seen).toEqual(upTo(1200));
  const history = await (await newOwnVm({ dataDir })).agent.getSessionEvents(id);
  expect(history.map(({ seq }) => seq)).toEqual(upTo(history.length));
  expect(history.length).toBeGreaterThanOrEqual(1200);
});
