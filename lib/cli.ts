#!/usr/bin/env node
/** `npx agentvm …` */

import { type ParseArgsConfig, parseArgs } from "node:util";
import type * as Api from "../index";
import { createClient, defaultAgentStoreDir, defaultDataDir } from "./client";
import { report } from "./doctor";
import { AgentVmError } from "./errors";
import { IMAGE_OPTIONS, images as imageCommand } from "./image-command";
import { attach } from "./shell";
import { keyText, requireVm, SHELL_OPTIONS, shellOptions, vmOptions } from "./shell-command";
import { print, progressLine, size, sum, table, tell, time } from "./terminal-output";
import { UsageError } from "./usage-error";

const USAGE = `Usage: agentvm <command>

  install <agent>[@version] …   Put agents, with a Node and npm of their own, into the agent store;
                                createSession does the same with one that is missing.
                                Without a version: the pinned one. --all: every agent.
  agents [--json]               List the agents, and what is in the store.
  remove <agent>[@version] …    Remove agents from the store. Without a version: all of them.
  prune [--dry-run]             Remove from the store what this version of agentvm does not use.
  shell <key> … [-- command …]  Open a shell in a VM, or run a command in it, on this terminal; without
                                one, with stdin, stdout and stderr as they are. A key of several parts is
                                several words. The exit code is that of the command, or 128 and the
                                signal that ended it; 127 if it, or --cwd, is not found, 126 if it can't
                                be run. The VM must not run in another process.
      --create                  Make the VM, if there is none of this key.
      --user root, --cwd <directory>, --env <name>=<value> (any number)
      --mount <host>:<vm>[:ro]  A directory or file of the host in the VM (any number).
      --memory 512m, --cpus 1.5, --pids 200, --disk 2g
                                Limits; memory and disk in bytes, or with k, m, g, t.
      --loopback-port <port>    A port of the host's loopback that the VM may reach (any number).
      --network public|none|allowlist, --allow <rule>, --deny <rule> (any number)
                                What else it may reach. Like all that says how it is booted, a VM does
                                not remember it, but for its image.
      --image <name>, --rootfs <directory>
                                What it is booted from, instead of the host's programs.
      --data-dir <directory>    Default: $AGENTVM_DATA_DIR, else $XDG_DATA_HOME/agentvm, else
                                ~/.local/share/agentvm.
  ls [--json] [--data-dir …]    List the VMs of a data directory, by key.
  images [list] [--json]        List the images that VMs were booted from, and how many VMs need each.
  images pull <name> …          Fetch images, as python:3.12, before a VM needs them.
  images rm <name> …            Remove images, by name or digest, that no VM was made with.
  images prune [--dry-run]      Remove all that no VM was made with, layers of pulls that ended early, and
                                what VMs of --data-dir shared of earlier states of the host.
  doctor [--json]               Try what VMs need of this host, and boot a temporary one. Says of all that
                                is not there what is lost without it, and how to enable it.
                                Exit code 1: no VM can run here.
  --version                     Print the version.
  -h, --help                    Print this.

A command line that makes no sense has the exit code 2, other failures have 1.

What running VMs use is never removed. A version that is not the pinned one is resolved by npm when it
is installed, and is not tested with this agentvm.

The store is $AGENTVM_CACHE_DIR/agents, else $XDG_CACHE_HOME/agentvm/agents, else
~/.cache/agentvm/agents.
`;

async function install(args: string[]): Promise<void> {
  const { values, positionals } = parse("install", args, { all: { type: "boolean" } });
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

async function agents(args: string[]): Promise<void> {
  const { values } = parse("agents", args, { json: { type: "boolean" } }, 0);
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
  const { positionals } = parse("remove", args, {});
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
  const { values } = parse("prune", args, { "dry-run": { type: "boolean" } }, 0);
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
  const { values } = parse("doctor", args, { json: { type: "boolean" } }, 0);
  const client = createClient();
  const result = await client.doctor();
  print(values["json"] ? JSON.stringify(result, null, 2) : report(result));
  return result.ok ? 0 : 1;
}

async function shell(args: string[]): Promise<number> {
  const end = args.indexOf("--");
  const [own, command] = end < 0 ? [args, []] : [args.slice(0, end), args.slice(end + 1)];
  const { values, positionals: key } = parse("shell", own, SHELL_OPTIONS);
  if (key.length === 0) {
    throw new UsageError("shell takes the key of a VM, for example: my-vm; -- begins a command");
  }
  const { create, "data-dir": dataDir = defaultDataDir() } = values;
  const [options, boot] = [shellOptions(values), vmOptions(values)];
  await using client = createClient({ dataDir });
  if (!create) {
    await requireVm(client, key, dataDir);
  }
  return await attach(client.vm.getOrCreate(key, boot), command, options);
}

async function ls(args: string[]): Promise<void> {
  const { values } = parse(
    "ls",
    args,
    { json: { type: "boolean" }, "data-dir": { type: "string" } },
    0,
  );
  const { json, "data-dir": dataDir = defaultDataDir() } = values;
  const vms = await createClient({ dataDir }).vm.list();
  if (json) {
    print(JSON.stringify({ dataDir, vms }, null, 2));
  } else if (vms.length === 0) {
    print(`There is no VM in ${dataDir}`);
  } else {
    const rows = vms.map(({ key, createdAt }) => [keyText(key), time(createdAt)]);
    table([["KEY", "MADE (UTC)"], ...rows]);
  }
}

async function images(args: string[]): Promise<void> {
  const { values, positionals } = parse("images", args, IMAGE_OPTIONS);
  await imageCommand(positionals, values);
}

function tellRemoved(verb: string, removed: Api.AgentStoreEntry[]): void {
  for (const { name, bytes } of removed) {
    print(`${verb} ${name}, ${size(bytes)}`);
  }
}

type Options = NonNullable<ParseArgsConfig["options"]>;

/** `most`: how many words there may be, besides options. */
function parse<const T extends Options>(
  command: string,
  args: string[],
  options: T,
  most = Number.POSITIVE_INFINITY,
) {
  const parsed = parsedArgs(command, args, options);
  const extra = parsed.positionals[most];
  if (extra !== undefined) {
    throw new UsageError(`${command}: it takes options alone, not ${extra}`);
  }
  return parsed;
}

function parsedArgs<const T extends Options>(command: string, args: string[], options: T) {
  try {
    return parseArgs({ args, options, allowPositionals: true });
  } catch (error) {
    // Its messages are for who has written the options, not for who uses them.
    throw new UsageError(`${command}: ${problemOf(args, options) ?? (error as Error).message}`);
  }
}

/** Why `parseArgs` refuses a command line. */
function problemOf(args: string[], options: Options): string | undefined {
  const { tokens } = parseArgs({ args, options, strict: false, tokens: true });
  for (const token of tokens) {
    if (token.kind !== "option") continue;
    const { name, rawName, value, inlineValue } = token;
    if (!Object.hasOwn(options, name)) {
      const known = Object.keys(options).map((option) => `--${option}`);
      return `there is no option ${rawName}: there is ${known.join(", ") || "none"}`;
    }
    const takesValue = options[name]?.type === "string";
    if (!takesValue && value !== undefined) {
      return `${rawName} takes no value`;
    }
    if (takesValue && (value === undefined || (!inlineValue && /^-./.test(value)))) {
      return `${rawName} takes a value; one that begins with - is written as ${rawName}=-…`;
    }
  }
  return undefined;
}

/** One that resolves to a number has that as its exit code. */
const COMMANDS: Record<string, (args: string[]) => Promise<unknown>> = {
  install,
  agents,
  remove,
  prune,
  doctor,
  shell,
  ls,
  images,
};

/** What the usage says of a command. */
function usageOf(command = ""): string | undefined {
  if (!Object.hasOwn(COMMANDS, command)) {
    return undefined;
  }
  const [head, ...parts] = USAGE.split(/^ {2}(?=\S)/m);
  const own = parts.filter((part) => part.split(" ")[0] === command);
  return [head, ...own].join("  ");
}

const HELP = "`agentvm --help` explains all commands";

async function main(args: string[]): Promise<number> {
  const [command, ...rest] = args;
  // What follows a -- is for somebody else.
  const own = args.includes("--") ? args.slice(0, args.indexOf("--")) : args;
  if (command === "help" || own.some((word) => word === "--help" || word === "-h")) {
    process.stdout.write(usageOf(command) ?? USAGE);
    return 0;
  }
  if (command === "--version") {
    print(require("../package.json").version);
    return 0;
  }
  const run = command !== undefined && Object.hasOwn(COMMANDS, command) && COMMANDS[command];
  if (!run) {
    if (command === undefined) {
      process.stderr.write(USAGE);
    } else {
      tell(`INVALID_ARGUMENT: there is no command ${command}\n${HELP}`);
    }
    return 2;
  }
  try {
    const code = await run(rest);
    return typeof code === "number" ? code : 0;
  } catch (error) {
    if (!(error instanceof UsageError)) {
      throw error;
    }
    tell(`INVALID_ARGUMENT: agentvm ${error.message}\n${HELP}`);
    return 2;
  }
}

// Who reads what comes is gone, as `head` is: nothing is wrong with that.
process.stdout.on("error", (error: NodeJS.ErrnoException) => {
  if (error.code !== "EPIPE") {
    tell(`agentvm can't write what it has to say: ${error.message}`);
    process.exit(1);
  }
});

main(process.argv.slice(2)).then(
  (code) => {
    process.exitCode = code;
  },
  (error: unknown) => {
    tell(error instanceof AgentVmError ? `${error.code}: ${error.message}` : String(error));
    // Of a command line that nobody here has looked at.
    process.exitCode = error instanceof AgentVmError && error.code === "INVALID_ARGUMENT" ? 2 : 1;
  },
);
