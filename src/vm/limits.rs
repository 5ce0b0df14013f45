//! What a VM may take of the host, and what it takes.

use std::fmt;

use async_trait::async_trait;
use tokio::sync::watch;

use super::{Result, VmError};

/// What a VM may take. `None`: what is said at each.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Limits {
    /// Of all processes together, with the page cache and the tmpfs files that they fill. No limit.
    pub memory_bytes: Option<u64>,
    /// Thousandths of a CPU. No limit.
    pub milli_cpus: Option<u64>,
    /// Processes and threads. [`DEFAULT_PIDS`].
    pub pids: Option<u64>,
    /// Of each process. As many as the host process may have, up to 2^20.
    pub open_files: Option<u64>,
    /// Of the VM's directory. No limit.
    pub disk_bytes: Option<u64>,
    /// What the file system of the VM's directory is to keep free; 0: nothing. A 64th of it, 512 MiB at
    /// most.
    pub min_free_disk_bytes: Option<u64>,
    /// What can't be enforced on this host is left out, or done by weaker means, instead of refused.
    pub best_effort: bool,
}

/// More than builds and test suites start, and far from what a host has.
pub const DEFAULT_PIDS: u64 = 4096;

/// One of the limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Limit {
    Memory,
    Cpus,
    Pids,
    OpenFiles,
    Disk,
    FreeDisk,
}

impl Limit {
    /// The option of this name.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Memory => "memoryBytes",
            Self::Cpus => "cpus",
            Self::Pids => "pids",
            Self::OpenFiles => "openFiles",
            Self::Disk => "diskBytes",
            Self::FreeDisk => "minFreeDiskBytes",
        }
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How a limit is enforced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mechanism {
    Cgroup2,
    Cgroup1,
    /// By the kernel, of each process or of each user of the VM.
    Rlimit,
    /// Looked at now and then: it can be exceeded for a moment.
    Polled,
    /// Not at all.
    None,
}

impl Mechanism {
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Cgroup2 => "cgroup2",
            Self::Cgroup1 => "cgroup1",
            Self::Rlimit => "rlimit",
            Self::Polled => "polled",
            Self::None => "none",
        }
    }
}

/// A limit of a VM and how it is enforced.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct InForce {
    pub limit: Limit,
    /// In the limit's own unit. `None`: there is none.
    pub value: Option<f64>,
    pub mechanism: Mechanism,
}

/// What a running VM takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    pub cpu_ms: u64,
    pub memory_bytes: u64,
    pub memory_peak_bytes: Option<u64>,
    /// Processes and threads, PID 1 included.
    pub pids: u64,
    /// From where the figures of CPU time, memory and pids are: `None` from the processes that run now.
    pub counted_by: Option<Mechanism>,
    pub uptime_ms: u64,
    pub network_rx_bytes: u64,
    pub network_tx_bytes: u64,
}

/// How often a VM has met its limits since it booted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Reached {
    /// Processes that were killed for want of memory.
    pub memory: u64,
    /// Processes and threads that could not be started.
    pub pids: u64,
    /// Times that its processes were killed because they were a fork bomb.
    pub fork_bombs: u64,
    /// Times that it was found with too much on its disk, and its processes were killed.
    pub disk: u64,
    /// Times that it was found growing when too little of the host's disk was free, and its processes
    /// were killed.
    pub free_disk: u64,
    /// Times that its processes were killed because it could have been the one that grew.
    pub free_disk_unseen: u64,
}

/// The part of a VM that is about limits.
#[async_trait]
pub trait Limited: Send + Sync {
    /// In the order of [`Limit`].
    fn limits(&self) -> &[InForce];

    async fn usage(&self) -> Result<Usage>;

    /// How often the VM has met its limits, as the kernel knows it at this moment.
    fn reached(&self) -> Reached;

    /// The same, when it changes. Closed when the VM has ended.
    fn watch_limits(&self) -> watch::Receiver<Reached>;

    /// What a limit is, for who reads an error: `memoryBytes (268435456)`.
    fn describe(&self, limit: Limit) -> String {
        let value = self.limits().iter().find(|own| own.limit == limit);
        value
            .and_then(|own| own.value)
            .map_or_else(|| limit.to_string(), |value| format!("{limit} ({value})"))
    }
}

const MORE_MEMORY: &str = "Give the VM more with limits.memoryBytes of getOrCreate or createClient";

/// The error of a call whose VM ended for want of memory.
pub fn out_of_memory(vm: &(impl Limited + ?Sized)) -> VmError {
    VmError::Limit {
        what: "the VM was killed, with all that ran in it".to_owned(),
        limit: vm.describe(Limit::Memory),
        remedy: MORE_MEMORY,
        output: None,
    }
}

/// Why something in the VM was killed, if it was for a limit that was met since `before`.
pub fn killed(vm: &(impl Limited + ?Sized), what: &str, before: Reached) -> Option<VmError> {
    let now = vm.reached();
    let (limit, remedy) = if now.memory > before.memory {
        (Limit::Memory, MORE_MEMORY)
    } else if now.fork_bombs > before.fork_bombs {
        let remedy = "It was a fork bomb, hundreds of processes that went on starting others and ended: all \
             that ran in the VM was killed. Start what you need anew";
        (Limit::Pids, remedy)
    } else if now.disk > before.disk {
        let remedy = "Delete something in it, or give it more with limits.diskBytes of getOrCreate or \
             createClient";
        (Limit::Disk, remedy)
    } else if now.free_disk_unseen > before.free_disk_unseen {
        let remedy = "Free space on the file system of the data directory: less than that was left, it went on \
             to fill, and how much the VM takes of it could not be told";
        (Limit::FreeDisk, remedy)
    } else if now.free_disk > before.free_disk {
        let remedy = "Free space on the file system of the data directory: the VM was growing when less \
             than that was left";
        (Limit::FreeDisk, remedy)
    } else {
        return None;
    };
    Some(VmError::Limit {
        what: what.to_owned(),
        limit: vm.describe(limit),
        remedy,
        output: None,
    })
}

/// The error of a process that could not be started.
pub(super) fn no_more_pids(vm: &(impl Limited + ?Sized), program: &str) -> VmError {
    VmError::Limit {
        what: format!("can't start {program:?}"),
        limit: vm.describe(Limit::Pids),
        remedy: "sleep() ends what runs in it; limits.pids of getOrCreate or createClient allows more",
        output: None,
    }
}
