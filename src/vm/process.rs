//! Everything that runs in a VM, whoever started it.

use async_trait::async_trait;

use super::Result;

/// A process of a VM. What it says of itself is its own choice: names and arguments are not to be trusted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessInfo {
    pub pid: u32,
    /// 0: none inside the VM.
    pub parent: u32,
    pub group: u32,
    pub session: u32,
    pub uid: u32,
    pub state: ProcessState,
    pub threads: u32,
    /// Of it alone.
    pub cpu_ms: u64,
    /// Its resident set.
    pub memory_bytes: u64,
    /// Milliseconds since the epoch, to a hundredth of a second.
    pub started_at: u64,
    /// Its first 2 KiB; of a process without arguments, its name in brackets.
    pub command: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProcessState {
    Running,
    Sleeping,
    /// In a wait that no signal interrupts, mostly for a disk.
    Waiting,
    Stopped,
    /// By a debugger.
    Traced,
    /// It has ended, and its parent has not asked how.
    Zombie,
    Other,
}

impl ProcessState {
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Sleeping => "sleeping",
            Self::Waiting => "waiting",
            Self::Stopped => "stopped",
            Self::Traced => "traced",
            Self::Zombie => "zombie",
            Self::Other => "other",
        }
    }
}

#[async_trait]
pub trait Processes: Send + Sync {
    /// By pid; the first 20,000. One that comes or goes meanwhile may or may not be there.
    async fn processes(&self) -> Result<Vec<ProcessInfo>>;
}
