/**
 * Keeps OpenCode from installing `@opencode-ai/plugin` (63 MB) into each of its configuration
 * directories at every first start. It has no switch for it; but it leaves a directory alone whose
 * lockfile has the package.
 *
 * Only plugins, tools and dependencies of the user need it: a directory that has any is left to
 * OpenCode.
 */

import { existsSync } from "node:fs";
import { mkdir, readdir, readFile, rm, writeFile } from "node:fs/promises";
import { dirname, join } from "node:path";

const PACKAGE = "@opencode-ai/plugin";
const NEEDING = ["package.json", "plugin", "plugins", "tool", "tools"];

const LOCK = `${JSON.stringify(
  {
    name: "nothing-to-install",
    lockfileVersion: 3,
    packages: { "": { dependencies: { [PACKAGE]: "*" } } },
  },
  undefined,
  2,
)}\n`;

/** The directories that OpenCode will read for a session in `cwd`. */
export function configurationDirectories(
  cwd: string,
  env: Record<string, string | undefined>,
): string[] {
  const home = env.HOME ?? "/";
  const config = join(env.XDG_CONFIG_HOME || join(home, ".config"), "opencode");
  const directories = [config, join(home, ".opencode")];
  if (env.OPENCODE_CONFIG_DIR) directories.push(env.OPENCODE_CONFIG_DIR);
  for (let at = cwd; ; at = dirname(at)) {
    directories.push(join(at, ".opencode"));
    if (dirname(at) === at) break;
  }
  const made = directories.filter((path) => path === config || existsSync(path));
  return [...new Set(made)];
}

export async function needNothing(directory: string): Promise<void> {
  const [modules, lock] = [join(directory, "node_modules"), join(directory, "package-lock.json")];
  await mkdir(directory, { recursive: true });
  const present = await readdir(directory);
  if (present.some((name) => NEEDING.includes(name))) {
    if ((await readFile(lock, "utf8").catch(() => "")) === LOCK) {
      // Ours, from when nothing was needed.
      await rm(lock);
      await rm(modules, { recursive: true });
    }
  } else if (!present.includes("node_modules") && !present.includes("package-lock.json")) {
    await mkdir(modules);
    await writeFile(lock, LOCK);
  }
}
