import { spawnSync } from "node:child_process";
import { once } from "node:events";
import { existsSync } from "node:fs";
import { createServer } from "node:http";
import { createSecureServer, type IncomingHttpHeaders } from "node:http2";
import { createServer as createTlsServer } from "node:https";
import { createRequire } from "node:module";
import type { AddressInfo } from "node:net";
import { dirname } from "node:path";
import { expect, onTestFinished, test } from "vitest";
import { failureOf, newClient, newVm, told } from "./fixtures.js";
import { newCertificate } from "./tls.js";

const require = createRequire(import.meta.url);

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

test("HTTP/2 may name its host in a header only", async () => {
  const seen: IncomingHttpHeaders[] = [];
  const server = createSecureServer(await newCertificate());
  server.on("stream", (stream, headers) => {
    seen.push(headers);
    stream.respond({ ":status": 200 });
    stream.end();
  });
  server.listen(0, "127.0.0.1");
  await once(server, "listening");
  onTestFinished(() => void server.close());
  const { port } = server.address() as AddressInfo;
  const host = `localhost:${port}`;
  const secrets = { KEY: { value: "the-key", hosts: [host] } };
  const agent = await newVm({ loopbackExemptPorts: [port], secrets });
  const ask = (name: string) => {
    const script = `
      const session = require("node:http2").connect("https://${host}");
      const stream = session.request({ host: "${name}", "x-api-key": process.env.KEY });
      stream.on("response", (headers) => console.log(headers[":status"]));
      stream.on("close", () => session.close());
      stream.resume();`;
    return agent.exec("node", { stdin: script });
  };
  expect(await ask(host)).toMatchObject({ stdout: "200\n", stderr: "" });
  expect(seen).toMatchObject([{ "x-api-key": "the-key" }]);
  expect(await ask("other.example")).toMatchObject({ stdout: "421\n", stderr: "" });
  expect(seen).toHaveLength(1);
});

/** What is needed in a VM, and a command that sends $KEY to $URL in a header. */
const TOOLS = {
  git: {
    needs: "git --version",
    sends: 'git -c http.extraHeader="x-api-key: $KEY" ls-remote $URL',
  },
  "Python's requests": {
    needs: "/usr/bin/python3 -c 'import requests'",
    sends: `/usr/bin/python3 -c 'if True:
      import os, requests
      requests.get(os.environ["URL"], headers={"x-api-key": os.environ["KEY"]})'`,
  },
  Deno: {
    needs: "/tools/deno/deno --version",
    sends: `/tools/deno/deno eval --no-lock '
      await fetch(Deno.env.get("URL"), { headers: { "x-api-key": Deno.env.get("KEY") } })'`,
  },
  cargo: {
    needs: "/tools/rust/bin/cargo --version",
    // Its registry wants to know who asks.
    sends:
      "CARGO_REGISTRIES_OWN_INDEX=sparse+$URL/ CARGO_REGISTRIES_OWN_TOKEN=$KEY \\\n" +
      "  /tools/rust/bin/cargo search --registry own it",
  },
};

const deno = `@deno/linux-${process.arch}-glibc/package.json`;
const rust = spawnSync("rustc", ["--print", "sysroot"], { encoding: "utf8" }).stdout?.trim();

test.for(Object.keys(TOOLS) as (keyof typeof TOOLS)[])(
  "%s trusts who stands in for the host of a secret",
  async (tool, { skip }) => {
    const sent: unknown[] = [];
    const server = createTlsServer(await newCertificate());
    server.on("request", ({ url, headers }, response) => {
      sent.push(headers["x-api-key"] ?? headers.authorization);
      const api = `https://${headers.host}`;
      if (url === "/config.json") {
        response.end(JSON.stringify({ dl: api, api, "auth-required": true }));
      } else {
        response.end(JSON.stringify({ crates: [], meta: { total: 0 } }));
      }
    });
    server.listen(0, "127.0.0.1");
    await once(server, "listening");
    onTestFinished(() => void server.close());
    const { port } = server.address() as AddressInfo;
    const mounts = [{ path: "/tools/deno", hostPath: dirname(require.resolve(deno)) }];
    if (rust && existsSync(rust)) mounts.push({ path: "/tools/rust", hostPath: rust });
    const agent = await newVm({
      loopbackExemptPorts: [port],
      mounts: mounts.map((mount) => ({ ...mount, readOnly: true })),
      secrets: { KEY: { value: "the-key", hosts: [`localhost:${port}`] } },
    });
    const { needs, sends } = TOOLS[tool];
    const { exitCode, stderr: lacks } = await agent.exec(needs);
    if (exitCode !== 0) {
      console.warn(`NOT RUN: ${tool} and the authority of a VM. ${lacks}`);
      skip();
    }
    const { stderr } = await agent.exec(sends, { env: { URL: `https://localhost:${port}` } });
    expect(sent, stderr).toContain("the-key");
  },
);

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
