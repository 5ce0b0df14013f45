// Brings node_modules in line with its lockfile, and only then: `npm ci` takes most of a minute.

import { readFileSync } from "node:fs";
import { resolve } from "node:path";
import { npm, ROOT, run, stage } from "./command.mjs";

/**
 * @typedef {{ version?: string, integrity?: string, optional?: boolean, devOptional?: boolean,
 *   link?: boolean }} Entry
 */

/** Installs what is missing or outdated, here and in adapters/. */
export async function installDependencies() {
  for (const directory of [ROOT, resolve(ROOT, "adapters")]) {
    if (isCurrent(directory)) continue;
    await stage(`Packages for ${directory} (npm ci: up to a minute, once)`, () =>
      run(...npm(["ci", "--loglevel=error"]), { cwd: directory }),
    );
  }
}

/**
 * npm records what it put into node_modules in a lockfile of its own there.
 *
 * @param {string} directory
 */
function isCurrent(directory) {
  const wanted = packages(resolve(directory, "package-lock.json"));
  if (wanted === undefined) throw new Error(`${directory} has no package-lock.json`);
  const installed = packages(resolve(directory, "node_modules/.package-lock.json"));
  if (installed === undefined) return false;
  wanted.delete("");
  for (const path of installed.keys()) {
    if (!wanted.has(path)) return false;
  }
  return [...wanted].every(([path, entry]) => {
    const there = installed.get(path);
    // Packages for other platforms are optional, and absent.
    if (there === undefined) return entry.optional === true || entry.devOptional === true;
    return there.version === entry.version && there.integrity === entry.integrity;
  });
}

/**
 * @param {string} lockfile
 * @returns {Map<string, Entry> | undefined}
 */
function packages(lockfile) {
  try {
    return new Map(Object.entries(JSON.parse(readFileSync(lockfile, "utf8")).packages));
  } catch (error) {
    if (/** @type {NodeJS.ErrnoException} */ (error).code === "ENOENT") return undefined;
    throw error;
  }
}
