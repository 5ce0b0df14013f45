import { readdir } from "node:fs/promises";
import { join } from "node:path";
import type { Agent } from "agentvm";
import { expect, test } from "vitest";
import { failureOf, isRoot, newClient, newDirectory, newPiVm, newVm } from "./fixtures.js";

/** No session is listed, no agent runs, and no file of it is kept. */
async function expectNothingLeft(agent: Agent, dataDir: string): Promise<void> {
  expect(await agent.listPersistedSessions()).toEqual([]);
  expect((await agent.exec("pgrep -x node")).stdout).toBe("");
  const [vm] = await readdir(join(dataDir, "vms"));
  const environments = await readdir(join(dataDir, "vms", String(vm), "env")).catch(() => []);
  expect(environments).toEqual([]);
}

test("without an API key nothing of the session is left, and the error names the variable", async () => {
  const dataDir = await newDirectory();
  const agent = await newVm({ dataDir });
  const error = await failureOf(() => agent.createSession("pi"));
  expect(error.code).toBe("AUTH_REQUIRED");
  expect(error.message).toContain("ANTHROPIC_API_KEY");
  expect(error.data).toMatchObject({ code: -32000, data: { type: "missing_api_key" } });
  await expectNothingLeft(agent, dataDir);
});

test("an API key of the host is not used", async () => {
  process.env["ANTHROPIC_API_KEY"] = "of the host";
  try {
    const agent = await newVm();
    expect((await failureOf(() => agent.createSession("pi"))).code).toBe("AUTH_REQUIRED");
  } finally {
    delete process.env["ANTHROPIC_API_KEY"];
  }
});

test("a name that no agent has is AGENT_UNKNOWN and boots nothing", async () => {
  const dataDir = await newDirectory();
  const agent = await newVm({ dataDir });
  const error = await failureOf(() => agent.createSession("pie"));
  expect(error.code).toBe("AGENT_UNKNOWN");
  expect(error.message).toContain("pie");
  expect(error.message).toMatch(/\bpi\b/);
  expect(await readdir(dataDir)).toEqual([]);
});

test("without autoInstall a missing agent is AGENT_NOT_INSTALLED, naming the command", async () => {
  const agentStoreDir = join(await newDirectory(), "agents");
  const agent = await newVm({ agentStoreDir, autoInstall: false });
  const error = await failureOf(() => agent.createSession("pi"));
  expect(error.code).toBe("AGENT_NOT_INSTALLED");
  expect(error.message).toContain("npx agentvm install pi");
});

test.for([
  ["below a file", "/home/user/file/project"],
  ["a file", "/home/user/file"],
  ["where only root may write", "/opt/project"],
  // Where the host process is not root, /root is not another user's.
  ...(isRoot ? [["that user can't enter", "/root"] as const] : []),
] as const)("a cwd %s is refused, and nothing of the session is left", async ([, cwd]) => {
  const { agent, session, dataDir } = await newPiVm([]);
  await agent.writeFile("file", "in the way");
  const error = await failureOf(() => session({ cwd }));
  expect(error.code).toBe("INVALID_ARGUMENT");
  expect(error.message).toMatch(/^cwd: /);
  expect(error.message).toContain(cwd);
  await expectNothingLeft(agent, dataDir);
});

test("aborting createSession leaves nothing of the session", async () => {
  const { agent, session, dataDir } = await newPiVm([]);
  const controller = new AbortController();
  const creating = failureOf(() => session({ signal: controller.signal }));
  // Until the agent's process is there.
  await agent.exec("until pgrep -x node; do sleep 0.02; done");
  controller.abort("changed my mind");

  expect(await creating).toMatchObject({
    name: "AbortError",
    code: "ABORTED",
    cause: "changed my mind",
  });
  await agent.exec("while pgrep -x node; do sleep 0.02; done");
  await expectNothingLeft(agent, dataDir);
});

test("a session that fails leaves no lock of Pi's, for which the next would wait", async () => {
  const { agent, session } = await newPiVm([]);
  for (let attempt = 0; attempt < 3; attempt++) {
    const mcpServers = [{ type: "local", command: "/no/such/server" }] as const;
    const error = await failureOf(() => session({ mcpServers }));
    expect(error.code).toBe("AGENT_ERROR");
    expect((await agent.exec("ls -d .pi/agent/*.lock")).stdout).toBe("");
  }
});

test("with a signal that is aborted already nothing boots", async () => {
  const dataDir = await newDirectory();
  const agent = await newVm({ dataDir });
  const error = await failureOf(() => agent.createSession("pi", { signal: AbortSignal.abort() }));
  expect(error).toMatchObject({ name: "AbortError", code: "ABORTED" });
  expect(await readdir(dataDir)).toEqual([]);
});

test.runIf(!isRoot)("a data directory that can't be made is an error that names it", async () => {
  const agent = (await newClient({ dataDir: "/agentvm-data" })).vm.getOrCreate("vm");
  const error = await failureOf(() => agent.exec("true"));
  expect(error.code).toBe("EACCES");
  expect(error.message).toContain("/agentvm-data");
});

test("a data directory that is a file is an error that names it", async () => {
  const agent = (await newClient({ dataDir: import.meta.filename })).vm.getOrCreate("vm");
  for (const call of [
    () => agent.exec("true"),
    () => agent.listPersistedSessions(),
    () => agent.createSession("pi"),
  ]) {
    const error = await failureOf(call);
    expect(error.code).toBe("ENOTDIR");
    expect(error.message).toContain(import.meta.filename);
  }
});
