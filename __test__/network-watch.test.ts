import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { expect, onTestFinished, test } from "vitest";
import { newVm } from "./fixtures.js";
import { watchNetwork } from "./network-watch.js";

/** Asks for each, and says what came of it. */
const program = (addresses: [string, number][]) => `node -e '
  const { connect } = require("node:net");
  for (const [host, port] of ${JSON.stringify(addresses)}) {
    connect(port, host)
      .on("connect", function () { console.log(host, "connected"); this.end(); })
      .on("error", ({ code }) => console.log(host, code));
  }
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
    program([
      ["telemetry.invalid", 443],
      ["127.0.0.1", port],
      ["192.0.2.1", 443],
      ["169.254.169.254", 80],
      ["2001:db8::1", 443],
    ]),
  );

  expect(stdout.split("\n").sort()).toEqual([
    "",
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
