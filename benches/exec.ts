// A command in a VM that runs, against one beside Node.

import { exec as execOnHost } from "node:child_process";
import { promisify } from "node:util";
import { type Comparison, compare, timed } from "./measure";
import { withClient } from "./setting";

const COMMAND = "echo hi";

export function exec(turns: number): Promise<Comparison> {
  return withClient({}, (client) => {
    const agent = client.vm.getOrCreate("exec");
    const onHost = promisify(execOnHost);
    return compare(
      {
        title: `exec("${COMMAND}") in a running VM`,
        goal: "at most child_process.exec's time",
        baseline: "child_process.exec",
      },
      [
        {
          name: "agent.exec",
          run: () => timed(async () => check((await agent.exec(COMMAND)).stdout)),
        },
        {
          name: "child_process.exec",
          run: () => timed(async () => check((await onHost(COMMAND)).stdout)),
        },
      ],
      turns,
    );
  });
}

function check(stdout: string): void {
  if (stdout !== "hi\n") throw new Error(`unexpected output: ${JSON.stringify(stdout)}`);
}
