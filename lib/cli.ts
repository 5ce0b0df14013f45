#!/usr/bin/env node
/** `npx agentvm …` */

import { defaultAgentStoreDir, openNative } from "./client";
import { AgentVmError, call } from "./errors";

const USAGE = `Usage: agentvm <command>

  install <agent>   Put a pinned agent with its own Node and npm into the agent store.
                    Agents: pi. createSession does the same when one is missing.
  --version         Print the version.
  -h, --help        Print this.

The store is $AGENTVM_CACHE_DIR/agents, else $XDG_CACHE_HOME/agentvm/agents, else
~/.cache/agentvm/agents.
`;

interface Progress {
  message: string;
  step: string;
}

async function install(agent: string): Promise<void> {
  const show = progressLine();
  const client = openNative({});
  await call(client.installAgent(agent, (json: string) => show(JSON.parse(json))));
  process.stderr.write(
    `${process.stderr.isTTY ? "\n" : ""}${agent} is installed in ${defaultAgentStoreDir()}\n`,
  );
}

/** One line for each step, which changes on a terminal; elsewhere a line for each message. */
function progressLine(): (progress: Progress) => void {
  let last = "";
  return ({ message, step }) => {
    if (process.stderr.isTTY) {
      process.stderr.write(`${step === last ? "\r\x1b[K" : "\n"}${message}`);
    } else {
      process.stderr.write(`${message}\n`);
    }
    last = step;
  };
}

async function main([command, ...rest]: string[]): Promise<number> {
  const [agent] = rest;
  if ([command, ...rest].some((word) => word === "--help" || word === "-h")) {
    process.stdout.write(USAGE);
    return 0;
  }
  switch (command) {
    case "install":
      if (rest.length !== 1 || !agent) {
        process.stderr.write("agentvm install takes the name of one agent, for example: pi\n");
        return 2;
      }
      await install(agent);
      return 0;
    case "--version":
      process.stdout.write(`${require("../package.json").version}\n`);
      return 0;
    default:
      process.stderr.write(command ? `Unknown command: ${command}\n\n${USAGE}` : USAGE);
      return 2;
  }
}

main(process.argv.slice(2)).then(
  (code) => {
    process.exitCode = code;
  },
  (error: unknown) => {
    const text = error instanceof AgentVmError ? `${error.code}: ${error.message}` : String(error);
    process.stderr.write(`${text}\n`);
    process.exitCode = 1;
  },
);
