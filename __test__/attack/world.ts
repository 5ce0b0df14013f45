/** A host and an internet of a test file's own, whose servers count who comes. */

import { spawn } from "node:child_process";
import { mkdtemp, readFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createInterface } from "node:readline";
import type { Agent, AgentEvents, NetworkRules } from "agentvm";
import { afterAll } from "vitest";
import { isRoot, ROOT, remove } from "../fixtures.js";

export type Denied = AgentEvents["networkDenied"];

type User = "user" | "root";

export interface World {
  /** What the host itself gets for each probe. */
  probe(probes: readonly string[]): Promise<string[]>;
  boot(network?: NetworkRules): Promise<Prober>;
}

/** A VM that tries to reach something. */
export interface Prober {
  probe(probes: readonly string[], user?: User): Promise<string[]>;
  exec(command: string, user?: User): ReturnType<Agent["exec"]>;
  setNetwork(network: NetworkRules): Promise<void>;
  /** What was told until now. */
  denied(): Promise<Denied[]>;
}

const HERE = join(ROOT, "__test__", "attack");
const PROBE = "probe.mjs";

/** For a whole test file, to be made at its top. */
export async function newWorld(): Promise<World> {
  const directory = await mkdtemp(join(tmpdir(), "agentvm-test-"));
  const namespaces = ["--net", "--mount"];
  if (!isRoot) namespaces.push("--user", "--map-current-user", "--keep-caps");
  const host = spawn(
    "unshare",
    [...namespaces, process.execPath, join(HERE, "host.mjs"), directory],
    {
      cwd: ROOT,
      stdio: ["pipe", "pipe", "inherit"],
    },
  );
  const ended = new Promise((resolve) => host.once("close", resolve));
  afterAll(async () => {
    host.stdin.end();
    await ended;
    await remove(directory);
  });
  const lines = createInterface({ input: host.stdout })[Symbol.asyncIterator]();
  const answer = async () => {
    const { value, done } = await lines.next();
    if (done) throw new Error("the host has ended: see above");
    return JSON.parse(value);
  };
  let last: Promise<unknown> = answer();
  const ask = (...request: unknown[]) => {
    const mine = last.then(() => {
      host.stdin.write(`${JSON.stringify(request)}\n`);
      return answer();
    });
    last = mine;
    return mine;
  };
  await last;

  let vms = 0;
  return {
    async probe(probes) {
      return JSON.parse(await ask("run", process.execPath, [join(HERE, PROBE), ...probes]));
    },
    async boot(network = {}) {
      const key = `vm-${vms++}`;
      await ask("boot", key, network);
      await ask("write", key, PROBE, await readFile(join(HERE, PROBE), "utf8"));
      const exec: Prober["exec"] = (command, user = "user") => ask("exec", key, command, { user });
      return {
        exec,
        async probe(probes, user) {
          const quoted = probes.map((probe) => `'${probe}'`).join(" ");
          const { stdout, stderr } = await exec(`node /home/user/${PROBE} ${quoted}`, user);
          if (stdout === "") throw new Error(stderr);
          return JSON.parse(stdout);
        },
        setNetwork: (network) => ask("setNetwork", key, network),
        denied: () => ask("denied", key),
      };
    },
  };
}
