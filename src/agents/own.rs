//! Agents that a client configures itself: any program of the VM that speaks ACP.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::catalog::is_reserved;

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
                "this is the name of an agent that agentvm brings itself: choose another one",
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

/// The own agents of a client, by name.
#[derive(Debug, Clone, Default)]
pub struct OwnAgents(Arc<BTreeMap<String, Arc<OwnAgent>>>);

impl OwnAgents {
    pub(super) fn find(&self, name: &str) -> Option<Arc<OwnAgent>> {
        self.0.get(name).map(Arc::clone)
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }
}

impl FromIterator<OwnAgent> for OwnAgents {
    fn from_iter<T: IntoIterator<Item = OwnAgent>>(agents: T) -> Self {
        let agents = agents.into_iter();
        let named = agents.map(|agent| (agent.name.clone(), Arc::new(agent)));
        Self(Arc::new(named.collect()))
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
