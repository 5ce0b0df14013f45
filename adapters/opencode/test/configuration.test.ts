import { expect, test } from "vitest";
import { type Circumstances, configure } from "../src/configuration.js";
import { parseJsonc } from "../src/jsonc.js";

function configured(at: Partial<Circumstances> = {}) {
  const { env, defaults } = configure({
    env: {},
    stateDir: "/state",
    userConfigs: [],
    hasOpenCodeLogin: false,
    ...at,
  });
  const content = JSON.parse(env.OPENCODE_CONFIG_CONTENT ?? "{}");
  // biome-ignore lint/suspicious/noExplicitAny: tests look into configurations of any shape
  return { env, content, defaults: defaults as any };
}

test("comments and trailing commas are no part of a configuration, in strings they are", () => {
  const text = `{ // one
    "a": "/* // not one, }", /* another */
    "b": [1, 2, /* last */ ],
  }`;
  expect(parseJsonc(text)).toEqual({ a: "/* // not one, }", b: [1, 2] });
  expect(() => parseJsonc("[]")).toThrow(SyntaxError);
});

test.for([
  ["http://model", "http://model/v1"],
  ["http://model/", "http://model/v1"],
  ["http://model/v1/", "http://model/v1"],
])("ANTHROPIC_BASE_URL %s is Anthropic's address %s", ([url, baseURL]) => {
  const { content } = configured({ env: { ANTHROPIC_BASE_URL: url } });
  expect(content.provider).toEqual({ anthropic: { options: { baseURL } } });
});

test("the session's own configuration comes before ours, and its instructions behind them", () => {
  const own = { snapshot: true, instructions: ["mine.md"], provider: { openai: { name: "O" } } };
  const { content } = configured({
    env: {
      OPENAI_BASE_URL: "http://model/v1",
      OPENCODE_CONFIG_CONTENT: JSON.stringify(own),
    },
  });
  expect(content).toEqual({
    snapshot: true,
    instructions: ["/state/instructions.md", "mine.md"],
    provider: { openai: { name: "O", options: { baseURL: "http://model/v1" } } },
  });
});

test("what the user has configured is no default, but lists are completed", () => {
  const { defaults } = configured({
    env: { OPENAI_API_KEY: "key" },
    userConfigs: [
      {
        model: "openai/gpt-6-sol",
        disabled_providers: ["groq"],
        agent: { title: { disable: false } },
        permission: { read: { "*": "deny" } },
      },
    ],
  });
  expect(defaults.model).toBeUndefined();
  expect(defaults.disabled_providers).toEqual(["groq", "opencode"]);
  expect(defaults.agent).toEqual({ title: {} });
  expect(defaults.permission).toEqual({ doom_loop: "allow", external_directory: "allow" });
  expect(defaults.snapshot).toBe(false);
});

test("a model is chosen where OpenCode would choose the dearest", () => {
  const model = (env: Record<string, string>) => configured({ env }).defaults.model;
  expect(model({ OPENAI_API_KEY: "key" })).toBe("openai/gpt-5.5");
  expect(model({ OPENAI_API_KEY: "key", ANTHROPIC_API_KEY: "key" })).toBeUndefined();
});

test("OpenCode's own service is for those who have a key or a login for it", () => {
  const disabled = (at: Partial<Circumstances>) => configured(at).defaults.disabled_providers;
  expect(disabled({})).toEqual(["opencode"]);
  expect(disabled({ env: { OPENCODE_API_KEY: "key" } })).toBeUndefined();
  expect(disabled({ hasOpenCodeLogin: true })).toBeUndefined();
});

test("the session's variables are left alone", () => {
  const set = {
    OPENCODE_DB: "/db",
    OPENCODE_CONFIG: "/config.json",
    OPENCODE_PERMISSION: "{}",
    OPENCODE_DISABLE_MODELS_FETCH: "0",
  };
  const { env, content, defaults } = configured({ env: { ...set, AGENTVM_ASKS: "1" } });
  for (const name of Object.keys(set)) expect(env).not.toHaveProperty(name);
  expect(content.permission).toBeUndefined();
  // The file that it names stands in for ours.
  expect(defaults).toEqual({});
  expect(content.snapshot).toBe(false);
});

test("a configuration that is none is named by its variable", () => {
  expect(() => configured({ env: { OPENCODE_CONFIG_CONTENT: "{" } })).toThrow(
    /^OPENCODE_CONFIG_CONTENT: /,
  );
});
