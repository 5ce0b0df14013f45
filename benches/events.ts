// An event's way from an agent's stdout through SQLite to a listener: how many fit into a second, and
// how long one takes. The agent is a program that only talks; the same program, piped straight into
// Node, and SQLite alone are what it is held against.

import { type ChildProcess, execFile, execFileSync, spawn } from "node:child_process";
import {
  closeSync,
  fdatasyncSync,
  mkdtempSync,
  openSync,
  readFileSync,
  rmSync,
  writeSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { promisify } from "node:util";
import type { Agent } from "agentvm";
import { type Comparison, type Competitor, compare, withRatios } from "./measure";
import { ROOT, withClient } from "./setting";

/** What the agent is to write. */
interface Order {
  /** Bytes of a line. */
  size: number;
  count: number;
  /** Between two lines; 0: as fast as the pipe takes them. */
  intervalMicros: number;
}

/** Resolves to the milliseconds from the order to the arrival of its last event. */
interface Source {
  produce(order: Order, arrived?: (event: Produced) => void): Promise<number>;
}

/** As far as it is looked at here. */
interface Produced {
  params?: { _meta?: { at?: string } };
}

const IN_VM = "/home/user/producer";

const FAST: readonly Order[] = [
  { size: 200, count: 100_000, intervalMicros: 0 },
  { size: 3000, count: 20_000, intervalMicros: 0 },
];

/** Of each turn: slow enough that the one before has arrived. */
const SLOW: readonly Order[] = [
  { size: 200, count: 50, intervalMicros: 2000 },
  { size: 3000, count: 50, intervalMicros: 2000 },
];

export async function events(turns: number): Promise<Comparison[]> {
  const programs = build();
  const agents = { producer: { command: IN_VM } };
  return await withClient({ agents }, async (client) => {
    const agent = client.vm.getOrCreate("events");
    await agent.writeFile(IN_VM, readFileSync(programs.producer));
    await agent.exec(`chmod +x ${IN_VM}`);
    const piped = new PipedProducer(programs.producer);
    try {
      const vm = await VmProducer.start(agent);
      const comparisons: Comparison[] = [];
      for (const order of FAST) {
        comparisons.push(await throughput(vm, piped, programs.bare, order, turns));
      }
      comparisons.push(await latency(vm, piped, turns));
      return comparisons;
    } finally {
      piped.end();
    }
  });
}

/** Microseconds of an event, when they come as fast as they can. */
async function throughput(
  vm: Source,
  piped: Source,
  bare: string,
  order: Order,
  turns: number,
): Promise<Comparison> {
  const batch = largestBatch(order.size);
  const ours = "agentvm: VM → SQLite → listener";
  const others = ["pipe → Node, no storage", `SQLite alone, ${batch} in a transaction`];
  const perEvent = (ms: number) => (ms / order.count) * 1000;
  const through = (name: string, source: Source): Competitor => ({
    name,
    async run() {
      return perEvent(await source.produce(order));
    },
  });
  const sqlite: Competitor = {
    name: others[1] ?? "",
    async run() {
      const dir = mkdtempSync(join(tmpdir(), "agentvm-bench-bare-"));
      const args = [join(dir, "bare.db"), order.size, order.count, batch].map(String);
      const { stdout } = await promisify(execFile)(bare, args);
      rmSync(dir, { recursive: true });
      return perEvent(Number(stdout));
    },
  };
  const result = await compare(
    { title: "", baseline: "", unit: "µs" },
    [through(ours, vm), through(others[0] ?? "", piped), sqlite],
    turns,
  );
  // Whatever is slower bounds what both together can be.
  const slower = result.rows.filter(({ name }) => name !== ours).sort((a, b) => b.p50 - a.p50)[0];
  const rows = withRatios(result.rows, slower?.name ?? "");
  const rate = (name?: string) => {
    const row = rows.find((row) => row.name === name);
    return Math.round(1e6 / (row?.p50 ?? Number.NaN));
  };
  const [mine, theirs] = [rate(ours), rate(slower?.name)];
  return {
    ...result,
    rows,
    title: `Events of ${order.size} B: time of each of ${order.count.toLocaleString("en")}`,
    goal:
      "0.8 of the slower baseline's events a second at least: " +
      `${(mine / theirs).toFixed(2)} (${mine.toLocaleString("en")} of ${theirs.toLocaleString("en")})`,
  };
}

/** From the agent's write to the listener. */
function latency(vm: Source, piped: Source, turns: number): Promise<Comparison> {
  const through = (name: string, source: Source, order: Order): Competitor => ({
    name: `${name}, ${order.size} B`,
    async run() {
      const times: number[] = [];
      await source.produce(order, (event) => {
        const written = BigInt(event.params?._meta?.at ?? 0);
        times.push(Number(process.hrtime.bigint() - written) / 1e6);
      });
      return times;
    },
  });
  const disk: Competitor = {
    name: "the disk: fdatasync of 4 KiB",
    run: () => Promise.resolve(flushTimes(50)),
  };
  return compare(
    {
      title: "One event, from the agent's write to the listener",
      goal: "under 0.3 ms at p50 (durability: normal); p99 is to be seen beside the disk's",
      baseline: disk.name,
    },
    [
      ...SLOW.map((order) => through("agentvm: VM → SQLite → listener", vm, order)),
      ...SLOW.map((order) => through("pipe → Node, no storage", piped, order)),
      disk,
    ],
    turns,
  );
}

function flushTimes(count: number): number[] {
  const dir = mkdtempSync(join(tmpdir(), "agentvm-bench-disk-"));
  const file = openSync(join(dir, "file"), "w");
  const times = Array.from({ length: count }, () => {
    writeSync(file, Buffer.alloc(4096));
    const start = performance.now();
    fdatasyncSync(file);
    return performance.now() - start;
  });
  closeSync(file);
  rmSync(dir, { recursive: true });
  return times;
}

/** The most that agentvm's writer puts into a transaction (`src/store/shared.rs`). */
function largestBatch(size: number): number {
  const overhead = 100;
  return Math.min(2048, Math.floor((1 << 20) / (size + overhead)));
}

/** As the agent of a session. */
class VmProducer implements Source {
  static async start(agent: Agent): Promise<VmProducer> {
    const { sessionId } = await agent.createSession("producer");
    return new VmProducer(agent, sessionId);
  }

  private constructor(
    private readonly agent: Agent,
    private readonly sessionId: string,
  ) {}

  async produce(order: Order, arrived?: (event: Produced) => void): Promise<number> {
    let missing = order.count;
    let time = Number.NaN;
    const start = performance.now();
    const all = new Promise<void>((done) => {
      const stop = this.agent.on("sessionEvent", ({ event }) => {
        // What agentvm adds to a turn is not the agent's.
        if (event.params?._meta?.at === undefined) return;
        arrived?.(event);
        missing -= 1;
        if (missing > 0) return;
        time = performance.now() - start;
        stop();
        done();
      });
    });
    await this.agent.sendPrompt(this.sessionId, JSON.stringify(order));
    await all;
    return time;
  }
}

/** As a child of this process, without anything between. */
class PipedProducer implements Source {
  readonly #child: ChildProcess;
  #rest = "";
  #arrived: (event: Produced & { id?: number }) => void = () => {};

  constructor(program: string) {
    this.#child = spawn(program, { stdio: ["pipe", "pipe", "inherit"] });
    this.#child.stdout?.setEncoding("utf8").on("data", (chunk: string) => {
      const lines = (this.#rest + chunk).split("\n");
      this.#rest = lines.pop() ?? "";
      for (const line of lines) this.#arrived(JSON.parse(line));
    });
  }

  produce(order: Order, arrived?: (event: Produced) => void): Promise<number> {
    const prompt = [{ type: "text", text: JSON.stringify(order) }];
    const request = { jsonrpc: "2.0", id: 1, method: "session/prompt", params: { prompt } };
    return new Promise((done) => {
      let missing = order.count;
      let time = Number.NaN;
      const start = performance.now();
      this.#arrived = (event) => {
        if (event.id !== undefined) return done(time);
        arrived?.(event);
        missing -= 1;
        if (missing === 0) time = performance.now() - start;
      };
      this.#child.stdin?.write(`${JSON.stringify(request)}\n`);
    });
  }

  end(): void {
    this.#child.stdin?.end();
  }
}

interface Programs {
  producer: string;
  bare: string;
}

function build(): Programs {
  const args = ["build", "--release", "--locked", "--package", "agentvm-bench-events"];
  execFileSync("cargo", [...args, "--message-format", "short"], { cwd: ROOT, stdio: "inherit" });
  const target = process.env.CARGO_TARGET_DIR || join(ROOT, "target");
  const program = (name: string) => join(target, "release", name);
  return { producer: program("bench-producer"), bare: program("bench-bare") };
}
