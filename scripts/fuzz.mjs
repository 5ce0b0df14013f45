// npm run fuzz [-- seconds]: each target of fuzz/ for a while, on the stable toolchain. The flags
// are what cargo-fuzz passes, less the address sanitizer, which needs nightly.

import { closeSync, mkdirSync, openSync, readdirSync, readFileSync } from "node:fs";
import { basename, join } from "node:path";
import { pathToFileURL } from "node:url";
import { Failure, main, output, ROOT, run } from "./command.mjs";

const COVERAGE = [
  "--cfg=fuzzing",
  "-Cpasses=sancov-module",
  "-Cllvm-args=-sanitizer-coverage-level=4",
  "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
  "-Cllvm-args=-sanitizer-coverage-pc-table",
  "-Cllvm-args=-sanitizer-coverage-trace-compares",
  "-Ccodegen-units=1",
];

/** @param {number} seconds for each target */
export async function fuzz(seconds) {
  const target = /^host: (.*)$/m.exec(output("rustc", ["-vV"]) ?? "")?.[1];
  if (target === undefined) throw new Failure("rustc -vV names no host");
  const directory = join(ROOT, "fuzz");
  // With --target, build scripts and macros are compiled without these flags.
  const args = ["build", "--release", "--locked", "--bins", "--target", target];
  await run("cargo", args, {
    cwd: directory,
    env: { CARGO_ENCODED_RUSTFLAGS: COVERAGE.join("\x1f"), CARGO_TARGET_DIR: undefined },
  });
  for (const file of readdirSync(join(directory, "fuzz_targets"))) {
    const name = basename(file, ".rs");
    await fuzzTarget(directory, name, join(directory, "target", target, "release", name), seconds);
  }
}

/**
 * @param {string} directory
 * @param {string} name
 * @param {string} program
 * @param {number} seconds
 */
async function fuzzTarget(directory, name, program, seconds) {
  // What it finds goes into the first; the second is committed.
  const corpus = [join(directory, "corpus", name), join(directory, "seeds", name)];
  const artifacts = join(directory, "artifacts", name);
  for (const path of [...corpus, artifacts]) mkdirSync(path, { recursive: true });
  const logFile = join(artifacts, "log");
  const log = openSync(logFile, "w");
  try {
    const limits = ["-max_len=65536", "-rss_limit_mb=1024", "-timeout=5"];
    const time = `-max_total_time=${seconds}`;
    await run(program, [time, `-artifact_prefix=${artifacts}/`, ...limits, ...corpus], { log });
  } catch (error) {
    console.error(readFileSync(logFile, "utf8").slice(-8000));
    throw error;
  } finally {
    closeSync(log);
  }
  const done = /^Done .*$/m.exec(readFileSync(logFile, "utf8"))?.[0];
  console.log(`${name}: ${done ?? "ended early"}`);
}

if (import.meta.url === pathToFileURL(process.argv[1] ?? "").href) {
  await main(() => fuzz(Number(process.argv[2] ?? 60)));
}
