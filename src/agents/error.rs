//! What can go wrong with agents and their store, each variant with the thing that failed.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use crate::error::{Code, Error};

#[derive(Debug, Error)]
pub enum AgentError {
    #[error(
        "unknown agent {name:?}: this client runs {known}. An agent of your own is configured with the \
         client option agents: {{ {name:?}: {{ command, args?, env? }} }}"
    )]
    Unknown { name: String, known: String },
    #[error(
        "agent {name:?} is not in this version of agentvm for this processor: this client runs {known}"
    )]
    Unsupported { name: String, known: String },
    #[error(
        "agent {agent:?} is not installed in {store:?}, and autoInstall is off: call \
         client.agents.install({agent:?}), or run `npx agentvm install {agent}` where the store is the one of \
         `npx agentvm agents`"
    )]
    NotInstalled { agent: String, store: PathBuf },
    #[error("agent {wanted:?}: {problem}")]
    Version {
        wanted: String,
        problem: &'static str,
    },
    #[error(
        "not removed from {store:?}: {}. Put the VMs that run on it to sleep, let installations end, then \
         try again", .kept.join(", ")
    )]
    InUse {
        store: PathBuf,
        /// Entries, each with who uses it.
        kept: Vec<String>,
    },
    /// Neither `AGENTVM_CACHE_DIR` nor `XDG_CACHE_HOME` nor `HOME` is set.
    #[error(
        "no place for the agent store: none of AGENTVM_CACHE_DIR, XDG_CACHE_HOME and HOME is set; set \
         AGENTVM_CACHE_DIR to a writable directory"
    )]
    NoCacheDirectory,
    #[error(
        "everybody can write to the agent store {store:?}, whose programs run with the keys of your \
         sessions: run `chmod o-w` on it if you trust what is in it, or set AGENTVM_CACHE_DIR to another \
         directory"
    )]
    WritableByAll { store: PathBuf },
    /// The store itself can't be read or written.
    #[error("{what} {path:?} in the agent store: {source}. {}", store_remedy(.source))]
    Store {
        what: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error(
        "can't install {title}: no npm found (looked for {}). Install npm, or set AGENTVM_NPM to an \
         npm or to its npm-cli.js", .tried.join(", ")
    )]
    NoNpm { title: String, tried: Vec<String> },
    /// npm did not start.
    #[error("can't install {title}: can't run npm as {command:?}: {source}")]
    NpmStart {
        title: String,
        command: String,
        source: io::Error,
    },
    /// npm ran and failed. Nothing of the attempt is left.
    #[error("can't install {title} into {store:?}: {reason}.{}", said(.output))]
    Npm {
        title: String,
        store: PathBuf,
        reason: String,
        /// The end of what npm wrote.
        output: String,
    },
    /// npm succeeded, but what it left is not what the lockfile says.
    #[error(
        "can't install {title}: npm reported success, but {missing}. Nothing was installed; try \
         again, and if it stays so run `npm cache verify`"
    )]
    Incomplete { title: String, missing: String },
    #[error(
        "can't use Node {version} of the agent store on this host: {problem}. It needs a Linux with \
         glibc 2.28 or newer"
    )]
    RuntimeUnusable {
        version: &'static str,
        problem: String,
    },
    #[error(
        "the adapter of agent {agent:?} is missing: no main.js in {path:?}. In a checkout run `npm \
         run build`; an installed agentvm package without it is broken: install it again"
    )]
    AdapterMissing { agent: &'static str, path: PathBuf },
    /// A lockfile of this crate can't be read: a defect of agentvm.
    #[error("the lockfile of {title} that is part of agentvm is broken: {source}")]
    Lockfile {
        title: String,
        source: serde_json::Error,
    },
    /// The caller gave up. Nothing of the attempt is left.
    #[error("the installation of {title} was cancelled")]
    Cancelled { title: String },
    /// A task of ours ended in a panic, or the async runtime is shutting down.
    #[error("the installation ended early: {0}")]
    Ended(String),
}

fn store_remedy(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT) => {
            "The disk is full: make room there, or set AGENTVM_CACHE_DIR to a directory elsewhere"
        }
        _ => "Make it writable, or set AGENTVM_CACHE_DIR to a directory that is",
    }
}

fn said(output: &str) -> String {
    if output.is_empty() {
        String::new()
    } else {
        format!(" npm said:\n{output}")
    }
}

impl From<AgentError> for Error {
    fn from(error: AgentError) -> Self {
        let code = match &error {
            AgentError::Unknown { .. } => Code::AgentUnknown,
            AgentError::Unsupported { .. } => Code::AgentUnsupported,
            AgentError::NotInstalled { .. } => Code::AgentNotInstalled,
            AgentError::Version { .. } => Code::InvalidArgument,
            AgentError::InUse { .. } => Code::AgentInUse,
            AgentError::NoCacheDirectory
            | AgentError::WritableByAll { .. }
            | AgentError::Store { .. }
            | AgentError::NoNpm { .. }
            | AgentError::NpmStart { .. }
            | AgentError::Npm { .. }
            | AgentError::Incomplete { .. }
            | AgentError::RuntimeUnusable { .. }
            | AgentError::AdapterMissing { .. } => Code::InstallFailed,
            AgentError::Cancelled { .. } => Code::Aborted,
            AgentError::Lockfile { .. } | AgentError::Ended(_) => Code::Internal,
        };
        Self::new(code, error.to_string())
    }
}
