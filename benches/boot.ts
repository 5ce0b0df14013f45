// From nothing to the end of the first command, against what else starts a command in namespaces.

import { execFile } from "node:child_process";
import { existsSync } from "node:fs";
import { type Comparison, type Competitor, compare, timed } from "./measure";
import { isInstalled, withClient } from "./setting";

/** The same programs to see, and like our VMs a /proc, a /dev and a /tmp of its own. */
const BWRAP = [
  "--unshare-all",
  "--die-with-parent",
  ...["/usr", "/bin", "/sbin", "/lib", "/lib64"]
    .filter((path) => existsSync(path))
    .flatMap((path) => ["--ro-bind", path, path]),
  ...["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"],
];

const UNSHARE = ["-Urmpfiun", "--mount-proc"];

export function boot(turns: number): Promise<Comparison> {
  return withClient({}, async (client) => {
    const woken = client.vm.getOrCreate("woken");
    await woken.wake();
    await woken.sleep();
    const ours: Competitor[] = [
      {
        name: "fresh VM: boot + exec('true')",
        async run(turn) {
          const agent = client.vm.getOrCreate(["fresh", String(turn)]);
          const time = await timed(() => agent.exec("true"));
          await agent.destroy();
          return time;
        },
      },
      {
        name: "sleeping VM: boot + exec('true')",
        async run() {
          const time = await timed(() => woken.exec("true"));
          await woken.sleep();
          return time;
        },
      },
      {
        name: "sleeping VM: boot + exec('true') + sleep()",
        run: () =>
          timed(async () => {
            await woken.exec("true");
            await woken.sleep();
          }),
      },
    ];
    const others = [
      program("bwrap --unshare-all", "bwrap", [...BWRAP, "true"]),
      program(`unshare ${UNSHARE.join(" ")}`, "unshare", [...UNSHARE, "true"]),
      program("no isolation", "true", []),
    ];
    return compare(
      {
        title: "Boot and first command",
        goal: "a VM takes at most bwrap's time, at p50 and p99",
        baseline: "bwrap --unshare-all",
      },
      [...ours, ...others.filter((other) => other !== undefined)],
      turns,
    );
  });
}

/** Another program that runs `true`, started as `child_process` starts it. */
function program(name: string, file: string, args: string[]): Competitor | undefined {
  if (!isInstalled(file)) {
    console.error(`${file} is not installed: it is left out`);
    return undefined;
  }
  return { name, run: () => timed(() => ended(file, args)) };
}

/** A `true` in namespaces of its own. */
export function runBwrap(): Promise<void> {
  return ended("bwrap", [...BWRAP, "true"]);
}

function ended(file: string, args: string[]): Promise<void> {
  return new Promise((done, failed) => {
    execFile(file, args, (error) => (error ? failed(error) : done()));
  });
}
