import { spawn } from "node:child_process";
import { expect, test } from "vitest";
import { agentStoreDir, newClient, newOwnVm, newPiSession, ROOT } from "./fixtures.js";

/** Streams a turn and writes what its listener is told to a pipe, before anything else happens. */
const PROGRAM = `
  import { writeSync } from "node:fs";
  import { createClient } from "agentvm";
  const [dataDir, agentStoreDir, id, ports, prompt] = process.argv.slice(1);
  const agents = { own: { command: "node", args: ["/home/user/own-agent.mjs"] } };
  const loopbackExemptPorts = JSON.parse(ports);
  const client = createClient({ dataDir, agentStoreDir, agents, loopbackExemptPorts });
  const agent = client.vm.getOrCreate("vm");
  agent.on("sessionEvent", ({ sequenceNumber, event }) => {
    const line = Buffer.from(JSON.stringify({ sequenceNumber, event }) + "\\n");
    for (let sent = 0; sent < line.length; ) sent += writeSync(1, line, sent);
  });
  await agent.sendPrompt(id, prompt);
`;

interface Told {
  sequenceNumber: number;
  event: unknown;
}

/** What a listener was told by the moment at which its process was killed: `delayMs` after the first. */
function toldUntilKilled(args: string[], delayMs: number): Promise<Told[]> {
  return new Promise((resolve, reject) => {
    const child = spawn(process.execPath, ["--input-type=module", "-e", PROGRAM, ...args], {
      cwd: ROOT,
      stdio: ["ignore", "pipe", "pipe"],
    });
    let out = "";
    let complaints = "";
    child.stdout.setEncoding("utf8").on("data", (text) => {
      if (out === "") setTimeout(() => child.kill("SIGKILL"), delayMs);
      out += text;
    });
    child.stderr.setEncoding("utf8").on("data", (text) => (complaints += text));
    child.on("error", reject);
    child.on("close", () => {
      // The last line may be half of one: its listener had not returned.
      const whole = out.slice(0, out.lastIndexOf("\n") + 1);
      const lines = whole.split("\n").filter((line) => line !== "");
      if (complaints !== "") reject(new Error(complaints));
      else resolve(lines.map((line) => JSON.parse(line)));
    });
  });
}

const seed = Number(process.env["AGENTVM_TEST_SEED"] ?? Date.now() % 1_000_000);

/** Mulberry32: a seed that is printed makes a failure repeatable. */
function random(seed: number): () => number {
  let state = seed;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t ^= t + Math.imul(t ^ (t >>> 7), 61 | t);
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

interface Killed {
  dataDir: string;
  sessionId: string;
  ports: number[];
  prompt: string;
  rounds: number;
  longestMs: number;
}

/** Kills a process in each round, and finds in the history all that its listener was told. */
async function kill({ dataDir, sessionId, ports, prompt, rounds, longestMs }: Killed) {
  console.log(`AGENTVM_TEST_SEED=${seed}`);
  const next = random(seed);
  const args = [dataDir, agentStoreDir, sessionId, JSON.stringify(ports), prompt];
  const reader = (await newClient({ dataDir })).vm.getOrCreate("vm");
  let last = 0;
  for (let round = 0; round < rounds; round++) {
    const told = await toldUntilKilled(args, next() * longestMs);
    const history = await reader.getSequencedEvents(sessionId, { since: last });
    const numbers = history.map(({ sequenceNumber }) => sequenceNumber);
    expect(numbers, `round ${round}`).toEqual(history.map((_, index) => last + index + 1));
    const first = told[0]?.sequenceNumber ?? 0;
    const kept = history.slice(first - last - 1, first - last - 1 + told.length);
    expect(
      kept.map(({ sequenceNumber, notification }) => ({ sequenceNumber, event: notification })),
      `round ${round}`,
    ).toEqual(told);
    last = numbers.at(-1) ?? last;
  }
}

test("what a listener was told is in the history, at whichever of 200 moments its process is killed", {
  timeout: 600_000,
}, async () => {
  const { dataDir, client, session } = await newOwnVm();
  const sessionId = await session();
  await client.close();
  const prompt = "stream 20000";
  await kill({ dataDir, sessionId, ports: [], prompt, rounds: 200, longestMs: 200 });

  const after = await newOwnVm({ dataDir });
  expect((await after.agent.sendPrompt(sessionId, "say still here")).text).toBe("still here");
  const ends = await after.agent.getEvents(sessionId, { method: "_agentvm/turn_end" });
  const starts = await after.agent.getEvents(sessionId, { method: "_agentvm/turn_start" });
  expect(ends.map(({ params }) => params.turnId)).toEqual(
    starts.map(({ params }) => params.turnId),
  );
});

test("the same with Pi, which goes on with its conversation", { timeout: 300_000 }, async () => {
  const words = Array.from({ length: 400 }, (_, index) => `word ${index} `).join("");
  const { dataDir, client, sessionId, model } = await newPiSession(({ body }) => {
    const said = JSON.stringify(body.messages);
    return said.includes("And now?") ? { text: "Done." } : { text: words };
  });
  await client.close();
  const ports = [model.port];
  await kill({ dataDir, sessionId, ports, prompt: "Tell me", rounds: 10, longestMs: 300 });

  const again = await newClient({ dataDir, loopbackExemptPorts: ports });
  const agent = again.vm.getOrCreate("vm");
  expect((await agent.sendPrompt(sessionId, "And now?")).text).toBe("Done.");
});
