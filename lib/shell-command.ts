/** `npx agentvm shell` and `npx agentvm ls`: which VM, and how it is booted. */

import type { ParseArgsConfig } from "node:util";
import type * as Api from "../index";
import { UsageError } from "./usage-error";

/** What `shell` takes, besides the parts of a key. */
export const SHELL_OPTIONS = {
  create: { type: "boolean" },
  user: { type: "string" },
  cwd: { type: "string" },
  env: { type: "string", multiple: true },
  "data-dir": { type: "string" },
  mount: { type: "string", multiple: true },
  memory: { type: "string" },
  cpus: { type: "string" },
  pids: { type: "string" },
  disk: { type: "string" },
  "loopback-port": { type: "string", multiple: true },
  network: { type: "string" },
  allow: { type: "string", multiple: true },
  deny: { type: "string", multiple: true },
  image: { type: "string" },
  rootfs: { type: "string" },
} as const satisfies NonNullable<ParseArgsConfig["options"]>;

export interface ShellValues {
  create?: boolean | undefined;
  user?: string | undefined;
  cwd?: string | undefined;
  env?: string[] | undefined;
  "data-dir"?: string | undefined;
  mount?: string[] | undefined;
  memory?: string | undefined;
  cpus?: string | undefined;
  pids?: string | undefined;
  disk?: string | undefined;
  "loopback-port"?: string[] | undefined;
  network?: string | undefined;
  allow?: string[] | undefined;
  deny?: string[] | undefined;
  image?: string | undefined;
  rootfs?: string | undefined;
}

export function vmOptions(values: ShellValues): Api.VmOptions {
  const { mount, memory, cpus, pids, disk, image, rootfs } = values;
  if (image !== undefined && rootfs !== undefined) {
    throw new UsageError("shell: --image and --rootfs are one or the other");
  }
  const limits: Api.VmLimits = {
    ...(memory !== undefined && { memoryBytes: size("--memory", memory) }),
    ...(cpus !== undefined && { cpus: number("--cpus", cpus) }),
    ...(pids !== undefined && { pids: number("--pids", pids) }),
    ...(disk !== undefined && { diskBytes: size("--disk", disk) }),
  };
  const network = networkRules(values);
  const ports = values["loopback-port"]?.map((port) => number("--loopback-port", port));
  return {
    ...(Object.keys(limits).length > 0 && { limits }),
    ...(ports && { loopbackExemptPorts: ports }),
    ...(network && { network }),
    ...(mount && { mounts: mount.map(mountOf) }),
    ...(image !== undefined && { image }),
    ...(rootfs !== undefined && { image: { rootfs } }),
  };
}

function networkRules({ network, allow, deny }: ShellValues): Api.NetworkRules | undefined {
  switch (network) {
    case undefined:
      return allow || deny ? { ...(allow && { allow }), ...(deny && { deny }) } : undefined;
    case "none":
      if (allow) {
        throw new UsageError(
          'shell: --network none allows nothing: with "allowlist" nothing else is',
        );
      }
      return { default: network, ...(deny && { deny }) };
    case "public":
    case "allowlist":
      return { default: network, ...(allow && { allow }), ...(deny && { deny }) };
    default:
      throw new UsageError(`shell: --network is public, none or allowlist, not ${network}`);
  }
}

export function shellOptions({ user, cwd, env }: ShellValues): Api.SpawnOptions & Api.ShellOptions {
  if (user !== undefined && user !== "user" && user !== "root") {
    throw new UsageError(`shell: --user is user or root, not ${user}`);
  }
  return {
    ...(user !== undefined && { user }),
    ...(cwd !== undefined && { cwd }),
    ...(env && { env: Object.fromEntries(env.map(variable)) }),
  };
}

/** Refuses a key that no VM has: a slip of the finger would make, and keep, a new one. */
export async function requireVm(
  client: Api.Client,
  key: readonly string[],
  dataDir: string,
): Promise<void> {
  const name = JSON.stringify(key);
  const vms = await client.vm.list();
  if (!vms.some((vm) => JSON.stringify(vm.key) === name)) {
    throw new UsageError(
      `shell: there is no VM ${keyText(key)} in ${dataDir}. ` +
        "--create makes one; `agentvm ls` lists those that there are",
    );
  }
}

/** As it is written on a command line. */
export function keyText(key: readonly string[]): string {
  const word = (part: string) =>
    /^[\w.,:/@+-]+$/.test(part) ? part : `'${part.replaceAll("'", "'\\''")}'`;
  return key.map(word).join(" ");
}

function mountOf(text: string): Api.Mount {
  const [hostPath, path, mode, ...more] = text.split(":");
  const isMode = mode === undefined || mode === "ro" || mode === "rw";
  if (!hostPath || !path || !isMode || more.length > 0) {
    throw new UsageError(
      `shell: --mount is <directory of the host>:<path in the VM>, and :ro, not ${text}`,
    );
  }
  return { hostPath, path, readOnly: mode === "ro" };
}

function variable(text: string): [string, string] {
  const at = text.indexOf("=");
  if (at < 1) {
    throw new UsageError(`shell: --env is NAME=value, not ${text}`);
  }
  return [text.slice(0, at), text.slice(at + 1)];
}

function number(option: string, text: string): number {
  if (!/^\d+(\.\d+)?$/.test(text)) {
    throw new UsageError(`shell: ${option} is a number, not ${text}`);
  }
  return Number(text);
}

const UNITS = { "": 0, k: 1, m: 2, g: 3, t: 4 };

function size(option: string, text: string): number {
  const [, digits, unit] = /^(\d+)([kmgt]?)$/i.exec(text) ?? [];
  if (digits === undefined || unit === undefined) {
    throw new UsageError(`shell: ${option} is bytes, or as 512m or 2g, not ${text}`);
  }
  return Number(digits) * 1024 ** UNITS[unit.toLowerCase() as keyof typeof UNITS];
}
