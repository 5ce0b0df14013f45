/**
 * Makes OpenCode ask before it changes anything, whatever a configuration allows: a project that
 * brings its own `opencode.json` must not decide it. What a configuration denies stays denied.
 */

import type { Json } from "./jsonc.js";

/** As OpenCode's agents and sessions have them, in a list of which the last that matches counts. */
export interface Rule {
  permission: string;
  pattern: string;
  action: "allow" | "ask" | "deny";
}

/** The parts of an agent, as OpenCode lists it, that matter here. */
export interface AgentInfo {
  name: string;
  mode: string;
  permission: Rule[];
}

/**
 * Tools that change nothing, and `external_directory`, which comes in addition to the permission of
 * the tool itself.
 */
const HARMLESS = [
  "read",
  "grep",
  "glob",
  "list",
  "lsp",
  "skill",
  "todoread",
  "todowrite",
  "external_directory",
];

/** OpenCode's own rule: what is usually a file of secrets is asked for. */
const READ = { "*": "allow", "*.env": "ask", "*.env.*": "ask", "*.env.example": "allow" };

const READING = { read: READ, grep: "allow", glob: "allow", list: "allow", lsp: "allow" };

/** The part of it that no project may change. */
export const ASKING_ALL = { "*": "ask" } as const;

/**
 * What subagents go by, which {@link sessionRules} does not reach. {@link ASKING_AGENTS} gives back to
 * some agents what it takes.
 */
export const ASKING: Json = {
  ...ASKING_ALL,
  ...READING,
  skill: "allow",
  todoread: "allow",
  todowrite: "allow",
  task: { "*": "ask", general: "allow", explore: "allow" },
};

/** OpenCode's own agents that may do less than the others. */
export const ASKING_AGENTS: Json = {
  plan: {
    permission: {
      edit: { "*": "deny", ".opencode/plans/*.md": "ask" },
      task: { general: "deny" },
    },
  },
  general: { permission: { todowrite: "deny", task: "deny" } },
  explore: {
    permission: { "*": "deny", ...READING, bash: "ask", webfetch: "ask", websearch: "ask" },
  },
};

/**
 * The last word about a session whose agent is `agent`: what it may do it asks for. A subagent that
 * would act without asking can't be started.
 */
export function sessionRules(agent: AgentInfo, agents: AgentInfo[]): Rule[] {
  const asking = agent.permission
    // Of ASKING, and behind what the user's own configuration denies.
    .filter(({ permission, pattern, action }) => `${permission} ${pattern} ${action}` !== "* * ask")
    .map((rule): Rule => (rule.action === "allow" ? { ...rule, action: "ask" } : rule));
  const harmless = HARMLESS.flatMap((permission) =>
    agent.permission
      .filter((rule) => covers(rule.permission, permission))
      .map((rule) => ({ ...rule, permission })),
  );
  const tasks = agents
    .filter(({ mode, name }) => mode !== "primary" && isAllowed(agent.permission, "task", name))
    .map(
      ({ name, permission }): Rule => ({
        permission: "task",
        pattern: name,
        action: actsUnasked(permission) ? "deny" : "allow",
      }),
    );
  return [...asking, ...harmless, ...tasks];
}

/** Whether the last rule about it does not deny it. */
function isAllowed(rules: Rule[], permission: string, pattern: string): boolean {
  const last = rules.findLast(
    (rule) => covers(rule.permission, permission) && covers(rule.pattern, pattern),
  );
  return last?.action !== "deny";
}

function covers(pattern: string, name: string): boolean {
  return pattern === "*" || pattern === name;
}

/** Whether anything that is not harmless is allowed, and no later rule takes that back. */
function actsUnasked(rules: Rule[]): boolean {
  return rules.some(
    (rule, index) =>
      rule.action === "allow" &&
      !HARMLESS.includes(rule.permission) &&
      !rules
        .slice(index + 1)
        .some(
          (later) =>
            later.action !== "allow" &&
            covers(later.permission, rule.permission) &&
            covers(later.pattern, rule.pattern),
        ),
  );
}
