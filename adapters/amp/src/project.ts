/** What a project makes Amp do by itself, which a session that has to ask can't let happen. */

import { existsSync, realpathSync } from "node:fs";
import { dirname, join } from "node:path";
import { ErrorCode, RpcError } from "./shared/errors.js";
import type { SessionSettings } from "./shared/settings.js";

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
    const found = UNASKED.map((name) => join(directory, name)).find((path) => existsSync(path));
    if (found !== undefined || directory === dirname(directory)) return found;
  }
}
