//! Which agents there are.

use std::sync::{Arc, LazyLock};

use super::amp;
use super::claude;
use super::codex;
use super::error::AgentError;
use super::launch::{Launch, SessionSpec};
use super::opencode;
use super::own::{ClientAgents, OwnAgent};
use super::pi;
use super::pinned::{Packages, Pinned};
use super::version::Version;

/// An agent that sessions can be made with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Agent {
    BuiltIn(BuiltIn),
    /// A built-in one in another version than the pinned one: nobody has tested it with this agentvm.
    InVersion(BuiltIn, Version),
    /// One that a client has configured: nothing of it is in the store.
    Own(Arc<OwnAgent>),
}

/// An agent that this version installs and runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum BuiltIn {
    Pi,
    Claude,
    Codex,
    OpenCode,
    Amp,
}

/// What the rest of this module needs to know about a built-in agent.
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
    /// Whether it tries SSE by itself where a remote MCP server does not know streamable HTTP.
    pub(super) finds_transports: bool,
    /// Adds to a launch plan what depends on the session. What the plan has of the session's own
    /// environment must stay as it is.
    pub(super) configure: fn(&SessionSpec<'_>, &mut Launch),
}

impl Agent {
    /// The agent that `createSession` calls `name`, for a client that has `configured` agents.
    pub fn find(name: &str, configured: &ClientAgents) -> Result<Self, AgentError> {
        if let Some(agent) = BuiltIn::find(name).filter(|agent| agent.runs_here()) {
            return Ok(match configured.version(agent) {
                Some(version) => agent.in_version(version.clone()),
                None => Self::BuiltIn(agent),
            });
        }
        if let Some(agent) = configured.find(name) {
            return Ok(Self::Own(agent));
        }
        let here = BuiltIn::ALL.iter().filter(|agent| agent.runs_here());
        let built_in = here.map(|agent| agent.name());
        let known: Vec<&str> = built_in.chain(configured.names()).collect();
        let known = known.join(", ");
        Err(if is_reserved(name) {
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

    /// The agent that `install` and `remove` call `pi`, or `pi@0.87.1` in an exact version.
    pub fn find_version(wanted: &str, configured: &ClientAgents) -> Result<Self, AgentError> {
        let Some((name, version)) = wanted.split_once('@') else {
            return Self::find(wanted, configured);
        };
        let refused = |problem| AgentError::Version {
            wanted: wanted.to_owned(),
            problem,
        };
        match Self::find(name, configured)? {
            Self::BuiltIn(agent) | Self::InVersion(agent, _) => {
                Ok(agent.in_version(Version::parse(version).map_err(refused)?))
            }
            Self::Own(_) => Err(refused("an agent of your own has none")),
        }
    }

    /// `None`: a client's own.
    #[must_use]
    pub const fn built_in(&self) -> Option<BuiltIn> {
        match self {
            Self::BuiltIn(agent) | Self::InVersion(agent, _) => Some(*agent),
            Self::Own(_) => None,
        }
    }

    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::BuiltIn(agent) | Self::InVersion(agent, _) => agent.name(),
            Self::Own(agent) => agent.name(),
        }
    }
}

impl BuiltIn {
    pub const ALL: [Self; 5] = [
        Self::Pi,
        Self::Claude,
        Self::Codex,
        Self::OpenCode,
        Self::Amp,
    ];

    #[must_use]
    pub fn find(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|agent| agent.name() == name)
    }

    /// Whether its packages are there for this processor.
    pub(super) fn runs_here(self) -> bool {
        self != Self::Amp || cfg!(target_arch = "x86_64")
    }

    #[must_use]
    pub fn name(self) -> &'static str {
        self.definition().name
    }

    /// The npm package that is this agent, or that speaks ACP for it.
    #[must_use]
    pub fn package(self) -> &'static str {
        self.definition().packages.package
    }

    /// The pinned version of [`BuiltIn::package`].
    #[must_use]
    pub fn version(self) -> &'static str {
        self.definition().packages.version
    }

    fn in_version(self, version: Version) -> Agent {
        if version.as_str() == self.version() {
            Agent::BuiltIn(self)
        } else {
            Agent::InVersion(self, version)
        }
    }

    /// Name of its entry; `version`: another one than the pinned.
    pub(super) fn entry(self, version: Option<&Version>) -> Result<String, AgentError> {
        let definition = self.definition();
        match version {
            Some(version) => definition.packages.entry_in_version(version),
            None => Ok(definition.entry.clone()),
        }
    }

    pub(super) fn packages(self, version: Option<&Version>) -> Result<Packages, AgentError> {
        let pinned = &self.definition().packages;
        version.map_or_else(
            || Ok(pinned.packages()),
            |version| pinned.in_version(version),
        )
    }

    pub(super) fn definition(self) -> &'static Definition {
        match self {
            Self::Pi => &pi::PI,
            Self::Claude => &claude::CLAUDE,
            Self::Codex => &codex::CODEX,
            Self::OpenCode => &opencode::OPENCODE,
            Self::Amp => &amp::AMP,
        }
    }
}

/// Whether a name is that of a built-in agent, here or on another processor.
pub(super) fn is_reserved(name: &str) -> bool {
    BuiltIn::find(name).is_some()
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]
mod tests {
    use super::*;
    use crate::error::{Code, Error};

    fn own(names: &[&str]) -> ClientAgents {
        let own = names.iter().map(|name| {
            let command = "/srv/bot".to_owned();
            OwnAgent::new((*name).to_owned(), command, Vec::new(), Vec::new()).unwrap()
        });
        own.collect()
    }

    fn find(name: &str, names: &[&str]) -> Result<Agent, Error> {
        Agent::find(name, &own(names)).map_err(Error::from)
    }

    fn version(text: &str) -> Version {
        Version::parse(text).unwrap()
    }

    #[test]
    fn a_client_chooses_the_version_of_a_built_in_agent() {
        let other = ClientAgents::new([], [(BuiltIn::Pi, version("0.1.0"))]);
        let in_version = Agent::InVersion(BuiltIn::Pi, version("0.1.0"));
        assert_eq!(Agent::find("pi", &other).unwrap(), in_version);
        let same = ClientAgents::new([], [(BuiltIn::Pi, version(BuiltIn::Pi.version()))]);
        assert_eq!(
            Agent::find("pi", &same).unwrap(),
            Agent::BuiltIn(BuiltIn::Pi)
        );
    }

    #[test]
    fn a_version_behind_the_name_is_exact_and_comes_before_the_clients() {
        let configured = ClientAgents::new([], [(BuiltIn::Pi, version("0.1.0"))]);
        let find = |wanted| Agent::find_version(wanted, &configured).map_err(Error::from);
        let in_version = Agent::InVersion(BuiltIn::Pi, version("0.2.0"));
        assert_eq!(find("pi@0.2.0").unwrap(), in_version);
        let pinned = format!("pi@{}", BuiltIn::Pi.version());
        assert_eq!(find(&pinned).unwrap(), Agent::BuiltIn(BuiltIn::Pi));
        for wrong in ["pi@latest", "pi@^1.0.0", "pi@"] {
            let error = find(wrong).unwrap_err();
            assert_eq!(error.code, Code::InvalidArgument);
            assert!(error.message.contains(wrong), "{error}");
        }
        assert_eq!(find("pie@1.0.0").unwrap_err().code, Code::AgentUnknown);
        let of_own = Agent::find_version("mybot@1.0.0", &own(&["mybot"]));
        let error = Error::from(of_own.unwrap_err());
        assert_eq!(error.code, Code::InvalidArgument);
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
        for named in ["\"pie\"", "pi, ", ", mybot", "client option agents"] {
            assert!(error.message.contains(named), "{error}");
        }
    }
}
