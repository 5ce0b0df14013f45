/** The configuration that a project brings, for a session that has to ask before it acts. */

import { existsSync, readFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { parseJsonc } from "./jsonc.js";

/** Options that start no program, load no code and send no key anywhere. */
const HARMLESS = [
  "$schema",
  "agent",
  "autoupdate",
  "command",
  "compaction",
  "default_agent",
  "disabled_providers",
  "enabled_providers",
  "instructions",
  "keybinds",
  "mode",
  "model",
  "permission",
  "share",
  "small_model",
  "snapshot",
  "subagent_depth",
  "theme",
  "tools",
  "tui",
  "username",
  "watcher",
];

const CODE = ["plugin", "plugins", "tool", "tools"];
const INSTRUCTIONS = ["AGENTS.md", "CLAUDE.md", "CONTEXT.md"];

/** What of the project would run something, or lead a key elsewhere, before anybody is asked. */
export function actsUnasked(cwd: string): string | undefined {
  for (const directory of directoriesAbove(cwd)) {
    const own = join(directory, ".opencode");
    for (const name of ["opencode.json", "opencode.jsonc"]) {
      const file = [join(directory, name), join(own, name)].find((path) => !isHarmless(path));
      if (file !== undefined) return file;
    }
    const code = CODE.map((name) => join(own, name)).find((path) => existsSync(path));
    if (code !== undefined) return code;
  }
  return undefined;
}

/** The project's instructions, as OpenCode finds them. */
export function instructionsOf(cwd: string): string[] {
  const directories = directoriesAbove(cwd);
  const found = INSTRUCTIONS.map((name) =>
    directories.map((directory) => join(directory, name)).filter((path) => existsSync(path)),
  );
  return found.find((paths) => paths.length > 0) ?? [];
}

function isHarmless(file: string): boolean {
  if (!existsSync(file)) return true;
  try {
    const options = Object.keys(parseJsonc(readFileSync(file, "utf8")));
    return options.every((option) => HARMLESS.includes(option));
  } catch {
    return false; // whatever OpenCode makes of it
  }
}

/** Up to the root of the project, or of everything. */
function directoriesAbove(cwd: string): string[] {
  const directories = [cwd];
  for (let at = cwd; !existsSync(join(at, ".git")) && dirname(at) !== at; ) {
    at = dirname(at);
    directories.push(at);
  }
  return directories;
}
