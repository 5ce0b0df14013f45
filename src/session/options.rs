//! What a caller says about a session, parsed once.

use serde::{Deserialize, Serialize};

use super::environment::Environment;
use super::mcp::{self, McpServer};
use crate::error::{Error, Result};
use crate::vm::GuestPath;

/// Who answers an agent that asks for permission.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PermissionPolicy {
    /// Every request waits for the caller's answer.
    Ask,
    /// Every request is allowed: the VM is the boundary.
    Allow,
    /// Every request is rejected.
    Reject,
}

/// Options of a new session.
#[derive(Debug, Clone)]
pub struct SessionOptions {
    pub env: Environment,
    pub cwd: GuestPath,
    /// Checked, and each with a name of its own.
    pub mcp_servers: Vec<McpServer>,
    /// Appended to the agent's system prompt, after what agentvm says itself.
    pub additional_instructions: Option<String>,
    /// Say nothing about the VM in the system prompt; what tools there are is said all the same.
    pub skip_os_instructions: bool,
    pub permission_policy: PermissionPolicy,
    /// What the agent is set to before its first turn. `None`: its own default.
    pub model: Option<String>,
    pub mode: Option<String>,
    pub thought_level: Option<String>,
    /// Keep `env` and `mcp_servers` for a later resume.
    pub persist_env: bool,
}

impl Default for SessionOptions {
    fn default() -> Self {
        Self {
            env: Environment::new(),
            cwd: GuestPath::home(),
            mcp_servers: Vec::new(),
            additional_instructions: None,
            skip_os_instructions: false,
            permission_policy: PermissionPolicy::Allow,
            model: None,
            mode: None,
            thought_level: None,
            persist_env: true,
        }
    }
}

/// The same as the caller writes it.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(crate) struct RawSessionOptions {
    env: Environment,
    cwd: Option<String>,
    mcp_servers: Vec<McpServer>,
    additional_instructions: Option<String>,
    skip_os_instructions: bool,
    permission_policy: Option<PermissionPolicy>,
    model: Option<String>,
    mode: Option<String>,
    thought_level: Option<String>,
    persist_env: Option<bool>,
}

impl TryFrom<RawSessionOptions> for SessionOptions {
    type Error = Error;

    fn try_from(raw: RawSessionOptions) -> Result<Self> {
        check_environment("env", &raw.env)?;
        let default = Self::default();
        let cwd = match raw.cwd {
            Some(cwd) => {
                GuestPath::new(&cwd).map_err(|problem| Error::invalid_argument("cwd", problem))?
            }
            None => default.cwd,
        };
        Ok(Self {
            env: raw.env,
            cwd,
            mcp_servers: mcp::check(raw.mcp_servers)?,
            additional_instructions: raw.additional_instructions,
            skip_os_instructions: raw.skip_os_instructions,
            permission_policy: raw.permission_policy.unwrap_or(default.permission_policy),
            model: raw.model,
            mode: raw.mode,
            thought_level: raw.thought_level,
            persist_env: raw.persist_env.unwrap_or(default.persist_env),
        })
    }
}

/// A name with `=` or NUL, or a value with NUL, can't be handed to a process.
pub(crate) fn check_environment(field: &str, env: &Environment) -> Result<()> {
    for (name, value) in env {
        if name.is_empty() || name.contains(['=', '\0']) {
            return Err(Error::invalid_argument(
                field,
                format!("{name:?} is not a name of an environment variable"),
            ));
        }
        if value.contains('\0') {
            return Err(Error::invalid_argument(
                field,
                format!("the value of {name} contains a NUL byte"),
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<SessionOptions> {
        let raw: RawSessionOptions = serde_json::from_str(json)
            .map_err(|error| Error::invalid_argument("options", error))?;
        raw.try_into()
    }

    #[test]
    fn nothing_given_means_home_and_an_empty_environment() {
        let options = parse("{}").expect("valid");
        assert_eq!(options.cwd.as_str(), "/home/user");
        assert!(options.env.is_empty());
        assert_eq!(options.permission_policy, PermissionPolicy::Allow);
    }

    #[test]
    fn what_a_process_cannot_be_given_is_refused_by_name() {
        for (json, named) in [
            (r#"{"env":{"A=B":"x"}}"#, "A=B"),
            (r#"{"env":{"A":"x\u0000"}}"#, "value of A"),
            (r#"{"env":{"A":1}}"#, "expected a string"),
            (r#"{"cwd":""}"#, "cwd"),
            (r#"{"cwd":"/a\u0000"}"#, "cwd"),
            (r#"{"speling":1}"#, "speling"),
        ] {
            let error = parse(json).expect_err(json);
            assert_eq!(error.code.as_str(), "INVALID_ARGUMENT");
            assert!(error.message.contains(named), "{error}");
        }
    }
}
