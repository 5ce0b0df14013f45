/**
 * Vitest's global set-up: installs the agents once, for every test file, where they stay for the next
 * run.
 */

import { spawnSync } from "node:child_process";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import type { TestProject } from "vitest/node";

declare module "vitest" {
  export interface ProvidedContext {
    agentStoreDir: string;
  }
}

const ROOT = resolve(import.meta.dirname, "..");

export default function setUp(project: TestProject): void {
  const cache = cacheDirectories().find(installAll);
  if (cache === undefined) throw new Error("The agents could not be installed: see above");
  project.provide("agentStoreDir", join(cache, "agents"));
}

/** In the order of preference. A checkout that is read-only may still hold a filled store. */
function cacheDirectories(): string[] {
  const { AGENTVM_TEST_CACHE_DIR } = process.env;
  if (AGENTVM_TEST_CACHE_DIR) return [AGENTVM_TEST_CACHE_DIR];
  return [
    join(ROOT, "target", "test-cache"),
    join(tmpdir(), `agentvm-test-cache-${process.getuid?.()}`),
  ];
}

function installAll(cache: string): boolean {
  const cli = join(ROOT, "dist", "cli.js");
  // With its output shown: the first time takes minutes.
  const { status } = spawnSync(process.execPath, [cli, "install", "--all"], {
    env: { ...process.env, AGENTVM_CACHE_DIR: cache },
    stdio: "inherit",
  });
  return status === 0;
}
