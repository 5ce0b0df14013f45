import { spawn } from "node:child_process";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { createInterface } from "node:readline";
import type { Agent } from "agentvm";
import { expect, onTestFinished, test } from "vitest";
import { isRoot, newDirectory, newVm, ROOT } from "./fixtures.js";
import { watchNetwork } from "./network-watch.js";

/** Asks to be connected to each, and says what came of it, sorted. */
const connect = (...addresses: [host: string, port: number][]) => `node -e '
  const { connect } = require("node:net");
  const outcomes = ${JSON.stringify(addresses)}.map(([host, port]) => new Promise((resolve) => {
    connect(port, host)
      .on("connect", function () { this.end().resume(); })
      .on("error", ({ code }) => resolve(host + " " + code))
      .on("end", () => resolve(host + " connected"));
  }));
  Promise.all(outcomes).then((outcomes) => console.log(outcomes.sort().join("\\n")));
'`;

test("whatever a VM asks for is seen: names, and addresses that are let through or refused", async () => {
  const server = createServer().listen(0, "127.0.0.1");
  await new Promise((resolve) => server.once("listening", resolve));
  onTestFinished(() => void server.close().closeAllConnections());
  const { port } = server.address() as AddressInfo;
  const vm = await newVm({ loopbackExemptPorts: [port] });
  await vm.wake();
  const watch = await watchNetwork(vm);

  const { stdout } = await vm.exec(
    connect(
      ["telemetry.invalid", 443],
      ["127.0.0.1", port],
      ["192.0.2.1", 443],
      ["169.254.169.254", 80],
      ["2001:db8::1", 443],
    ),
  );

  expect(stdout.trim().split("\n")).toEqual([
    "127.0.0.1 connected",
    "169.254.169.254 ECONNREFUSED",
    "192.0.2.1 ECONNREFUSED",
    "2001:db8::1 ECONNREFUSED",
    "telemetry.invalid ENOTFOUND",
  ]);
  expect(await watch.attempts()).toEqual([
    "dns telemetry.invalid",
    `tcp 127.0.0.1:${port}`,
    "tcp 169.254.169.254:80",
    "tcp 192.0.2.1:443",
    "tcp [2001:db8::1]:443",
  ]);
});

/** Runs the commands that it reads, one after the other. */
const OFFLINE = `
  import { createInterface } from "node:readline";
  import { createClient } from "agentvm";
  const vm = createClient({ dataDir: process.argv[1] }).vm.getOrCreate("vm");
  for await (const line of createInterface({ input: process.stdin })) {
    console.log(JSON.stringify(await vm.exec(JSON.parse(line))));
  }
  process.exit();
`;

/** A VM of a process that has a network of its own, from which nothing can be reached. */
async function newOfflineVm(): Promise<Pick<Agent, "exec">> {
  const namespaces = isRoot ? ["--net"] : ["--net", "--user", "--map-current-user", "--keep-caps"];
  const node = [process.execPath, "--input-type=module", "--eval", OFFLINE, await newDirectory()];
  const host = spawn("unshare", [...namespaces, ...node], {
    cwd: ROOT,
    stdio: ["pipe", "pipe", "inherit"],
  });
  const ended = new Promise((resolve) => host.once("close", resolve));
  onTestFinished(async () => {
    host.stdin.end();
    await ended;
  });
  const answers = createInterface({ input: host.stdout })[Symbol.asyncIterator]();
  return {
    async exec(command) {
      host.stdin.write(`${JSON.stringify(command)}\n`);
      return JSON.parse((await answers.next()).value);
    },
  };
}

test("public addresses, to which the VM's rules open the way, are seen as well", async () => {
  const vm = await newOfflineVm();
  const watch = await watchNetwork(vm);
  const { stdout } = await vm.exec(connect(["1.2.3.4", 443], ["2606:4700::1", 80]));
  expect(stdout).toMatch(/1\.2\.3\.4 E\w+\n2606:4700::1 E\w+\n/);
  expect(await watch.attempts()).toEqual(["tcp 1.2.3.4:443", "tcp [2606:4700::1]:80"]);
});
