/** What tests start from: each has a data directory, VMs and a model of its own, gone when it ends. */

import { execFile } from "node:child_process";
import { chmod, lstat, mkdtemp, readdir, readFile, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import {
  type Agent,
  type AgentEvents,
  AgentVmError,
  type Client,
  type ClientOptions,
  type CreateSessionOptions,
  createClient,
  type Session,
} from "agentvm";
import { expect, inject, onTestFinished } from "vitest";
import { pi } from "./agents/pi.js";
import {
  type ModelServer,
  type ModelServerOptions,
  type Script,
  startModelServer,
} from "./model-server.js";

export const ROOT = resolve(import.meta.dirname, "..");

/** Root of the host, whose VMs have a root of their own. */
export const isRoot = process.getuid?.() === 0;

/** Where Pi is installed already. */
export const agentStoreDir: string = inject("agentStoreDir");

export async function newDirectory(): Promise<string> {
  const path = await mkdtemp(join(tmpdir(), "agentvm-test-"));
  onTestFinished(() => remove(path));
  return path;
}

/** The kernel keeps directories of mode 0 in a VM's layers, which only root can just remove. */
export async function remove(path: string): Promise<void> {
  if (!isRoot) await openUp(path);
  await rm(path, { recursive: true, force: true });
}

/** By bytes: programs may make names that are not UTF-8. */
async function openUp(directory: string | Buffer): Promise<void> {
  await chmod(directory, 0o700);
  for (const name of await readdir(directory, { encoding: "buffer" })) {
    const path = Buffer.concat([Buffer.from(directory), Buffer.from("/"), name]);
    if ((await lstat(path)).isDirectory()) await openUp(path);
  }
}

/** A client that is closed when the test ends. Default: on a data directory of its own. */
export async function newClient(options: ClientOptions = {}): Promise<Client> {
  const dataDir = options.dataDir ?? (await newDirectory());
  const client = createClient({ agentStoreDir, ...options, dataDir });
  onTestFinished(() => client.close());
  return client;
}

/** A VM on a data directory of its own. */
export async function newVm(options: ClientOptions = {}): Promise<Agent> {
  return (await newClient(options)).vm.getOrCreate("vm");
}

export async function newModel(
  script: Script,
  options: Omit<ModelServerOptions, "script"> = {},
): Promise<ModelServer> {
  const model = await startModelServer({ script, ...options });
  onTestFinished(() => model.close());
  return model;
}

/** What Pi has to know of a model. A failed request is not repeated. */
export function envOf(model: ModelServer): Record<string, string> {
  return { ...pi.env(model), ...pi.noRetries };
}

/** A session with Pi in a VM of its own, whose model follows a script. */
export interface PiSession {
  dataDir: string;
  client: Client;
  agent: Agent;
  model: ModelServer;
  session: Session;
  sessionId: string;
}

export async function newPiSession(
  script: Script,
  options: CreateSessionOptions = {},
): Promise<PiSession> {
  const { session, ...pi } = await newPiVm(script);
  const created = await session(options);
  return { ...pi, session: created, sessionId: created.sessionId };
}

/** The same without a session yet. `session()` makes one. */
export async function newPiVm(script: Script, options: ClientOptions = {}) {
  const model = await newModel(script);
  const dataDir = await newDirectory();
  const client = await newClient({
    ...options,
    dataDir,
    loopbackExemptPorts: [model.port, ...(options.loopbackExemptPorts ?? [])],
  });
  const agent = client.vm.getOrCreate("vm");
  return {
    dataDir,
    client,
    agent,
    model,
    session: (options: CreateSessionOptions = {}) =>
      agent.createSession("pi", { env: envOf(model), ...options }),
  };
}

/** A VM with `own-agent.mjs` as the agent `own`. `session()` makes a session with it. */
export async function newOwnVm(options: ClientOptions = {}) {
  const dataDir = options.dataDir ?? (await newDirectory());
  const program = "/home/user/own-agent.mjs";
  const agents = { own: { command: "node", args: [program] } };
  const client = await newClient({ agents, ...options, dataDir });
  const agent = client.vm.getOrCreate("vm");
  await agent.writeFile(program, await readFile(join(ROOT, "__test__/own-agent.mjs")));
  return {
    dataDir,
    client,
    agent,
    session: async (options: CreateSessionOptions = {}) =>
      (await agent.createSession("own", options)).sessionId,
  };
}

/** Resolves to the first value of an event that has the property. */
export function told<E extends keyof AgentEvents>(
  agent: Agent,
  event: E,
  matches: (value: AgentEvents[E]) => boolean = () => true,
): Promise<AgentEvents[E]> {
  return new Promise((resolve) => {
    const off = agent.on(event, (value) => {
      if (!matches(value)) return;
      off();
      resolve(value);
    });
  });
}

/** The error that `run` throws or rejects with: always one of ours. */
export async function failureOf(run: () => unknown): Promise<AgentVmError> {
  try {
    await run();
  } catch (error) {
    expect(error).toBeInstanceOf(AgentVmError);
    return error as AgentVmError;
  }
  throw new Error("it did not fail");
}

/** A promise that the test opens. (`Promise.withResolvers` needs Node 22.) */
export function gate<T = void>(): { opened: Promise<T>; open: (value: T) => void } {
  let open: (value: T) => void = () => {};
  const opened = new Promise<T>((resolve) => {
    open = resolve;
  });
  return { opened, open };
}

export interface Ended {
  code: number | null;
  signal: NodeJS.Signals | null;
  stdout: string;
  stderr: string;
}

/** Runs an ES module that can import "agentvm" in a Node of its own. */
export function runNode(source: string, ...args: string[]): Promise<Ended> {
  return runProgram(["--input-type=module", "--eval", source, "--", ...args]);
}

/** Runs `node` with these arguments, in the checkout. */
export function runProgram(args: string[], env: NodeJS.ProcessEnv = {}): Promise<Ended> {
  const options = { cwd: ROOT, env: { ...process.env, ...env }, timeout: 45_000 };
  return new Promise((resolve) => {
    const child = execFile(process.execPath, args, options, (_failed, stdout, stderr) => {
      resolve({ code: child.exitCode, signal: child.signalCode, stdout, stderr });
    });
  });
}
