// The cargo subcommands that the checks need.

import { homedir } from "node:os";
import { delimiter, join, resolve } from "node:path";
import { output, run, stage } from "./command.mjs";

/**
 * Any version of the same minor series that is already on the machine will do. Built without
 * optimisation: they compile in half of the time and then run for a second.
 */
const TOOLS = {
  deny: { crate: "cargo-deny", version: "0.20.2", flags: ["--no-default-features"] },
  machete: { crate: "cargo-machete", version: "0.9.2", flags: [] },
  nextest: {
    crate: "cargo-nextest",
    version: "0.9.143",
    flags: ["--no-default-features", "--features", "default-no-update"],
  },
};

/** Shared by all checkouts of this user: building the tools takes minutes. */
const CACHE = join(
  process.env["XDG_CACHE_HOME"] || join(homedir(), ".cache"),
  "agentvm-development",
);

/**
 * Makes `cargo <name>` work for this process and what it starts.
 *
 * @param {keyof typeof TOOLS} name
 */
export async function provide(name) {
  const { crate, version, flags } = TOOLS[name];
  if (isRight(name)) return;
  const root = join(CACHE, `${crate}-${version}`);
  process.env["PATH"] = [join(root, "bin"), process.env["PATH"]].join(delimiter);
  if (isRight(name)) return;
  const args = ["install", "--locked", "--debug", ...flags, "--root", root, `${crate}@${version}`];
  await stage(`${crate} (cargo install into ${root}: minutes, once for all checkouts)`, () =>
    run("cargo", args, {
      cwd: resolve("/"),
      env: { CARGO_PROFILE_DEV_DEBUG: "0", CARGO_TARGET_DIR: undefined, RUSTFLAGS: undefined },
    }),
  );
}

/** @param {keyof typeof TOOLS} name */
function isRight(name) {
  const { crate, version } = TOOLS[name];
  const series = version.slice(0, version.lastIndexOf("."));
  // Some name themselves before the version, some print it alone.
  const printed = output("cargo", [name, "--version"])?.split("\n", 1)[0];
  return printed?.replace(`${crate} `, "").startsWith(`${series}.`) ?? false;
}
