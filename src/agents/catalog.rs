//! Which agents there are.

use std::sync::LazyLock;

use super::error::AgentError;
use super::pi;
use super::pinned::Pinned;

/// An agent that this version can run.
///
/// Agents that a client configures itself (`{ command, args, env }`) will be a variant here: they
/// have a launch plan but nothing in the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Agent {
    Pi,
}

/// Documented names that this version does not run yet.
const PLANNED: [&str; 4] = ["claude", "codex", "opencode", "amp"];

/// What the rest of this module needs to know about an agent.
pub(super) struct Definition {
    /// As `createSession` takes it.
    pub(super) name: &'static str,
    pub(super) packages: Pinned,
    /// Name of the entry that `packages` make.
    pub(super) entry: LazyLock<String>,
    /// Directory of our ACP adapter below `adapters/` of the npm package; its `main.js` is what the
    /// runtime's Node runs.
    pub(super) adapter: &'static str,
    /// Set unless the session sets them otherwise.
    pub(super) env: &'static [(&'static str, &'static str)],
}

impl Agent {
    pub const ALL: [Self; 1] = [Self::Pi];

    /// The agent that `createSession` and `install` call `name`.
    pub fn parse(name: &str) -> Result<Self, AgentError> {
        if let Some(agent) = Self::ALL.into_iter().find(|agent| agent.name() == name) {
            return Ok(agent);
        }
        let known = Self::ALL.map(Self::name).join(", ");
        Err(if PLANNED.contains(&name) {
            AgentError::Unsupported {
                name: name.to_owned(),
                known,
            }
        } else {
            AgentError::Unknown {
                name: name.to_owned(),
                known,
            }
        })
    }

    #[must_use]
    pub fn name(self) -> &'static str {
        self.definition().name
    }

    /// Version of the agent's main package.
    #[must_use]
    pub fn version(self) -> &'static str {
        self.definition().packages.version
    }

    pub(super) fn definition(self) -> &'static Definition {
        match self {
            Self::Pi => &pi::PI,
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]
mod tests {
    use super::*;
    use crate::error::{Code, Error};

    #[test]
    fn an_agent_is_found_by_its_name() {
        assert_eq!(Agent::parse("pi").unwrap(), Agent::Pi);
    }

    #[test]
    fn an_unknown_name_is_answered_with_the_known_ones() {
        let error = Error::from(Agent::parse("pie").unwrap_err());
        assert_eq!(error.code, Code::AgentUnknown);
        assert!(error.message.contains("\"pie\""), "{error}");
        assert!(error.message.contains("pi"), "{error}");
    }

    #[test]
    fn a_documented_agent_of_a_later_version_is_told_apart_from_an_unknown_one() {
        let error = Error::from(Agent::parse("claude").unwrap_err());
        assert_eq!(error.code, Code::AgentUnsupported);
    }
}
