/** What a project makes Amp do by itself, which a session that has to ask can't let happen. */

import { existsSync, readdirSync, readFileSync, realpathSync } from "node:fs";
import { homedir } from "node:os";
import { dirname, join } from "node:path";
import { ErrorCode, RpcError } from "./shared/errors.js";
import type { SessionSettings } from "./shared/settings.js";

const SKILLS = [".agents/skills", ".claude/skills"];

/**
 * Plugins run as soon as Amp does, with its key in their environment. The settings of a project come
 * before those that the adapter gives, and can allow everything. Amp has no switch for either.
 */
const UNASKED = [".amp/plugins", ".amp/settings.json", ".amp/settings.jsonc"];

/** Throws where somebody wants to be asked, and Amp would act without. */
export function refuseUnasked({ cwd, permissionPolicy: policy }: SessionSettings): void {
  const path = policy === "allow" ? undefined : actsUnasked(cwd);
  if (path === undefined) return;
  throw new RpcError(
    ErrorCode.internalError,
    `Amp would follow ${path} without asking, and permissionPolicy is "${policy}": ` +
      'move it away, choose another cwd, or set permissionPolicy to "allow"',
    { type: "amp_project_acts_unasked", path },
  );
}

/**
 * Looks in the working directory, as Amp itself sees it, and in all above it: only git knows for sure
 * which of them is the top of a repository.
 */
function actsUnasked(cwd: string): string | undefined {
  for (let directory = realpathSync(cwd); ; directory = dirname(directory)) {
    const found =
      UNASKED.map((name) => join(directory, name)).find((path) => existsSync(path)) ??
      SKILLS.map((name) => serverOfSkill(directory, name)).find((path) => path !== undefined);
    if (found !== undefined || directory === dirname(directory)) return found;
  }
}

/**
 * Amp starts the MCP servers of all skills, whether or not the model uses one. The skills in the home
 * directory are the user's.
 */
function serverOfSkill(directory: string, name: string): string | undefined {
  const skills = join(directory, name);
  if (directory === userHome() || !existsSync(skills)) return undefined;
  const files = readdirSync(skills, { recursive: true, withFileTypes: true });
  const found = files.find(
    (file) =>
      file.isSymbolicLink() || // to where this does not look
      /^mcp\.json$/i.test(file.name) ||
      (/^skill\.md$/i.test(file.name) && mayNameServers(join(file.parentPath, file.name))),
  );
  return found && join(found.parentPath, found.name);
}

/** In the YAML at the head of the file, in which a key can be written with escapes, too. */
function mayNameServers(file: string): boolean {
  const text = readFileSync(file, "utf8");
  return text.includes("mcpServers") || text.slice(0, text.lastIndexOf("\n---")).includes("\\");
}

function userHome(): string {
  return existsSync(homedir()) ? realpathSync(homedir()) : homedir();
}
