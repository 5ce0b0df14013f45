// TCP from a VM to a server on the host's loopback, against the same without a VM.

import { execFile, spawn } from "node:child_process";
import { once } from "node:events";
import { createInterface } from "node:readline";
import { promisify } from "node:util";
import type { Agent } from "agentvm";
import { type Comparison, compare } from "./measure";
import { withClient } from "./setting";

const MEBIBYTES = 512;
/** With all turns fewer than a VM may make at once: beyond those they come at a rate. */
const CONNECTIONS = 50;

/** In a process of its own, so that it takes nothing from the one that relays for the VM. */
const SERVER = `
  const { createServer } = require("node:net");
  const { once } = require("node:events");
  const chunk = Buffer.alloc(1 << 20);
  const ports = [];
  for (const chunks of [${MEBIBYTES}, 0, -1]) {
    const server = createServer(async (socket) => {
      socket.on("error", () => {});
      if (chunks < 0) return socket.on("data", () => {}).on("end", () => socket.end("!"));
      socket.write("!");
      for (let sent = 0; sent < chunks; sent += 1) {
        if (!socket.write(chunk)) await once(socket, "drain");
      }
      if (chunks > 0) socket.end();
    });
    server.listen(0, "127.0.0.1", () => {
      ports.push(server.address().port);
      if (ports.length === 3) console.log(JSON.stringify(ports));
    });
  }
`;

/** All print milliseconds. */
const download = (port: number) => `
  const start = performance.now();
  require("node:net").connect(${port}, "127.0.0.1").on("data", () => {}).on("close", () => {
    console.log(performance.now() - start);
  });
`;

/** Until the server says that it has all of it. */
const upload = (port: number) => `
  const { once } = require("node:events");
  const chunk = Buffer.alloc(1 << 20);
  (async () => {
    const start = performance.now();
    const socket = require("node:net").connect(${port}, "127.0.0.1");
    for (let sent = 0; sent < ${MEBIBYTES}; sent += 1) {
      if (!socket.write(chunk)) await once(socket, "drain");
    }
    socket.end();
    await once(socket, "data");
    console.log(performance.now() - start);
    process.exit();
  })();
`;

/** Waits for a byte: a VM's connection is established before the host has dialled. */
const connect = (port: number) => `
  const { connect } = require("node:net");
  const { once } = require("node:events");
  (async () => {
    const start = performance.now();
    for (let i = 0; i < ${CONNECTIONS}; i += 1) {
      const socket = connect(${port}, "127.0.0.1");
      await once(socket, "data");
      socket.destroy();
    }
    console.log((performance.now() - start) / ${CONNECTIONS});
    process.exit();
  })();
`;

export async function network(turns: number): Promise<Comparison[]> {
  const server = spawn(process.execPath, ["--eval", SERVER], {
    stdio: ["ignore", "pipe", "inherit"],
  });
  try {
    const [line] = await once(createInterface(server.stdout), "line");
    const ports: number[] = JSON.parse(line);
    return await withClient({ loopbackExemptPorts: ports }, (client) =>
      throughProxy(client.vm.getOrCreate("network"), ports, turns),
    );
  } finally {
    server.kill();
  }
}

async function throughProxy(agent: Agent, ports: number[], turns: number): Promise<Comparison[]> {
  const [bulk = 0, greeting = 0, sink = 0] = ports;
  const pair = (title: string, script: string) =>
    compare(
      { title, baseline: "plain loopback" },
      [
        { name: "VM", run: () => inVm(agent, script) },
        { name: "plain loopback", run: () => onHost(script) },
      ],
      turns,
    );
  return [
    await pair(`TCP: download of ${MEBIBYTES} MiB from a loopback server`, download(bulk)),
    await pair(`TCP: upload of ${MEBIBYTES} MiB to one`, upload(sink)),
    await pair("TCP: connect and one byte", connect(greeting)),
  ];
}

/** The host's Node is part of the VM's base: both sides run the same client. */
async function inVm(agent: Agent, script: string): Promise<number> {
  const { stdout, stderr, exitCode } = await agent.exec("node", { stdin: script });
  if (exitCode !== 0) throw new Error(`node in the VM failed: ${stderr}`);
  return Number(stdout);
}

async function onHost(script: string): Promise<number> {
  const { stdout } = await promisify(execFile)("node", ["--eval", script]);
  return Number(stdout);
}
