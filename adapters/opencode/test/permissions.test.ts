import { expect, test } from "vitest";
import { type AgentInfo, type Rule, sessionRules } from "../src/permissions.js";

function rules(...rules: string[]): Rule[] {
  return rules.map((rule) => {
    const [permission = "", pattern = "", action = "ask"] = rule.split("|");
    return { permission, pattern, action: action as Rule["action"] };
  });
}

function agent(name: string, mode: string, ...permission: string[]): AgentInfo {
  return { name, mode, permission: rules(...permission) };
}

/** As OpenCode decides. */
function decision(list: Rule[], permission: string, pattern: string): string | undefined {
  const matches = (own: string, name: string) =>
    new RegExp(`^${own.replaceAll(".", "\\.").replaceAll("*", ".*")}$`).test(name);
  return list.findLast(
    (rule) => matches(rule.permission, permission) && matches(rule.pattern, pattern),
  )?.action;
}

test("what an agent may do it asks for, but for reading", () => {
  const build = agent(
    "build",
    "primary",
    "*|*|allow",
    "read|*|allow",
    "read|*.env|ask",
    "b*|*|allow",
  );
  const list = sessionRules(build, [build]);
  expect(decision(list, "bash", "ls")).toBe("ask");
  expect(decision(list, "docs_search", "*")).toBe("ask");
  expect(decision(list, "read", "a.txt")).toBe("allow");
  expect(decision(list, "read", "a.env")).toBe("ask");
  expect(decision(list, "grep", "x")).toBe("allow");
});

test("what is denied stays denied", () => {
  const plan = agent("plan", "primary", "*|*|allow", "bash|curl *|deny", "*|*|ask", "edit|*|deny");
  const list = sessionRules(plan, [plan]);
  expect(decision(list, "edit", "a.txt")).toBe("deny");
  expect(decision(list, "bash", "curl x")).toBe("deny");
  expect(decision(list, "bash", "ls")).toBe("ask");
});

test("a subagent is started if it asks by itself, and if the agent may", () => {
  const agents = [
    agent("build", "primary", "*|*|allow", "task|forbidden|deny"),
    agent("asking", "subagent", "*|*|allow", "*|*|ask", "read|*|allow"),
    agent("acting", "all", "*|*|ask", "bash|*|allow"),
    agent("limited", "subagent", "*|*|ask", "bash|*|allow", "bash|*|deny"),
    agent("forbidden", "subagent", "*|*|ask"),
  ];
  const [build] = agents;
  const list = build ? sessionRules(build, agents) : [];
  const started = agents.map(({ name }) => [name, decision(list, "task", name)]);
  expect(Object.fromEntries(started)).toEqual({
    build: "ask",
    asking: "allow",
    acting: "deny",
    limited: "allow",
    forbidden: "deny",
  });
});
