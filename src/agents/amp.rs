//! Amp: our adapter runs its program once for each turn, and speaks ACP for it.
//!
//! The package of the program itself is pinned, not `@ampcode/cli`, which only chooses one for the
//! platform. Only that for x64 could be had when this was pinned: on other processors there is no Amp.

use std::sync::LazyLock;

use super::catalog::Definition;
use super::pinned::Pinned;

pub(super) const PACKAGES: Pinned = Pinned {
    name: "amp",
    version: "0.0.1790142911-g7618fb",
    package: "@ampcode/cli-linux-x64",
    manifest: include_str!("locks/amp/package.json"),
    lock: include_str!("locks/amp/package-lock.json"),
    files: &["node_modules/@ampcode/cli-linux-x64/amp"],
};

pub(super) static AMP: Definition = Definition {
    name: "amp",
    packages: PACKAGES,
    entry: LazyLock::new(|| PACKAGES.entry()),
    adapter: "amp",
    // The adapter sets it up.
    env: &[],
    finds_transports: true,
    configure: |_, _| {},
};
