// Installs what npm would publish into an empty project, and loads it from there.

import { cpSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { Failure, output, ROOT, run } from "./command.mjs";

/** The package, and the one of this platform with its addon. */
export async function checkPackedPackage() {
  const platform = `linux-${process.arch}-gnu`;
  const directory = mkdtempSync(join(tmpdir(), "agentvm-packed-"));
  try {
    const addon = join(directory, "addon");
    cpSync(join(ROOT, "npm", platform), addon, { recursive: true });
    const file = `agentvm.${platform}.node`;
    cpSync(join(ROOT, file), join(addon, file));
    const tarballs = [pack(ROOT, directory), pack(addon, directory)];

    const project = join(directory, "project");
    cpSync(join(ROOT, "examples", "package.json"), join(project, "package.json"));
    const quiet = ["--no-audit", "--no-fund", "--no-save", "--loglevel=error"];
    await run("npm", ["install", "--offline", ...quiet, ...tarballs], { cwd: project });

    writeFileSync(join(project, "import.mjs"), 'await import("agentvm");\n');
    writeFileSync(join(project, "require.cjs"), 'require("agentvm");\n');
    for (const program of ["import.mjs", "require.cjs"]) {
      await run(process.execPath, [program], { cwd: project });
    }
    await run(join(project, "node_modules", ".bin", "agentvm"), ["--help"], { cwd: project });
  } finally {
    rmSync(directory, { recursive: true, force: true });
  }
}

/**
 * @param {string} source
 * @param {string} destination
 * @returns {string} path of the tarball
 */
function pack(source, destination) {
  const args = ["pack", source, "--json", "--ignore-scripts", "--pack-destination", destination];
  const packed = output("npm", args);
  if (packed === undefined) throw new Failure(`npm ${args.join(" ")} failed`);
  return join(destination, JSON.parse(packed)[0].filename);
}
