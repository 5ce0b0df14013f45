import { existsSync } from "node:fs";
import { expect, test } from "vitest";
import { isRoot, newClient, newVm } from "./fixtures.js";

const hasCgroups = isRoot && existsSync("/sys/fs/cgroup/memory/cgroup.procs");

test("stats of a VM that sleeps tell its disk alone, and do not wake it", async () => {
  const agent = await newVm();
  expect(await agent.stats()).toEqual({ running: false, diskBytes: 0 });
  await agent.writeFile("file", new Uint8Array(100_000));
  await agent.sleep();
  const stats = await agent.stats();
  expect(stats.running).toBe(false);
  expect(stats.diskBytes).toBeGreaterThan(100_000);
});

test("stats of a VM that runs tell what it takes and which limits are in force", async () => {
  const agent = await newVm({ limits: { openFiles: 500 } });
  await agent.exec("true");
  const stats = await agent.stats();
  if (!stats.running) throw new Error("it runs");
  expect(stats.pids).toBe(1);
  expect(stats.memoryBytes).toBeGreaterThan(0);
  expect(stats.countedBy).toBe("processes");
  expect(stats.limits).toEqual([
    { name: "memoryBytes", value: null, mechanism: "none" },
    { name: "cpus", value: null, mechanism: "none" },
    { name: "pids", value: 4096, mechanism: "rlimit" },
    { name: "openFiles", value: 500, mechanism: "rlimit" },
    { name: "diskBytes", value: null, mechanism: "none" },
    { name: "minFreeDiskBytes", value: expect.any(Number), mechanism: "polled" },
  ]);
});

test("a VM has its client's limits, each unless it is given its own", async () => {
  const client = await newClient({ limits: { openFiles: 500, diskBytes: 1e9 } });
  const agent = client.vm.getOrCreate("vm", { limits: { openFiles: 300 } });
  await agent.exec("true");
  const stats = await agent.stats();
  if (!stats.running) throw new Error("it runs");
  const values = stats.limits.map(({ name, value }) => [name, value]);
  expect(Object.fromEntries(values)).toMatchObject({ openFiles: 300, diskBytes: 1e9 });
});

test.runIf(hasCgroups)("a command killed for want of memory is an event and an error", async () => {
  const agent = await newVm({ limits: { memoryBytes: 64 << 20 } });
  const told = new Promise((resolve) => agent.once("limitReached", resolve));
  await expect(agent.exec("echo begun; exec tail /dev/zero")).rejects.toMatchObject({
    code: "VM_LIMIT",
    message: expect.stringContaining("limits.memoryBytes"),
    data: { stdout: "begun\n" },
  });
  expect(await told).toMatchObject({ limit: "memoryBytes" });
});

test.runIf(hasCgroups)("files in memory take a part of it at most", async () => {
  const agent = await newVm({ limits: { memoryBytes: 100e6 } });
  const filled = await agent.exec("head -c 400000000 /dev/zero > /tmp/x");
  expect(filled.stderr).toContain("No space left on device");
  expect((await agent.exec("ls /tmp")).stdout).toBe("x\n");
});

test.runIf(hasCgroups)("whatever is killed for want of memory, the limit is named", async () => {
  const agent = await newVm({ limits: { memoryBytes: 64e6 } });
  // Memory that no process holds: nothing that is killed frees it.
  const take = `
    head -c 31000000 /dev/zero > /tmp/file; head -c 15000000 /dev/zero > /dev/shm/file
    exec perl -e 'my $id = shmget(0, 15e6, 0600) // die; shmwrite($id, q(x) x 15e6, 0, 15e6); q(x) x $_ for 64e6'`;
  await expect(agent.exec(take)).rejects.toMatchObject({ code: "VM_LIMIT" });
  for (let call = 0; call < 10; call++) {
    await agent.exec("true").catch((error) => {
      expect(error).toMatchObject({
        code: "VM_LIMIT",
        message: expect.stringContaining("memoryBytes"),
      });
    });
  }
});

test.runIf(!isRoot && !hasCgroups)("a limit that can't be enforced is refused", async () => {
  const agent = await newVm({ limits: { cpus: 0.5 } });
  await expect(agent.exec("true")).rejects.toMatchObject({
    code: "VM_UNSUPPORTED",
    message: expect.stringContaining("limits.cpus"),
  });
  expect((await agent.stats()).running).toBe(false);
});

test("a wrong limit is named", async () => {
  await expect(newClient({ limits: { cpus: 0 } })).rejects.toThrow(/limits\.cpus: must be/);
  await expect(newClient({ limits: { pids: 1.5 } })).rejects.toThrow(/limits\.pids: must be/);
});

test("what was too much on the disk is not allowed again once it was deleted", async () => {
  const agent = await newVm({ limits: { diskBytes: 20e6 } });
  const fill = "head -c 60000000 /dev/zero > big; sleep 100";
  const full = { code: "VM_LIMIT", message: expect.stringContaining("limits.diskBytes") };
  await expect(agent.exec(fill)).rejects.toMatchObject(full);
  await agent.exec("rm big; sleep 3");
  await expect(agent.exec(fill)).rejects.toMatchObject(full);
  // With too much it may boot, to be rid of it.
  await agent.sleep();
  expect((await agent.exec("sleep 2; rm big; echo removed")).stdout).toBe("removed\n");
});

test("deleted files that a program still writes to count", async () => {
  const agent = await newVm({ limits: { diskBytes: 20e6 } });
  const hidden = "exec 3>hidden; rm hidden; head -c 60000000 /dev/zero >&3; sleep 100";
  await expect(agent.exec(hidden)).rejects.toMatchObject({
    code: "VM_LIMIT",
    message: expect.stringContaining("limits.diskBytes"),
  });
});
