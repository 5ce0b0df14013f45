/** The programs of the agent's packages, found from our own place by Node's rules. */

import { existsSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

const EXECUTABLES = [
  `opencode-linux-${process.arch}/bin/opencode`,
  // For processors without AVX2.
  `opencode-linux-${process.arch}-baseline/bin/opencode`,
];

export function openCode(): string {
  const found = EXECUTABLES.map(find).find((path) => path !== undefined);
  if (found === undefined) throw new Error(`no ${EXECUTABLES[0]} in any node_modules above`);
  return found;
}

/** A directory with ripgrep: OpenCode downloads one where the PATH has none. */
export function ripgrep(): string | undefined {
  const program = find(`@vscode/ripgrep-linux-${process.arch}/bin/rg`);
  return program && dirname(program);
}

function find(program: string): string | undefined {
  let directory = dirname(fileURLToPath(import.meta.url));
  for (;;) {
    const path = join(directory, "node_modules", program);
    if (existsSync(path)) return path;
    const parent = dirname(directory);
    if (parent === directory) return undefined;
    directory = parent;
  }
}
