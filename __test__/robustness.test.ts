/**
 * Node processes that die, VMs that come and go by the hundred, and data directories that can't be
 * used: over the built package, in child processes.
 */

import { type ChildProcess, spawn, spawnSync } from "node:child_process";
import { randomUUID } from "node:crypto";
import { chmodSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { createClient } from "agentvm";
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import { agentStoreDir, envOf, newModel } from "./fixtures.js";

const PACKAGE = new URL("../dist/index.js", import.meta.url).pathname;
const IS_ROOT = process.getuid?.() === 0;

/** Generous: it takes milliseconds. */
const SOON_MS = 20_000;

let dataDir: string;
beforeEach(() => {
  dataDir = mkdtempSync(join(tmpdir(), "agentvm-robust-"));
});
afterEach(() => {
  rmSync(dataDir, { recursive: true, force: true });
});

interface Ended {
  code: number | null;
  signal: NodeJS.Signals | null;
  stderr: string;
}

interface Host {
  process: ChildProcess;
  /** Resolves with the rest of the line that begins with the word. */
  said(word: string): Promise<string>;
  ended: Promise<Ended>;
}

/**
 * Runs a script in a Node process of its own, with `client`, `agent` and `say` in scope. `wrapper` is
 * the start of its command line.
 */
function host(script: string, wrapper: string[] = []): Host {
  const program = `
    const { createClient } = require(${JSON.stringify(PACKAGE)});
    const dataDir = ${JSON.stringify(dataDir)};
    const client = createClient({ dataDir });
    const agent = client.vm.getOrCreate("robust");
    const say = (word, value = "") => console.log(word + " " + value);
    (async () => { ${script} })().catch((error) => { console.error(error); process.exit(70); });
  `;
  const [command = "", ...args] = [...wrapper, process.execPath, "-e", program];
  const child = spawn(command, args, { stdio: ["ignore", "pipe", "pipe"] });
  let stderr = "";
  child.stderr.setEncoding("utf8").on("data", (text) => {
    stderr += text;
  });
  const lines: string[] = [];
  const waiting = new Set<() => void>();
  createInterface(child.stdout).on("line", (line) => {
    lines.push(line);
    for (const look of waiting) look();
  });
  const ended = new Promise<Ended>((resolve, reject) => {
    child.once("error", reject);
    child.once("close", (code, signal) => resolve({ code, signal, stderr }));
  });
  const said = (word: string) =>
    new Promise<string>((resolve, reject) => {
      const look = () => {
        const line = lines.find((line) => line.startsWith(`${word} `));
        if (line === undefined) return;
        waiting.delete(look);
        resolve(line.slice(word.length + 1));
      };
      waiting.add(look);
      look();
      ended.then(() => reject(new Error(`it ended before it said ${word}: ${stderr}`)), reject);
    });
  return { process: child, said, ended };
}

/** Processes whose command line has the text, whoever's they are. */
function processesWith(text: string): string[] {
  return readdirSync("/proc").filter((pid) => {
    try {
      return /^\d+$/.test(pid) && readFileSync(`/proc/${pid}/cmdline`, "utf8").includes(text);
    } catch {
      return false; // it has just ended
    }
  });
}

async function eventually(what: string, holds: () => boolean): Promise<void> {
  const deadline = Date.now() + SOON_MS;
  while (!holds()) {
    if (Date.now() > deadline) throw new Error(`it never came true: ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 5));
  }
}

/** Programs that do not want to end, with the marker in their command lines. */
function stubborn(marker: string): string {
  return `
    for n in 1 2 3; do
      setsid sh -c 'trap "" TERM HUP INT; while :; do sleep 1000; done' ${marker} > /dev/null 2>&1 &
      (setsid sh -c 'sleep 1000; :' ${marker} > /dev/null 2>&1 &)
    done
    echo kept > file`;
}

describe("a Node process that ends takes its VMs with it, and the next one goes on", () => {
  const ways: [string, string, Partial<Ended>, NodeJS.Signals?][] = [
    ["SIGKILL", "", { signal: "SIGKILL" }, "SIGKILL"],
    ["SIGTERM", "", { signal: "SIGTERM" }, "SIGTERM"],
    ["SIGINT", "", { signal: "SIGINT" }, "SIGINT"],
    ["SIGHUP", "", { signal: "SIGHUP" }, "SIGHUP"],
    ["process.exit()", "process.exit(3);", { code: 3 }],
    ["an uncaught exception", "setImmediate(() => { throw new Error('boom'); });", { code: 1 }],
    ["process.abort()", "process.abort();", { signal: "SIGABRT" }],
  ];
  test.each(ways)("%s", async (_way, end, expected, signal) => {
    const marker = randomUUID();
    const dying = host(`
      await agent.exec(${JSON.stringify(stubborn(marker))});
      agent.exec("sleep 1000").catch(() => {}); // keeps Node alive
      say("running");
      process.stdin.on("data", () => {});
      ${end === "" ? "" : `setTimeout(() => { ${end} }, 100);`}
    `);
    await dying.said("running");
    if (signal) {
      // What the VM runs has the marker in its arguments, what the script says does not count.
      const own = dying.process.pid?.toString();
      await eventually("programs run", () => {
        return processesWith(marker).filter((pid) => pid !== own).length >= 6;
      });
      dying.process.kill(signal);
    }
    expect(await dying.ended).toMatchObject(expected);

    const client = createClient({ dataDir });
    const { stdout } = await client.vm.getOrCreate("robust").exec("cat file");
    expect(stdout).toBe("kept\n");
    expect(processesWith(marker)).toEqual([]);
    await client.close();
  });
});

test("a process that is done exits by itself, though a VM still runs", async () => {
  const { ended } = host(`say("out", (await agent.exec("echo done")).stdout);`);
  expect(await ended).toMatchObject({ code: 0, stderr: "" });
});

/** For a script: what a process holds. */
const HELD = `
  const fs = require("node:fs");
  const rss = () => { gc(); gc(); return process.memoryUsage.rss() / 1024 / 1024; };
  const held = () => ({
    descriptors: fs.readdirSync("/proc/self/fd").length,
    threads: fs.readdirSync("/proc/self/task").length,
    children: fs.readdirSync("/proc/self/task").map((task) => {
      try {
        return fs.readFileSync("/proc/self/task/" + task + "/children", "utf8");
      } catch (error) {
        if (error.code === "ENOENT" || error.code === "ESRCH") return ""; // the thread has ended meanwhile
        throw error;
      }
    }).join(""),
  });
  const settled = async (before) => {
    const deadline = Date.now() + ${SOON_MS};
    // Threads may go: the pool of blocking ones shrinks when idle.
    const more = (now) => now.descriptors > before.descriptors || now.children !== before.children
      || now.threads > before.threads;
    while (more(held())) {
      if (Date.now() > deadline) throw new Error(JSON.stringify([before, held()]));
      gc();
      await new Promise((resolve) => setTimeout(resolve, 20));
    }
  };
`;

test("two hundred VMs leave the process as it was", async () => {
  const { ended, said } = host(
    `
    require("node:v8").setFlagsFromString("--expose-gc");
    globalThis.gc = require("node:vm").runInNewContext("gc");
    ${HELD}
    const live = async (n) => {
      const agent = client.vm.getOrCreate(["vm", String(n)]);
      await agent.exec("true");
      await agent.destroy();
    };
    const many = async (from, count) => {
      // Four at a time, as a busy server does.
      for (let n = from; n < from + count; n += 4) {
        await Promise.all([n, n + 1, n + 2, n + 3].map(live));
      }
    };
    await many(0, 40);
    const [before, memory] = [held(), rss()];
    await many(40, 200);
    await settled(before);
    say("grown", rss() - memory);
    `,
  );
  const grown = Number(await said("grown"));
  expect(await ended).toMatchObject({ code: 0 });
  expect(grown).toBeLessThan(12);
});

test("fifty VMs boot at once", async () => {
  const client = createClient({ dataDir });
  const agents = Array.from({ length: 50 }, (_, n) => client.vm.getOrCreate(["vm", String(n)]));
  const outputs = await Promise.all(agents.map((agent, n) => agent.exec(`echo ${n}`)));
  expect(outputs.map(({ stdout }) => Number(stdout))).toEqual(agents.map((_, n) => n));
  await client.close();
});

describe("a data directory that can't be used", () => {
  test("a file in its place is named", async () => {
    const path = join(dataDir, "file");
    writeFileSync(path, "");
    const client = createClient({ dataDir: path });
    const failed = client.vm.getOrCreate("a").exec("true");
    await expect(failed).rejects.toMatchObject({
      code: "ENOTDIR",
      message: expect.stringContaining(path),
    });
    await client.close();
  });

  test.skipIf(IS_ROOT)("one without permissions is named", async () => {
    const client = createClient({ dataDir });
    for (const mode of [0o000, 0o500]) {
      chmodSync(dataDir, mode);
      const failed = client.vm.getOrCreate("a").exec("true");
      await expect(failed).rejects.toMatchObject({
        code: "EACCES",
        message: expect.stringContaining(dataDir),
      });
    }
    chmodSync(dataDir, 0o700);
    await client.vm.getOrCreate("a").exec("true");
    await client.close();
  });

  test("one on a read-only file system is named", async () => {
    const { said, ended } = host(
      `try { await agent.exec("true"); } catch (error) { say("code", error.code + " " + error.message); }`,
      onTmpfs(16, "mount -o remount,bind,ro"),
    );
    const told = await said("code");
    expect(told).toMatch(/^EROFS /);
    expect(told).toContain(dataDir);
    expect(await ended).toMatchObject({ code: 0 });
  });
});

/**
 * A command line that runs the rest with a tmpfs as data directory, which has so much room beside what a
 * first boot as root puts there; `more` works on it.
 */
function onTmpfs(room: number, more = "true"): string[] {
  const mebibytes = room + (IS_ROOT ? packageDatabase() : 0);
  const own = IS_ROOT ? [] : ["--user", "--map-current-user", "--keep-caps"];
  const script = `mount -t tmpfs -o size=${mebibytes}m,mode=700 tmpfs "$DIR" && ${more} "$DIR" && exec "$@"`;
  return ["env", `DIR=${dataDir}`, "unshare", "--mount", ...own, "sh", "-c", script, "sh"];
}

/** Mebibytes that the host's takes, which is copied to another file system. */
function packageDatabase(): number {
  const { stdout } = spawnSync("du", ["-sm", "/var/lib/dpkg"], { encoding: "utf8" });
  return Number.parseInt(stdout, 10) || 0;
}

/** `fill()` takes what space is left, until `ballast` is removed; `code()` of a call, or "OK". */
const BALLAST = `
  const fs = require("node:fs");
  const code = (promise) => promise.then(() => "OK", (error) => error.code);
  const ballast = dataDir + "/ballast";
  const fill = () => {
    const fd = fs.openSync(ballast, "a");
    const page = Buffer.alloc(4096);
    try { for (;;) fs.writeSync(fd, page); } catch (error) { if (error.code !== "ENOSPC") throw error; }
    fs.closeSync(fd);
  };
`;

test("a full disk is told as such, and all goes on when there is space again", async () => {
  const { said, ended } = host(
    `
    ${BALLAST}
    await agent.exec("true");
    fill();
    say("write", await code(agent.writeFile("big", new Uint8Array(1 << 20))));
    say("fresh", await code(client.vm.getOrCreate("fresh").exec("true")));
    say("running", await code(agent.exec("true")));
    await agent.sleep();
    say("reboot", await code(agent.exec("rm -f big")));
    fs.rmSync(ballast);
    await agent.writeFile("big", new Uint8Array(1 << 20));
    say("after", (await agent.exec("wc -c < big")).stdout.trim());
    say("fresh-after", await code(client.vm.getOrCreate("fresh").exec("true")));
    await client.close();
    `,
    onTmpfs(16),
  );
  expect(await said("write")).toBe("ENOSPC");
  expect(await said("fresh")).toBe("STORE_FULL");
  expect(await said("running")).toBe("OK");
  // Or nobody could remove what fills it.
  expect(await said("reboot")).toBe("OK");
  expect(await said("after")).toBe(String(1 << 20));
  expect(await said("fresh-after")).toBe("OK");
  expect(await ended).toMatchObject({ code: 0 });
});

test("a session outlives a full disk: nothing that was kept is lost, and it goes on", async () => {
  const model = await newModel(() => ({ text: "Hello" }));
  const options = { agentStoreDir, loopbackExemptPorts: [model.port] };
  const { said, ended } = host(
    `
    ${BALLAST}
    const client = createClient({ dataDir, ...${JSON.stringify(options)} });
    const agent = client.vm.getOrCreate("full");
    const { sessionId } = await agent.createSession("pi", { env: ${JSON.stringify(envOf(model))} });
    await agent.sendPrompt(sessionId, "before");
    const kept = await agent.getSessionEvents(sessionId);
    fill();
    say("full", await code(agent.sendPrompt(sessionId, "x".repeat(200_000))));
    fs.rmSync(ballast);
    say("after", (await agent.sendPrompt(sessionId, "after")).text);
    const events = await agent.getSessionEvents(sessionId);
    say("kept", JSON.stringify(events.slice(0, kept.length)) === JSON.stringify(kept));
    say("gapless", events.every(({ seq }, index) => seq === index + 1));
    await client.close();
    `,
    onTmpfs(32),
  );
  // Which of the two notices first is theirs: Pi keeps a file of its own.
  expect(await said("full")).toMatch(/^(STORE_FULL|AGENT_ERROR)$/);
  expect(await said("after")).toBe("Hello");
  expect(await said("kept")).toBe("true");
  expect(await said("gapless")).toBe("true");
  expect(await ended).toMatchObject({ code: 0 });
});

describe("a worker thread that is terminated", () => {
  /** In a worker: calls that end after the thread that made them. */
  const WORKER = `
    const { createClient } = require(${JSON.stringify(PACKAGE)});
    const { parentPort, workerData } = require("node:worker_threads");
    const agent = createClient({ dataDir: workerData }).vm.getOrCreate("worker");
    agent.wake().then(() => {
      for (let i = 0; i < 20; i++) agent.exec("sleep 0.2").catch(() => {});
      agent.exec("sleep 0.1").then(() => agent.readFile("none")).catch(() => {});
      parentPort.postMessage("busy");
    });
    setInterval(() => {}, 1000);
  `;

  test("takes its VMs with it, and nothing of the process", async () => {
    const { ended } = host(`
      const { Worker } = require("node:worker_threads");
      const { readdirSync, readFileSync } = require("node:fs");
      const guests = () => readdirSync("/proc/self/task").flatMap((task) =>
        readFileSync("/proc/self/task/" + task + "/children", "utf8").split(" ").filter(Boolean),
      );
      await agent.wake();
      const before = guests().length;
      for (let i = 0; i < 5; i++) {
        const worker = new Worker(${JSON.stringify(WORKER)}, { eval: true, workerData: dataDir });
        await new Promise((resolve) => worker.once("message", resolve));
        await worker.terminate();
        while (guests().length > before) await new Promise(setImmediate);
      }
      // Calls of the dead threads would have ended by now.
      await agent.exec("sleep 0.5");
      await client.close();
    `);
    expect(await ended).toMatchObject({ code: 0, signal: null });
  });
});
