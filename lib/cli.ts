#!/usr/bin/env node
/** `npx agentvm …` */

import { parseArgs } from "node:util";
import type * as Api from "../index";
import { createClient, defaultAgentStoreDir } from "./client";
import { report } from "./doctor";
import { AgentVmError } from "./errors";
import { attach } from "./shell";

const USAGE = `Usage: agentvm <command>

  install <agent>[@version] …   Put agents, with a Node and npm of their own, into the agent store;
                                createSession does the same with one that is missing.
                                Without a version: the pinned one. --all: every agent.
  agents [--json]               List the agents, and what is in the store.
  remove <agent>[@version] …    Remove agents from the store. Without a version: all of them.
  prune [--dry-run]             Remove from the store what this version of agentvm does not use.
  shell <key> [-- command …]    Open a shell in a VM, or run a command in it, on this terminal; without
                                one, with stdin, stdout and stderr as they are. The exit code is that of
                                the command, or 128 and the signal that ended it. The VM must not run in
                                another process. --user root; --cwd <directory>; --data-dir <directory>:
                                default $AGENTVM_DATA_DIR, else $XDG_DATA_HOME/agentvm, else
                                ~/.local/share/agentvm.
  doctor [--json]               Try what VMs need of this host, and boot a temporary one. Says of all that
                                is not there what is lost without it, and how to enable it.
                                Exit code 1: no VM can run here.
  --version                     Print the version.
  -h, --help                    Print this.

What running VMs use is never removed. A version that is not the pinned one is resolved by npm when it
is installed, and is not tested with this agentvm.

The store is $AGENTVM_CACHE_DIR/agents, else $XDG_CACHE_HOME/agentvm/agents, else
~/.cache/agentvm/agents.
`;

/** A command line that makes no sense. */
class UsageError extends Error {}

const print = (line: string) => process.stdout.write(`${line}\n`);
const tell = (line: string) => process.stderr.write(`${line}\n`);

async function install(args: string[]): Promise<void> {
  const { values, positionals } = parse(args, { all: { type: "boolean" } });
  if (values["all"] ? positionals.length > 0 : positionals.length === 0) {
    throw new UsageError("install takes the names of agents, for example: pi; or --all");
  }
  const client = createClient();
  const wanted = values["all"]
    ? (await client.agents.list()).agents.map(({ name }) => name)
    : positionals;
  // Nothing half-made is left where a person gives up.
  const interrupted = new AbortController();
  process.once("SIGINT", () => interrupted.abort());
  for (const agent of wanted) {
    const show = progressLine();
    await client.agents.install(agent, { onProgress: show, signal: interrupted.signal });
    tell(`${process.stderr.isTTY ? "\n" : ""}${agent} is installed in ${defaultAgentStoreDir()}`);
  }
}

/** One line for each step, which changes on a terminal; elsewhere a line for each message. */
function progressLine(): (progress: Api.InstallProgress) => void {
  let last = "";
  return ({ message, step }) => {
    if (process.stderr.isTTY) {
      process.stderr.write(`${step === last ? "\r\x1b[K" : "\n"}${message}`);
    } else {
      tell(message);
    }
    last = step;
  };
}

async function agents(args: string[]): Promise<void> {
  const { values } = parse(args, { json: { type: "boolean" } }, 0);
  const listing = await createClient().agents.list();
  if (values["json"]) {
    print(JSON.stringify({ store: defaultAgentStoreDir(), ...listing }, null, 2));
    return;
  }
  const rows = listing.agents.map((agent) => [
    agent.name,
    agent.version,
    agent.package,
    agent.installed ? "installed" : "-",
  ]);
  table([["AGENT", "VERSION", "PACKAGE", "STATE"], ...rows]);
  const { entries } = listing;
  print(`\nIn ${defaultAgentStoreDir()}, ${size(sum(entries))}:\n`);
  if (entries.length > 0) {
    const rows = entries.map((entry) => [entry.name, size(entry.bytes), useOf(entry)]);
    table([["ENTRY", "SIZE", "USE"], ...rows]);
  }
}

function useOf({ use, running }: Api.AgentStoreEntry): string {
  const words = { pinned: "this agentvm", "on-request": "on request", unused: "unused" };
  return running ? `${words[use]}, a VM runs on it` : words[use];
}

async function remove(args: string[]): Promise<void> {
  const { positionals } = parse(args, {});
  if (positionals.length === 0) {
    throw new UsageError("remove takes the names of agents, for example: pi or pi@0.87.0");
  }
  const client = createClient();
  for (const agent of positionals) {
    const removed = await client.agents.remove(agent);
    if (removed.length === 0) {
      print(`${agent} is not installed`);
    }
    tellRemoved("removed", removed);
  }
}

async function prune(args: string[]): Promise<void> {
  const { values } = parse(args, { "dry-run": { type: "boolean" } }, 0);
  const dryRun = values["dry-run"] === true;
  const { removed, kept } = await createClient().agents.prune({ dryRun });
  const verb = dryRun ? "would remove" : "removed";
  tellRemoved(verb, removed);
  for (const { name, reason } of kept) {
    print(`kept ${name}: ${reason === "in-use" ? "a VM runs on it" : "it is being installed"}`);
  }
  print(`${verb} ${removed.length} of ${removed.length + kept.length}, ${size(sum(removed))}`);
}

async function doctor(args: string[]): Promise<number> {
  const { values } = parse(args, { json: { type: "boolean" } }, 0);
  const client = createClient();
  const result = await client.doctor();
  print(values["json"] ? JSON.stringify(result, null, 2) : report(result));
  return result.ok ? 0 : 1;
}

async function shell(args: string[]): Promise<number> {
  const end = args.indexOf("--");
  const [own, command] = end < 0 ? [args, []] : [args.slice(0, end), args.slice(end + 1)];
  const { values, positionals } = parse(
    own,
    { user: { type: "string" }, cwd: { type: "string" }, "data-dir": { type: "string" } },
    1,
  );
  const [key] = positionals;
  if (key === undefined) {
    throw new UsageError("shell takes the key of a VM, for example: my-vm; -- begins a command");
  }
  const { user, cwd, "data-dir": dataDir } = values as Record<string, string | undefined>;
  if (user !== undefined && user !== "user" && user !== "root") {
    throw new UsageError(`shell: --user is user or root, not ${user}`);
  }
  await using client = createClient(dataDir === undefined ? {} : { dataDir });
  return await attach(client.vm.getOrCreate(key), command, {
    ...(user !== undefined && { user }),
    ...(cwd !== undefined && { cwd }),
  });
}

function tellRemoved(verb: string, removed: Api.AgentStoreEntry[]): void {
  for (const { name, bytes } of removed) {
    print(`${verb} ${name}, ${size(bytes)}`);
  }
}

const sum = (entries: Api.AgentStoreEntry[]) =>
  entries.reduce((bytes, entry) => bytes + entry.bytes, 0);

const size = (bytes: number) => `${(bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0)} MB`;

function table(rows: string[][]): void {
  const widths = rows.reduce<number[]>(
    (widths, row) => row.map((cell, column) => Math.max(widths[column] ?? 0, cell.length)),
    [],
  );
  for (const row of rows) {
    print(
      row
        .map((cell, column) => cell.padEnd(widths[column] ?? 0))
        .join("  ")
        .trimEnd(),
    );
  }
}

/** `most`: how many words there may be, besides options. */
function parse(
  args: string[],
  options: Record<string, { type: "boolean" | "string" }>,
  most = Number.POSITIVE_INFINITY,
) {
  try {
    const parsed = parseArgs({ args, options, allowPositionals: true });
    const extra = parsed.positionals[most];
    if (extra !== undefined) {
      throw new Error(`Unexpected argument '${extra}'`);
    }
    return parsed;
  } catch (error) {
    throw new UsageError((error as Error).message);
  }
}

/** One that resolves to a number has that as its exit code. */
const COMMANDS: Record<string, (args: string[]) => Promise<unknown>> = {
  install,
  agents,
  remove,
  prune,
  doctor,
  shell,
};

async function main(args: string[]): Promise<number> {
  const [command, ...rest] = args;
  // What follows a -- is for somebody else.
  const own = args.includes("--") ? args.slice(0, args.indexOf("--")) : args;
  if (own.some((word) => word === "--help" || word === "-h")) {
    process.stdout.write(USAGE);
    return 0;
  }
  if (command === "--version") {
    print(require("../package.json").version);
    return 0;
  }
  const run = command !== undefined && Object.hasOwn(COMMANDS, command) && COMMANDS[command];
  if (!run) {
    process.stderr.write(command ? `Unknown command: ${command}\n\n${USAGE}` : USAGE);
    return 2;
  }
  try {
    const code = await run(rest);
    return typeof code === "number" ? code : 0;
  } catch (error) {
    if (!(error instanceof UsageError)) {
      throw error;
    }
    tell(`agentvm ${error.message}`);
    return 2;
  }
}

main(process.argv.slice(2)).then(
  (code) => {
    process.exitCode = code;
  },
  (error: unknown) => {
    tell(error instanceof AgentVmError ? `${error.code}: ${error.message}` : String(error));
    process.exitCode = 1;
  },
);
