//! What a turn of an agent has in the foreground, as [`Vm::foreground`](super::Vm::foreground) sees it.

use agentvm_guest::protocol::Instance;

/// A point in time in the clock in which the processes of a VM are dated ([`Vm::now`](super::Vm::now)).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment {
    /// Of `CLOCK_BOOTTIME`, which goes on while the machine sleeps.
    pub(super) nanoseconds: u64,
}

/// Command lines: program and arguments, as the agent was told to start them.
pub type Commands = Vec<Vec<String>>;

/// The foreground of a turn, as it was when it was looked at.
#[derive(Debug, Clone)]
pub struct Foreground {
    /// `None`: the agent had exited.
    pub(super) agent: Option<Instance>,
    pub(super) since: Moment,
    pub(super) spare: Commands,
    pub(super) seen: Vec<Instance>,
}

impl Foreground {
    /// How many processes it was.
    #[must_use]
    pub fn len(&self) -> usize {
        self.seen.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.seen.is_empty()
    }
}

/// How much [`Vm::end_foreground`](super::Vm::end_foreground) ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// The commands: the agent has obeyed and lives on.
    Foreground,
    /// The agent as well, with its process group: it has ignored the cancel. Everything is stopped
    /// before anything is killed, so that the agent starts nothing more.
    WithAgent,
}
