// What a benchmark runs in: a data directory of its own, the released addon, the agent store.

import { execFileSync } from "node:child_process";
import { mkdtempSync, readdirSync, rmSync, statSync } from "node:fs";
import { homedir, tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { type Client, type ClientOptions, createClient } from "agentvm";

export const ROOT = fileURLToPath(new URL("..", import.meta.url));

/** Runs with a client whose data is gone afterwards. */
export async function withClient<T>(
  options: ClientOptions,
  run: (client: Client) => Promise<T>,
): Promise<T> {
  const dataDir = mkdtempSync(join(tmpdir(), "agentvm-bench-"));
  const client = createClient({ dataDir, ...options });
  try {
    return await run(client);
  } finally {
    await client.close();
    rmSync(dataDir, { recursive: true, force: true });
  }
}

/** Where agents are installed. */
export function agentStore(): string {
  const { AGENTVM_CACHE_DIR, XDG_CACHE_HOME } = process.env;
  const cache = AGENTVM_CACHE_DIR || join(XDG_CACHE_HOME || join(homedir(), ".cache"), "agentvm");
  return join(cache, "agents");
}

/** An unoptimised addon is several times as big; its figures would be worth nothing. */
export function requireReleaseBuild(): void {
  const RELEASE_LIMIT = 40 << 20;
  const addons = readdirSync(ROOT).filter((name) => name.endsWith(".node"));
  const size = Math.max(0, ...addons.map((name) => statSync(join(ROOT, name)).size));
  if (size === 0 || size > RELEASE_LIMIT) {
    throw new Error("the addon is not built for release: npm run build");
  }
}

export function isInstalled(program: string): boolean {
  try {
    execFileSync("sh", ["-c", `command -v ${program}`], { stdio: "ignore" });
    return true;
  } catch {
    return false;
  }
}
