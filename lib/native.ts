/** Finds the native addon: the one built in this checkout, or the platform's package. */

import { existsSync } from "node:fs";
import { join } from "node:path";
import type * as Native from "./binding";
import { AgentVmError } from "./errors";

/** Root of this npm package, whether it runs from `dist/` or from `lib/`. */
export const packageDir: string = join(__dirname, "..");

function load(): typeof Native {
  const libc = process.platform === "linux" && !isMusl() ? "gnu" : "musl";
  const target = `${process.platform}-${process.arch}-${libc}`;
  if (target !== "linux-x64-gnu" && target !== "linux-arm64-gnu") {
    throw new AgentVmError(
      "VM_UNSUPPORTED",
      `agentvm runs on Linux with glibc on x64 and arm64; this is ${target}`,
    );
  }
  const built = join(packageDir, `agentvm.${target}.node`);
  if (existsSync(built)) {
    return require(built);
  }
  try {
    return require(`agentvm-${target}`);
  } catch (cause) {
    throw new AgentVmError(
      "VM_UNSUPPORTED",
      `the native addon is missing (${built} or the package agentvm-${target}). ` +
        "In a checkout run `npm run build`; installed from the registry, run `npm install` again " +
        "without --omit=optional",
      { cause },
    );
  }
}

/** glibc tells its version in the process report; musl has no such entry. */
function isMusl(): boolean {
  const report = process.report?.getReport() as { header?: { glibcVersionRuntime?: string } };
  return !report?.header?.glibcVersionRuntime;
}

export const native: typeof Native = load();
