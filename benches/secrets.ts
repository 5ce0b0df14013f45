// HTTPS from a VM to a server on the host's loopback that a secret is for, against the same untouched.

import { execFileSync, spawn } from "node:child_process";
import { once } from "node:events";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createInterface } from "node:readline";
import type { Agent } from "agentvm";
import { type Comparison, compare } from "./measure";
import { withClient } from "./setting";

const MEBIBYTES = 256;
const REQUESTS = 200;
const CONNECTIONS = 50;

/** In a process of its own. `/` is short, everything else is long. */
const SERVER = `
  const { createServer } = require("node:https");
  const { readFileSync } = require("node:fs");
  const { once } = require("node:events");
  const [directory] = process.argv.slice(1);
  const read = (name) => readFileSync(directory + "/" + name);
  const chunk = Buffer.alloc(1 << 20);
  const server = createServer({ key: read("key.pem"), cert: read("cert.pem") });
  server.on("request", async (request, response) => {
    if (request.url === "/") return response.end("!");
    for (let sent = 0; sent < ${MEBIBYTES}; sent += 1) {
      if (!response.write(chunk)) await once(response, "drain");
    }
    response.end();
  });
  server.listen(0, "127.0.0.1", () => console.log(server.address().port));
`;

/** `ask(path)` resolves when the answer has ended. All of them print milliseconds. */
const client = (port: number, keepAlive: boolean, body: string) => `
  const { Agent, get } = require("node:https");
  const agent = new Agent({ keepAlive: ${keepAlive}, maxSockets: 1, maxCachedSessions: 0 });
  const headers = { authorization: "Bearer " + process.env.KEY };
  const options = { agent, headers, rejectUnauthorized: false };
  const ask = (path) => new Promise((resolve, reject) =>
    get("https://localhost:${port}" + path, options, (answer) =>
      answer.on("data", () => {}).on("end", resolve)).on("error", reject));
  (async () => {
    await ask("/");
    const start = performance.now();
    ${body}
    process.exit();
  })();
`;

const repeat = (count: number) => `
  for (let i = 0; i < ${count}; i += 1) await ask("/");
  console.log((performance.now() - start) / ${count});
`;

export async function secrets(turns: number): Promise<Comparison[]> {
  const directory = mkdtempSync(join(tmpdir(), "agentvm-bench-"));
  certify(directory);
  const server = spawn(process.execPath, ["--eval", SERVER, directory], {
    stdio: ["ignore", "pipe", "inherit"],
  });
  try {
    const [line] = await once(createInterface(server.stdout), "line");
    const port = Number(line);
    return await withClient({ loopbackExemptPorts: [port] }, (client) => {
      const KEY = { value: "the-value", hosts: [`localhost:${port}`] };
      return measured(
        client.vm.getOrCreate("secret", { secrets: { KEY } }),
        client.vm.getOrCreate("none"),
        port,
        turns,
      );
    });
  } finally {
    server.kill();
    rmSync(directory, { recursive: true });
  }
}

/** A certificate of the server, whose authority this process trusts. */
function certify(directory: string): void {
  const openssl = (...args: string[]) =>
    execFileSync("openssl", args, { cwd: directory, stdio: "ignore" });
  const newKey = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"];
  const authority = ["-keyout", "authority.key", "-out", "authority.pem"];
  openssl("req", "-x509", ...newKey, "-subj", "/CN=bench", "-days", "2", ...authority);
  openssl("req", ...newKey, "-subj", "/CN=localhost", "-keyout", "key.pem", "-out", "request.pem");
  writeFileSync(join(directory, "names"), "subjectAltName=DNS:localhost");
  const by = ["-CA", "authority.pem", "-CAkey", "authority.key", "-CAcreateserial"];
  const of = ["-in", "request.pem", "-extfile", "names", "-days", "2", "-out", "cert.pem"];
  openssl("x509", "-req", ...by, ...of);
  process.env["SSL_CERT_FILE"] = join(directory, "authority.pem");
}

async function measured(
  secret: Agent,
  none: Agent,
  port: number,
  turns: number,
): Promise<Comparison[]> {
  const pair = (title: string, script: string) =>
    compare(
      { title, baseline: "without secrets" },
      [
        { name: "with a secret", run: () => inVm(secret, script) },
        { name: "without secrets", run: () => inVm(none, script) },
      ],
      turns,
    );
  const download = `await ask("/much"); console.log(performance.now() - start);`;
  return [
    await pair(
      `HTTPS: download of ${MEBIBYTES} MiB from a host of a secret`,
      client(port, true, download),
    ),
    await pair("HTTPS: a request over an open connection", client(port, true, repeat(REQUESTS))),
    await pair("HTTPS: a connection and a request", client(port, false, repeat(CONNECTIONS))),
  ];
}

async function inVm(agent: Agent, script: string): Promise<number> {
  const { stdout, stderr, exitCode } = await agent.exec("node", { stdin: script });
  if (exitCode !== 0) throw new Error(`node in the VM failed: ${stderr}`);
  return Number(stdout);
}
