// Programs that tests run beside agentvm, and that a machine need not have.

import { Failure, output, run, stage } from "./command.mjs";

/** Debian's package of each. */
const PACKAGES = {
  "docker-registry": "docker-registry",
  less: "less",
  skopeo: "skopeo",
  tmux: "tmux",
  top: "procps",
  vim: "vim",
};

/**
 * Installs what is missing where nobody minds: on a machine of CI. Elsewhere the tests that need a program
 * say what to install.
 */
export async function provideDebianPackages() {
  const missing = Object.entries(PACKAGES)
    .filter(([program]) => output("sh", ["-c", `command -v ${program}`]) === undefined)
    .map(([, name]) => name);
  const isCi = Boolean(process.env["CI"]) && process.getuid?.() === 0;
  if (missing.length === 0 || !isCi || output("apt-get", ["--version"]) === undefined) return;
  const env = { DEBIAN_FRONTEND: "noninteractive" };
  const quietly = ["install", "-y", "-qq", "--no-install-recommends"];
  try {
    await stage(`${missing.join(", ")} (apt-get install)`, async () => {
      await run("apt-get", ["update", "-qq"], { env });
      await run("apt-get", [...quietly, ...missing], { env });
    });
  } catch (error) {
    if (!(error instanceof Failure)) throw error;
    console.warn(`${error.message}: what needs them says so`);
  }
}
