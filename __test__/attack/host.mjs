// A host with a network of its own, that nobody else sees: run in new net and mount namespaces. It does
// what the lines of its stdin say, one after the other, and answers each with a line.

import { execFile, execFileSync, spawn } from "node:child_process";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { promisify } from "node:util";
import { createClient } from "agentvm";
import { listen } from "./listeners.mjs";

/** @typedef {import("agentvm").Agent} Agent */
/** @typedef {import("agentvm").AgentEvents["networkDenied"]} Denied */

const [directory = ""] = process.argv.slice(2);
const here = import.meta.dirname;

/** Public and not, beside its loopback. */
const OWN = ["5.6.7.8", "2600:5::8", "192.168.77.1"];

/** @param {string} command */
const ip = (command) => execFileSync("ip", command.split(" "), { stdio: "inherit" });

async function wire() {
  const internet = spawn("unshare", ["--net", process.execPath, join(here, "internet.mjs")], {
    stdio: ["pipe", "pipe", "inherit"],
  });
  const said = createInterface({ input: internet.stdout })[Symbol.asyncIterator]();
  await said.next();
  ip("link set lo up");
  ip(`link add name wan type veth peer name internet netns ${internet.pid}`);
  ip("link set wan up");
  ip("addr add 5.6.7.8/24 dev wan");
  ip("addr add 2600:5::8/64 dev wan nodad");
  ip("addr add 192.168.77.1/24 dev wan");
  internet.stdin.write("wired\n");
  if ((await said.next()).value !== "up") throw new Error("there is no internet: see above");
  ip("route add default via 5.6.7.1");
  ip("route add default via 2600:5::1");
  const resolver = join(directory, "resolv.conf");
  writeFileSync(resolver, "nameserver 1.2.3.53\n");
  execFileSync("mount", ["--bind", resolver, "/etc/resolv.conf"]);
  await listen(["127.0.0.1", "127.0.0.2", "::1", ...OWN]);
}

/** @type {Map<string, { agent: Agent, denied: Denied[] }>} */
const vms = new Map();

/** @param {string} key */
function vm(key) {
  const found = vms.get(key);
  if (found === undefined) throw new Error(`no VM ${key}`);
  return found;
}

/** @type {Record<string, (...args: any[]) => unknown>} */
const actions = {
  boot: async (key, network) => {
    const agent = client.vm.getOrCreate(key, { network });
    /** @type {Denied[]} */
    const denied = [];
    agent.on("networkDenied", (event) => void denied.push(event));
    vms.set(key, { agent, denied });
    await agent.wake();
  },
  exec: (key, command, options) => vm(key).agent.exec(command, options),
  write: (key, path, content) => vm(key).agent.writeFile(path, content),
  setNetwork: (key, network) => vm(key).agent.setNetwork(network),
  denied: (key) => vm(key).denied,
  run: async (program, args) => (await promisify(execFile)(program, args)).stdout,
};

await wire();
const client = createClient({ dataDir: join(directory, "data"), sleepAfterMs: false });
console.log("null");
for await (const line of createInterface({ input: process.stdin })) {
  const [action, ...args] = JSON.parse(line);
  console.log(JSON.stringify((await actions[action]?.(...args)) ?? null));
}
await client.close();
process.exit();
