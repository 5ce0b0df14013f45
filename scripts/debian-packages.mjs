// Programs that tests run beside agentvm, and that a machine need not have.

import { Failure, output, run, stage } from "./command.mjs";

/** Debian's package of each program, or of a file. */
const PACKAGES = {
  "/usr/lib/python3/dist-packages/requests/__init__.py": "python3-requests",
  debootstrap: "debootstrap",
  "docker-registry": "docker-registry",
  git: "git",
  less: "less",
  "musl-gcc": "musl-tools",
  skopeo: "skopeo",
  tmux: "tmux",
  top: "procps",
  umoci: "umoci",
  vim: "vim",
};

/**
 * Installs what is missing, where root may: on Debian and its like. Elsewhere the tests that need a program
 * are left out, which is said.
 *
 * @returns {Promise<string[]>} what could not be installed
 */
export async function provideDebianPackages() {
  const missing = missingPackages();
  if (missing.length === 0) return [];
  if (process.getuid?.() !== 0 || output("apt-get", ["--version"]) === undefined) return missing;
  const env = { DEBIAN_FRONTEND: "noninteractive" };
  const quietly = ["install", "-y", "-qq", "--no-install-recommends"];
  try {
    await stage(`${missing.join(", ")} (apt-get install)`, async () => {
      await run("apt-get", ["update", "-qq"], { env });
      await run("apt-get", [...quietly, ...missing], { env });
    });
  } catch (error) {
    // In CI nobody reads what was left out.
    if (!(error instanceof Failure) || process.env["CI"]) throw error;
    console.warn(error.message);
  }
  return missingPackages();
}

function missingPackages() {
  return Object.entries(PACKAGES)
    .filter(([what]) => output("sh", ["-c", `test -e ${what} || command -v ${what}`]) === undefined)
    .map(([, name]) => name);
}
