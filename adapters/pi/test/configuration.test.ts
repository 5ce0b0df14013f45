import { mkdir, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { expect, test } from "vitest";
import { startModelServer } from "../../../__test__/model-server.js";
import { Adapter, anthropic, startLocal } from "./adapter.js";

interface Option {
  id: string;
  category: string;
  currentValue: string;
  options: { value: string; name: string }[];
}

function option(configOptions: Option[], id: string): Option {
  const found = configOptions.find((candidate) => candidate.id === id);
  if (!found) throw new Error(`no option ${id} in ${JSON.stringify(configOptions)}`);
  return found;
}

function valuesOf({ options }: Option): string[] {
  return options.map(({ value }) => value);
}

test("a session says which models have a key, and how much the current one can think", async () => {
  await using server = await startModelServer({ script: [] });
  await using pi = await startLocal(server.openaiUrl);
  const { configOptions } = await pi.request("session/new", { cwd: pi.home, mcpServers: [] });
  expect(configOptions).toMatchObject([
    {
      id: "model",
      category: "model",
      type: "select",
      currentValue: "local/thinker",
      options: [
        { value: "local/thinker", name: "The Thinker" },
        { value: "local/plain", name: "The Plain" },
      ],
    },
    { id: "thought_level", category: "thought_level", type: "select", currentValue: "high" },
  ]);
  expect(valuesOf(option(configOptions, "thought_level"))).toEqual(
    expect.arrayContaining(["off", "low", "medium", "high"]),
  );
});

test("a model that is set is the model of the next request", async () => {
  await using server = await startModelServer({ script: () => ({ text: "Hello." }) });
  await using pi = await startLocal(server.openaiUrl);
  const sessionId = await pi.newSession();
  await pi.prompt(sessionId, "One");
  const change = { sessionId, configId: "model", value: "local/plain" };
  const { configOptions } = await pi.request("session/set_config_option", change);
  await pi.prompt(sessionId, "Two");
  expect(option(configOptions, "model").currentValue).toBe("local/plain");
  expect(server.requests.map(({ body }) => body.model)).toEqual(["thinker", "plain"]);
});

test("a thought level that is set is the one of the next request", async () => {
  await using server = await startModelServer({ script: () => ({ text: "Hello." }) });
  await using pi = await startLocal(server.openaiUrl);
  const sessionId = await pi.newSession();
  await pi.prompt(sessionId, "One");
  const change = { sessionId, configId: "thought_level", value: "low" };
  const { configOptions } = await pi.request("session/set_config_option", change);
  await pi.prompt(sessionId, "Two");
  expect(option(configOptions, "thought_level").currentValue).toBe("low");
  expect(server.requests.map(({ body }) => body.reasoning_effort)).toEqual(["high", "low"]);
  expect(pi.updatesOf("config_option_update")).toEqual([]);
});

test("a thought level that the new model does not have is announced", async () => {
  await using server = await startModelServer({ script: [] });
  await using pi = await startLocal(server.openaiUrl);
  const sessionId = await pi.newSession();
  const change = { sessionId, configId: "model", value: "local/plain" };
  const { configOptions } = await pi.request("session/set_config_option", change);
  const level = option(configOptions, "thought_level");
  expect([level.currentValue, valuesOf(level)]).toEqual(["off", ["off"]]);
  expect(pi.updatesOf("config_option_update")).toEqual([
    { sessionUpdate: "config_option_update", configOptions },
  ]);
});

test("a model that a command of Pi chooses is announced", async () => {
  await using server = await startModelServer({ script: [] });
  await using pi = await startLocal(server.openaiUrl);
  await mkdir(join(pi.home, ".pi/agent/extensions"), { recursive: true });
  await writeFile(
    join(pi.home, ".pi/agent/extensions/plain.js"),
    `export default (pi) => pi.registerCommand("plain", {
      description: "Use the plain model",
      handler: async (_args, ctx) => {
        await pi.setModel(ctx.modelRegistry.find("local", "plain"));
      },
    });`,
  );
  await pi.prompt(await pi.newSession(), "/plain");
  const [update] = pi.updatesOf("config_option_update").slice(-1);
  expect(option(update.configOptions, "model").currentValue).toBe("local/plain");
});

test.for([["session/load"], ["session/resume"]] as const)(
  "%s brings the choice back, before the first prompt and after it",
  async ([method]) => {
    await using server = await startModelServer({ script: () => ({ text: "Hello." }) });
    await using pi = await Adapter.start({ env: anthropic(server) });
    const sessionId = await pi.newSession();
    const set = (configId: string, value: string) =>
      pi.request("session/set_config_option", { sessionId, configId, value });
    const reopened = async () => {
      await pi.request("session/close", { sessionId });
      return await pi.request(method, { sessionId, cwd: pi.home, mcpServers: [] });
    };
    const { configOptions } = await pi.request(method, { sessionId, cwd: pi.home });
    const model = option(configOptions, "model");
    const other = valuesOf(model).find((value) => value !== model.currentValue) ?? "";
    await set("model", other);
    const levels = valuesOf(option((await set("model", other)).configOptions, "thought_level"));
    const level = levels.at(-1) ?? "";
    const chosen = (await set("thought_level", level)).configOptions;
    expect((await reopened()).configOptions).toEqual(chosen);
    await pi.prompt(sessionId, "Hi");
    expect((await reopened()).configOptions).toEqual(chosen);
    expect(`anthropic/${server.requests[0]?.body.model}`).toBe(other);
  },
);

test.for<[object, string]>([
  [{ configId: "colour", value: "red" }, "the options are: model, thought_level"],
  [{ configId: "model", value: "local/none" }, "it can be: local/thinker, local/plain"],
  [{ configId: "model", value: 7 }, "model can't be 7; it can be: local/thinker"],
  [{ configId: "thought_level", value: "deep" }, "it can be: off, "],
  [{ value: "x" }, "configId must be a string"],
])("%j is invalid: %s", async ([change, message]) => {
  await using server = await startModelServer({ script: [] });
  await using pi = await startLocal(server.openaiUrl);
  const sessionId = await pi.newSession();
  const { error } = await pi.call("session/set_config_option", { sessionId, ...change });
  expect(error).toMatchObject({ code: -32602, message: expect.stringContaining(message) });
});

test("an option of a session that is not open is an error that names it", async () => {
  await using pi = await Adapter.start();
  const change = { sessionId: "x", configId: "model", value: "y" };
  const { error } = await pi.call("session/set_config_option", change);
  expect(error).toMatchObject({ code: -32002, data: { sessionId: "x" } });
});

test.for([["session/new"], ["session/load"], ["session/resume"]] as const)(
  "%s is followed by Pi's commands",
  async ([method]) => {
    await using server = await startModelServer({ script: [{ text: "Reviewed." }] });
    await using pi = await Adapter.start({ env: anthropic(server) });
    const sessionId = await pi.newSession();
    await pi.request("session/close", { sessionId });
    await mkdir(join(pi.home, ".pi/agent/prompts"), { recursive: true });
    await writeFile(
      join(pi.home, ".pi/agent/prompts/review.md"),
      "---\ndescription: Review a file\nargument-hint: <file>\n---\nReview $1 with care.",
    );
    await mkdir(join(pi.home, ".pi/agent/skills/sing"), { recursive: true });
    await writeFile(
      join(pi.home, ".pi/agent/skills/sing/SKILL.md"),
      "---\nname: sing\ndescription: How to sing\n---\nLoudly.",
    );
    const opened = await pi.request(method, { sessionId, cwd: pi.home, mcpServers: [] });
    const update = await pi.update((each) => each.sessionUpdate === "available_commands_update");
    expect(update.availableCommands).toEqual([
      { name: "review", description: "Review a file", input: { hint: "<file>" } },
      { name: "skill:sing", description: "How to sing" },
    ]);
    await pi.prompt(opened.sessionId ?? sessionId, "/review a.ts");
    expect(server.requests[0]?.userText).toBe("Review a.ts with care.");
  },
);

test("each turn says how full the context is", async () => {
  await using server = await startModelServer({ script: [{ text: "Hello." }] });
  await using pi = await Adapter.start({ env: anthropic(server) });
  await pi.prompt(await pi.newSession(), "Hi");
  expect(pi.updatesOf("usage_update")).toEqual([
    {
      sessionUpdate: "usage_update",
      used: expect.any(Number),
      size: expect.any(Number),
      cost: { amount: expect.any(Number), currency: "USD" },
    },
  ]);
});
