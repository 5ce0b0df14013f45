/** The agent store: what is in it, what is removed from it and what is not. */

import { type ChildProcess, execFileSync, spawn } from "node:child_process";
import { once } from "node:events";
import { mkdir, readdir, writeFile } from "node:fs/promises";
import { dirname, join } from "node:path";
import { type Client, createClient } from "agentvm";
import { expect, onTestFinished, test } from "vitest";
import { agentStoreDir, failureOf, newClient, newDirectory, ROOT, runProgram } from "./fixtures.js";

/** A store with Pi in it that a test may spoil. Returns the cache directory that has it. */
async function newCache(): Promise<string> {
  const cache = await newDirectory();
  const store = join(cache, "agents");
  await mkdir(store);
  const { agents, entries } = await createClient({ agentStoreDir }).agents.list();
  const pi = agents.find(({ name }) => name === "pi");
  const needed = entries.filter(
    ({ agent, use, name }) =>
      use === "pinned" && !name.includes("/") && (agent === "node" || agent === pi?.name),
  );
  for (const { name } of needed) copy(join(agentStoreDir, name), store);
  // In a checkout, adapters of earlier builds.
  await createClient({ agentStoreDir: store }).agents.prune();
  return cache;
}

function copy(entry: string, store: string): void {
  try {
    // Links are quick; the temporary directory may be on another file system.
    execFileSync("cp", ["-al", entry, store], { stdio: "ignore" });
  } catch {
    execFileSync("cp", ["-a", entry, store]);
  }
}

const agentvm = (cache: string, ...args: string[]) =>
  runProgram(["dist/cli.js", ...args], { AGENTVM_CACHE_DIR: cache });

/** Port 9 (discard) of the loopback: nobody listens. */
const OFFLINE = {
  npm_config_registry: "http://127.0.0.1:9",
  npm_config_fetch_retries: "0",
};

async function entryOf(client: Client, agent: string) {
  const { entries } = await client.agents.list();
  return entries.find((entry) => entry.agent === agent && entry.use === "pinned");
}

/** What a version of agentvm has left that nobody uses any more. */
async function leaveOldEntry(cache: string): Promise<string> {
  const name = "pi-0.0.1-aaaaaaaaaaaa";
  const entry = join(cache, "agents", name);
  await mkdir(join(entry, "node_modules"), { recursive: true });
  await writeFile(join(entry, "entry.json"), '{"format":1,"bytes":1000000}\n');
  return name;
}

const SESSION_UNTIL_KILLED = `
  import { createClient } from "agentvm";
  const client = createClient({ dataDir: process.argv[1] });
  await client.vm.getOrCreate("vm").createSession("pi", { env: { ANTHROPIC_API_KEY: "none" } });
  console.log("running");
  setInterval(() => {}, 1000);
`;

/** A process with a VM that runs Pi. */
async function startSession(cache: string): Promise<ChildProcess> {
  const args = ["--input-type=module", "--eval", SESSION_UNTIL_KILLED, "--", await newDirectory()];
  const child = spawn(process.execPath, args, {
    cwd: ROOT,
    env: { ...process.env, AGENTVM_CACHE_DIR: cache },
    stdio: ["ignore", "pipe", "inherit"],
  });
  onTestFinished(() => void child.kill("SIGKILL"));
  await once(child.stdout as NodeJS.ReadableStream, "data");
  return child;
}

test("agents.list tells what is installed, how big it is, and what runs", async () => {
  const client = await newClient();
  const { agents } = await client.agents.list();
  const pi = agents.find(({ name }) => name === "pi");
  expect(pi).toMatchObject({ pinned: true, installed: true });
  expect(pi?.package).toContain("pi-coding-agent");
  const entry = await entryOf(client, "pi");
  expect(entry).toMatchObject({ version: pi?.version, agent: "pi", use: "pinned" });
  expect(entry?.bytes).toBeGreaterThan(50e6);
});

test("an agent that a VM of another process runs on is not removed, until that process is killed", async () => {
  const cache = await newCache();
  const client = await newClient({ agentStoreDir: join(cache, "agents"), autoInstall: false });
  const child = await startSession(cache);
  expect(await entryOf(client, "pi")).toMatchObject({ running: true });
  expect(await entryOf(client, "node")).toMatchObject({ running: true });

  const refused = await agentvm(cache, "remove", "pi");
  expect(refused).toMatchObject({ code: 1, stdout: "" });
  expect(refused.stderr).toMatch(/^AGENT_IN_USE: .*pi-.* is in use by a running VM/);

  child.kill("SIGKILL");
  await once(child, "exit");
  const removed = await agentvm(cache, "remove", "pi");
  expect(removed).toMatchObject({ code: 0, stderr: "" });
  expect(removed.stdout).toMatch(/^removed pi-.* MB\n$/);
  expect(await agentvm(cache, "remove", "pi")).toMatchObject({ stdout: "pi is not installed\n" });
  const vm = client.vm.getOrCreate("vm");
  const missing = await failureOf(() => vm.createSession("pi"));
  expect(missing.code).toBe("AGENT_NOT_INSTALLED");
});

test("an agent is in use until its VM sleeps, also when its session is closed", async () => {
  const cache = await newCache();
  const client = await newClient({ agentStoreDir: join(cache, "agents") });
  const vm = client.vm.getOrCreate("vm");
  const { sessionId } = await vm.createSession("pi", { env: { ANTHROPIC_API_KEY: "none" } });
  await vm.closeSession(sessionId);
  expect((await failureOf(() => client.agents.remove("pi"))).code).toBe("AGENT_IN_USE");
  await vm.sleep();
  const [removed] = await client.agents.remove("pi");
  expect(removed).toMatchObject({ agent: "pi", running: false });
});

test("prune removes what no client of this version can use, after telling it", async () => {
  const cache = await newDirectory();
  const old = await leaveOldEntry(cache);
  const told = await agentvm(cache, "prune", "--dry-run");
  expect(told).toMatchObject({ code: 0, stderr: "" });
  expect(told.stdout).toBe(`would remove ${old}, 1.0 MB\nwould remove 1 of 1, 1.0 MB\n`);
  expect(await readdir(join(cache, "agents"))).toContain(old);
  const { stdout } = await agentvm(cache, "prune");
  expect(stdout).toBe(`removed ${old}, 1.0 MB\nremoved 1 of 1, 1.0 MB\n`);
  expect(await readdir(join(cache, "agents"))).toEqual([".locks"]);
});

test("agents prints tables, and JSON of the same", async () => {
  const cache = await newDirectory();
  const old = await leaveOldEntry(cache);
  const { stdout } = await agentvm(cache, "agents");
  expect(stdout).toMatch(/^AGENT +VERSION +PACKAGE +STATE\n(.*\n)*pi .* -\n/);
  expect(stdout).toMatch(new RegExp(`${old} +1.0 MB +unused\n`));
  const { store, entries } = JSON.parse((await agentvm(cache, "agents", "--json")).stdout);
  expect(store).toBe(join(cache, "agents"));
  expect(entries).toEqual([
    { name: old, agent: "pi", version: "0.0.1", bytes: 1e6, use: "unused", running: false },
  ]);
});

test("without the registry an installed agent is installed, and a missing one names the registry", async () => {
  const cache = dirname(agentStoreDir);
  const env = { AGENTVM_CACHE_DIR: cache, ...OFFLINE, npm_config_cache: await newDirectory() };
  const done = await runProgram(["dist/cli.js", "install", "pi"], env);
  expect(done).toMatchObject({ code: 0, stderr: `pi is installed in ${agentStoreDir}\n` });

  const elsewhere = await newDirectory();
  const failed = await runProgram(["dist/cli.js", "install", "pi"], {
    ...env,
    AGENTVM_CACHE_DIR: elsewhere,
  });
  expect(failed.code).toBe(1);
  expect(failed.stderr).toContain("INSTALL_FAILED: can't install");
  expect(failed.stderr).toContain("the npm registry could not be reached (ECONNREFUSED)");
  const { entries } = await createClient({
    agentStoreDir: join(elsewhere, "agents"),
  }).agents.list();
  expect(entries).toEqual([]);
});

test("without the registry sessions are created with installed agents", async () => {
  const program = `
    import { createClient } from "agentvm";
    const client = createClient({ dataDir: process.argv[1] });
    const vm = client.vm.getOrCreate("vm");
    const { agentType } = await vm.createSession("pi", { env: { ANTHROPIC_API_KEY: "none" } });
    await client.close();
    console.log(agentType);
  `;
  const args = ["--input-type=module", "--eval", program, "--", await newDirectory()];
  const env = { AGENTVM_CACHE_DIR: dirname(agentStoreDir), ...OFFLINE };
  expect(await runProgram(args, env)).toMatchObject({ code: 0, stdout: "pi\n", stderr: "" });
});

test("a version of the client that is not installed is named with the command that installs it", async () => {
  const client = await newClient({
    autoInstall: false,
    agents: { pi: { version: "0.0.1-none" } },
  });
  const { agents } = await client.agents.list();
  expect(agents.find(({ name }) => name === "pi")).toMatchObject({
    version: "0.0.1-none",
    pinned: false,
    installed: false,
  });
  const missing = await failureOf(() => client.vm.getOrCreate("vm").createSession("pi"));
  expect(missing.code).toBe("AGENT_NOT_INSTALLED");
  expect(missing.message).toContain("npx agentvm install pi@0.0.1-none");
});

test.for(["pi@latest", "pi@^1.0.0", "pi@"])("%s is no exact version", async (agent) => {
  const client = await newClient();
  for (const call of [() => client.agents.install(agent), () => client.agents.remove(agent)]) {
    const error = await failureOf(call);
    expect(error.code).toBe("INVALID_ARGUMENT");
    expect(error.message).toContain("exact version");
  }
});

test("an installed agent starts with the compiled scripts of the store", async () => {
  const vm = (await newClient()).vm.getOrCreate("vm");
  const env = { ANTHROPIC_API_KEY: "none" };
  const { sessionId } = await vm.createSession("pi", { env });
  const environ = "grep -az '^NODE_COMPILE_CACHE=' /proc/[0-9]*/environ | tr '\\0' '\\n' | sort -u";
  const { stdout } = await vm.exec(environ);
  const cache = stdout.trim().split("=").at(-1);
  expect(cache).toMatch(/^\/opt\/agentvm\/agents\/pi-.*\/compile-cache-/);
  await vm.closeSession(sessionId);
  const list = async (directory: string) =>
    (await vm.exec(`find ${directory} -type f 2> /dev/null | wc -l`)).stdout.trim();
  expect(Number(await list(`${cache}`))).toBeGreaterThan(10);
  expect(await list("/var/cache/agentvm")).toBe("0");
});

test("no program of a VM can open the locks of the store, and so hold up an installation", async () => {
  const cache = await newCache();
  const client = await newClient({ agentStoreDir: join(cache, "agents") });
  const vm = client.vm.getOrCreate("vm");
  await vm.createSession("pi", { env: { ANTHROPIC_API_KEY: "none" } });
  const { stdout } = await vm.exec("cat /opt/agentvm/agents/.locks/* 2>&1");
  const lines = stdout.trim().split("\n");
  expect(lines.filter((line) => !line.endsWith("Permission denied"))).toEqual([]);
  expect(lines.length).toBeGreaterThan(0);
});
