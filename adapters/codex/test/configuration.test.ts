import { expect, test } from "vitest";
import type { Model, OpenedThread } from "../src/codex.js";
import { Configuration } from "../src/configuration.js";

function model(name: string, efforts: string[], hidden = false): Model {
  return {
    model: name,
    displayName: name.toUpperCase(),
    description: "",
    hidden,
    isDefault: false,
    defaultReasoningEffort: efforts[0] ?? "",
    supportedReasoningEfforts: efforts.map((reasoningEffort) => ({
      reasoningEffort,
      description: "",
    })),
  };
}

const MODELS = [
  model("large", ["medium", "high", "max"]),
  model("small", ["low", "medium"]),
  model("secret", ["low"], true),
];

function opened(thread: Partial<OpenedThread> = {}): Configuration {
  const defaults = { model: "large", modelProvider: "agentvm", reasoningEffort: null };
  return new Configuration(MODELS, { thread: { id: "t" }, ...defaults, ...thread });
}

function values(configuration: Configuration) {
  return configuration.options().map(({ id, currentValue, options }) => ({
    [id]: currentValue,
    of: options.map(({ value }) => value),
  }));
}

test("the models and the efforts of the current one can be chosen", () => {
  expect(values(opened())).toEqual([
    { model: "large", of: ["large", "small"] },
    { thought_level: "medium", of: ["medium", "high", "max"] },
  ]);
  expect(opened().forTurn()).toEqual({ model: "large", effort: "medium" });
});

test("an effort that another model does not have gives way to that model's own", () => {
  const configuration = opened();
  configuration.set("thought_level", "max");
  configuration.set("model", "small");
  expect(configuration.forTurn()).toEqual({ model: "small", effort: "low" });
  configuration.set("model", "large");
  expect(configuration.forTurn()).toEqual({ model: "large", effort: "max" });
});

test("a model that Codex is configured for is offered though its catalogue does not have it", () => {
  expect(values(opened({ model: "qwen" }))).toEqual([
    { model: "qwen", of: ["large", "small", "qwen"] },
  ]);
  expect(opened({ model: "qwen" }).forTurn()).toEqual({ model: "qwen", effort: null });
  expect(values(opened({ model: "qwen", reasoningEffort: "high" }))[1]).toEqual({
    thought_level: "high",
    of: ["high"],
  });
});

test("what is not offered is refused with what is", () => {
  expect(() => opened().set("model", "huge")).toThrow("it can be: large, small");
  expect(() => opened().set("thought_level", 1)).toThrow("it can be: medium, high, max");
  expect(() => opened().set("speed", "fast")).toThrow("the options are: model, thought_level");
  expect(() => opened().setMode("yolo")).toThrow("the modes are: default, plan");
});

test("Codex is told of a mode from when it is chosen, also when it is left", () => {
  const configuration = opened();
  configuration.setMode("default");
  expect(configuration.forTurn()).not.toHaveProperty("collaborationMode");
  configuration.setMode("plan");
  expect(configuration.forTurn()).toEqual({
    collaborationMode: {
      mode: "plan",
      settings: { model: "large", reasoning_effort: "medium", developer_instructions: null },
    },
  });
  configuration.setMode("default");
  expect(configuration.forTurn()).toMatchObject({ collaborationMode: { mode: "default" } });
});

test("a thread that is resumed is in the mode that it was in", () => {
  const resumed = opened({ collaborationMode: { mode: "plan" } });
  expect(resumed.modes().currentModeId).toBe("plan");
  expect(resumed.forTurn()).toMatchObject({ collaborationMode: { mode: "plan" } });
});
