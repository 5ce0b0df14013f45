import { once } from "node:events";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import type { Agent, VmOptions } from "agentvm";
import { expect, onTestFinished, test } from "vitest";
import {
  agentStoreDir,
  envOf,
  failureOf,
  newClient,
  newDirectory,
  newModel,
  newPiSession,
  newVm,
  runNode,
} from "./fixtures.js";

test("after close every call of a client is CLIENT_CLOSED", async () => {
  const client = await newClient();
  const agent = client.vm.getOrCreate("vm");
  await agent.exec("true");
  await client.close();
  await client.close();

  const id = "01a20f17-a84e-70d6-a176-692da91130ed";
  for (const call of [
    () => client.vm.getOrCreate("vm"),
    () => agent.exec("true"),
    () => agent.readFile("x"),
    () => agent.writeFile("x", ""),
    () => agent.createSession("pi"),
    () => agent.sendPrompt(id, "Hello"),
    () => agent.cancelPrompt(id),
    () => agent.resumeSession(id),
    () => agent.closeSession(id),
    () => agent.listPersistedSessions(),
    () => agent.getSessionEvents(id),
    () => agent.sleep(),
    () => agent.wake(),
    () => agent.destroy(),
    () => agent.on("vmBooted", () => {}),
  ]) {
    expect((await failureOf(call)).code).toBe("CLIENT_CLOSED");
  }
});

test("closing a client cancels its turns and ends its VM, and says so", async () => {
  const { client, agent, sessionId, model } = await newPiSession([
    { text: "…", hold: { afterChunks: 0, until: new Promise(() => {}) } },
  ]);
  const reasons: string[] = [];
  agent.on("vmShutdown", ({ reason }) => reasons.push(reason));
  const turn = agent.sendPrompt(sessionId, "Talk");
  await model.request(0);

  await client.close();

  expect((await turn).stopReason).toBe("cancelled");
  expect(reasons).toEqual(["close"]);
});

test("clients of one process on the same data directory share a VM until the last one closes", async () => {
  const dataDir = await newDirectory();
  const [one, other] = [await newClient({ dataDir }), await newClient({ dataDir })];
  const [ofOne, ofOther] = [one.vm.getOrCreate("vm"), other.vm.getOrCreate("vm")];
  await ofOne.exec("sleep 600 >/dev/null 2>&1 & until pgrep -x sleep; do :; done");
  await one.close();
  expect((await ofOther.exec("pgrep -x sleep")).exitCode).toBe(0);
});

test("a VM is open in one process at a time", async () => {
  const dataDir = await newDirectory();
  const agent = await newVm({ dataDir });
  await agent.wake();
  const program = `
    import { createClient } from "agentvm";
    const client = createClient({ dataDir: process.argv[1] });
    const vm = client.vm.getOrCreate("vm");
    console.log(await vm.stats().then(({ running }) => running, ({ message }) => message));
    for (const call of [
      () => vm.setNetwork({ default: "none" }),
      () => vm.setSecrets({ KEY: { value: "x", hosts: ["api.example.com"] } }),
      () => vm.wake(),
    ]) {
      console.log(await call().then(() => "done", ({ code }) => code));
    }
  `;
  const busy = await runNode(program, dataDir);
  expect(busy.stdout).toMatch(
    /VM \["vm"\] is open in another process \(pid \d+\).*\n(VM_BUSY\n){3}$/,
  );
  expect(busy.stdout).toContain(`(pid ${process.pid})`);
  await agent.sleep();
  expect((await runNode(program, dataDir)).stdout).toBe("false\ndone\ndone\ndone\n");
});

test("destroy deletes files and sessions; the key then names an empty VM", async () => {
  const { agent, sessionId } = await newPiSession([]);
  await agent.writeFile("file", "content");
  await agent.destroy();

  expect(await agent.listPersistedSessions()).toEqual([]);
  expect((await failureOf(() => agent.getSessionEvents(sessionId))).code).toBe("SESSION_NOT_FOUND");
  expect((await failureOf(() => agent.readFile("file"))).code).toBe("ENOENT");
});

test("sleep ends what runs in a VM, and the next call wakes it", async () => {
  const agent = await newVm();
  await agent.exec("sleep 600 >/dev/null 2>&1 & until pgrep -x sleep; do :; done");
  await agent.sleep();
  await agent.sleep();
  expect((await agent.exec("pgrep -x sleep")).stdout).toBe("");
});

const OPEN = `
  import { createClient } from "agentvm";
  const [dataDir, agentStoreDir, env, port] = process.argv.slice(1);
  const client = createClient({ dataDir, agentStoreDir, loopbackExemptPorts: [Number(port)] });
  const agent = client.vm.getOrCreate("vm");
  agent.on("sessionEvent", ({ event }) => console.log(event.method));
  const { sessionId } = await agent.createSession("pi", { env: JSON.parse(env) });
`;

test("Node exits by itself with a VM, an idle session and a listener, when nothing is in flight", async () => {
  const model = await newModel([]);
  const args = [await newDirectory(), agentStoreDir, JSON.stringify(envOf(model)), `${model.port}`];
  expect(await runNode(OPEN, ...args)).toEqual({ code: 0, signal: null, stdout: "", stderr: "" });
});

test("a turn that nobody awaits keeps Node alive to its end", async () => {
  const model = await newModel([{ text: "Done.", delayMs: 300 }]);
  const args = [await newDirectory(), agentStoreDir, JSON.stringify(envOf(model)), `${model.port}`];
  const program = `${OPEN}
    agent.sendPrompt(sessionId, "Hello").then(({ text }) => console.log(text));
  `;
  const { code, stdout, stderr } = await runNode(program, ...args);
  expect({ code, stderr }).toEqual({ code: 0, stderr: "" });
  expect(stdout).toMatch(/_agentvm\/turn_end\nDone\.\n$/);
});

test("a VM has the options that it was asked for with, from its next boot on", async () => {
  const server = createServer((_, response) => response.end("of the host")).listen(0, "127.0.0.1");
  onTestFinished(() => void server.close());
  await once(server, "listening");
  const { port } = server.address() as AddressInfo;
  const client = await newClient({ sleepAfterMs: false });
  const fetched = async (agent: Agent) =>
    (await agent.exec(`curl -s http://127.0.0.1:${port}`)).stdout;

  const agent = client.vm.getOrCreate("open", { loopbackExemptPorts: [port] });
  expect(await fetched(agent)).toBe("of the host");
  expect(await fetched(client.vm.getOrCreate("open"))).toBe("of the host");
  expect(await fetched(client.vm.getOrCreate("other"))).toBe("");
  expect(client.vm.getOrCreate("open", {})).toBe(agent);
  await agent.sleep();
  expect(await fetched(agent)).toBe("");
});

test("an option of the client is none of a VM", async () => {
  const client = await newClient();
  const options = { durability: "full" } as VmOptions;
  const error = await failureOf(() => client.vm.getOrCreate("vm", options));
  expect(error.code).toBe("INVALID_ARGUMENT");
  expect(error.message).toContain("durability");
});
