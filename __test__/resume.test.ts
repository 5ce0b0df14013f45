import { expect, test } from "vitest";
import {
  agentStoreDir,
  envOf,
  failureOf,
  gate,
  newClient,
  newDirectory,
  newPiSession,
  newPiVm,
  runNode,
} from "./fixtures.js";

const REMEMBER = [{ text: "Noted." }, { text: "Blue." }];

test("what the agent repeats of a conversation when it resumes is not logged again", async () => {
  const { agent, sessionId } = await newPiSession(REMEMBER);
  await agent.sendPrompt(sessionId, "My colour is blue");
  const before = await agent.getSessionEvents(sessionId);
  const told: number[] = [];
  agent.on("sessionEvent", ({ sequenceNumber }) => told.push(sequenceNumber));
  await agent.closeSession(sessionId);
  await agent.resumeSession(sessionId);
  expect(await agent.getSessionEvents(sessionId)).toEqual(before);

  await agent.sendPrompt(sessionId, "Which one is it?");

  const after = await agent.getSessionEvents(sessionId);
  expect(after.slice(0, before.length)).toEqual(before);
  expect(after.map(({ seq }) => seq)).toEqual(after.map((_, index) => index + 1));
  expect(told).toEqual(after.slice(before.length).map(({ seq }) => seq));
});

test("a session goes on in another client on the same data directory", async () => {
  const { agent, sessionId, dataDir, model, client } = await newPiSession(REMEMBER);
  await agent.writeFile("notes.txt", "kept");
  await agent.sendPrompt(sessionId, "My colour is blue");
  await client.close();

  const again = await newClient({ dataDir, loopbackExemptPorts: [model.port] });
  const { text } = await again.vm.getOrCreate(["vm"]).sendPrompt(sessionId, "Which one is it?");

  expect(text).toBe("Blue.");
  expect(JSON.stringify((await model.request(1)).body.messages)).toContain("My colour is blue");
  const notes = await again.vm.getOrCreate("vm").readFile("notes.txt");
  expect(new TextDecoder().decode(notes)).toBe("kept");
});

test("a session goes on in another process, though the first was killed in the middle of a turn", async () => {
  const dataDir = await newDirectory();
  const streaming = gate();
  const { agent, model } = await newPiVm(({ index }) => {
    if (index > 0) return { text: "Where were we?" };
    return { text: "One moment", hold: { afterChunks: 1, until: streaming.opened } };
  });
  await agent.destroy();
  const program = `
    import { createClient } from "agentvm";
    const [dataDir, agentStoreDir, env, port] = process.argv.slice(1);
    const client = createClient({ dataDir, agentStoreDir, loopbackExemptPorts: [Number(port)] });
    const agent = client.vm.getOrCreate("vm");
    agent.on("sessionEvent", ({ sessionId, event }) => {
      if (event.params.update?.sessionUpdate !== "agent_message_chunk") return;
      process.stdout.write(sessionId, () => process.kill(process.pid, "SIGKILL"));
    });
    const { sessionId } = await agent.createSession("pi", { env: JSON.parse(env) });
    await agent.sendPrompt(sessionId, "Start");
  `;
  const args = [dataDir, agentStoreDir, JSON.stringify(envOf(model)), String(model.port)];
  const killed = await runNode(program, ...args);
  expect(killed).toMatchObject({ signal: "SIGKILL", stderr: "" });
  const sessionId = killed.stdout;

  const client = await newClient({ dataDir, loopbackExemptPorts: [model.port] });
  const next = client.vm.getOrCreate("vm");
  const before = await next.getSessionEvents(sessionId);
  // What a listener has seen is there.
  expect(before.at(-1)?.event.params.update?.content.text).toBe("One moment");
  expect((await next.sendPrompt(sessionId, "Go on")).text).toBe("Where were we?");

  const events = await next.getSessionEvents(sessionId);
  expect(events.map(({ seq }) => seq)).toEqual(events.map((_, index) => index + 1));
  expect(events[before.length]?.event).toMatchObject({
    method: "_agentvm/turn_end",
    params: { interrupted: { reason: expect.any(String) } },
  });
});

test("resumeSession starts the agent again and returns the session's record", async () => {
  const { agent, session, sessionId } = await newPiSession([]);
  await agent.closeSession(sessionId);

  const record = await agent.resumeSession(sessionId);

  expect(record).toMatchObject({ ...session, cwd: "/home/user", status: "open" });
  expect((await agent.exec("pgrep -x node")).exitCode).toBe(0);
});

test("resumeSession does nothing to a session that is live", async () => {
  const { agent, sessionId } = await newPiSession([{ text: "Hello." }]);
  const pid = (await agent.exec("pgrep -x node")).stdout;
  await agent.resumeSession(sessionId);
  expect((await agent.exec("pgrep -x node")).stdout).toBe(pid);
});

test("the environment is kept for a resume, unless persistEnv is false", async () => {
  const { agent, session, model } = await newPiVm([{ text: "Hello again." }]);
  const { sessionId } = await session({ persistEnv: false });
  await agent.closeSession(sessionId);

  const error = await failureOf(() => agent.sendPrompt(sessionId, "Hello"));
  expect(error.code).toBe("ENV_REQUIRED");
  expect(error.message).toContain("resumeSession(sessionId, { env })");

  await agent.resumeSession(sessionId, { env: envOf(model) });
  expect((await agent.sendPrompt(sessionId, "Hello")).text).toBe("Hello again.");
});

test("closeSession can be called again, and during a turn, which it cancels", async () => {
  const { agent, sessionId, model } = await newPiSession([
    { text: "No end", hold: { afterChunks: 0, until: new Promise(() => {}) } },
  ]);
  const turn = agent.sendPrompt(sessionId, "Talk");
  await model.request(0);
  await agent.closeSession(sessionId);
  await agent.closeSession(sessionId);

  expect((await turn).stopReason).toBe("cancelled");
  expect(await agent.listPersistedSessions()).toMatchObject([{ sessionId, status: "closed" }]);
});

test("listPersistedSessions has every session, the newest first, and boots nothing", async () => {
  const { agent, session, client, dataDir } = await newPiVm([]);
  expect(await agent.listPersistedSessions()).toEqual([]);
  const before = Date.now();
  const first = await session();
  const second = await session({ cwd: "/home/user/project" });
  await client.close();

  const other = (await newClient({ dataDir })).vm.getOrCreate("vm");
  const booted: unknown[] = [];
  other.on("vmBooted", (value) => booted.push(value));
  const sessions = await other.listPersistedSessions();

  expect(sessions).toMatchObject([
    { ...second, cwd: "/home/user/project", status: "suspended", lastSequenceNumber: 0 },
    { ...first, cwd: "/home/user", status: "suspended", lastSequenceNumber: 0 },
  ]);
  for (const { createdAt, updatedAt } of sessions) {
    expect(createdAt).toBeGreaterThanOrEqual(before);
    expect(updatedAt).toBeGreaterThanOrEqual(createdAt);
    expect(updatedAt).toBeLessThanOrEqual(Date.now());
  }
  // The first boot is the one that is asked for now.
  const told = gate();
  other.once("vmBooted", () => told.open());
  await other.wake();
  await told.opened;
  expect(booted).toHaveLength(1);
});

test("the history of a session can be read without booting anything", async () => {
  const { agent, sessionId, client, dataDir } = await newPiSession([{ text: "Hello." }]);
  await agent.sendPrompt(sessionId, "Hello");
  const events = await agent.getSessionEvents(sessionId);
  await client.close();

  const program = `
    import { createClient } from "agentvm";
    const client = createClient({ dataDir: process.argv[1] });
    const agent = client.vm.getOrCreate("vm");
    agent.on("vmBooted", () => console.error("booted"));
    console.log(JSON.stringify(await agent.getSessionEvents(process.argv[2])));
    await client.close();
  `;
  const { code, stdout, stderr } = await runNode(program, dataDir, sessionId);
  expect({ code, stderr }).toEqual({ code: 0, stderr: "" });
  expect(JSON.parse(stdout)).toEqual(events);
});

test("locks that a killed Pi has left are gone at the next start, and those of a living one stay", async () => {
  const { agent, session } = await newPiVm([]);
  const dir = "/home/user/.pi/agent";
  await agent.exec(`mkdir -p ${dir}/settings.json.lock ${dir}/auth.json.lock ${dir}/kept`);
  // As after a SIGKILL of the host process: nothing of the VM runs any more, its files stay.
  await agent.sleep();
  // Files are dated by the tick of the kernel's clock, and this may still be that of the boot.
  await agent.exec(`until mkdir ${dir}/mine.lock && [ ${dir}/mine.lock -nt /run/user ]
    do rmdir ${dir}/mine.lock; done`);
  await session();
  const { stdout } = await agent.exec(`ls ${dir}`);
  expect(stdout.split("\n")).toEqual(expect.arrayContaining(["kept", "mine.lock"]));
  expect(stdout).not.toContain("settings.json.lock");
  expect(stdout).not.toContain("auth.json.lock");
});
