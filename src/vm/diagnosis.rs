//! What a host can do for VMs, feature by feature.

use std::path::PathBuf;

/// What `doctor` found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Diagnosis {
    pub checks: Vec<Check>,
}

/// One feature of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Check {
    /// Stable, as `"overlay"`.
    pub name: &'static str,
    pub state: State,
    /// What was found.
    pub detail: String,
    /// What does not work without it, and how to enable it: of what is not [`State::Ok`].
    pub trouble: Option<Trouble>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trouble {
    pub lost: String,
    pub remedy: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    Ok,
    /// VMs run, with something less.
    Degraded,
    /// No VM runs without it.
    Missing,
}

/// Where to look.
#[derive(Debug, Clone)]
pub struct Places {
    pub data_dir: PathBuf,
    /// Root of the agent store.
    pub agents: PathBuf,
}

impl Diagnosis {
    /// Whether VMs run on this host: one has just been booted.
    #[must_use]
    pub fn is_ok(&self) -> bool {
        self.checks
            .iter()
            .all(|check| check.state != State::Missing)
    }
}

impl Check {
    pub(super) fn ok(name: &'static str, detail: impl Into<String>) -> Self {
        Self {
            name,
            state: State::Ok,
            detail: detail.into(),
            trouble: None,
        }
    }

    pub(super) fn degraded(
        name: &'static str,
        detail: impl Into<String>,
        lost: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self {
            name,
            state: State::Degraded,
            detail: detail.into(),
            trouble: Some(Trouble {
                lost: lost.into(),
                remedy: remedy.into(),
            }),
        }
    }

    pub(super) fn missing(
        name: &'static str,
        detail: impl Into<String>,
        lost: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self {
            state: State::Missing,
            ..Self::degraded(name, detail, lost, remedy)
        }
    }
}
