// What an idle VM weighs: its processes, and what the Node process grows by for it.

import { readdirSync, readFileSync } from "node:fs";
import { loadavg } from "node:os";
import { type Comparison, summarise } from "./measure";
import { withClient } from "./setting";

/** VMs that exist before the first reading: what is loaded once is not counted as a VM's. */
const WARM_UP = 5;

export function memory(vms: number): Promise<Comparison> {
  return withClient({}, async (client) => {
    const before = loadavg()[0] ?? 0;
    const boot = async (name: string) => {
      await client.vm.getOrCreate(["memory", name]).exec("true");
    };
    for (let vm = 0; vm < WARM_UP; vm += 1) await boot(`warm-up-${vm}`);
    const known = new Set(guests());
    const start = settledPss();
    for (let vm = 0; vm < vms; vm += 1) await boot(String(vm));
    const host = (settledPss() - start) / vms;
    const guest = guests().filter((pid) => !known.has(pid));
    if (guest.length !== vms) throw new Error(`${guest.length} guests for ${vms} VMs`);
    const pss = guest.map((pid) => pssOf(pid));
    return {
      title: `Idle VM, of ${vms}: proportional set size`,
      goal: "under 2048 KiB together",
      unit: "KiB",
      rows: [
        summarise("PID 1 of the VM", pss),
        { ...summarise("growth of the Node process", [host]), n: vms },
        {
          ...summarise(
            "together",
            pss.map((guest) => guest + host),
          ),
        },
      ],
      load: [before, loadavg()[0] ?? 0],
    };
  });
}

/** PIDs of this process's VMs. */
function guests(): string[] {
  const children = (pid: string) =>
    readdirSync(`/proc/${pid}/task`).flatMap((thread) =>
      readFileSync(`/proc/${pid}/task/${thread}/children`, "utf8").split(" ").filter(Boolean),
    );
  return children("self").filter(
    (pid) => readFileSync(`/proc/${pid}/comm`, "utf8").trim() === "agentvm-guest",
  );
}

function settledPss(): number {
  // Garbage of the benchmark itself is no VM's memory.
  globalThis.gc?.();
  globalThis.gc?.();
  return pssOf("self");
}

/** KiB. */
function pssOf(pid: string): number {
  const rollup = readFileSync(`/proc/${pid}/smaps_rollup`, "utf8");
  return Number(/^Pss:\s+(\d+) kB/m.exec(rollup)?.[1] ?? Number.NaN);
}
