// Processes and terminals in a VM that runs, against those beside Node.

import { spawn } from "node:child_process";
import { once } from "node:events";
import type { Agent } from "agentvm";
import { type Comparison, compare, timed } from "./measure";
import { withClient } from "./setting";

/** How many keys are typed for one time: one alone would measure a process that has just woken. */
const KEYS = 20;

/** Node has no terminals: Python's, on a thread's distance from nothing. Prints microseconds. */
const ON_HOST = `
import os, pty, sys, time, tty
pid, master = pty.fork()
if pid == 0:
    tty.setraw(0)
    os.write(1, b"r")
    os.execvp("cat", ["cat"])
os.read(master, 1)
time.sleep(0.2)
for line in sys.stdin:
    times = []
    for _ in range(${KEYS}):
        start = time.perf_counter()
        os.write(master, b"x")
        os.read(master, 1)
        times.append((time.perf_counter() - start) * 1000)
    print(" ".join(map(str, times)), flush=True)
`;

export function pty(turns: number): Promise<Comparison[]> {
  return withClient({}, async (client) => {
    const agent = client.vm.getOrCreate("pty");
    return [await firstByte(agent, turns), await roundTrip(agent, turns)];
  });
}

function firstByte(agent: Agent, turns: number): Promise<Comparison> {
  return compare(
    {
      title: "spawn to the first byte of output, echo",
      goal: "at most child_process.spawn's time",
      baseline: "child_process.spawn",
    },
    [
      {
        name: "agent.spawn",
        run: async () => {
          const heard = new Promise((resolve) => agent.once("processOutput", resolve));
          const time = await timed(async () => {
            await agent.spawn("echo", ["hi"]);
            await heard;
          });
          await Promise.all((await agent.listProcesses()).map(({ pid }) => agent.waitProcess(pid)));
          return time;
        },
      },
      {
        name: "child_process.spawn",
        run: async () => {
          let child: ReturnType<typeof spawn> | undefined;
          const time = await timed(async () => {
            child = spawn("echo", ["hi"]);
            if (child.stdout) await once(child.stdout, "data");
          });
          if (child && child.exitCode === null) await once(child, "exit");
          return time;
        },
      },
    ],
    turns,
  );
}

async function roundTrip(agent: Agent, turns: number): Promise<Comparison> {
  let heard: () => void = () => {};
  const off = agent.on("shellData", () => heard());
  const ready = new Promise<void>((resolve) => {
    heard = resolve;
  });
  const script = "stty raw -echo; echo ready; exec cat";
  const { shellId } = await agent.openShell({ command: "sh", args: ["-c", script] });
  await ready;
  const python = spawn("python3", ["-c", ON_HOST], { stdio: ["pipe", "pipe", "inherit"] });
  const result = await compare(
    {
      title: "a byte to cat on a terminal and back",
      goal: "p50 at most 0.2 ms",
      baseline: "a terminal of the host, from Python",
    },
    [
      {
        name: "writeShell to shellData",
        run: async () => {
          const times: number[] = [];
          for (let key = 0; key < KEYS; key += 1) {
            times.push(
              await timed(async () => {
                const back = new Promise<void>((resolve) => {
                  heard = resolve;
                });
                void agent.writeShell(shellId, "x");
                await back;
              }),
            );
          }
          return times;
        },
      },
      {
        name: "a terminal of the host, from Python",
        run: async () => {
          python.stdin.write("\n");
          const [line] = await once(python.stdout, "data");
          return String(line).trim().split(" ").map(Number);
        },
      },
    ],
    turns,
  );
  python.kill();
  off();
  await agent.closeShell(shellId);
  return result;
}
