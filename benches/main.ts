// npm run bench: what agentvm costs, beside what else does the job, in the same run.
//
//   npm run bench                          everything
//   npm run bench -- boot exec             these alone
//   npm run bench -- boot --turns 500      more of each
//   npm run bench -- --json                for programs

import { parseArgs } from "node:util";
import { agents } from "./agents";
import { boot } from "./boot";
import { crowd } from "./crowd";
import { events } from "./events";
import { exec } from "./exec";
import { files } from "./files";
import type { Comparison } from "./measure";
import { memory } from "./memory";
import { native } from "./native";
import { network } from "./network";
import { pty } from "./pty";
import { describe, machine, table } from "./report";
import { secrets } from "./secrets";
import { session } from "./session";
import { requireReleaseBuild } from "./setting";

interface Bench {
  run(turns: number): Promise<Comparison | Comparison[]>;
  turns: number;
}

const BENCHES: Record<string, Bench> = {
  boot: { run: boot, turns: 200 },
  exec: { run: exec, turns: 500 },
  files: { run: files, turns: 300 },
  pty: { run: pty, turns: 100 },
  crowd: { run: crowd, turns: 15 },
  memory: { run: memory, turns: 500 },
  session: { run: session, turns: 20 },
  agents: { run: agents, turns: 15 },
  native: { run: native, turns: 15 },
  network: { run: network, turns: 10 },
  secrets: { run: secrets, turns: 10 },
  events: { run: events, turns: 20 },
};

const { values, positionals } = parseArgs({
  options: { json: { type: "boolean", default: false }, turns: { type: "string" } },
  allowPositionals: true,
});
const names = positionals.length > 0 ? positionals : Object.keys(BENCHES);
const unknown = names.find((name) => !(name in BENCHES));
const turns = values.turns === undefined ? undefined : Number(values.turns);
if (unknown !== undefined || (turns !== undefined && !(Number.isInteger(turns) && turns > 0))) {
  console.error(
    `usage: npm run bench -- [${Object.keys(BENCHES).join("|")}]… [--turns <n>] [--json]`,
  );
  process.exit(2);
}
requireReleaseBuild();

const here = machine();
if (!values.json) console.log(`${describe(here)}\n`);
const comparisons: Comparison[] = [];
for (const name of names) {
  const bench = BENCHES[name];
  if (bench === undefined) continue;
  const results = [await bench.run(turns ?? bench.turns)].flat();
  comparisons.push(...results);
  if (!values.json) for (const result of results) console.log(table(result));
}
if (values.json) console.log(JSON.stringify({ machine: here, comparisons }, null, 2));
