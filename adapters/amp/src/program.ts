/** Where Amp's program is, and whether it can log in. */

import { existsSync, readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { homedir } from "node:os";
import { dirname, join } from "node:path";
import { ErrorCode, RpcError } from "./shared/errors.js";

/** The package with the program itself; `@ampcode/cli` only chooses one for the platform. */
const PACKAGE = `@ampcode/cli-linux-${process.arch}`;

const DEFAULT_URL = "https://ampcode.com";

/** `AMP_CLI_PATH`, or the program of the package that is installed beside this adapter. */
export function programPath(env: NodeJS.ProcessEnv): string {
  const program = env.AMP_CLI_PATH || join(dirname(manifestPath() ?? ""), "amp");
  if (existsSync(program)) return program;
  throw new RpcError(
    ErrorCode.internalError,
    env.AMP_CLI_PATH
      ? `Amp's program is not at AMP_CLI_PATH: ${program}`
      : `Amp's program is not installed: there is no package ${PACKAGE}`,
    { type: "amp_not_found" },
  );
}

export function programVersion(env: NodeJS.ProcessEnv): string {
  const manifest = env.AMP_CLI_PATH ? undefined : manifestPath();
  if (manifest === undefined) return "unknown";
  return (JSON.parse(readFileSync(manifest, "utf8")) as { version: string }).version;
}

function manifestPath(): string | undefined {
  try {
    return createRequire(import.meta.url).resolve(`${PACKAGE}/package.json`);
  } catch {
    return undefined; // no package for this processor
  }
}

/**
 * Throws `auth_required` if Amp has no key. Asked before every turn, because Amp itself would begin a
 * login and wait for a person.
 */
export function requireKey(env: NodeJS.ProcessEnv): void {
  if (env.AMP_API_KEY || hasStoredKey(env.AMP_URL || DEFAULT_URL)) return;
  throw new RpcError(
    ErrorCode.authRequired,
    "Amp has no API key: set AMP_API_KEY (https://ampcode.com/settings)",
    { type: "missing_api_key", variable: "AMP_API_KEY" },
  );
}

/** What `amp login` leaves: `{ "apiKey@<url>": "…" }`. */
function hasStoredKey(url: string): boolean {
  let secrets: unknown;
  try {
    const file = join(homedir(), ".local/share/amp/secrets.json");
    secrets = JSON.parse(readFileSync(file, "utf8"));
  } catch {
    return false; // never logged in, or Amp could not read it either
  }
  const names = Object.keys(secrets ?? {}).map(withoutSlash);
  return names.includes(`apiKey@${withoutSlash(url)}`);
}

function withoutSlash(url: string): string {
  return url.replace(/\/+$/, "");
}
