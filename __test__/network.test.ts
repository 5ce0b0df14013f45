import { expect, test } from "vitest";
import type { AgentEvents } from "../index.js";
import { newClient, newDirectory, newOwnVm, newVm, told } from "./fixtures.js";

type Denied = AgentEvents["networkDenied"];

/** Tries to connect, and tells how that went. */
const connect = (host: string, port: number) =>
  `timeout 10 bash -c 'exec 3<>/dev/tcp/${host}/${port} && cat <&3' 2>&1; true`;

test("what the rules refuse is an event with the rule", async () => {
  const agent = await newVm({
    network: { default: "allowlist", allow: ["*.example.com"] },
  });
  const events: Denied[] = [];
  agent.on("networkDenied", (event) => events.push(event));
  const toldOf = async (command: string) => {
    const told = new Promise((resolve) => agent.once("networkDenied", resolve));
    await agent.exec(command);
    await told;
  };
  await toldOf(connect("10.0.0.1", 5432));
  await toldOf("getent hosts denied.test; true");
  expect(events).toEqual([
    { host: "10.0.0.1", port: 5432, protocol: "tcp", rule: "private", count: 1 },
    { host: "denied.test", port: 53, protocol: "dns", rule: "allowlist", count: 1 },
  ]);
});

test("setNetwork changes the rules of a VM that runs, and of its later boots", async () => {
  const agent = await newVm();
  await agent.exec("true");
  await agent.setNetwork({ default: "none" });
  const rules = async () => {
    const told = new Promise<Denied>((resolve) => agent.once("networkDenied", resolve));
    const output = await agent.exec(connect("1.1.1.1", 443));
    expect(output.stdout).toContain("refused");
    return (await told).rule;
  };
  expect(await rules()).toBe("none");
  await agent.sleep();
  expect(await rules()).toBe("none");
});

test("setNetwork holds for a boot that a call has asked for already", async () => {
  const client = await newClient();
  for (let round = 0; round < 10; round++) {
    const agent = client.vm.getOrCreate(`vm ${round}`);
    const told = new Promise<Denied>((resolve) => agent.once("networkDenied", resolve));
    await Promise.all([agent.exec("true"), agent.setNetwork({ default: "none" })]);
    await agent.exec(connect("1.1.1.1", 443));
    expect((await told).rule).toBe("none");
  }
});

test("a wrong rule is named, and what is wrong with it", async () => {
  const wrong = { network: { allow: ["192.0.2.0/24", "https://example.org"] } };
  await expect(newClient(wrong)).rejects.toMatchObject({
    code: "INVALID_ARGUMENT",
    message: expect.stringContaining('network.allow[1]: "https://example.org" is a URL'),
  });
  const client = await newClient();
  const agent = client.vm.getOrCreate("vm");
  await expect(agent.setNetwork({ default: "none", allow: ["example.com"] })).rejects.toMatchObject(
    { message: expect.stringContaining("allowlist") },
  );
  await expect(agent.setNetwork({ allow: ["example.com"] })).rejects.toMatchObject({
    code: "INVALID_ARGUMENT",
    message: expect.stringContaining('network.allow[0]: "example.com" is of no use'),
  });
  expect(() => client.vm.getOrCreate("vm", { network: { deny: ["127.0.0.1:80"] } })).toThrow(
    "loopbackExemptPorts",
  );
});

test("what setNetwork denies stays denied when other options are given", async () => {
  const client = await newClient();
  const agent = client.vm.getOrCreate("vm");
  await agent.setNetwork({ deny: ["one.one.one.one"] });
  client.vm.getOrCreate("vm", { sleepAfterMs: false });
  const denied = new Promise((resolve) => agent.once("networkDenied", resolve));
  await agent.exec("getent hosts one.one.one.one");
  expect(await denied).toMatchObject({ host: "one.one.one.one", rule: "one.one.one.one" });
});

test("rules that are given hold for a VM that runs, whoever has booted it", async () => {
  const dataDir = await newDirectory();
  const [open, closed] = [
    await newClient({ dataDir }),
    await newClient({ dataDir, network: { default: "none" } }),
  ];
  const resolve = "getent hosts denied.test; true";
  const rules: string[] = [];
  const agent = open.vm.getOrCreate("vm");
  agent.on("networkDenied", ({ rule }) => rules.push(rule));
  await agent.exec(resolve);
  expect(rules).toEqual([]);

  await closed.vm.getOrCreate("vm").exec(resolve);
  await expect.poll(() => rules).toContain("none");
  open.vm.getOrCreate("vm", { network: { deny: ["denied.test"] } });
  await agent.exec(resolve);
  await expect.poll(() => rules).toContain("denied.test");
});

test("rules that are given hold for the next turn of an agent that runs", async () => {
  const { agent, client, session } = await newOwnVm();
  const sessionId = await session();
  const denied = told(agent, "networkDenied");
  client.vm.getOrCreate("vm", { network: { default: "none" } });
  const { text } = await agent.sendPrompt(sessionId, "lookup denied.test");
  expect(text).toBe("EAI_AGAIN");
  expect(await denied).toMatchObject({ host: "denied.test", rule: "none" });
});

test("rules that were given last hold, though a call from before comes after them", async () => {
  const dataDir = await newDirectory();
  const network = { deny: ["denied.test"] } as const;
  const client = await newClient({ dataDir, network });
  const later = await newClient({ dataDir });
  const rules: string[] = [];
  const agent = client.vm.getOrCreate("vm");
  agent.on("networkDenied", ({ rule }) => rules.push(rule));
  // It boots the VM, by rules that are older when it does.
  const booting = agent.exec("true");
  client.vm.getOrCreate("vm", { network: { default: "none" } });
  await booting;
  await agent.exec("getent hosts any.test");
  await expect.poll(() => rules).toContain("none");

  await later.vm.getOrCreate("vm").setNetwork({ deny: ["other.test"] });
  await agent.exec("getent hosts other.test");
  await expect.poll(() => rules).toContain("other.test");
});
