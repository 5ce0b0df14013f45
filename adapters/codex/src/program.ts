/** Where Codex is. */

import { createRequire } from "node:module";
import { dirname, join } from "node:path";

const TRIPLES: Record<string, string> = {
  x64: "x86_64-unknown-linux-musl",
  arm64: "aarch64-unknown-linux-musl",
};

/** The package's own launcher is a Node process that does no more than this. */
export function codexProgram(): string {
  const require = createRequire(import.meta.url);
  const manifest = require.resolve(`@openai/codex-linux-${process.arch}/package.json`);
  const triple = TRIPLES[process.arch] ?? process.arch;
  return join(dirname(manifest), "vendor", triple, "bin/codex");
}

export function codexVersion(): string {
  const { version } = createRequire(import.meta.url)("@openai/codex/package.json");
  return version;
}
