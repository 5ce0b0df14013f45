//! What an installation tells while it runs.

/// How far an installation is. At least one a second while it runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InstallProgress {
    /// The agent that is wanted, as `createSession` takes it.
    pub agent: &'static str,
    pub step: Step,
    /// One line for a person.
    pub message: String,
    /// Packages that have arrived, of `total`; both 0 as long as npm has still to find out which.
    pub done: usize,
    pub total: usize,
    /// Bytes that npm has written to its cache and to the store in this step: it moves while one big
    /// package is on its way. 0 where the host does not tell.
    pub bytes: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Another installer, of this process or another, is at the same entry.
    Waiting,
    /// Node and npm, once for all agents.
    Runtime,
    /// The agent itself.
    Agent,
}

impl Step {
    /// As JavaScript sees it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Runtime => "runtime",
            Self::Agent => "agent",
        }
    }
}
