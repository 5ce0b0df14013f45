#!/usr/bin/env node
/** `opencode acp` on standard input and output, with what it leaves out. */

import { type ChildProcessByStdio, spawn } from "node:child_process";
import { randomBytes } from "node:crypto";
import { existsSync } from "node:fs";
import { mkdir, readFile, writeFile } from "node:fs/promises";
import { homedir } from "node:os";
import { join } from "node:path";
import type { Readable, Writable } from "node:stream";
import { setTimeout as sleep } from "node:timers/promises";
import { Bridge } from "./bridge.js";
import { asks, configure } from "./configuration.js";
import { configurationDirectories, needNothing } from "./downloads.js";
import { type Json, parseJsonc } from "./jsonc.js";
import { lines, writeLine } from "./lines.js";
import { openCode, ripgrep } from "./packages.js";
import { actsUnasked, instructionsOf } from "./project.js";
import { freePort, Server } from "./server.js";
import { describe, ErrorCode } from "./shared/errors.js";
import { takeStdout } from "./shared/stdout.js";

type Child = ChildProcessByStdio<Writable, Readable, null>;

/** Between two looks for a server that is starting. */
const POLL_MS = 20;

/** How long an answer is waited for. */
const ANSWER_MS = 200;

/** How often another port is tried: somebody else may have been quicker. */
const PORTS = 5;

const { env } = process;
const home = env.HOME ?? homedir();
const stateDir = env.AGENTVM_STATE_DIR ?? join(home, ".local/state/agentvm-opencode");

process.on("uncaughtException", die);
process.on("unhandledRejection", die);

let child: Child | undefined;
for (const signal of ["SIGTERM", "SIGINT", "SIGHUP"] as const) {
  process.on(signal, () => child?.kill(signal));
}
process.on("exit", () => child?.kill("SIGKILL"));

const output = takeStdout();
// The client is gone when it closes either end; its other end says so.
output.on("error", () => {});
const [variables, maxRetries] = await set().catch(refuseAll);
for (let left = PORTS; ; left -= 1) {
  const server = new Server(await freePort(), randomBytes(16).toString("hex"));
  child = start(server);
  const bridge = new Bridge({
    server,
    input: process.stdin,
    output,
    child,
    asks: asks(env),
    maxRetries,
  });
  const running = child;
  const exited = new Promise<number>((resolve) => {
    running.once("exit", (code) => resolve(code ?? 1));
  });
  if (!(await isOurs(server, running)) && left > 1) continue;
  void follow(server, bridge, running);
  await Promise.all([bridge.serveAgent(), Promise.race([bridge.serveClient(), exited])]);
  process.exitCode = await exited;
  break;
}
await new Promise((resolve) => output.end(resolve));
process.exit();

async function set(): Promise<[Record<string, string>, number | undefined]> {
  return [await prepare(), wholeNumber("AGENTVM_MAX_RETRIES")];
}

/** Answers every request with what is wrong with the session's environment. */
async function refuseAll(wrong: unknown): Promise<never> {
  const error = { code: ErrorCode.invalidParams, message: describe(wrong) };
  for await (const line of lines(process.stdin)) {
    const { id } = JSON.parse(line.toString()) as { id?: unknown };
    if (id === undefined) continue;
    await writeLine(output, JSON.stringify({ jsonrpc: "2.0", id, error }));
  }
  process.exit(0);
}

/** The variables that OpenCode gets beside the session's own. */
async function prepare(): Promise<Record<string, string>> {
  const config = join(env.XDG_CONFIG_HOME || join(home, ".config"), "opencode");
  const files = ["config.json", "opencode.json", "opencode.jsonc"].map((name) =>
    join(config, name),
  );
  if (env.OPENCODE_CONFIG) files.push(env.OPENCODE_CONFIG);
  const logins = join(env.XDG_DATA_HOME || join(home, ".local/share"), "opencode/auth.json");
  const unasked = asks(env) ? actsUnasked(process.cwd()) : undefined;
  if (unasked !== undefined) {
    console.error(`The project's configuration is not used: ${unasked} could act unasked`);
  }
  const configured = configure({
    env,
    stateDir,
    projectInstructions: unasked === undefined ? undefined : instructionsOf(process.cwd()),
    userConfigs: (await Promise.all(files.map(read))).filter((config) => config !== undefined),
    hasOpenCodeLogin: (await read(logins))?.opencode !== undefined,
  });
  await mkdir(stateDir, { recursive: true });
  await writeFile(join(stateDir, "defaults.json"), JSON.stringify(configured.defaults));
  await Promise.all(
    configurationDirectories(process.cwd(), env).map((directory) =>
      // OpenCode works all the same, after a download.
      needNothing(directory).catch((error: unknown) => console.error(String(error))),
    ),
  );
  const search = ripgrep();
  return {
    ...configured.env,
    ...(search === undefined ? {} : { PATH: [env.PATH, search].filter(Boolean).join(":") }),
  };
}

/** What a file of the user holds; OpenCode itself says what is wrong with it. */
async function read(path: string): Promise<Json | undefined> {
  if (!existsSync(path)) return undefined;
  try {
    return parseJsonc(await readFile(path, "utf8"));
  } catch {
    return undefined;
  }
}

function start({ port, password }: Server): Child {
  const args = ["acp", "--hostname", "127.0.0.1", "--port", String(port)];
  const started = spawn(openCode(), args, {
    env: { ...env, ...variables, OPENCODE_SERVER_PASSWORD: password },
    stdio: ["pipe", "pipe", "inherit"],
  });
  // It has exited: that is what counts.
  started.stdin.on("error", () => {});
  return started;
}

/** Resolves when the server is there: to false when it is somebody else's. */
async function isOurs(server: Server, running: Child): Promise<boolean> {
  while (isRunning(running)) {
    try {
      await server.health(AbortSignal.timeout(ANSWER_MS));
      return true;
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === undefined) {
        console.error(String(error));
        running.kill("SIGKILL");
        return false;
      }
      await sleep(POLL_MS);
    }
  }
  return false;
}

async function follow(server: Server, bridge: Bridge, running: Child): Promise<void> {
  while (isRunning(running)) {
    // One that breaks off is opened again, as OpenCode's own ACP does.
    await server.events((event) => bridge.onEvent(event)).catch(() => {});
    await sleep(POLL_MS);
  }
}

function isRunning({ exitCode, signalCode }: Child): boolean {
  return exitCode === null && signalCode === null;
}

function wholeNumber(name: string): number | undefined {
  const text = env[name];
  if (text === undefined || text === "") return undefined;
  if (!/^\d{1,9}$/.test(text)) throw new Error(`${name} must be a whole number, not "${text}"`);
  return Number(text);
}

function die(error: unknown): never {
  process.stderr.write(`${error instanceof Error ? error.stack : String(error)}\n`);
  process.exit(1);
}
