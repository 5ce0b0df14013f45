//! What a VM may take of the host, and what it takes.

use serde::{Deserialize, Serialize};

use super::Rlimit;

/// Applied at boot, by PID 1 to itself: whatever it starts inherits them.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct LimitSpec {
    pub rlimits: Vec<Rlimit>,
    /// Of the programs that PID 1 starts: lower than its own, so that there is room for what the host asks
    /// for when the VM's programs have used up theirs.
    pub program_rlimits: Vec<Rlimit>,
    /// Settings below `/proc/sys` of the VM's own namespaces, as `user/max_inotify_watches`. Those that
    /// the kernel does not have, or does not let a VM change, are left.
    pub sysctls: Vec<(String, String)>,
}

/// Asked of all processes of the VM but PID 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum LimitOp {
    /// What they take, answered by [`super::Reply::Usage`].
    Usage,
    /// SIGKILL.
    Kill,
}

/// What the processes of a VM take, PID 1 included, as `/proc` has it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessUsage {
    /// Of those that run, with their children that have ended and were waited for, in hundredths of a
    /// second.
    pub cpu_ticks: u64,
    /// Sum of the resident sets. Memory that processes share counts for each.
    pub resident_bytes: u64,
    /// Threads: what the limit counts.
    pub tasks: u64,
}
