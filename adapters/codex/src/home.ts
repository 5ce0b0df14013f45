/** The directory in which Codex keeps what it knows: one for each session, over the user's own. */

import { lstatSync, mkdirSync, readdirSync, readlinkSync, rmSync, symlinkSync } from "node:fs";
import { homedir } from "node:os";
import { join } from "node:path";

/**
 * What a person writes, or has by logging in. All else in there is Codex's own: conversations, logs,
 * databases, caches.
 */
const OF_THE_USER = [
  "AGENTS.md",
  "AGENTS.override.md",
  "agents",
  "auth.json",
  "config.toml",
  "hooks.json",
  "prompts",
  "rules",
];

const SKILLS = "skills";

/**
 * Returns what `CODEX_HOME` is to be: the caller's own, or a directory in the session's state in which
 * the files of `~/.codex` are links, so that they count as they do for Codex itself.
 */
export function prepareHome(env: NodeJS.ProcessEnv): string {
  const own = join(homedir(), ".codex");
  if (env.CODEX_HOME) return env.CODEX_HOME;
  if (!env.AGENTVM_STATE_DIR) return own;
  const home = join(env.AGENTVM_STATE_DIR, "codex");
  mkdirSync(join(home, SKILLS), { recursive: true, mode: 0o700 });
  const present = new Set(namesIn(own));
  for (const name of OF_THE_USER) link(own, home, name, present.has(name));
  // One by one: Codex has skills of its own beside them.
  const skills = namesIn(join(own, SKILLS)).filter((name) => !name.startsWith("."));
  for (const name of new Set([...skills, ...linksIn(join(home, SKILLS))])) {
    link(join(own, SKILLS), join(home, SKILLS), name, skills.includes(name));
  }
  return home;
}

/** What Codex itself has written under the name stays: a login of this session, say. */
function link(from: string, to: string, name: string, present: boolean): void {
  const place = join(to, name);
  const target = join(from, name);
  const there = lstatSync(place, { throwIfNoEntry: false });
  if (there && !there.isSymbolicLink()) return;
  if (there && present && readlinkSync(place) === target) return;
  if (there) rmSync(place);
  if (present) symlinkSync(target, place);
}

function linksIn(directory: string): string[] {
  const entries = readdirSync(directory, { withFileTypes: true });
  return entries.filter((entry) => entry.isSymbolicLink()).map(({ name }) => name);
}

function namesIn(directory: string): string[] {
  try {
    return readdirSync(directory);
  } catch {
    return []; // not there, or not readable: Codex would not read it either
  }
}
