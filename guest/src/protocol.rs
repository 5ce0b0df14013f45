//! Message types and their encoding.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use self::files::{FileAnswer, FileOp};
use crate::net::NetConfig;

pub mod files;
mod host_mount;
mod limits;
mod port;
mod process;
mod terminal;

pub use self::host_mount::{HostMount, HostSource};
pub use self::limits::{LimitOp, LimitSpec, ProcessUsage};
pub use self::port::{MAX_LISTENERS, PortOp};
pub use self::process::{MAX_COMMAND, ProcessEntry, ProcessOp};
pub use self::terminal::TerminalSpec;

/// Largest packet either side sends: well under what SEQPACKET takes (`EMSGSIZE` near 256 KiB).
/// A larger request travels in a memfd; a reply is never larger.
pub const MAX_PACKET: usize = 64 * 1024;

/// Descriptors in one packet (the kernel's limit is 253).
pub const MAX_DESCRIPTORS: usize = 64;

/// First byte of a packet: the message follows, or is in the packet's last descriptor.
pub const INLINE: u8 = 0;
pub const IN_MEMFD: u8 = 1;

/// The host's side of the control socket in PID 1.
pub const CONTROL_FD: i32 = 3;

/// uid and gid of the account `user` in every VM.
pub const USER_ID: u32 = 1000;

/// Chosen by the host, repeated in the reply.
pub type RequestId = u32;

/// Bytes of a path, argument or variable: Linux does not promise UTF-8.
pub type Bytes = Vec<u8>;

/// Host to guest.
#[derive(Debug, Serialize, Deserialize)]
pub enum Request {
    /// First message, once the id maps are written. Descriptors: the VM's lock, then the mount
    /// trees that [`Source::Descriptor`] counts from 0.
    Boot(Box<BootSpec>),
    /// Descriptors: stdin, stdout, stderr of the new process.
    Spawn {
        id: RequestId,
        argv: Vec<Bytes>,
        /// `NAME=value`
        env: Vec<Bytes>,
        cwd: Bytes,
        user: Account,
    },
    /// A spawned process on a terminal of its own. [`Reply::Spawned`] has the terminal's other end as
    /// its descriptor.
    Terminal {
        id: RequestId,
        spec: Box<TerminalSpec>,
    },
    /// To the process group `pid` of a spawned process.
    Signal {
        id: RequestId,
        pid: i32,
        signal: i32,
    },
    /// Kills a spawned process and whatever is in its session.
    EndSession { id: RequestId, leader: i32 },
    /// Looks what a turn of a spawned process has in the foreground. Changes nothing.
    Foreground {
        id: RequestId,
        agent: i32,
        turn: Turn,
    },
    /// Kills the foreground, and of `seen` what still runs.
    EndForeground {
        id: RequestId,
        agent: Instance,
        turn: Turn,
        seen: Vec<Instance>,
        /// Kills the agent with its process group, too.
        agent_too: bool,
    },
    /// Of the VM as a whole.
    Limits { id: RequestId, op: LimitOp },
    Open {
        id: RequestId,
        path: Bytes,
        /// `open(2)` flags; `O_CLOEXEC`, `O_NONBLOCK` and `O_NOCTTY` are always added.
        flags: i32,
        mode: u32,
        user: Account,
    },
    /// Ports of the VM's loopback; see [`PortOp`].
    Port { id: RequestId, op: PortOp },
    /// Of everything that runs; see [`ProcessOp`].
    Process { id: RequestId, op: ProcessOp },
    /// `mkdir -p`
    MakeDirs {
        id: RequestId,
        path: Bytes,
        user: Account,
    },
    /// Descriptors: as the operation says.
    File {
        id: RequestId,
        user: Account,
        op: FileOp,
    },
}

/// Guest to host. Written by a process that the host does not trust.
#[derive(Debug, Serialize, Deserialize)]
pub enum Reply {
    /// Boot is complete. Descriptors: the sockets of [`NetState::Up`].
    Ready {
        net: NetState,
    },
    /// A boot step failed; PID 1 exits.
    BootFailed {
        step: Bytes,
        errno: i32,
    },
    Spawned {
        id: RequestId,
        pid: i32,
    },
    /// Descriptor: the file, or the socket of [`PortOp::Connect`].
    Opened {
        id: RequestId,
    },
    /// [`MAX_LISTENERS`] at most.
    Listeners {
        id: RequestId,
        listeners: Vec<SocketAddr>,
    },
    Done {
        id: RequestId,
    },
    /// `agent` is `None` if it has exited; then there is no foreground either.
    Foreground {
        id: RequestId,
        agent: Option<Instance>,
        /// Parents before children; [`MAX_SEEN`] at most.
        seen: Vec<Instance>,
    },
    /// How many processes were killed, the agent and its group aside.
    ForegroundEnded {
        id: RequestId,
        killed: u32,
    },
    Usage {
        id: RequestId,
        usage: ProcessUsage,
    },
    Processes {
        id: RequestId,
        processes: Vec<ProcessEntry>,
        /// There are more after the last of these.
        more: bool,
    },
    /// What a [`Request::File`] found.
    File {
        id: RequestId,
        answer: FileAnswer,
    },
    Failed {
        id: RequestId,
        errno: i32,
        at: FailedAt,
    },
    /// A process of [`Request::Spawn`] ended; `status` as `waitpid(2)` gives it.
    Exited {
        pid: i32,
        status: i32,
    },
    /// There was a fork bomb in the VM: everything that ran in it is being killed.
    ForkBomb,
}

/// One process, for good: its number may be another's when it is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Instance {
    pub pid: i32,
    /// When it started, in hundredths of a second since the machine's boot.
    pub started: u64,
}

/// Processes in [`Reply::Foreground`]: as many as fit a packet (15 bytes each, at the worst).
pub const MAX_SEEN: usize = 4000;

/// What [`crate::foreground`] needs to know of a turn.
#[derive(Debug, Serialize, Deserialize)]
pub struct Turn {
    /// When it began: nanoseconds of `CLOCK_BOOTTIME`.
    pub since: u64,
    /// Command lines of what is not the turn's.
    pub spare: Vec<Vec<Bytes>>,
}

/// Which part of a request failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FailedAt {
    /// What was asked for: the program, the path.
    Operation,
    /// Entering the working directory.
    Cwd,
}

#[derive(Debug, Serialize, Deserialize)]
pub enum NetState {
    /// Descriptors: TCP v4, UDP DNS, TCP DNS, the rules' netlink, TCP v6 where the kernel has IPv6, and
    /// the log of refusals where it has NFLOG.
    Up { v6: bool, log: bool },
    /// The VM runs without a network, because this step failed.
    Down { step: Bytes, errno: i32 },
}

/// Who an operation acts as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Account {
    User,
    Root,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct BootSpec {
    /// uid 0 is mapped, and PID 1 acts as it, with this real uid. `None`: only [`USER_ID`] is mapped, and
    /// PID 1 runs as it.
    pub real_uid: Option<u32>,
    pub hostname: Bytes,
    /// Made in this order under the new root.
    pub root: Vec<Node>,
    /// The root is an overlay of the VM's own, and not a skeleton to be sealed.
    pub writable_root: bool,
    pub net: NetConfig,
    /// `struct sock_filter`s of the filter that every process gets.
    pub seccomp: Vec<SockFilter>,
    pub limits: LimitSpec,
    /// A second one of every process but PID 1. Empty: none.
    pub program_seccomp: Vec<SockFilter>,
    /// Layers of the isolation that a test does without.
    #[cfg(feature = "weaken")]
    pub without: Vec<String>,
}

impl BootSpec {
    /// Whether the VM is to have this layer of its isolation: always, but in a test's build.
    #[must_use]
    pub fn has(&self, layer: &str) -> bool {
        #[cfg(feature = "weaken")]
        return !self.without.iter().any(|without| without == layer);
        #[cfg(not(feature = "weaken"))]
        return !layer.is_empty();
    }
}

/// `struct sock_filter` of `linux/filter.h`.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct SockFilter {
    pub code: u16,
    pub jt: u8,
    pub jf: u8,
    pub k: u32,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Rlimit {
    pub resource: u32,
    pub soft: u64,
    pub hard: u64,
}

/// One thing in the new root. Paths are absolute, as inside the VM; parents come first.
#[derive(Debug, Serialize, Deserialize)]
pub enum Node {
    Dir {
        path: String,
        mode: u32,
        owner: Account,
    },
    Symlink {
        path: String,
        target: String,
    },
    /// A directory tree attached at an existing directory.
    Tree {
        path: String,
        source: Source,
        read_only: bool,
        no_exec: bool,
    },
    /// Of the host, by the wish of the VM's owner.
    HostMount(HostMount),
    /// The directories of `lowers` as one, the first on top, with a persistent writable layer:
    /// `layer` holds `upper` and `work`. At `/` it is the root itself, and comes first.
    Overlay {
        path: String,
        lowers: Vec<Source>,
        layer: Source,
    },
    /// A file with this content, whatever was there.
    File {
        path: String,
        content: Bytes,
    },
    /// A file with what the first file of `from` has that can be read, or with `otherwise`, and then
    /// `more`.
    Authorities {
        path: String,
        from: Vec<String>,
        otherwise: Bytes,
        more: Bytes,
    },
    /// A file in the format of passwd(5) or group(5) with these accounts, where it has none of their
    /// name or number.
    Accounts {
        path: String,
        lines: Vec<String>,
    },
    /// A directory of the new root, shown at a second place.
    Bind {
        path: String,
        from: String,
    },
    Tmpfs {
        path: String,
        mode: u32,
        /// Bytes; pages are only taken when used.
        size: u64,
        inodes: u64,
    },
    /// procfs with what a VM has no business in masked.
    Proc {
        path: String,
    },
    /// A minimal /dev with its own pts and shm.
    Dev {
        path: String,
        shm_size: u64,
    },
}

/// Where a tree of the host comes from.
#[derive(Debug, Serialize, Deserialize)]
pub enum Source {
    /// A detached mount that a privileged host made (`open_tree`), as index into the packet's trees.
    Descriptor(u32),
    /// A path of the host, cloned by the guest before it leaves the host's root.
    HostPath(Bytes),
    /// The same, of a path without symlinks: one that is there by now is not followed (`ELOOP`).
    RealPath(Bytes),
}

/// Encodes a message. `None` for a value that postcard can't express: there is none in these types.
#[must_use]
pub fn encode<T: Serialize>(message: &T) -> Option<Vec<u8>> {
    postcard::to_allocvec(message).ok()
}

/// Decodes exactly one message; trailing bytes are an error.
#[must_use]
pub fn decode<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Option<T> {
    match postcard::take_from_bytes(bytes) {
        Ok((message, [])) => Some(message),
        _ => None,
    }
}

#[cfg(test)]
mod seeds;
