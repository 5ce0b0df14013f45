//! Codex: our adapter speaks ACP for the `codex app-server` that it starts.
//!
//! There is an adapter of ACP's own project, `@agentclientprotocol/codex-acp`. It knows no mode that asks
//! without a sandbox of Codex's own inside ours, ends a turn when a permission is refused, and makes text
//! of failed model requests. The protocol of `codex app-server` has all of that.

use std::sync::LazyLock;

use super::catalog::Definition;
use super::pinned::Pinned;

pub(super) const PACKAGES: Pinned = Pinned {
    name: "codex",
    version: "0.166.0",
    package: "@openai/codex",
    manifest: include_str!("locks/codex/package.json"),
    lock: include_str!("locks/codex/package-lock.json"),
    files: &[PROGRAM],
};

const PROGRAM: &str = if cfg!(target_arch = "x86_64") {
    "node_modules/@openai/codex-linux-x64/vendor/x86_64-unknown-linux-musl/bin/codex"
} else {
    "node_modules/@openai/codex-linux-arm64/vendor/aarch64-unknown-linux-musl/bin/codex"
};

pub(super) static CODEX: Definition = Definition {
    name: "codex",
    packages: PACKAGES,
    entry: LazyLock::new(|| PACKAGES.entry()),
    adapter: "codex",
    // The adapter sets it up: what it has to look at is in the VM.
    env: &[],
    finds_transports: false,
    configure: |_, _| {},
};
