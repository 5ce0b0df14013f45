//! What a caller says about a session, parsed once.

use serde::{Deserialize, Serialize};

use super::environment::Environment;
use crate::error::{Error, Result};
use crate::vm::GuestPath;

/// Who answers an agent that asks for permission.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PermissionPolicy {
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
    pub permission_policy: PermissionPolicy,
    /// Keep `env` for a later resume.
    pub persist_env: bool,
}

/// The same as the caller writes it.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(crate) struct RawSessionOptions {
    env: Environment,
    cwd: Option<String>,
    permission_policy: Option<PermissionPolicy>,
    persist_env: Option<bool>,
}

impl TryFrom<RawSessionOptions> for SessionOptions {
    type Error = Error;

    fn try_from(raw: RawSessionOptions) -> Result<Self> {
        check_environment("env", &raw.env)?;
        let cwd = match raw.cwd {
            Some(cwd) => {
                GuestPath::new(&cwd).map_err(|problem| Error::invalid_argument("cwd", problem))?
            }
            None => GuestPath::home(),
        };
        Ok(Self {
            env: raw.env,
            cwd,
            permission_policy: raw.permission_policy.unwrap_or(PermissionPolicy::Allow),
            persist_env: raw.persist_env.unwrap_or(true),
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
