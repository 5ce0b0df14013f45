import { once } from "node:events";
import { createServer } from "node:http";
import { createServer as createTlsServer } from "node:https";
import type { AddressInfo } from "node:net";
import { expect, onTestFinished, test } from "vitest";
import { failureOf, newClient, newVm, told } from "./fixtures.js";
import { newCertificate } from "./tls.js";

/** Says which key it was sent. */
async function newServer(tls?: { key: string; cert: string }): Promise<number> {
  const server = tls ? createTlsServer(tls) : createServer();
  server.on("request", (request, response) => response.end(request.headers["x-api-key"]));
  server.listen(0, "127.0.0.1");
  await once(server, "listening");
  onTestFinished(() => {
    server.close();
    server.closeAllConnections();
  });
  return (server.address() as AddressInfo).port;
}

test("a key is exchanged while the VM runs, and holds at its next boot", async () => {
  const port = await newServer(await newCertificate());
  const hosts = [`localhost:${port}`];
  const secrets = (value: string) => ({ KEY: { value, hosts } });
  const agent = await newVm({ loopbackExemptPorts: [port], secrets: secrets("first") });
  const sent = async () =>
    (await agent.exec(`curl -sS -H "x-api-key: $KEY" https://localhost:${port}`)).stdout;
  expect(await sent()).toBe("first");
  await agent.setSecrets(secrets("second"));
  expect(await sent()).toBe("second");
  await agent.sleep();
  expect(await sent()).toBe("second");
});

test("Node in the VM trusts who stands in for the host of a secret", async () => {
  const port = await newServer(await newCertificate());
  const secrets = { KEY: { value: "the-key", hosts: [`localhost:${port}`] } };
  const agent = await newVm({ loopbackExemptPorts: [port], secrets });
  const script = `
    const headers = { "x-api-key": process.env.KEY };
    fetch("https://localhost:${port}", { headers }).then(async (answer) =>
      console.log(await answer.text()));`;
  const { stdout, stderr } = await agent.exec("node", { stdin: script });
  expect(stderr).toBe("");
  expect(stdout).toBe("the-key\n");
});

test("a placeholder in plain text is told, and is of no use", async () => {
  const port = await newServer();
  const secrets = { KEY: { value: "the-key", hosts: ["api.example.com"] } };
  const agent = await newVm({ loopbackExemptPorts: [port], secrets });
  const misdirected = told(agent, "secretMisdirected");
  const { stdout } = await agent.exec(
    `curl -sS -H "x-api-key: $KEY" http://localhost:${port}; echo; echo $KEY`,
  );
  const [sent, placeholder] = stdout.split("\n");
  expect(sent).toMatch(/^agentvm-secret-[0-9a-f]{32}$/);
  expect(sent).toBe(placeholder);
  expect(await misdirected).toEqual({
    secret: "KEY",
    host: "localhost",
    port,
    place: "plaintext",
    count: 1,
  });
});

test("a VM of one client has its own secrets", async () => {
  const secret = (value: string) => ({ value, hosts: ["api.example.com"] });
  const client = await newClient({ secrets: { OF_CLIENT: secret("a") } });
  const names = async (key: string, own?: object) => {
    const agent = client.vm.getOrCreate(key, own);
    const { stdout } = await agent.exec("env | grep =agentvm-secret- | cut -d= -f1");
    return stdout;
  };
  expect(await names("as the client")).toBe("OF_CLIENT\n");
  expect(await names("own", { secrets: { OF_VM: secret("b") } })).toBe("OF_VM\n");
  expect(await names("none", { secrets: {} })).toBe("");
});

test("a wrong secret is named, and shown in no error", async () => {
  const hosts = ["api.example.com"];
  for (const [secrets, problem] of [
    ["hush", "secrets: must be an object"],
    [{ KEY: "hush" }, "secrets.KEY: must be an object"],
    [{ KEY: { value: "hush" } }, 'secrets.KEY: "hosts" is missing'],
    [{ KEY: { value: "hush\n", hosts } }, "secrets.KEY.value: "],
    [{ KEY: { value: ["hush"], hosts } }, "secrets.KEY.value: "],
    [{ KEY: { value: "hush", hosts: ["1.2.3.4"] } }, "secrets.KEY.hosts[0]: must be a name"],
    [{ KEY: { value: "hush", hosts, headers: ["host"] } }, "secrets.KEY.headers[0]: "],
  ] as const) {
    const error = await failureOf(() => newClient({ secrets: secrets as never }));
    expect(error.code).toBe("INVALID_ARGUMENT");
    expect(error.message).toMatch(problem);
    expect(error.message).not.toContain("hush");
  }
  const agent = await newVm();
  await agent.wake();
  const error = await failureOf(() => agent.setSecrets({ KEY: { value: "hush", hosts } }));
  expect(error.code).toBe("INVALID_ARGUMENT");
  expect(error.message).toContain("sleep()");
});
