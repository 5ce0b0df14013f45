import { readdirSync, readFileSync, readlinkSync } from "node:fs";
import { readdir } from "node:fs/promises";
import { join } from "node:path";
import { expect, test } from "vitest";
import { newClient, newDirectory } from "./fixtures.js";

const CROWD = 50;

/** Pids of this process's VMs. */
function guests(): string[] {
  return readdirSync("/proc/self/task").flatMap((thread) => {
    const children = readFileSync(`/proc/self/task/${thread}/children`, "utf8");
    return children.split(" ").filter(Boolean);
  });
}

/** What this process has open that only a VM needs. */
function descriptors(dataDir: string): string[] {
  return readdirSync("/proc/self/fd").flatMap((number) => {
    try {
      const to = readlinkSync(`/proc/self/fd/${number}`);
      return to.startsWith(dataDir) || to.includes("pidfd") ? [to] : [];
    } catch {
      return [];
    }
  });
}

/** Counts turns of the event loop until `promise` is settled. */
async function turnsUntil(promise: Promise<unknown>): Promise<number> {
  let turns = 0;
  let settled = false;
  const done = promise.finally(() => {
    settled = true;
  });
  while (!settled) {
    await new Promise((resolve) => setImmediate(resolve));
    turns += 1;
  }
  await done;
  return turns;
}

test("fifty VMs boot and end at once, the event loop goes on, and nothing is left", async () => {
  const dataDir = await newDirectory();
  const client = await newClient({ dataDir });
  const agents = Array.from({ length: CROWD }, (_, index) => client.vm.getOrCreate(`vm-${index}`));

  const booting = Promise.all(agents.map((agent) => agent.exec("echo up")));
  expect(await turnsUntil(booting)).toBeGreaterThan(CROWD);
  for (const { stdout } of await booting) expect(stdout).toBe("up\n");
  expect(guests()).toHaveLength(CROWD);

  const ending = Promise.all(agents.map((agent) => agent.destroy()));
  expect(await turnsUntil(ending)).toBeGreaterThan(CROWD);
  await client.close();
  expect(guests()).toEqual([]);
  expect(descriptors(dataDir)).toEqual([]);
  expect(await readdir(join(dataDir, "vms"))).toEqual([]);
});
