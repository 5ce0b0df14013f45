// npm test: every check there is, from a bare clone, the quick ones first.
//
//   npm test -- --list               names the steps
//   npm test -- --only rust,vitest   runs these alone, without building anything first
//
// It stops at the first failure; with CI set it goes on with what the failure leaves meaningful.

import { mkdirSync, statfsSync, writeFileSync } from "node:fs";
import { join, resolve } from "node:path";
import { parseArgs } from "node:util";
import { adapters, build, setUp, sourceProjects, tsc } from "./build.mjs";
import { provide } from "./cargo-tools.mjs";
import { elapsed, Failure, main, output, ROOT, run, runNode } from "./command.mjs";
import { provideDebianPackages } from "./debian-packages.mjs";
import { fuzz } from "./fuzz.mjs";
import { asOrdinaryUser } from "./ordinary-user.mjs";
import { checkPackedPackage } from "./packed.mjs";
import { checkTestPrerequisites } from "./prerequisites.mjs";

/**
 * @typedef {object} Step
 * @property {string} name
 * @property {string} what
 * @property {string} [needs]
 * @property {true} [root]
 * @property {() => Promise<void | string[]>} run resolves to what it had to leave out
 */

const FUZZ_SECONDS = 5;

// The user's tests run Vite without its usual habit of writing beside its configuration.
const VITEST = ["run", "--configLoader", "native"];
const VITEST_PROGRAM = "vitest/vitest.mjs";
const JEST_PROGRAM = "jest/bin/jest.js";

/** @type {Step[]} */
const STEPS = [
  {
    name: "format",
    what: "rustfmt",
    async run() {
      await run("cargo", ["fmt", "--all", "--check"]);
      await run("cargo", ["fmt", "--manifest-path", "fuzz/Cargo.toml", "--check"]);
    },
  },
  {
    name: "lint",
    what: "Biome: formatting and lints of TypeScript, JavaScript and JSON",
    run: () => runNode("@biomejs/biome/bin/biome", ["ci", "--error-on-warnings", "."]),
  },
  {
    name: "clippy",
    what: "clippy, pedantic, on everything",
    run: () =>
      run("cargo", [
        "clippy",
        "--workspace",
        "--all-targets",
        "--keep-going",
        "--locked",
        "--",
        "-Dwarnings",
      ]),
  },
  {
    name: "licences",
    what: "cargo deny: licences, bans, sources",
    async run() {
      await provide("deny");
      await run("cargo", ["fetch", "--locked"]);
      const checks = ["check", "--hide-inclusion-graph", "bans", "licenses", "sources"];
      await run("cargo", ["deny", "--offline", "--locked", ...checks]);
    },
  },
  {
    name: "unused",
    what: "cargo machete: no dependency that nothing uses",
    async run() {
      await provide("machete");
      await run("cargo", ["machete"]);
    },
  },
  { name: "build", what: "the addon, the guest, the TypeScript", run: () => build() },
  {
    name: "types",
    what: "tsc on everything, tests and examples included",
    needs: "build",
    async run() {
      const tests = adapters().map((adapter) => `${adapter}/tsconfig.test.json`);
      for (const project of [".", ...sourceProjects(), ...tests]) {
        await tsc(["--noEmit", "--project", project]);
      }
    },
  },
  {
    name: "api",
    what: "tsd: index.d.ts accepts and rejects what it should",
    run: () => runNode("tsd/dist/cli.js", []),
  },
  {
    name: "rust",
    what: "Rust unit and integration tests",
    async run() {
      await provide("nextest");
      await run("cargo", ["nextest", "run", "--workspace", "--locked"]);
    },
  },
  {
    name: "layers",
    what: "what each layer of the isolation is for, shown without it",
    async run() {
      await provide("nextest");
      const weaken = ["--locked", "--features", "weaken"];
      await run("cargo", ["nextest", "run", ...weaken, "--test", "it", "weakened::"]);
      // What it costs is measured by hand; it is to compile.
      await run("cargo", ["build", ...weaken, "--bench", "hardening"]);
    },
  },
  {
    name: "vitest",
    what: "the built package",
    needs: "build",
    async run() {
      const missing = await provideDebianPackages();
      await runNode(VITEST_PROGRAM, VITEST);
      return missing.map((name) => `tests with ${name}. Install it: apt-get install ${name}`);
    },
  },
  {
    name: "adapters",
    what: "the agents' ACP adapters, on the Node that they have in a VM",
    needs: "build",
    async run() {
      const node = resolve(ROOT, `adapters/node_modules/node-linux-${process.arch}/bin/node`);
      const vitest = resolve(ROOT, "node_modules", VITEST_PROGRAM);
      for (const adapter of adapters()) {
        await run(node, [vitest, ...VITEST], { cwd: resolve(ROOT, adapter) });
      }
    },
  },
  {
    name: "jest",
    what: "the built package under Jest, from CommonJS",
    needs: "build",
    run: () => runNode(JEST_PROGRAM, ["--config", "jest.config.cjs"]),
  },
  {
    name: "packed",
    what: "what npm would publish, installed into an empty project",
    needs: "build",
    run: checkPackedPackage,
  },
  {
    name: "user",
    what: "Rust, Vitest and Jest tests again, as an ordinary user",
    needs: "build",
    root: true,
    run: testAsOrdinaryUser,
  },
  {
    name: "fuzz",
    what: `fuzz targets, ${FUZZ_SECONDS} s each`,
    run: () => fuzz(FUZZ_SECONDS),
  },
];

async function testAsOrdinaryUser() {
  await provide("nextest");
  const nextest = which("cargo-nextest");
  const binaries = capture("cargo", [
    ...["nextest", "list", "--workspace", "--locked"],
    ...["--list-type", "binaries-only", "--message-format", "json"],
  ]);
  const metadata = capture("cargo", ["metadata", "--format-version", "1", "--locked"]);
  const built = join(ROOT, "target", "ordinary-user");
  mkdirSync(built, { recursive: true });
  writeFileSync(join(built, "binaries.json"), binaries);
  writeFileSync(join(built, "metadata.json"), metadata);

  await asOrdinaryUser({ "cargo-nextest": nextest }, async ({ checkout, bin }, runAs) => {
    const there = join(checkout, "target", "ordinary-user");
    const node = join(bin, "node");
    const runs = [
      () =>
        runAs(join(bin, "cargo-nextest"), [
          ...["nextest", "run"],
          ...["--binaries-metadata", join(there, "binaries.json")],
          ...["--cargo-metadata", join(there, "metadata.json")],
          ...["--workspace-remap", checkout, "--target-dir-remap", join(checkout, "target")],
        ]),
      () => runAs(node, [join(checkout, "node_modules", VITEST_PROGRAM), ...VITEST]),
      () => {
        const configured = ["--config", "jest.config.cjs"];
        return runAs(node, [join(checkout, "node_modules", JEST_PROGRAM), ...configured]);
      },
    ];
    let failure;
    for (const one of runs) {
      try {
        await one();
      } catch (error) {
        if (!(error instanceof Failure)) throw error;
        if (failure) failure.lastOutput += error.lastOutput;
        else failure = error;
        // As between steps: with CI set, all failures are told.
        if (!process.env["CI"]) break;
      }
    }
    if (failure) throw failure;
  });
}

/**
 * @param {string} program
 * @param {string[]} args
 */
function capture(program, args) {
  const text = output(program, args);
  if (text === undefined) throw new Failure(`${program} ${args.join(" ")} failed`);
  return text;
}

/** @param {string} program */
function which(program) {
  return capture("sh", ["-c", `command -v ${program}`]).trim();
}

/** What fills the disk fails tests that have nothing to do with it. */
function freeDisk() {
  const { bavail, bsize } = statfsSync(ROOT);
  return `${((bavail * bsize) / 1e9).toFixed(1)} GB`;
}

/** @returns {Step[]} */
function chosenSteps() {
  const { values } = parseArgs({
    options: { only: { type: "string" }, list: { type: "boolean", default: false } },
  });
  if (values.list) {
    for (const { name, what } of STEPS) console.log(`${name.padEnd(10)}${what}`);
    process.exit();
  }
  if (values.only === undefined) return STEPS;
  const names = values.only.split(",");
  const unknown = names.find((name) => !STEPS.some((step) => step.name === name));
  if (unknown !== undefined) throw new Failure(`no step ${unknown}; npm test -- --list names them`);
  return STEPS.filter(({ name }) => names.includes(name)).map(({ needs, ...step }) => step);
}

await main(async () => {
  const steps = chosenSteps();
  const isRoot = process.getuid?.() === 0;
  const start = performance.now();
  // Nobody compiles a clean checkout a second time; what that would need is a third of `target`.
  if (process.env["CI"]) process.env["CARGO_INCREMENTAL"] = "0";
  console.log(`${freeDisk()} left on the disk; all of it takes about 8`);
  await setUp();
  checkTestPrerequisites();

  /** @type {Map<string, "passed" | "failed" | "skipped">} */
  const results = new Map();
  /** @type {string[]} */
  const notes = [];
  /** @type {string[]} */
  const failures = [];
  for (const step of steps) {
    const stopped = !process.env["CI"] && [...results.values()].includes("failed");
    const needed = step.needs === undefined ? "passed" : results.get(step.needs);
    if (stopped || needed !== "passed") {
      results.set(step.name, "skipped");
      continue;
    }
    if (step.root && !isRoot) {
      notes.push(
        `NOT RUN: ${step.name}. You are an ordinary user: the tests ran as you, and not as root.`,
      );
      results.set(step.name, "skipped");
      continue;
    }
    console.log(`\n── ${step.name}: ${step.what}`);
    const stepStart = performance.now();
    try {
      for (const left of (await step.run()) ?? []) notes.push(`NOT RUN: ${left}`);
      results.set(step.name, "passed");
    } catch (error) {
      console.error(error instanceof Failure ? error.message : error);
      if (error instanceof Failure && error.lastOutput) {
        failures.push(`\n── the end of ${step.name}:\n${error.lastOutput}`);
      }
      results.set(step.name, "failed");
    }
    const took = `in ${elapsed(stepStart)}, with ${freeDisk()} left on the disk`;
    const summary = `${step.name} ${results.get(step.name)} ${took}`;
    notes.push(summary);
    console.log(`── ${summary}`);
  }

  for (const failure of failures) console.log(failure);
  const count = (/** @type {string} */ result) =>
    [...results.values()].filter((value) => value === result).length;
  console.log(`\nAll of it, in ${elapsed(start)}:\n${notes.map((note) => `  ${note}`).join("\n")}`);
  const skipped = count("skipped") === 0 ? "" : `, ${count("skipped")} skipped`;
  console.log(`checks: ${count("passed")} passed, ${count("failed")} failed${skipped}`);
  if (count("failed") > 0) process.exitCode = 1;
});
