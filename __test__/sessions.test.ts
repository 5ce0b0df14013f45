import { readdir } from "node:fs/promises";
import { join } from "node:path";
import { isDeepStrictEqual } from "node:util";
import type { AgentEvents } from "agentvm";
import { expect, test } from "vitest";
import { failureOf, newOwnVm, newPiVm, told } from "./fixtures.js";

test("an agent of the client's own is one that createSession knows", async () => {
  const { agent } = await newOwnVm();
  expect(await agent.createSession("own")).toEqual({
    sessionId: expect.stringMatching(/^[0-9a-f-]{36}$/),
    agentType: "own",
    capabilities: { loadSession: true, mcpCapabilities: { http: true } },
    agentInfo: { name: "own", version: "1" },
  });
  const error = await failureOf(() => agent.createSession("another"));
  expect(error.code).toBe("AGENT_UNKNOWN");
  expect(error.message).toMatch(/\bown\b.*\bpi\b|\bpi\b.*\bown\b/);
});

test("getSession and listSessions tell what a session is and what is going on in it", async () => {
  const { agent, session } = await newOwnVm();
  const first = await session();
  const second = await session({ cwd: "/home/user/project", permissionPolicy: "reject" });
  expect(await agent.getSession(second)).toEqual({
    sessionId: second,
    agentType: "own",
    capabilities: expect.any(Object),
    agentInfo: { name: "own", version: "1" },
    cwd: "/home/user/project",
    status: "open",
    lastSequenceNumber: 0,
    createdAt: expect.any(Number),
    updatedAt: expect.any(Number),
    permissionPolicy: "reject",
    turn: null,
    pendingPermissions: [],
  });
  const before = Date.now();
  const streaming = told(agent, "sessionEvent", ({ event }) => event.method === "session/update");
  const turn = agent.sendPrompt(first, "say hello\nhold");
  await streaming;

  const sessions = await agent.listSessions();
  expect(sessions.map(({ sessionId }) => sessionId)).toEqual([second, first]);
  const [start] = await agent.getEvents(first, { method: "_agentvm/turn_start" });
  expect(sessions[1]?.turn).toEqual({
    turnId: start?.params.turnId,
    startedAt: expect.any(Number),
  });
  expect(sessions[1]?.turn?.startedAt).toBeGreaterThanOrEqual(before);
  expect(sessions[0]?.turn).toBeNull();

  await agent.cancelPrompt(first);
  await turn;
  expect((await agent.getSession(first)).turn).toBeNull();
});

test("sessionStatus tells what a session comes to", async () => {
  const { agent, session } = await newOwnVm();
  const comesTo = (status: Partial<AgentEvents["sessionStatus"]>) =>
    told(agent, "sessionStatus", (value) => isDeepStrictEqual({ ...value, ...status }, value));

  const opened = comesTo({ status: "open", turnId: null, pendingPermissions: 0 });
  const sessionId = await session({ permissionPolicy: "ask" });
  expect((await opened).sessionId).toBe(sessionId);

  const asks = comesTo({ status: "open", pendingPermissions: 1 });
  const turn = agent.sendPrompt(sessionId, "permission allow_once\nhold");
  const { turnId } = await asks;
  const [request] = (await agent.getSession(sessionId)).pendingPermissions;
  const goesOn = comesTo({ status: "open", turnId, pendingPermissions: 0 });
  await agent.respondPermission(sessionId, request?.permissionId ?? "", "once");
  await goesOn;

  const ends = comesTo({ status: "open", turnId: null, pendingPermissions: 0 });
  await agent.cancelPrompt(sessionId);
  await turn;
  await ends;

  const closed = comesTo({ status: "closed", turnId: null, pendingPermissions: 0 });
  await agent.closeSession(sessionId);
  await closed;

  const destroyed = comesTo({ status: "destroyed", turnId: null, pendingPermissions: 0 });
  await agent.destroySession(sessionId);
  await destroyed;
});

test("destroySession removes the session with all its data, and no other", async () => {
  const { agent, session, dataDir } = await newOwnVm();
  const kept = await session({ env: { A: "1" } });
  const id = await session({ env: { A: "2" } });
  await agent.sendPrompt(id, "say hello");
  await agent.sendPrompt(kept, "say hello");

  await agent.destroySession(id);
  await agent.destroySession(id);

  expect((await agent.listSessions()).map(({ sessionId }) => sessionId)).toEqual([kept]);
  for (const call of [
    () => agent.getSession(id),
    () => agent.getEvents(id),
    () => agent.sendPrompt(id, "say hello"),
    () => agent.resumeSession(id),
  ]) {
    expect((await failureOf(call)).code).toBe("SESSION_NOT_FOUND");
  }
  const [vm = ""] = await readdir(join(dataDir, "vms"));
  const environments = await readdir(join(dataDir, "vms", vm, "env"));
  expect(environments.filter((name) => name.includes(id))).toEqual([]);
  expect(environments.filter((name) => name.includes(kept))).toHaveLength(1);
  expect((await agent.sendPrompt(kept, "remember")).text).toBe("2");
});

test("destroySession ends a turn that is under way", async () => {
  const { agent, session } = await newOwnVm();
  const id = await session();
  const streaming = told(agent, "sessionEvent", ({ event }) => event.method === "session/update");
  const turn = agent.sendPrompt(id, "say hello\nhold").catch((error) => error);
  await streaming;
  await agent.destroySession(id);
  await turn;
  expect((await agent.exec("pgrep -x node")).stdout).toBe("");
  expect(await agent.listSessions()).toEqual([]);
});

test("a session that is destroyed while its VM sleeps is gone, and so is what was destroyed before", async () => {
  const { agent, session } = await newOwnVm();
  const id = await session();
  await agent.sleep();
  await agent.destroySession(id);
  expect(await agent.listPersistedSessions()).toEqual([]);
});

test("an agent that is resumed has the environment, directory and servers of its session", async () => {
  const { agent, session } = await newOwnVm();
  const id = await session({
    env: { GREETING: "hello" },
    cwd: "/home/user/project",
    mcpServers: [{ type: "local", name: "files", command: "true", args: ["-v"], env: { A: "1" } }],
  });
  const opened = async () => JSON.parse((await agent.sendPrompt(id, "opened")).text);
  const before = await opened();
  expect(before).toMatchObject({
    cwd: "/home/user/project",
    mcpServers: [
      { name: "files", command: "true", args: ["-v"], env: [{ name: "A", value: "1" }] },
    ],
  });

  await agent.sleep();
  const { sessionId: _, ...after } = await opened();
  expect(after).toEqual(before);
  expect((await agent.sendPrompt(id, "env GREETING")).text).toBe("hello");
});

test("what was not kept is asked for by name, and resumeSession takes it", async () => {
  const { agent, session } = await newOwnVm();
  const server = { type: "local", name: "files", command: "true" } as const;
  const id = await session({ env: { A: "1" }, mcpServers: [server], persistEnv: false });
  await agent.closeSession(id);

  const without = await failureOf(() => agent.resumeSession(id));
  expect(without).toMatchObject({
    code: "ENV_REQUIRED",
    message: expect.stringContaining("{ env }"),
  });
  const half = await failureOf(() => agent.resumeSession(id, { env: { A: "2" } }));
  expect(half).toMatchObject({ code: "ENV_REQUIRED", message: expect.stringContaining("files") });

  const state = await agent.resumeSession(id, { env: { A: "2" }, mcpServers: [server] });
  expect(state).toMatchObject({ sessionId: id, status: "open", turn: null });
  expect((await agent.sendPrompt(id, "env A")).text).toBe("2");
});

test("the death of one agent harms no other session", async () => {
  const { agent, session } = await newOwnVm();
  const [dying, living] = [await session(), await session()];
  const streaming = told(agent, "sessionEvent", ({ sessionId }) => sessionId === living);
  const turn = agent.sendPrompt(living, "say hello\nhold");
  await streaming;

  expect((await failureOf(() => agent.sendPrompt(dying, "die"))).code).toBe("AGENT_EXITED");

  expect(await agent.getSession(dying)).toMatchObject({ status: "suspended" });
  expect((await agent.getSession(living)).turn).not.toBeNull();
  await agent.cancelPrompt(living);
  expect((await turn).stopReason).toBe("cancelled");
  expect((await agent.sendPrompt(dying, "remember")).text).toBe("2");
});

test("an idle VM goes to sleep by itself, and a prompt wakes it", async () => {
  const { agent, session } = await newOwnVm({ sleepAfterMs: 200 });
  const slept = told(agent, "vmShutdown");
  const id = await session();
  await agent.sendPrompt(id, "say hello");
  // What an agent leaves running keeps nobody awake.
  await agent.exec("setsid sleep 600 > /dev/null 2>&1 &");

  expect(await slept).toEqual({ reason: "sleep" });
  expect((await agent.sendPrompt(id, "remember")).text).toBe("2");
});

test("a turn keeps a VM awake", async () => {
  const { agent, session } = await newOwnVm({ sleepAfterMs: 50 });
  const id = await session();
  const reasons: string[] = [];
  agent.on("vmShutdown", ({ reason }) => reasons.push(reason));
  const streaming = told(agent, "sessionEvent", ({ event }) => event.method === "session/update");
  const turn = agent.sendPrompt(id, "say hello\nhold");
  await streaming;
  // Longer than it may be idle.
  await agent.exec("sleep 0.5");
  expect(reasons).toEqual([]);
  await agent.cancelPrompt(id);
  await turn;
});

test("an agent that does not obey a cancel is stopped after cancelGraceMs", async () => {
  const { agent, session } = await newOwnVm({ cancelGraceMs: 100 });
  const id = await session();
  const streaming = told(agent, "sessionEvent", ({ event }) => event.method === "session/update");
  const turn = agent.sendPrompt(id, "say hello\ndeaf");
  await streaming;
  expect(await agent.cancelPrompt(id)).toEqual({ cancelled: true });
  expect((await turn).stopReason).toBe("cancelled");
  expect((await agent.sendPrompt(id, "remember")).text).toBe("2");
});

test("instructions of the client and of the session reach Pi's model, after those about the VM", async () => {
  const { agent, session, model } = await newPiVm([{ text: "One." }, { text: "Two." }], {
    additionalInstructions: "Be brief.",
  });
  const own = await session({ additionalInstructions: "Write tests first." });
  const skipped = await session({ skipOsInstructions: true });
  await agent.sendPrompt(own.sessionId, "one");
  await agent.sendPrompt(skipped.sessionId, "two");

  const [first, second] = model.requests.map(({ body }) => JSON.stringify(body.system));
  const places = ["agentvm", "Be brief.", "Write tests first."].map((text) => first?.indexOf(text));
  expect(places.every((place) => place !== undefined && place > 0)).toBe(true);
  expect(places).toEqual([...places].sort((a, b) => Number(a) - Number(b)));
  expect(second).toContain("Be brief.");
  expect(second).not.toContain("You work in agentvm");
  // What there is to work with is said all the same.
  expect(second).toMatch(/installed in this machine: .*\bnode\b/);
  const readable = await agent.readFile("/etc/agentvm/instructions.md");
  expect(new TextDecoder().decode(readable)).toContain("You work in agentvm");
});
