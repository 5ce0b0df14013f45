import {
  lstatSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, expect, test, vi } from "vitest";
import { prepareHome } from "../src/home.js";
import { mcpConfig } from "../src/mcp.js";
import { overridesOf, toArguments } from "../src/overrides.js";
import { trustLevel } from "../src/project.js";
import { providerOf } from "../src/provider.js";
import type { SessionSettings } from "../src/shared/settings.js";

let home: string;
let state: string;

beforeEach(() => {
  home = mkdtempSync(join(tmpdir(), "codex-home-"));
  state = mkdtempSync(join(tmpdir(), "codex-state-"));
  vi.stubEnv("HOME", home);
});
afterEach(() => {
  vi.unstubAllEnvs();
  for (const directory of [home, state]) rmSync(directory, { recursive: true });
});

test("what the user has written counts in every session, and what Codex writes is the session's", () => {
  mkdirSync(join(home, ".codex/skills/.system"), { recursive: true });
  mkdirSync(join(home, ".codex/skills/mine"));
  writeFileSync(join(home, ".codex/config.toml"), 'model = "gpt-5.5"\n');
  writeFileSync(join(home, ".codex/history.jsonl"), "");

  const directory = prepareHome({ AGENTVM_STATE_DIR: state });

  expect(directory).toBe(join(state, "codex"));
  expect(readdirSync(directory).sort()).toEqual(["config.toml", "skills"]);
  expect(readdirSync(join(directory, "skills"))).toEqual(["mine"]);
  expect(readFileSync(join(directory, "config.toml"), "utf8")).toBe('model = "gpt-5.5"\n');
});

test("at the next start the links are what the user has by then", () => {
  mkdirSync(join(home, ".codex"));
  writeFileSync(join(home, ".codex/config.toml"), "");
  const directory = prepareHome({ AGENTVM_STATE_DIR: state });
  writeFileSync(join(directory, "auth.json"), "of this session");

  rmSync(join(home, ".codex/config.toml"));
  writeFileSync(join(home, ".codex/AGENTS.md"), "Be kind.");
  writeFileSync(join(home, ".codex/auth.json"), "of the user");
  prepareHome({ AGENTVM_STATE_DIR: state });

  expect(readdirSync(directory).sort()).toEqual(["AGENTS.md", "auth.json", "skills"]);
  expect(lstatSync(join(directory, "AGENTS.md")).isSymbolicLink()).toBe(true);
  expect(readFileSync(join(directory, "auth.json"), "utf8")).toBe("of this session");
});

test("a CODEX_HOME of the caller's is left as it is", () => {
  expect(prepareHome({ AGENTVM_STATE_DIR: state, CODEX_HOME: "/srv/codex" })).toBe("/srv/codex");
  expect(readdirSync(state)).toEqual([]);
});

test("an address in the environment is the service, with the key by its name", () => {
  const env = { OPENAI_BASE_URL: "http://127.0.0.1:1/v1/", OPENAI_API_KEY: "secret" };
  const { id, overrides, retry } = providerOf(env, state);
  expect(id).toBe("agentvm");
  expect(overrides).toMatchObject({
    model_provider: "agentvm",
    "model_providers.agentvm": {
      base_url: "http://127.0.0.1:1/v1",
      env_key: "OPENAI_API_KEY",
      wire_api: "responses",
      stream_max_retries: retry?.maxRetries,
    },
  });
  expect(JSON.stringify(overrides)).not.toContain("secret");
});

test("a service without a key is asked without one", () => {
  const { overrides } = providerOf({ OPENAI_BASE_URL: "http://127.0.0.1:1/v1" }, state);
  expect(JSON.stringify(overrides)).not.toContain("env_key");
});

test("a key alone is for OpenAI, unless Codex is configured for another service", () => {
  const env = { OPENAI_API_KEY: "secret" };
  expect(providerOf(env, state).overrides).toMatchObject({
    "model_providers.agentvm": { base_url: "https://api.openai.com/v1" },
  });
  const config = join(state, "config.toml");
  writeFileSync(config, '[profiles.work]\nmodel_provider = "corp"\n');
  expect(providerOf(env, state).id).toBe("agentvm");
  writeFileSync(config, '# mine\nmodel_provider = "corp"\n\n[model_providers.corp]\n');
  expect(providerOf(env, state).id).toBeUndefined();
  expect(providerOf({ ...env, OPENAI_BASE_URL: "http://x" }, state).id).toBe("agentvm");
});

test("without address and key it is for Codex to know one", () => {
  expect(providerOf({}, state)).toEqual({ id: undefined, overrides: {}, retry: undefined });
});

test("the number of repetitions is the environment's", () => {
  const retries = (text: string) =>
    providerOf({ OPENAI_API_KEY: "k", AGENTVM_MAX_RETRIES: text }, state).retry?.maxRetries;
  expect(retries("0")).toBe(0);
  expect(() => retries("many")).toThrow("AGENTVM_MAX_RETRIES must be a whole number");
});

test("overrides are TOML on the command line", () => {
  expect(
    toArguments({
      "features.goals": false,
      model: 'a "b"',
      nothing: null,
      servers: { "my.server": { args: ["x", null, 1], no: null } },
    }),
  ).toEqual([
    ...["--config", "features.goals=false"],
    ...["--config", 'model="a \\"b\\""'],
    ...["--config", 'servers={ "my.server" = { "args" = ["x", 1] } }'],
  ]);
});

test("CODEX_CONFIG is a JSON object", () => {
  expect(overridesOf({ CODEX_CONFIG: '{"model":"qwen"}' })).toEqual({ model: "qwen" });
  for (const CODEX_CONFIG of ["model", "[]", "null"]) {
    expect(() => overridesOf({ CODEX_CONFIG })).toThrow("CODEX_CONFIG");
  }
});

test("where somebody wants to be asked, a project that configures Codex is not trusted", () => {
  const cwd = join(home, "project/deep");
  mkdirSync(cwd, { recursive: true });
  mkdirSync(join(home, "project/.git"));
  const trust = (permissionPolicy: SessionSettings["permissionPolicy"], directory = cwd) =>
    trustLevel({ ...settings, cwd: directory, permissionPolicy });
  expect([trust("allow"), trust("ask"), trust("reject")]).toEqual(Array(3).fill("trusted"));
  mkdirSync(join(home, ".codex"));
  expect([trust("ask"), trust("ask", home)]).toEqual(["trusted", "trusted"]);
  mkdirSync(join(home, "project/.codex"));
  expect([trust("allow"), trust("ask"), trust("reject")]).toEqual([
    "trusted",
    "untrusted",
    "untrusted",
  ]);
});

const settings: SessionSettings = {
  cwd: "/srv",
  instructions: undefined,
  permissionPolicy: "allow",
  mcpServers: [],
};

test("a server of the VM gets the session's environment by name, and its own by value", () => {
  const server = {
    type: "stdio" as const,
    name: "files",
    command: "npx",
    args: ["-y", "files"],
    env: { ROOT: "/srv" },
  };
  const env = { OPENAI_API_KEY: "secret", ROOT: "/" };
  const config = mcpConfig({ ...settings, mcpServers: [server] }, env);
  expect(config.files).toMatchObject({
    command: "npx",
    args: ["-y", "files"],
    cwd: "/srv",
    env: { ROOT: "/srv" },
    env_vars: ["OPENAI_API_KEY"],
    required: true,
    default_tools_approval_mode: "approve",
  });
  expect(JSON.stringify(config)).not.toContain("secret");
});

test("names are as Codex allows them, and not those of servers that it has", () => {
  const server = { type: "stdio" as const, command: "x", args: [], env: {} };
  const mcpServers = ["my files", "my_files", "mine"].map((name) => ({ ...server, name }));
  const config = mcpConfig({ ...settings, mcpServers }, {}, 1, ["mine"]);
  expect(Object.keys(config)).toEqual(["my_files", "my_files_2", "mine_2"]);
});

test("under a policy that asks, every tool of a server asks", () => {
  const server = {
    type: "http" as const,
    guessed: false,
    name: "a",
    url: "http://x",
    headers: { A: "b" },
  };
  for (const permissionPolicy of ["ask", "reject"] as const) {
    const config = mcpConfig({ ...settings, permissionPolicy, mcpServers: [server] }, {});
    expect(config.a).toMatchObject({
      url: "http://x",
      http_headers: { A: "b" },
      default_tools_approval_mode: "prompt",
    });
  }
});

test("a server that speaks SSE only is refused", () => {
  const server = {
    type: "sse" as const,
    guessed: false,
    name: "old",
    url: "http://x",
    headers: {},
  };
  expect(() => mcpConfig({ ...settings, mcpServers: [server] }, {})).toThrow('"old" speaks SSE');
});
