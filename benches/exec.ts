// A command in a VM that runs, against one beside Node.

import { exec as execOnHost } from "node:child_process";
import { promisify } from "node:util";
import { type Comparison, compare, timed, timedInARow } from "./measure";
import { withClient } from "./setting";

const COMMAND = "echo hi";

export function exec(turns: number): Promise<Comparison[]> {
  return withClient({}, async (client) => {
    const agent = client.vm.getOrCreate("exec");
    const onHost = promisify(execOnHost);
    const inVm = async () => check((await agent.exec(COMMAND)).stdout);
    const besideNode = async () => check((await onHost(COMMAND)).stdout);
    const title = `exec("${COMMAND}") in a running VM`;
    const goal = "at most child_process.exec's time";
    const baseline = "child_process.exec";
    return [
      await compare(
        { title, goal, baseline },
        [
          { name: "agent.exec", run: () => timed(inVm) },
          { name: baseline, run: () => timed(besideNode) },
        ],
        turns,
      ),
      await compare(
        { title: `${title}, one after the other`, goal: `${goal}; p50 at most 1.5 ms`, baseline },
        [
          { name: "agent.exec", run: () => timedInARow(inVm) },
          { name: baseline, run: () => timedInARow(besideNode) },
        ],
        Math.ceil(turns / 10),
      ),
    ];
  });
}

function check(stdout: string): void {
  if (stdout !== "hi\n") throw new Error(`unexpected output: ${JSON.stringify(stdout)}`);
}
