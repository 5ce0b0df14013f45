import { readdir } from "node:fs/promises";
import { join } from "node:path";
import type { DoctorResult } from "agentvm";
import { expect, test } from "vitest";
import { failureOf, isRoot, newClient, newDirectory, runProgram } from "./fixtures.js";

const doctor = async (...args: string[]) => {
  const dataDir = await newDirectory();
  return runProgram(["dist/cli.js", "doctor", ...args], { AGENTVM_DATA_DIR: dataDir });
};

test("doctor says of a host with VMs that they run, and leaves nothing", async () => {
  const dataDir = await newDirectory();
  const client = await newClient({ dataDir });
  const { ok, checks } = await client.doctor();
  expect(checks.filter(({ state }) => state === "missing")).toEqual([]);
  expect(ok).toBe(true);
  const names = checks.map(({ name }) => name);
  for (const name of ["node", "kernel", "user-namespaces", "proc", "seccomp", "cgroups", "boot"]) {
    expect(names).toContain(name);
  }
  expect(new Set(names).size).toBe(names.length);
  expect(checks.find(({ name }) => name === "boot")?.detail).toMatch(/booted in [\d.]+ ms/);
  for (const { state, lost, remedy } of checks) {
    expect([lost === null, remedy === null]).toEqual([state === "ok", state === "ok"]);
  }
  expect(await readdir(join(dataDir, "vms"))).toEqual([]);
});

test("doctor knows whether VMs have a root", async () => {
  const { checks } = await (await newClient()).doctor();
  const state = checks.find(({ name }) => name === "vm-root")?.state;
  expect(state).toBe(isRoot ? "ok" : "degraded");
});

test("npx agentvm doctor prints every check, and --json the same as JSON", async () => {
  const text = await doctor();
  expect(text).toMatchObject({ code: 0, stderr: "" });
  expect(text.stdout).toContain("VMs run on this host.");
  const json = await doctor("--json");
  expect(json.code).toBe(0);
  const { ok, checks }: DoctorResult = JSON.parse(json.stdout);
  expect(ok).toBe(true);
  for (const { name } of checks) {
    expect(text.stdout).toContain(name);
  }
});

test("doctor on a data directory that can't be used names it, and exits with 1", async () => {
  const { code, stdout } = await runProgram(["dist/cli.js", "doctor"], {
    AGENTVM_DATA_DIR: "/dev/null/data",
  });
  expect(code).toBe(1);
  expect(stdout).toMatch(/MISSING\s+data-directory/);
  expect(stdout).toContain("/dev/null");
  expect(stdout).toContain("No VM can run");
});

test("a closed client examines nothing", async () => {
  const client = await newClient();
  await client.close();
  expect((await failureOf(() => client.doctor())).code).toBe("CLIENT_CLOSED");
});
