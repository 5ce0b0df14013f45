//! What a VM is, whatever isolates it: processes, files, an end.
//!
//! [`namespace`] is the one backend so far: Linux namespaces with the static guest as PID 1.

use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;

use crate::net::Rules;
use crate::net::secrets::{Secrets, Sightings};
use crate::pipe::PipeEnd;

pub use diagnosis::{Check, Diagnosis, Places, State, Trouble};
pub use error::VmError;
pub use files::Files;
pub use foreground::{Commands, Extent, Foreground, Moment};
pub use image::{Image, MadeWith};
pub use limits::{Limit, Limited, Limits, Reached, Usage};
pub use port::Ports;
pub use process::{ProcessInfo, ProcessState, Processes};
pub use terminal::{Size, Terminal, TerminalEnd, TerminalInput, Terminals};

mod diagnosis;
pub mod environment;
mod error;
pub mod exec;
pub mod file;
pub mod files;
mod foreground;
mod image;
pub mod limits;
pub mod mount;
pub mod namespace;
mod port;
mod process;
mod terminal;

/// What a program, or an agent, should know of a VM: in it at `/etc/agentvm/instructions.md`.
pub const INSTRUCTIONS: &str = include_str!("instructions.md");

pub type Result<T, E = VmError> = std::result::Result<T, E>;

/// An absolute path as a program inside the VM would write it. Never resolved on the host.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct GuestPath {
    text: String,
    /// Of a path that is not UTF-8, as Linux allows: what `text` shows only in part.
    bytes: Option<Vec<u8>>,
}

impl GuestPath {
    pub const HOME: &'static str = "/home/user";

    /// Takes an absolute path, or one relative to `/home/user`.
    pub fn new(path: &str) -> Result<Self, &'static str> {
        Self::from_bytes(path.as_bytes().to_vec())
    }

    /// The same of a path that may not be UTF-8.
    pub fn from_bytes(path: Vec<u8>) -> Result<Self, &'static str> {
        if path.is_empty() {
            return Err("a path must not be empty");
        }
        if path.contains(&0) {
            return Err("a path must not contain a NUL byte");
        }
        let path = if path.starts_with(b"/") {
            path
        } else {
            [Self::HOME.as_bytes(), b"/", &path].concat()
        };
        Ok(match String::from_utf8(path) {
            Ok(text) => Self { text, bytes: None },
            Err(error) => Self {
                text: String::from_utf8_lossy(error.as_bytes()).into_owned(),
                bytes: Some(error.into_bytes()),
            },
        })
    }

    #[must_use]
    pub fn home() -> Self {
        Self {
            text: Self::HOME.to_owned(),
            bytes: None,
        }
    }

    /// For messages, and for whoever takes nothing but text: of a path that is not UTF-8, with
    /// replacement characters.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }

    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        self.bytes.as_deref().unwrap_or(self.text.as_bytes())
    }

    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        self.as_bytes().to_vec()
    }
}

/// Who acts inside the VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum User {
    /// uid 1000, no capabilities: agents and API calls, unless asked otherwise.
    #[default]
    User,
    /// uid 0 of the VM, never of the host.
    Root,
}

/// A program to start inside the VM with pipes for stdio. Nothing is inherited: `env` is all it gets.
#[derive(Debug, Clone)]
pub struct Command {
    /// Program (looked up in `env`'s PATH unless it contains a slash) and arguments.
    pub argv: Vec<String>,
    /// Over what the VM's image gives every program.
    pub env: Vec<(String, String)>,
    pub cwd: GuestPath,
    pub user: User,
}

/// How a process ended: exactly one of the two is set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    Code(i32),
    /// Number of the signal that killed it.
    Signal(i32),
}

/// A started process. Dropping it closes its pipes; the process itself goes on until it exits, is
/// signalled, or the VM ends.
#[derive(Debug)]
pub struct Process {
    /// Pid as seen inside the VM; also its process group.
    pub pid: u32,
    /// The host's ends of its pipes.
    pub stdin: PipeEnd,
    pub stdout: PipeEnd,
    pub stderr: PipeEnd,
    /// `None` until it has exited. Closed without a value only if the whole VM has ended.
    pub exit: watch::Receiver<Option<Exit>>,
    /// What the VM had met of its limits before it was started.
    pub before: Reached,
}

/// Waits for the end of a process. `None`: the whole VM ended first.
pub async fn exited(exit: &mut watch::Receiver<Option<Exit>>) -> Option<Exit> {
    exit.wait_for(Option::is_some)
        .await
        .ok()
        .and_then(|exit| *exit)
}

/// After which what does not end is killed again: one that another program traces is not known to have
/// ended before that one has, which [`Vm::kill`] kills, too, once it sees that.
pub const KILL_AGAIN: Duration = Duration::from_secs(1);

/// How to open a regular file of the VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Open {
    Read,
    /// Create or truncate, mode 0644 before the umask.
    Write,
}

/// Why a VM is no longer running.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VmEnd {
    /// `shutdown` was called.
    Shutdown,
    /// Its PID 1 died on its own; the text says what is known.
    Died(String),
    /// The kernel killed its PID 1, when it had killed for want of memory.
    OutOfMemory,
}

/// A running VM. All calls act on the guest side: no guest path is ever resolved by the host.
#[async_trait]
pub trait Vm: Files + Limited + Ports + Processes + Terminals + Send + Sync + 'static {
    async fn spawn(&self, command: &Command) -> Result<Process>;

    /// Signals the whole process group of a process started by [`Vm::spawn`].
    /// One that has already exited is not an error.
    async fn signal(&self, pid: u32, signal: i32) -> Result<()>;

    /// Kills a process started by [`Vm::spawn`] with everything in its session, also what it has moved
    /// to a process group of its own, as timeout(1) does and shells with job control. What it has
    /// detached lives on (`setsid`). One that has already exited is not an error.
    async fn kill(&self, pid: u32) -> Result<()>;

    /// Now, in the clock in which this VM dates its processes. At the start of a turn, before its
    /// prompt is sent: what starts from then on is the turn's.
    fn now(&self) -> Moment;

    /// Looks what the agent `pid`, started by [`Vm::spawn`], has in the foreground of the turn that
    /// began at `since`: the commands that run below it by the chain of live parents, and not what
    /// they have detached (another session, or a parent that has exited). `spare` are command lines
    /// that are not the turn's: MCP servers. The exact rule, and what it can't tell, is documented at
    /// `agentvm_guest::foreground`.
    ///
    /// To cancel a turn: call this *before* the agent is told, because an agent that kills only the
    /// shell of a command leaves the command behind as an orphan, which looks like a background
    /// process. Then [`Vm::end_foreground`], when the agent has answered or its time is up, and before
    /// its next turn may begin, whose commands would be killed too.
    async fn foreground(&self, pid: u32, since: Moment, spare: Commands) -> Result<Foreground>;

    /// Kills what was seen in the foreground and what is there now, with [`Extent::WithAgent`] the
    /// agent too, and waits until it has ended (for a second at most: a process in an
    /// uninterruptible wait dies later). Returns how many processes were killed, the agent and its
    /// group aside. Nothing else is touched: a process is never mistaken for an earlier one with its
    /// number. An agent that has exited meanwhile is no error.
    async fn end_foreground(&self, foreground: &Foreground, extent: Extent) -> Result<u32>;

    /// Opens a file as `user`. The descriptor is checked to be a regular file.
    async fn open(&self, path: &GuestPath, open: Open, user: User) -> Result<File>;

    /// Makes a directory and its missing parents as `user`; an existing directory is fine.
    async fn create_dir_all(&self, path: &GuestPath, user: User) -> Result<()>;

    /// Puts other rules of the network into force. New connections and questions are judged by them at
    /// once, and connections that they deny are reset.
    async fn set_network(&self, rules: Rules) -> Result<()>;

    /// Whether it runs at this moment, as the kernel sees it. When it does not, this returns once
    /// [`Vm::ended`] says so too.
    async fn still_runs(&self) -> bool;

    /// What it has instead of the host's programs.
    fn image(&self) -> Option<&Image>;

    /// Exchanges its secrets. Programs that run have the placeholders of before, which go on to work
    /// for secrets that are still there; new names are for programs that are started from now on.
    /// `false`: it was booted without any, and trusts nobody to stand in for their hosts.
    fn set_secrets(&self, secrets: &Secrets) -> bool;

    /// Where placeholders were seen that they are not for. `None`: it has no secrets.
    fn misdirected_secrets(&self) -> Option<Arc<Sightings>>;

    /// `None` while it runs, and until its end has been noticed.
    fn ended(&self) -> watch::Receiver<Option<VmEnd>>;

    /// Ends every process, then PID 1. When it returns no process, mount or namespace of the VM is
    /// left, and it holds its lock no longer. Idempotent.
    async fn shutdown(&self);
}

pub type DynVm = Arc<dyn Vm>;
