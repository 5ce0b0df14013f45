/**
 * The program `claude`. Anthropic's SDK has the MCP servers of a session in its arguments, with their
 * headers and variables; those every user of the machine can read. So they go along as a file that has no
 * name, and that only this program has open.
 */

import { type ChildProcess, spawn } from "node:child_process";
import { randomUUID } from "node:crypto";
import { closeSync, openSync, unlinkSync, writeSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";

const MCP_CONFIG = "--mcp-config";

/** The first one after standard error. */
const DESCRIPTOR = 3;

/** What the SDK wants to start. */
export interface Program {
  command: string;
  args: string[];
  cwd?: string;
  env: NodeJS.ProcessEnv;
  signal: AbortSignal;
}

/** For the SDK's option `spawnClaudeCodeProcess`. */
export function start({ command, args, cwd, env, signal }: Program): ChildProcess {
  const at = args.indexOf(MCP_CONFIG) + 1;
  const config = at === 0 ? undefined : args[at];
  const options = { cwd, env, signal };
  if (config === undefined) {
    return spawn(command, args, { ...options, stdio: ["pipe", "pipe", "inherit"] });
  }
  const file = namelessFile(config);
  try {
    return spawn(command, args.with(at, `/proc/self/fd/${DESCRIPTOR}`), {
      ...options,
      stdio: ["pipe", "pipe", "inherit", file],
    });
  } finally {
    closeSync(file);
  }
}

function namelessFile(content: string): number {
  const path = join(tmpdir(), `agentvm-${randomUUID()}`);
  const file = openSync(path, "wx+", 0o600);
  try {
    unlinkSync(path);
    const bytes = Buffer.from(content);
    for (let written = 0; written < bytes.length; ) written += writeSync(file, bytes, written);
    return file;
  } catch (problem) {
    closeSync(file);
    throw problem;
  }
}
