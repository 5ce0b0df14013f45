// npm run build: the addon with its guest, then the TypeScript of lib/ and of the adapters.
// `--debug` builds the addon unoptimised, which takes a third of the time.

import { chmodSync, existsSync, readdirSync, rmSync } from "node:fs";
import { resolve } from "node:path";
import { pathToFileURL } from "node:url";
import { main, ROOT, runNode, stage } from "./command.mjs";
import { installDependencies } from "./dependencies.mjs";
import { checkBuildPrerequisites } from "./prerequisites.mjs";

/** @param {{ debug?: boolean }} [options] */
export async function build({ debug = false } = {}) {
  const profile = debug ? "debug" : "release";
  await stage(`The addon, ${profile} (cargo: minutes the first time, then seconds)`, () =>
    buildAddon(debug),
  );
  await stage("TypeScript: the package and the adapters (tsc)", buildTypeScript);
}

/**
 * `agentvm.<platform>.node` at the top, and its types at `lib/binding.d.ts`. Cargo itself knows
 * what is up to date, the guest included (build.rs).
 *
 * @param {boolean} debug
 */
async function buildAddon(debug) {
  const profile = debug ? [] : ["--release"];
  const files = ["--platform", "--no-js", "--dts", "lib/binding.d.ts"];
  await runNode("@napi-rs/cli/dist/cli.js", ["build", ...files, ...profile, "--", "--locked"], {
    env: { CARGO: resolve(ROOT, "scripts/cargo.sh") },
  });
}

async function buildTypeScript() {
  await Promise.all(
    sourceProjects().map(async (project) => {
      // Nothing of a source file that is gone may stay.
      rmSync(resolve(ROOT, outputOf(project)), { recursive: true, force: true });
      await tsc(["--project", project]);
    }),
  );
  chmodSync(resolve(ROOT, "dist/cli.js"), 0o755);
}

/** The directories whose TypeScript is compiled: the package's own, and one for each adapter. */
export function sourceProjects() {
  return ["lib", ...adapters()];
}

/** The directories of the adapters. */
export function adapters() {
  const paths = readdirSync(resolve(ROOT, "adapters")).map((name) => `adapters/${name}`);
  return paths.filter((path) => existsSync(resolve(ROOT, path, "tsconfig.json")));
}

/**
 * Where tsc puts what it makes of a project.
 *
 * @param {string} project
 */
function outputOf(project) {
  return project === "lib" ? "dist" : `${project}/dist`;
}

/** @param {string[]} args */
export function tsc(args) {
  return runNode("typescript/bin/tsc", args);
}

/** Everything from a bare clone to a built package. */
export async function setUp() {
  checkBuildPrerequisites();
  await installDependencies();
}

if (import.meta.url === pathToFileURL(process.argv[1] ?? "").href) {
  await main(async () => {
    await setUp();
    await build({ debug: process.argv.includes("--debug") });
  });
}
