import { expect, test } from "vitest";
import { metaOf } from "../src/options.js";

const optionsOf = (policy: unknown, env = {}) => {
  const { spawnClaudeCodeProcess, ...options } = metaOf(policy, env).options;
  return options;
};

test.for(["ask", "reject"])("with the policy %s a project runs nothing by itself", (policy) => {
  expect(optionsOf(policy)).toEqual({
    strictMcpConfig: true,
    projectConfigRoot: expect.stringMatching(/^\//),
    managedSettings: {
      allowManagedHooksOnly: true,
      allowManagedPermissionRulesOnly: true,
      permissions: { ask: ["Bash", "Monitor", "EnterWorktree", "ExitWorktree"] },
    },
  });
});

test("with the policy allow a project counts as in Claude Code itself", () => {
  expect(optionsOf("allow")).toEqual({});
});

test("the endpoint is that of the environment, and no secret goes along", () => {
  const env = { ANTHROPIC_BASE_URL: "http://a.test", ANTHROPIC_API_KEY: "secret" };
  expect(optionsOf("allow", env)).toEqual({
    settings: { env: { ANTHROPIC_BASE_URL: "http://a.test" } },
  });
});
