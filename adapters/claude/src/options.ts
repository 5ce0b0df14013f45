/** What Anthropic's SDK is told of a session, beside what claude-agent-acp tells it. */

import { start } from "./program.js";
import { WATCHED } from "./retries.js";

/** For `_meta.claudeCode` of the requests that open a conversation. */
export function metaOf(policy: unknown, env: NodeJS.ProcessEnv) {
  return {
    emitRawSDKMessages: WATCHED,
    options: { spawnClaudeCodeProcess: start, ...mayRunUnasked(policy), ...endpoint(env) },
  };
}

/**
 * Tools that run programs, and are always asked about. Claude Code itself lets commands pass that it takes
 * for reading, such as `git status`; but the configuration of a repository has git run what it names.
 */
const RUNS_PROGRAMS = ["Bash", "Monitor", "EnterWorktree", "ExitWorktree"];

/** Where somebody wants to be asked, what lies in a project must not run without a question. */
function mayRunUnasked(policy: unknown) {
  if (policy === "allow") return {};
  return {
    strictMcpConfig: true,
    // A project's settings are looked for in our own directory, where there are none: in them a project
    // could allow itself everything, name programs to be run, and set variables. Its memory (CLAUDE.md)
    // is read where it is.
    projectConfigRoot: import.meta.dirname,
    managedSettings: {
      allowManagedHooksOnly: true,
      allowManagedPermissionRulesOnly: true,
      permissions: { ask: RUNS_PROGRAMS },
    },
  };
}

/**
 * The variables in settings files win over those of the process. Those of the session have to stay: a
 * project could else have the key sent elsewhere.
 */
function endpoint({ ANTHROPIC_BASE_URL }: NodeJS.ProcessEnv) {
  return ANTHROPIC_BASE_URL === undefined ? {} : { settings: { env: { ANTHROPIC_BASE_URL } } };
}
