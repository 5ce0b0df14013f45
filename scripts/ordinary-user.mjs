// Runs programs as an ordinary user of this machine: a uid that root made up, with no groups, no
// capabilities and a home of its own. It sees the checkout read-only in a directory that it can
// reach (the real one may lie below /root), through a mount that ends with the program.

import {
  chmodSync,
  chownSync,
  existsSync,
  lstatSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  realpathSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { delimiter, join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { Failure, output, ROOT, run } from "./command.mjs";

/** No account has it, and no range of /etc/subuid starts so low. */
const UID = 12345;

/** How long PID 1 of a VM may take to end it after its host process is gone. */
const FAREWELL_MS = 10_000;

/** Bound mounts of a file need something to lie on; everything else is the caller's argument. */
const ENTER = `
  mount --bind "$AGENTVM_STAGE_CHECKOUT" "$AGENTVM_STAGE/checkout"
  mount -o remount,bind,ro "$AGENTVM_STAGE/checkout"
  mount --bind "$AGENTVM_STAGE_NODE" "$AGENTVM_STAGE/bin/node"
  cd "$AGENTVM_STAGE/checkout"
  exec setpriv --reuid=${UID} --regid=${UID} --clear-groups --inh-caps=-all -- "$@"
`;

/** @typedef {{ checkout: string, bin: string, scratch: string }} Stage */

/**
 * Lends an ordinary user this checkout, and takes it back.
 *
 * @param {Record<string, string>} programs files to be found on its PATH
 * @param {(stage: Stage, runAs: (program: string, args: string[]) => Promise<void>) => Promise<void>} use
 *   programs are those of the stage: `stage.bin` has `node` and what `programs` names
 */
export async function asOrdinaryUser(programs, use) {
  refuseUnreadableCheckout();
  refuseLeftovers("are running before the tests");
  const directory = mkdtempSync(join(tmpdir(), "agentvm-user-"));
  const stage = {
    checkout: join(directory, "checkout"),
    bin: join(directory, "bin"),
    scratch: join(directory, "scratch"),
  };
  try {
    prepare(directory, stage, programs);
    await use(stage, (program, args) =>
      run(
        "unshare",
        ["--mount", "--propagation", "private", "--", "sh", "-euc", ENTER, "sh", program, ...args],
        {
          env: environment(directory, stage),
        },
      ),
    );
    await waitForProcesses();
  } finally {
    rmSync(directory, { recursive: true, force: true });
  }
}

/**
 * @param {string} directory
 * @param {Stage} stage
 * @param {Record<string, string>} programs
 */
function prepare(directory, stage, programs) {
  chmodSync(directory, 0o755);
  for (const path of [stage.checkout, stage.bin]) mkdirSync(path);
  for (const name of ["home", "tmp", "scratch"]) {
    const path = join(directory, name);
    mkdirSync(path, { mode: 0o700 });
    chownSync(path, UID, UID);
  }
  writeFileSync(join(stage.bin, "node"), "");
  for (const [name, file] of Object.entries(programs)) {
    // Small enough to copy, unlike Node.
    const path = join(stage.bin, name);
    writeFileSync(path, readFileSync(file));
    chmodSync(path, 0o755);
  }
}

/**
 * @param {string} directory
 * @param {Stage} stage
 */
function environment(directory, stage) {
  return {
    AGENTVM_STAGE: directory,
    AGENTVM_STAGE_CHECKOUT: ROOT,
    AGENTVM_STAGE_NODE: realpathSync(process.execPath),
    PATH: [stage.bin, "/usr/local/bin", "/usr/bin", "/bin", "/usr/sbin", "/sbin"].join(delimiter),
    HOME: join(directory, "home"),
    TMPDIR: join(directory, "tmp"),
    AGENTVM_VITEST_CACHE: join(directory, "tmp", "vitest"),
    // npm run points these at the home of whoever ran it.
    npm_config_cache: undefined,
    npm_config_userconfig: undefined,
    USER: undefined,
    LOGNAME: undefined,
    XDG_CACHE_HOME: undefined,
    XDG_CONFIG_HOME: undefined,
    XDG_DATA_HOME: undefined,
    XDG_RUNTIME_DIR: undefined,
    XDG_STATE_HOME: undefined,
  };
}

/** A checkout made under umask 077 can't be shown to anyone else. */
function refuseUnreadableCheckout() {
  const paths = [".", "package.json", "dist/index.js", "node_modules", "target"];
  const closed = paths
    .map((path) => join(ROOT, path))
    .filter((path) => {
      if (!existsSync(path)) return false;
      const { mode } = lstatSync(path);
      return (mode & 0o004) === 0;
    });
  if (closed.length === 0) return;
  throw new Failure(
    `An ordinary user can't read ${closed.join(", ")}. Open the checkout: chmod -R go+rX ${ROOT}`,
  );
}

/** Nothing that the tests started may stay: VMs end with the process that asked for them. */
async function waitForProcesses() {
  const deadline = Date.now() + FAREWELL_MS;
  while (processes().length > 0 && Date.now() < deadline) await sleep(50);
  refuseLeftovers("are still running after the tests");
}

/** @param {string} when */
function refuseLeftovers(when) {
  const pids = processes();
  if (pids.length === 0) return;
  const list = output("ps", ["-o", "pid,ppid,stat,args", "-p", pids.join(",")]) ?? pids.join(" ");
  throw new Failure(`Processes of uid ${UID} ${when}:\n${list}`);
}

/** @returns {string[]} */
function processes() {
  return readdirSync("/proc")
    .filter((name) => /^\d+$/.test(name))
    .filter((pid) => {
      try {
        const uid = /^Uid:\s+(\d+)/m.exec(readFileSync(`/proc/${pid}/status`, "utf8"));
        return Number(uid?.[1]) === UID;
      } catch {
        return false; // it has just ended
      }
    });
}
