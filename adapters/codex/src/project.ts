/** Whether Codex trusts the project that a session works in. */

import { existsSync } from "node:fs";
import { homedir } from "node:os";
import { dirname, join } from "node:path";
import type { SessionSettings } from "./shared/settings.js";

/**
 * In a project that Codex trusts, `AGENTS.md` and `.codex` count. The latter may run programs, about
 * which nobody is asked: where somebody wants to be asked, a project that has it is not trusted.
 *
 * Codex has to be told: else it decides for trust, and writes that into the user's configuration.
 */
export function trustLevel({ cwd, permissionPolicy }: SessionSettings): "trusted" | "untrusted" {
  return permissionPolicy === "allow" || !configuresCodex(cwd) ? "trusted" : "untrusted";
}

/** Codex looks from the top of a repository down to the working directory. */
function configuresCodex(cwd: string): boolean {
  const ofTheUser = join(homedir(), ".codex");
  for (let directory = cwd; ; directory = dirname(directory)) {
    const configuration = join(directory, ".codex");
    if (configuration !== ofTheUser && existsSync(configuration)) return true;
    if (existsSync(join(directory, ".git")) || directory === dirname(directory)) return false;
  }
}
