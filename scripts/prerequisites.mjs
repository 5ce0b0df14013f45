// What has to be on the machine before anything can be built.

import { accessSync, readFileSync } from "node:fs";
import { isAbsolute, resolve } from "node:path";
import { Failure, output, ROOT } from "./command.mjs";

/** @typedef {{ what: string, remedy: string }} Missing */

/** Throws a {@link Failure} that lists everything missing, each with its remedy. */
export function checkBuildPrerequisites() {
  report([...platform(), ...rust(), ...c()]);
}

/** As {@link checkBuildPrerequisites}, for what only the checks need. */
export function checkTestPrerequisites() {
  report([...components(), ...cpp(), ...perl()]);
}

/** @param {Missing[]} missing */
function report(missing) {
  if (missing.length === 0) return;
  const list = missing.map(({ what, remedy }) => `  - ${what}\n    ${remedy}`);
  throw new Failure(`This machine lacks what agentvm is built with:\n${list.join("\n")}`);
}

/** @returns {Missing[]} */
function platform() {
  const missing = [];
  const major = Number(process.versions.node.split(".")[0]);
  if (major < 20) {
    missing.push({
      what: `Node 20 or newer (this is ${process.version})`,
      remedy: "install a current Node, from your distribution or nodejs.org",
    });
  }
  if (process.platform !== "linux" || !["x64", "arm64"].includes(process.arch)) {
    missing.push({
      what: `Linux on x64 or arm64 (this is ${process.platform} on ${process.arch})`,
      remedy: "VMs are made of Linux namespaces: use a Linux machine",
    });
  }
  return missing;
}

/** @returns {Missing[]} */
function rust() {
  const manifest = readFileSync(resolve(ROOT, "Cargo.toml"), "utf8");
  const wanted = /^rust-version = "(\d+)\.(\d+)"/m.exec(manifest);
  if (wanted === null) throw new Error("Cargo.toml names no rust-version");
  const version = `${wanted[1]}.${wanted[2]}`;
  const found = /cargo (\d+)\.(\d+)/.exec(output("cargo", ["--version"]) ?? "");
  if (found === null) {
    return [{ what: `Rust ${version} or newer`, remedy: "install it with rustup (rustup.rs)" }];
  }
  const [major, minor] = [Number(found[1]), Number(found[2])];
  const [wantedMajor, wantedMinor] = [Number(wanted[1]), Number(wanted[2])];
  if (major > wantedMajor || (major === wantedMajor && minor >= wantedMinor)) return [];
  return [
    {
      what: `Rust ${version} or newer (this is ${major}.${minor})`,
      remedy: "rustup update stable",
    },
  ];
}

/** @returns {Missing[]} */
function c() {
  if (output("cc", ["--version"]) === undefined) {
    return [
      {
        what: "a C compiler (SQLite is built in, and Rust links with it)",
        remedy: "apt-get install build-essential, or dnf install gcc glibc-devel glibc-static",
      },
    ];
  }
  // PID 1 of a VM is linked statically. The compiler answers with the bare name of a file it lacks.
  const library = output("cc", ["-print-file-name=libc.a"])?.trim() ?? "";
  if (isAbsolute(library) && exists(library)) return [];
  return [
    {
      what: "the static C library, libc.a (PID 1 of a VM is linked with it)",
      remedy: "apt-get install libc6-dev, or dnf install glibc-static",
    },
  ];
}

/** @returns {Missing[]} */
function components() {
  return ["rustfmt", "clippy"].flatMap((component) => {
    const command = component === "rustfmt" ? "fmt" : component;
    if (output("cargo", [command, "--version"]) !== undefined) return [];
    return [{ what: `cargo ${command}`, remedy: `rustup component add ${component}` }];
  });
}

/** @returns {Missing[]} */
function cpp() {
  if (output("c++", ["--version"]) !== undefined) return [];
  return [
    {
      what: "a C++ compiler (the fuzzer is written in it)",
      remedy: "apt-get install g++, or dnf install gcc-c++",
    },
  ];
}

/** @returns {Missing[]} */
function perl() {
  if (output("perl", ["-e", "1"]) !== undefined) return [];
  return [
    {
      what: "Perl (a test captures packets with it)",
      remedy: "apt-get install perl-base, or dnf install perl-interpreter",
    },
  ];
}

/** @param {string} path */
function exists(path) {
  try {
    accessSync(path);
    return true;
  } catch {
    return false;
  }
}
