// Starting other programs from the drivers in this directory.

import { spawn, spawnSync } from "node:child_process";
import { dirname, resolve } from "node:path";
import { setTimeout } from "node:timers/promises";
import { fileURLToPath } from "node:url";

/** The top of the checkout. */
export const ROOT = resolve(dirname(fileURLToPath(import.meta.url)), "..");

/** A message for the person at the terminal: a stack trace would not help them. */
export class Failure extends Error {
  /** What the program that failed printed last, where somebody reads it later. */
  lastOutput = "";
}

/** Nobody scrolls back in what CI keeps: it may cut the middle out. */
const KEPT_OUTPUT = process.env["CI"] ? 8192 : 0;

/**
 * Runs a program on this terminal, in the checkout.
 *
 * @param {string} program
 * @param {string[]} args
 * @param {{ cwd?: string, env?: NodeJS.ProcessEnv, log?: number }} [options] `env` is added to the
 *   environment; a descriptor `log` gets the output instead of the terminal
 * @returns {Promise<void>} rejects with a {@link Failure} unless it exits with 0
 */
export function run(program, args, { cwd = ROOT, env = {}, log } = {}) {
  return new Promise((done, failed) => {
    const out = log ?? (KEPT_OUTPUT > 0 ? "pipe" : "inherit");
    const child = spawn(program, args, {
      cwd,
      env: { ...process.env, ...env },
      stdio: ["ignore", out, out],
    });
    let lastOutput = "";
    for (const [from, to] of /** @type {const} */ ([
      [child.stdout, process.stdout],
      [child.stderr, process.stderr],
    ])) {
      from?.setEncoding("utf8").on("data", (text) => {
        to.write(text);
        lastOutput = (lastOutput + text).slice(-KEPT_OUTPUT);
      });
    }
    child.on("error", (error) => failed(new Failure(`cannot start ${program}: ${error.message}`)));
    child.on("exit", async (code, signal) => {
      if (code === 0) return done();
      // What is still under way; others may have the pipes open for longer.
      await setTimeout(200);
      const failure = new Failure(`${program} ${args.join(" ")}: ${signal ?? `exit code ${code}`}`);
      failed(Object.assign(failure, { lastOutput }));
    });
  });
}

/**
 * What a program prints, or `undefined` where it can't be started or fails.
 *
 * @param {string} program
 * @param {string[]} args
 * @param {{ cwd?: string }} [options]
 * @returns {string | undefined}
 */
export function output(program, args, { cwd = ROOT } = {}) {
  const result = spawnSync(program, args, {
    cwd,
    encoding: "utf8",
    maxBuffer: 256 * 1024 * 1024,
    stdio: ["ignore", "pipe", "ignore"],
  });
  return result.status === 0 ? result.stdout : undefined;
}

/**
 * The JavaScript program of an installed package, run with the Node that runs this: a `node` found
 * on `PATH` may be another one.
 *
 * @param {string} path below node_modules
 * @param {string[]} args
 * @param {{ cwd?: string, env?: NodeJS.ProcessEnv }} [options]
 */
export function runNode(path, args, options) {
  return run(process.execPath, [resolve(ROOT, "node_modules", path), ...args], options);
}

/**
 * Program and arguments of an npm command: of the npm that runs this, where one does.
 *
 * @param {string[]} args
 * @returns {[string, string[]]}
 */
export function npm(args) {
  const path = process.env["npm_execpath"];
  return path === undefined ? ["npm", args] : [process.execPath, [path, ...args]];
}

/**
 * Announces what may take a while, and says how long it took.
 *
 * @param {string} title
 * @param {() => Promise<void>} work
 */
export async function stage(title, work) {
  const start = performance.now();
  console.log(`── ${title}`);
  await work();
  console.log(`   ${elapsed(start)}`);
}

/**
 * @param {number} since of `performance.now()`
 */
export function elapsed(since) {
  return `${((performance.now() - since) / 1000).toFixed(1)} s`;
}

/**
 * Runs a driver to its end.
 *
 * @param {() => Promise<void>} driver
 */
export async function main(driver) {
  try {
    await driver();
  } catch (error) {
    if (!(error instanceof Failure)) throw error;
    console.error(`\n${error.message}`);
    process.exitCode = 1;
  }
}
