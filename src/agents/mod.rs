//! What differs between agents: packages, launch, environment, state.
//!
//! An [`Agent`] is built in, or a client's [`OwnAgent`]: any program of the VM that speaks ACP. Only what
//! is built in is installed, into the agent store.
//!
//! # The agent store
//!
//! One directory of the host, shared by all VMs and processes and mounted read-only into every VM at
//! [`crate::vm::namespace::AGENTS`]. It holds *entries*, each made once and never changed:
//!
//! - a **runtime**, `node-<version>-<hash>`: Node with npm, `bin/` ready for a `PATH`;
//! - **agents**, `<name>-<version>-<hash>`: an npm package with its dependencies, and beside them
//!   our ACP adapter for it, `adapter-<hash>/`.
//!
//! What is in an entry is pinned by a `package-lock.json` that is part of this crate
//! (`locks/`): npm checks every package against the hash in it. `<hash>` is derived from that
//! lockfile, so another lockfile makes another entry and whoever runs on the old one keeps it. A version
//! that somebody asks for by its number has no lockfile here: npm makes one, which stays in the entry,
//! `<name>-<version>-unpinned-<hash>`.
//!
//! An entry appears by one `rename` of a complete, checked and synced directory. Before that it is a
//! `.partial-*` directory that belongs to the holder of the entry's lock (`.locks/<entry>`); whoever
//! finds the lock free knows that the partial directories of that entry are left over and removes
//! them.
//!
//! Whoever runs on an entry holds a [`Lease`] of it (`.locks/<entry>.use`). Removal takes the entry's
//! lock and the whole of its lease, or leaves it, and begins with a rename to a partial directory.

mod adapter;
mod amp;
mod catalog;
mod claude;
mod codex;
mod compile_cache;
mod error;
mod install;
mod inventory;
mod launch;
mod lease;
mod npm;
mod opencode;
mod own;
mod pi;
mod pinned;
mod progress;
mod removal;
mod runtime;
mod store;
mod version;

pub use self::catalog::{Agent, BuiltIn};
pub use self::error::AgentError;
pub use self::inventory::{StoreEntry, Used};
pub use self::launch::{Launch, Link, SessionSpec, launch, state_dir};
pub use self::lease::Lease;
pub use self::own::{ClientAgents, Invalid, OwnAgent};
pub use self::progress::{InstallProgress, Step};
pub use self::removal::{Removal, Why};
pub use self::store::{AgentStore, Available, InStore, Installed, default_root};
pub use self::version::Version;
