// Files of a running VM, against Node's own fs on the file system that the VM lies on.

import { execFile, execFileSync } from "node:child_process";
import { mkdtempSync, rmSync } from "node:fs";
import { copyFile, readdir, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { promisify } from "node:util";
import type { Agent } from "agentvm";
import { type Comparison, compare, timed, timedInARow } from "./measure";
import { withClient } from "./setting";

const MB = 1_000_000;
const run = promisify(execFile);

const BASELINE = "fs.promises";

/** Turns of what takes seconds. */
const FEW = 15;

export function files(turns: number): Promise<Comparison[]> {
  return withClient({}, async (client) => {
    const agent = client.vm.getOrCreate("files");
    const host = mkdtempSync(join(tmpdir(), "agentvm-bench-"));
    try {
      return [
        await read(agent, host, 1000, undefined, turns),
        await readInARow(agent, host, Math.ceil(turns / 10)),
        await read(agent, host, 100 * MB, "at most 100 ms (1 GB/s)", FEW),
        await write(agent, host, 1000, turns),
        await write(agent, host, 100 * MB, FEW),
        await list(agent, host, turns),
        await upload(agent, host),
        await remove(agent, host),
      ];
    } finally {
      rmSync(host, { recursive: true, force: true });
    }
  });
}

async function read(
  agent: Agent,
  host: string,
  size: number,
  goal: string | undefined,
  turns: number,
) {
  const { inVm, onHost } = await reading(agent, host, size);
  return compare(
    { title: `readFile, ${bytes(size)}`, ...(goal && { goal }), baseline: BASELINE },
    [
      { name: "agent.readFile", run: () => timed(inVm) },
      { name: BASELINE, run: () => timed(onHost) },
    ],
    turns,
  );
}

async function readInARow(agent: Agent, host: string, turns: number) {
  const { inVm, onHost } = await reading(agent, host, 1000);
  return compare(
    {
      title: `readFile, ${bytes(1000)}, one after the other`,
      goal: "p50 at most 0.1 ms",
      baseline: BASELINE,
    },
    [
      { name: "agent.readFile", run: () => timedInARow(inVm) },
      { name: BASELINE, run: () => timedInARow(onHost) },
    ],
    turns,
  );
}

async function reading(agent: Agent, host: string, size: number) {
  const content = Buffer.alloc(size, 7);
  const path = join(host, "read");
  await writeFile(path, content);
  await agent.writeFile("read", content);
  const whole = async (reading: Promise<Uint8Array>) => {
    if ((await reading).length !== size) throw new Error("not the whole file");
  };
  return {
    inVm: () => whole(agent.readFile("read")),
    onHost: () => whole(readFile(path)),
  };
}

function write(agent: Agent, host: string, size: number, turns: number) {
  const content = Buffer.alloc(size, 7);
  const path = join(host, "write");
  return compare(
    { title: `writeFile, ${bytes(size)}`, baseline: BASELINE },
    [
      { name: "agent.writeFile", run: () => timed(() => agent.writeFile("write", content)) },
      { name: BASELINE, run: () => timed(() => writeFile(path, content)) },
    ],
    turns,
  );
}

async function list(agent: Agent, host: string, turns: number) {
  const COUNT = 5000;
  const path = join(host, "list");
  const make = `mkdir list && cd list && seq ${COUNT} | xargs touch`;
  await agent.exec(make);
  execFileSync("sh", ["-c", make], { cwd: host });
  const all = async (listing: Promise<unknown[]>) => {
    if ((await listing).length !== COUNT) throw new Error("not every entry");
  };
  const goal = "a few milliseconds";
  return compare(
    { title: "readdir with types, 5,000 files", goal, baseline: BASELINE },
    [
      { name: "agent.readdir", run: () => timed(() => all(agent.readdir("list"))) },
      { name: BASELINE, run: () => timed(() => all(readdir(path, { withFileTypes: true }))) },
    ],
    turns,
  );
}

async function upload(agent: Agent, host: string) {
  const from = join(host, "upload");
  await writeFile(from, Buffer.alloc(100 * MB, 7));
  return compare(
    { title: "uploadFile and downloadFile, 100 MB", baseline: "fs.copyFile" },
    [
      { name: "agent.uploadFile", run: () => timed(() => agent.uploadFile(from, "upload")) },
      {
        name: "agent.downloadFile",
        run: async () => {
          await agent.uploadFile(from, "upload");
          return timed(() => agent.downloadFile("upload", join(host, "download")));
        },
      },
      { name: "fs.copyFile", run: () => timed(() => copyFile(from, join(host, "copy"))) },
    ],
    FEW,
  );
}

function remove(agent: Agent, host: string) {
  const make =
    "mkdir many && cd many && for d in $(seq 10); do mkdir $d; done && " +
    "seq 10 | while read d; do (cd $d && seq 1000 | xargs touch); done";
  const path = join(host, "many");
  const onHost = () => execFileSync("sh", ["-c", make], { cwd: host });
  return compare(
    { title: "delete, 10,000 files", goal: "near rm -rf", baseline: "rm -rf" },
    [
      {
        name: "agent.delete",
        run: async () => {
          await agent.exec(make);
          return timed(() => agent.delete("many", { recursive: true }));
        },
      },
      {
        name: "rm -rf",
        run: () => {
          onHost();
          return timed(() => run("rm", ["-rf", path]));
        },
      },
      {
        name: "fs.promises.rm",
        run: () => {
          onHost();
          return timed(() => rm(path, { recursive: true }));
        },
      },
    ],
    FEW,
  );
}

function bytes(size: number): string {
  return size < MB ? `${size / 1000} KB` : `${size / MB} MB`;
}
