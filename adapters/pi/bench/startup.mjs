/**
 * From spawn to a session, interleaved: the adapter (initialize and session/new answered) against a
 * bare script that imports Pi's SDK by its name and makes a session.
 *
 *     npm run build && node adapters/pi/bench/startup.mjs [runs] [compile cache folder]
 */

import { spawn } from "node:child_process";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { fileURLToPath } from "node:url";

const ROOT = fileURLToPath(new URL("..", import.meta.url));
const NODE = join(ROOT, `../node_modules/node-linux-${process.arch}/bin/node`);
const [runs = "20", cache] = process.argv.slice(2);
const WARM_UP = 2;

const BARE = `
  const { createAgentSession } = await import("@earendil-works/pi-coding-agent");
  const { session } = await createAgentSession({ cwd: process.cwd() });
  console.log(session.sessionId);
  process.exit(0);
`;

function request(id, method, params) {
  return `${JSON.stringify({ jsonrpc: "2.0", id, method, params })}\n`;
}

async function measure(args, input, answers) {
  const home = mkdtempSync(join(tmpdir(), "pi-startup-"));
  const env = {
    PATH: process.env.PATH,
    HOME: home,
    ANTHROPIC_API_KEY: "unused",
    PI_OFFLINE: "1",
    ...(cache ? { NODE_COMPILE_CACHE: cache } : {}),
  };
  const start = performance.now();
  const child = spawn(NODE, args, { cwd: ROOT, env, stdio: ["pipe", "pipe", "inherit"] });
  child.stdin.write(input(home));
  const lines = createInterface({ input: child.stdout })[Symbol.asyncIterator]();
  for (let line = 0; line < answers; line += 1) {
    const { value } = await lines.next();
    if (!value || value.includes('"error"')) throw new Error(`unexpected output: ${value}`);
  }
  const elapsed = performance.now() - start;
  child.stdin.end();
  await new Promise((resolve) => child.once("close", resolve));
  rmSync(home, { recursive: true });
  return elapsed;
}

const bare = [];
const adapter = [];
for (let run = -WARM_UP; run < Number(runs); run += 1) {
  const b = await measure(["--input-type=module", "--eval", BARE], () => "", 1);
  const a = await measure(
    ["dist/main.js"],
    (cwd) =>
      request(1, "initialize", { protocolVersion: 1 }) +
      request(2, "session/new", { cwd, mcpServers: [] }),
    2,
  );
  if (run < 0) continue;
  bare.push(b);
  adapter.push(a);
}

function at(times, quantile) {
  const sorted = times.toSorted((x, y) => x - y);
  return Math.round(sorted[Math.min(sorted.length - 1, Math.floor(sorted.length * quantile))]);
}
for (const [name, times] of Object.entries({ bare, adapter })) {
  console.log(
    `${name}: p50 ${at(times, 0.5)} ms, p95 ${at(times, 0.95)} ms, min ${at(times, 0)} ms`,
  );
}
console.log(`adapter / bare at p50: ${(at(adapter, 0.5) / at(bare, 0.5)).toFixed(2)}`);
