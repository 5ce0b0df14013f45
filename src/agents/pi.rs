//! Pi: our adapter hosts its SDK in one Node process.

use std::sync::LazyLock;

use super::catalog::Definition;
use super::launch::SessionSpec;
use super::pinned::Pinned;
use crate::vm::GuestPath;

pub(super) const PACKAGES: Pinned = Pinned {
    name: "pi",
    version: "0.87.1",
    package: "@earendil-works/pi-coding-agent",
    manifest: include_str!("locks/pi/package.json"),
    lock: include_str!("locks/pi/package-lock.json"),
    files: &["node_modules/@earendil-works/pi-coding-agent/dist/index.js"],
};

pub(super) static PI: Definition = Definition {
    name: "pi",
    packages: PACKAGES,
    entry: LazyLock::new(|| PACKAGES.entry()),
    adapter: "pi",
    // It asks nobody but the model's provider: no update check, no download, no telemetry.
    env: &[
        ("PI_OFFLINE", "1"),
        ("PI_SKIP_VERSION_CHECK", "1"),
        ("PI_TELEMETRY", "0"),
    ],
    finds_transports: true,
    configure: |session, launch| launch.lock_dirs = lock_dirs(session).into(),
};

fn lock_dirs(session: &SessionSpec<'_>) -> [String; 2] {
    let home = session.variable("HOME").unwrap_or(GuestPath::HOME);
    let own = session.variable("PI_CODING_AGENT_DIR");
    [
        own.map_or_else(|| format!("{home}/.pi/agent"), str::to_owned),
        // Of the project.
        format!("{}/.pi", session.cwd.as_str()),
    ]
}
