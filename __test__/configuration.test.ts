import { expect, test } from "vitest";
import { failureOf, newOwnVm } from "./fixtures.js";

const optionsOf = async (agent: Awaited<ReturnType<typeof newOwnVm>>["agent"], id: string) =>
  Object.fromEntries(
    (await agent.getConfigOptions(id)).map((option) => [option.id, option.currentValue]),
  );

test("setMode, setModel, setThoughtLevel and setConfigOption change the agent and return its answer", async () => {
  const { agent, session } = await newOwnVm();
  const id = await session();

  expect(await agent.setMode(id, "code")).toEqual({ _own: "obeyed" });
  expect(await agent.setModel(id, "large")).toMatchObject({
    configOptions: [{ id: "model", currentValue: "large" }, {}, {}],
  });
  await agent.setThoughtLevel(id, "high");
  await agent.setConfigOption(id, "brave", true);

  const { text } = await agent.sendPrompt(id, "configuration");
  expect(JSON.parse(text)).toEqual({
    mode: "code",
    model: "large",
    thought_level: "high",
    brave: true,
  });
});

test("getModes and getConfigOptions tell what can be set and what is, also while nothing runs", async () => {
  const { agent, session, client, dataDir } = await newOwnVm();
  const id = await session();
  const available = [
    { id: "ask", name: "ask" },
    { id: "code", name: "code" },
  ];
  expect(await agent.getModes(id)).toEqual({ currentModeId: "ask", availableModes: available });
  expect(await agent.getConfigOptions(id)).toMatchObject([
    { id: "model", type: "select", currentValue: "small", options: [{ value: "small" }, {}] },
    { id: "thought_level", type: "select", currentValue: "low" },
    { id: "brave", type: "boolean", currentValue: false },
  ]);
  await agent.setMode(id, "code");
  await agent.setModel(id, "large");
  await client.close();

  const again = (await newOwnVm({ dataDir })).agent;
  await again.sleep();
  const booted: unknown[] = [];
  again.on("vmBooted", (value) => booted.push(value));
  expect(await again.getModes(id)).toEqual({ currentModeId: "code", availableModes: available });
  expect(await optionsOf(again, id)).toEqual({
    model: "large",
    thought_level: "low",
    brave: false,
  });
  expect(booted).toEqual([]);
});

test("a change that the agent does not tell is in the log all the same", async () => {
  const { agent, session } = await newOwnVm();
  const id = await session();
  const events: string[] = [];
  agent.on("sessionEvent", ({ event }) => events.push(event.params.update.sessionUpdate));
  await agent.setMode(id, "code");
  await agent.setModel(id, "large");

  const log = (await agent.getEvents(id)).map(({ params }) => params);
  expect(log).toMatchObject([
    {
      sessionId: id,
      update: { sessionUpdate: "current_mode_update", currentModeId: "code" },
      _meta: { agentvm: {} },
    },
    {
      sessionId: id,
      update: {
        sessionUpdate: "config_option_update",
        configOptions: [{ id: "model", currentValue: "large" }, {}, {}],
      },
      _meta: { agentvm: {} },
    },
  ]);
});

test("the configuration comes back when a session is resumed, though the agent has forgotten it", async () => {
  const { agent, session } = await newOwnVm();
  const id = await session();
  await agent.setMode(id, "code");
  await agent.setModel(id, "large");
  await agent.setConfigOption(id, "brave", true);
  const wanted = { mode: "code", model: "large", thought_level: "low", brave: true };

  await agent.closeSession(id);
  expect(JSON.parse((await agent.sendPrompt(id, "configuration")).text)).toEqual(wanted);

  await agent.sleep();
  expect(JSON.parse((await agent.sendPrompt(id, "configuration")).text)).toEqual(wanted);
  expect(await agent.getEvents(id, { method: "_agentvm/session_restored" })).toEqual([]);
});

test("a session can begin with a model, a mode and a thought level", async () => {
  const { agent, session } = await newOwnVm();
  const id = await session({ model: "large", mode: "code", thoughtLevel: "high" });
  const { text } = await agent.sendPrompt(id, "configuration");
  expect(JSON.parse(text)).toMatchObject({ mode: "code", model: "large", thought_level: "high" });
});

test("a session that should begin with what the agent does not offer is not made", async () => {
  const { agent, session } = await newOwnVm();
  const error = await failureOf(() => session({ model: "huge" }));
  expect(error.code).toBe("INVALID_ARGUMENT");
  expect(error.message).toMatch(/^model: .*small.*large/);
  expect(await agent.listPersistedSessions()).toEqual([]);
});

test("a value that is not offered is refused with those that are", async () => {
  const { agent, session } = await newOwnVm();
  const id = await session();
  const cases = [
    [() => agent.setMode(id, "plan"), /ask.*code/],
    [() => agent.setModel(id, "huge"), /small.*large/],
    [() => agent.setThoughtLevel(id, "none"), /low.*high/],
    [() => agent.setConfigOption(id, "model", "huge"), /small.*large/],
    [() => agent.setConfigOption(id, "brave", "very"), /true.*false/],
    [() => agent.setConfigOption(id, "courage", true), /model.*thought_level.*brave/],
  ] as const;
  for (const [call, offered] of cases) {
    const error = await failureOf(call);
    expect(error.code).toBe("INVALID_ARGUMENT");
    expect(error.message).toMatch(offered);
  }
});

test("what the agent refuses rejects with its own error", async () => {
  const { agent, session } = await newOwnVm();
  const id = await session({ env: { REFUSE: "1" } });
  const error = await failureOf(() => agent.setModel(id, "large"));
  expect(error).toMatchObject({
    code: "AGENT_ERROR",
    message: expect.stringContaining("too large"),
    data: { code: -32050, data: { limit: "small" } },
  });
  expect(await optionsOf(agent, id)).toMatchObject({ model: "small" });
});

test("rawSend passes any request on, with the agent's own session id, and returns the answer", async () => {
  const { agent, session } = await newOwnVm();
  const id = await session();
  const params = { text: "hi", list: [1, null, { deep: true }] };
  expect(await agent.rawSend(id, "_own/echo", params)).toEqual({ ...params, sessionId: "private" });
  expect(await agent.rawSend(id, "_own/echo")).toEqual({ sessionId: "private" });

  await agent.rawSend(id, "session/set_mode", { modeId: "code" });
  expect(await agent.getModes(id)).toMatchObject({ currentModeId: "code" });

  const error = await failureOf(() => agent.rawSend(id, "_own/nothing"));
  expect(error).toMatchObject({ code: "AGENT_ERROR", data: { code: -32601 } });
});

test("rawSend leaves what has a call of its own to that call", async () => {
  const { agent, session } = await newOwnVm();
  const id = await session();
  const error = await failureOf(() => agent.rawSend(id, "session/prompt", { prompt: [] }));
  expect(error.code).toBe("INVALID_ARGUMENT");
  expect(error.message).toContain("sendPrompt");
});

test("a session that is closed is resumed to be configured", async () => {
  const { agent, session } = await newOwnVm();
  const id = await session();
  await agent.closeSession(id);
  await agent.setMode(id, "code");
  expect(await agent.getSession(id)).toMatchObject({ status: "open" });
});
