/** Loads the native addon: the one built in this checkout, or the platform's package. */

import { existsSync } from "node:fs";
import { join } from "node:path";
import type * as Native from "./binding";
import { AgentVmError } from "./errors";

/** The platforms that there is an addon for, as napi names them. */
const PLATFORMS: Partial<Record<string, string>> = {
  "linux-x64": "linux-x64-gnu",
  "linux-arm64": "linux-arm64-gnu",
};

/** Root of this npm package. */
export const packageDir: string = join(__dirname, "..");

function load(): typeof Native {
  const host = `${process.platform}-${process.arch}`;
  const platform = PLATFORMS[host];
  if (platform === undefined) {
    throw new AgentVmError(
      "VM_UNSUPPORTED",
      `agentvm runs on Linux, x64 or arm64, with glibc; this is ${host}`,
    );
  }
  const built = join(packageDir, `agentvm.${platform}.node`);
  const installed = `agentvm-${platform}`;
  try {
    return require(existsSync(built) ? built : installed);
  } catch (cause) {
    const remedy =
      (cause as NodeJS.ErrnoException).code === "MODULE_NOT_FOUND"
        ? `install ${installed} (npm does, unless optional dependencies are omitted or this ` +
          "Linux has musl instead of glibc), or run `npm run build` in a checkout"
        : "the cause tells why; it needs glibc";
    throw new AgentVmError(
      "VM_UNSUPPORTED",
      `the native addon for ${host} can't be loaded: ${remedy}`,
      { cause },
    );
  }
}

export const native: typeof Native = load();
