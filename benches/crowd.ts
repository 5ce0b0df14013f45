// Many at once: how long it takes, and whether the event loop goes on meanwhile.

import { monitorEventLoopDelay } from "node:perf_hooks";
import { setTimeout } from "node:timers/promises";
import { runBwrap } from "./boot";
import { type Comparison, type Competitor, compare, timed } from "./measure";
import { withClient } from "./setting";

const CROWD = 50;

export function crowd(turns: number): Promise<Comparison[]> {
  return withClient({}, async (client) => {
    const agents = Array.from({ length: CROWD }, (_, index) =>
      client.vm.getOrCreate(["crowd", String(index)]),
    );
    const boot = () => Promise.all(agents.map((agent) => agent.exec("true")));
    const end = () => Promise.all(agents.map((agent) => agent.sleep()));
    const ours: Competitor = {
      name: `${CROWD} VMs: boot + exec('true')`,
      async run() {
        const time = await timed(boot);
        await end();
        return time;
      },
    };
    const bwrap = () => Promise.all(Array.from({ length: CROWD }, runBwrap));
    const theirs: Competitor = { name: `${CROWD} × bwrap --unshare-all`, run: () => timed(bwrap) };
    const together = await compare(
      {
        title: `${CROWD} at once`,
        goal: "VMs take at most the time of as many bwraps",
        baseline: theirs.name,
      },
      [ours, theirs],
      turns,
    );
    const delays = await compare(
      {
        title: `Longest delay of the event loop while ${CROWD} boot or end at once`,
        goal: "less than starting as many programs with child_process",
        baseline: theirs.name,
      },
      [
        {
          name: "VMs boot and run a command",
          async run() {
            const delay = await longestDelay(boot);
            await end();
            return delay;
          },
        },
        {
          name: "VMs end",
          async run() {
            await boot();
            return longestDelay(end);
          },
        },
        { name: theirs.name, run: () => longestDelay(bwrap) },
      ],
      turns,
    );
    return [together, delays];
  });
}

/** Milliseconds. */
async function longestDelay(run: () => Promise<unknown>): Promise<number> {
  const delay = monitorEventLoopDelay({ resolution: 1 });
  delay.enable();
  // It measures from its first tick on.
  await setTimeout(5);
  await run();
  await setTimeout(5);
  delay.disable();
  return delay.max / 1e6;
}
