// Installs what npm would publish into an empty project, and uses it from there.

import { cpSync, mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { Failure, npm, output, ROOT, run, runNode } from "./command.mjs";

const ADDON = `linux-${process.arch}-gnu`;

/** Boots a VM from CommonJS; the quickstart is an ES module. */
const BOOT = `
const { createClient } = require("agentvm");
(async () => {
  const client = createClient({ dataDir: process.argv[2] });
  const { exitCode } = await client.vm.getOrCreate("packed").exec("true");
  await client.close();
  if (exitCode !== 0) throw new Error(\`true exited with \${exitCode}\`);
})();
`;

/** The package, and the one of this platform with its addon. */
export async function checkPackedPackage() {
  const directory = mkdtempSync(join(tmpdir(), "agentvm-packed-"));
  try {
    const addon = join(directory, "addon");
    cpSync(join(ROOT, "npm", ADDON), addon, { recursive: true });
    const file = `agentvm.${ADDON}.node`;
    cpSync(join(ROOT, file), join(addon, file));
    const tarballs = [pack(ROOT, directory), pack(addon, directory)];

    const project = join(directory, "project");
    mkdirSync(project);
    writeFileSync(join(project, "package.json"), '{ "private": true }\n');
    const quiet = ["--no-audit", "--no-fund", "--no-save", "--loglevel=error"];
    await run(...npm(["install", "--prefer-offline", ...quiet, ...tarballs]), { cwd: project });
    await use(project, join(directory, "data"));
  } finally {
    rmSync(directory, { recursive: true, force: true });
  }
}

/**
 * @param {string} project
 * @param {string} dataDir
 */
async function use(project, dataDir) {
  await run(join(project, "node_modules", ".bin", "agentvm"), ["--version"], { cwd: project });
  writeFileSync(join(project, "boot.cjs"), BOOT);
  await run(process.execPath, ["boot.cjs", dataDir], { cwd: project });
  // A session needs the adapters of the package, too. Without a key it talks to the model server.
  for (const path of ["examples", "__test__/model-server", "__test__/model-server.ts"]) {
    cpSync(join(ROOT, path), join(project, path), { recursive: true });
  }
  await runNode("tsx/dist/cli.mjs", ["examples/quickstart.ts"], {
    cwd: project,
    env: { ANTHROPIC_API_KEY: undefined },
  });
}

/**
 * @param {string} source
 * @param {string} destination
 * @returns {string} path of the tarball
 */
function pack(source, destination) {
  const command = npm(["pack", source, "--json", "--ignore-scripts"]);
  const packed = output(...command, { cwd: destination });
  if (packed === undefined) throw new Failure(`npm pack ${source} failed`);
  return join(destination, JSON.parse(packed)[0].filename);
}
