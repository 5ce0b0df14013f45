// What an idle VM weighs: its processes, what the Node process grows by for it, and what the kernel keeps.

import { readdirSync, readFileSync } from "node:fs";
import { loadavg } from "node:os";
import { setTimeout } from "node:timers/promises";
import { type Comparison, type Row, summarise } from "./measure";
import { withClient } from "./setting";

/** VMs that exist before the first reading: what is loaded once is not counted as a VM's. */
const WARM_UP = 5;

/** VMs that boot at once. */
const CROWD = 50;

/** How long the kernel takes to give back what was needed for a boot only (RCU). */
const SETTLE_MS = 1000;

export function memory(vms: number): Promise<Comparison> {
  return withClient({}, async (client) => {
    const before = loadavg()[0] ?? 0;
    const boot = (name: string) => client.vm.getOrCreate(["memory", name]).exec("true");
    for (let vm = 0; vm < WARM_UP; vm += 1) await boot(`warm-up-${vm}`);
    const known = new Set(guests());
    await setTimeout(SETTLE_MS);
    const start = { process: settledPss(), kernel: kernelMemory() };
    for (let first = 0; first < vms; first += CROWD) {
      const crowd = Array.from({ length: Math.min(CROWD, vms - first) }, (_, index) =>
        boot(String(first + index)),
      );
      await Promise.all(crowd);
    }
    await setTimeout(SETTLE_MS);
    const kernel = kernelMemory();
    const host = (settledPss() - start.process) / vms;
    const guest = guests().filter((pid) => !known.has(pid));
    if (guest.length !== vms) throw new Error(`${guest.length} guests for ${vms} VMs`);
    const pss = guest.map((pid) => pssOf(pid));
    const ofAll = (name: string, value: number): Row => ({ ...summarise(name, [value]), n: vms });
    const kept = (kernel.kept - start.kernel.kept) / vms;
    const all = pss.reduce((sum, guest) => sum + guest + host + kept, 0);
    return {
      title: `Idle VM, of ${vms}: proportional set size and kernel memory`,
      goal: "under 2048 KiB of processes and 512 KiB of kernel memory; 500 VMs under 1,572,864 KiB",
      unit: "KiB",
      rows: [
        summarise("PID 1 of the VM", pss),
        ofAll("growth of the Node process", host),
        summarise(
          "together",
          pss.map((guest) => guest + host),
        ),
        ofAll("kernel memory", kept),
        ofAll(
          "kernel memory that it gives back under pressure",
          (kernel.cached - start.kernel.cached) / vms,
        ),
        ofAll(`all ${vms} with kernel memory`, all),
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

/** KiB, of the whole machine: nothing else should run meanwhile. */
function kernelMemory(): { kept: number; cached: number } {
  const meminfo = readFileSync("/proc/meminfo", "utf8");
  const field = (name: string) =>
    Number(new RegExp(`^${name}:\\s+(\\d+) kB`, "m").exec(meminfo)?.[1] ?? 0);
  const kept = ["SUnreclaim", "KernelStack", "PageTables", "Percpu"].map(field);
  return { kept: kept.reduce((sum, part) => sum + part), cached: field("SReclaimable") };
}
