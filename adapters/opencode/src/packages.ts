/** The programs of the agent's packages, found from our own place by Node's rules. */

import { createRequire } from "node:module";
import { dirname, join } from "node:path";

const require = createRequire(import.meta.url);

export function openCode(): string {
  const name = `opencode-linux-${process.arch}`;
  // The other one is for processors without AVX2.
  const directory = packageDirectory(name) ?? packageDirectory(`${name}-baseline`);
  if (directory === undefined) throw new Error(`the package ${name} is not there`);
  return join(directory, "bin/opencode");
}

/** A directory with ripgrep: OpenCode downloads one where the PATH has none. */
export function ripgrep(): string | undefined {
  const directory = packageDirectory(`@vscode/ripgrep-linux-${process.arch}`);
  return directory && join(directory, "bin");
}

function packageDirectory(name: string): string | undefined {
  try {
    return dirname(require.resolve(`${name}/package.json`));
  } catch {
    return undefined;
  }
}
