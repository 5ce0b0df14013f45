//! Which agents there are.

use std::sync::{Arc, LazyLock};

use super::error::AgentError;
use super::launch::{Launch, SessionSpec};
use super::own::{OwnAgent, OwnAgents};
use super::pi;
use super::pinned::Pinned;

/// An agent that sessions can be made with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Agent {
    BuiltIn(BuiltIn),
    /// One that a client has configured: nothing of it is in the store.
    Own(Arc<OwnAgent>),
}

/// An agent that this version installs and runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum BuiltIn {
    Pi,
}

/// Documented names that this version does not run yet.
const PLANNED: [&str; 4] = ["claude", "codex", "opencode", "amp"];

/// What the rest of this module needs to know about a built-in agent.
pub(super) struct Definition {
    /// As `createSession` takes it.
    pub(super) name: &'static str,
    pub(super) packages: Pinned,
    /// Name of the entry that `packages` make.
    pub(super) entry: LazyLock<String>,
    pub(super) program: Program,
    /// Set unless the session sets them otherwise.
    pub(super) env: &'static [(&'static str, &'static str)],
    /// Whether it tries SSE by itself where a remote MCP server does not know streamable HTTP.
    pub(super) finds_transports: bool,
    /// Adds to a launch plan what depends on the session. What the plan has of the session's own
    /// environment must stay as it is.
    pub(super) configure: fn(&SessionSpec<'_>, &mut Launch) -> Result<(), AgentError>,
}

/// What speaks ACP for an agent.
pub(super) enum Program {
    /// Our adapter: a directory below `adapters/` of the npm package, whose `main.js` the runtime's Node
    /// runs.
    Adapter(&'static str),
    /// A script of the agent's packages, which the runtime's Node runs. Relative to the entry.
    Script(&'static str),
    /// A program of the agent's packages. Relative to the entry.
    Executable {
        path: &'static str,
        args: &'static [&'static str],
    },
}

impl Agent {
    /// The agent that `createSession` and `install` call `name`, for a client that has configured
    /// `own`.
    pub fn find(name: &str, own: &OwnAgents) -> Result<Self, AgentError> {
        if let Some(agent) = BuiltIn::find(name) {
            return Ok(Self::BuiltIn(agent));
        }
        if let Some(agent) = own.find(name) {
            return Ok(Self::Own(agent));
        }
        let built_in = BuiltIn::ALL.iter().map(|agent| agent.name());
        let known: Vec<&str> = built_in.chain(own.names()).collect();
        let known = known.join(", ");
        Err(if is_planned(name) {
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
    pub fn name(&self) -> &str {
        match self {
            Self::BuiltIn(agent) => agent.name(),
            Self::Own(agent) => agent.name(),
        }
    }
}

impl BuiltIn {
    pub const ALL: [Self; 1] = [Self::Pi];

    fn find(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|agent| agent.name() == name)
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

/// Whether a name is that of a built-in agent, now or in a later version.
pub(super) fn is_reserved(name: &str) -> bool {
    BuiltIn::find(name).is_some() || is_planned(name)
}

fn is_planned(name: &str) -> bool {
    PLANNED.contains(&name)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]
mod tests {
    use super::*;
    use crate::error::{Code, Error};

    fn find(name: &str, own: &[&str]) -> Result<Agent, Error> {
        let own = own.iter().map(|name| {
            let command = "/srv/bot".to_owned();
            OwnAgent::new((*name).to_owned(), command, Vec::new(), Vec::new()).unwrap()
        });
        Agent::find(name, &own.collect()).map_err(Error::from)
    }

    #[test]
    fn an_agent_is_found_by_its_name() {
        assert_eq!(find("pi", &[]).unwrap(), Agent::BuiltIn(BuiltIn::Pi));
        assert_eq!(find("mybot", &["a", "mybot"]).unwrap().name(), "mybot");
    }

    #[test]
    fn an_unknown_name_is_answered_with_the_known_ones_and_the_option_that_adds_one() {
        let error = find("pie", &["mybot"]).unwrap_err();
        assert_eq!(error.code, Code::AgentUnknown);
        for named in ["\"pie\"", "pi, mybot", "client option agents"] {
            assert!(error.message.contains(named), "{error}");
        }
    }

    #[test]
    fn a_documented_agent_of_a_later_version_is_told_apart_from_an_unknown_one() {
        let error = find("claude", &[]).unwrap_err();
        assert_eq!(error.code, Code::AgentUnsupported);
    }
}
