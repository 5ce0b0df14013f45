//! What a client configures of agents: its own, which are any program of the VM that speaks ACP, and
//! versions of the built-in ones.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::catalog::{BuiltIn, is_reserved};
use super::version::Version;

/// A program of the VM as an agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OwnAgent {
    name: String,
    pub(super) command: String,
    pub(super) args: Vec<String>,
    /// Set unless the session sets them otherwise.
    pub(super) env: Vec<(String, String)>,
}

/// Which field of an [`OwnAgent`] is wrong, and why.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Invalid {
    /// `None`: the name itself.
    pub field: Option<&'static str>,
    pub problem: &'static str,
}

impl OwnAgent {
    /// `name`: letters, digits, `-` and `_`, and not that of a built-in agent. `command`: looked up on
    /// the session's `PATH`, or an absolute path in the VM. `env` has been checked to be one.
    pub fn new(
        name: String,
        command: String,
        args: Vec<String>,
        env: Vec<(String, String)>,
    ) -> Result<Self, Invalid> {
        let invalid = |field, problem| Err(Invalid { field, problem });
        let in_name = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if name.is_empty() || !name.chars().all(in_name) {
            return invalid(
                None,
                "an agent's name consists of letters, digits, \"-\" and \"_\"",
            );
        }
        if is_reserved(&name) {
            return invalid(
                None,
                "this is the name of an agent that agentvm brings itself: choose another one, or give \
                 nothing but its version",
            );
        }
        let field = Some("command");
        if command.is_empty() {
            return invalid(field, "must not be empty");
        }
        if command.contains('/') && !command.starts_with('/') {
            return invalid(
                field,
                "must be the name of a program on the VM's PATH, or an absolute path in the VM; \
                 what follows the program goes into args",
            );
        }
        if command.contains('\0') {
            return invalid(field, "contains a NUL byte");
        }
        if args.iter().any(|arg| arg.contains('\0')) {
            return invalid(Some("args"), "an argument contains a NUL byte");
        }
        Ok(Self {
            name,
            command,
            args,
            env,
        })
    }

    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }
}

/// What a client has configured.
#[derive(Debug, Clone, Default)]
pub struct ClientAgents(Arc<Configured>);

#[derive(Debug, Default)]
struct Configured {
    own: BTreeMap<String, Arc<OwnAgent>>,
    /// Of built-in agents, by name.
    versions: BTreeMap<&'static str, Version>,
}

impl ClientAgents {
    /// `versions`: of built-in agents that this client runs in another version than the pinned one.
    #[must_use]
    pub fn new(
        own: impl IntoIterator<Item = OwnAgent>,
        versions: impl IntoIterator<Item = (BuiltIn, Version)>,
    ) -> Self {
        let own = own.into_iter();
        let versions = versions.into_iter();
        Self(Arc::new(Configured {
            own: own.map(|own| (own.name.clone(), Arc::new(own))).collect(),
            versions: versions
                .map(|(agent, version)| (agent.name(), version))
                .collect(),
        }))
    }

    pub(super) fn find(&self, name: &str) -> Option<Arc<OwnAgent>> {
        self.0.own.get(name).map(Arc::clone)
    }

    /// `None`: the pinned one.
    pub(super) fn version(&self, agent: BuiltIn) -> Option<&Version> {
        self.0.versions.get(agent.name())
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.0.own.keys().map(String::as_str)
    }
}

impl FromIterator<OwnAgent> for ClientAgents {
    fn from_iter<T: IntoIterator<Item = OwnAgent>>(agents: T) -> Self {
        Self::new(agents, [])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_be_no_agent_is_refused_with_its_field() {
        for (name, command, field) in [
            ("", "bot", None),
            ("my bot", "bot", None),
            ("b\u{f6}t", "bot", None),
            ("pi", "bot", None),
            ("claude", "bot", None),
            ("bot", "", Some("command")),
            ("bot", "./bot", Some("command")),
            ("bot", "bin/bot --acp", Some("command")),
            ("bot", "/b\0t", Some("command")),
        ] {
            let agent = OwnAgent::new(name.to_owned(), command.to_owned(), vec![], vec![]);
            assert_eq!(agent.expect_err(name).field, field, "{name} {command}");
        }
    }
}
