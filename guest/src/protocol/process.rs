//! What the host asks of the VM's processes as a whole.

use serde::{Deserialize, Serialize};

use super::{Bytes, Instance};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ProcessOp {
    /// Lists processes by pid, from the first one above `after`, as many as fit a reply.
    List {
        after: i32,
        /// With command lines, which may take seconds.
        commands: bool,
    },
}

/// A process as `/proc` describes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessEntry {
    pub instance: Instance,
    pub parent: i32,
    pub group: i32,
    pub session: i32,
    pub uid: u32,
    /// The letter of `proc_pid_stat(5)`.
    pub state: u8,
    pub threads: u32,
    /// In hundredths of a second.
    pub cpu_ticks: u64,
    pub resident_bytes: u64,
    /// Arguments, each with a NUL byte at its end, cut at [`MAX_COMMAND`]; of a process without any,
    /// its name in brackets.
    pub command: Bytes,
}

/// Bytes of a command line in one entry.
pub const MAX_COMMAND: usize = 2048;
