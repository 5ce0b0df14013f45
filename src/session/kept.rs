//! What of a session's options is kept with its record, for every later start.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::client::Settings;
use super::environment::Secrets;
use super::instructions;
use super::mcp::McpServer;
use super::options::{PermissionPolicy, SessionOptions};
use super::start::Setup;
use crate::error::{Code, Error, Result};
use crate::ids::SessionId;
use crate::vm::GuestPath;

/// In the database: nothing secret.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Kept {
    pub(super) permission_policy: PermissionPolicy,
    #[serde(default = "yes")]
    pub(super) persist_env: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    additional_instructions: Option<String>,
    #[serde(default)]
    skip_os_instructions: bool,
    /// Names of its MCP servers: what there must be for a resume.
    #[serde(default)]
    mcp_servers: Vec<String>,
}

/// Sessions of before this was asked kept theirs.
const fn yes() -> bool {
    true
}

impl Kept {
    pub(super) fn of(options: &SessionOptions) -> Self {
        let names = options.mcp_servers.iter().map(McpServer::name);
        Self {
            permission_policy: options.permission_policy,
            persist_env: options.persist_env,
            additional_instructions: options.additional_instructions.clone(),
            skip_os_instructions: options.skip_os_instructions,
            mcp_servers: names.map(ToOwned::to_owned).collect(),
        }
    }

    /// From a record; the strictest settings from one that can't be read.
    pub(super) fn parse(text: &str) -> Self {
        serde_json::from_str(text).unwrap_or(Self {
            permission_policy: PermissionPolicy::Reject,
            persist_env: false,
            additional_instructions: None,
            skip_os_instructions: false,
            mcp_servers: Vec::new(),
        })
    }

    pub(super) fn to_text(&self) -> Arc<str> {
        // A struct of plain fields: always representable.
        serde_json::to_string(self).unwrap_or_default().into()
    }

    /// What a new start needs of what was kept, and of what the caller passes again.
    pub(super) fn secrets(
        &self,
        session: SessionId,
        kept: Option<Secrets>,
        given: Resume,
    ) -> Result<Secrets> {
        let required = |option: &str, why: String| {
            let remedy = format!("pass it with resumeSession(sessionId, {{ {option} }})");
            Error::new(
                Code::EnvRequired,
                format!("session {session} {why}: {remedy}"),
            )
        };
        let (env, mcp_servers) = kept.map_or((None, None), |kept| {
            (Some(kept.env), Some(kept.mcp_servers))
        });
        let env = given.env.or(env);
        let mcp_servers = given.mcp_servers.or(mcp_servers);
        Ok(Secrets {
            env: env.ok_or_else(|| required("env", "has no kept environment".to_owned()))?,
            mcp_servers: match mcp_servers {
                Some(servers) => servers,
                None if self.mcp_servers.is_empty() => Vec::new(),
                None => {
                    let names = self.mcp_servers.join(", ");
                    let why = format!("has MCP servers ({names}) that were not kept");
                    return Err(required("mcpServers", why));
                }
            },
        })
    }

    /// What the agent is told whenever it opens the conversation.
    pub(super) fn setup(
        &self,
        settings: &Settings,
        cwd: GuestPath,
        mcp_servers: Vec<McpServer>,
        programs: &[String],
    ) -> Setup {
        Setup {
            instructions: instructions::compose(
                self.skip_os_instructions,
                &mcp_servers,
                programs,
                settings.additional_instructions.as_deref(),
                self.additional_instructions.as_deref(),
            ),
            cwd,
            mcp_servers,
            policy: self.permission_policy,
        }
    }
}

/// What a caller of `resumeSession` passes again.
#[derive(Debug, Default)]
pub struct Resume {
    /// Replaces what was kept.
    pub env: Option<super::environment::Environment>,
    pub mcp_servers: Option<Vec<McpServer>>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(mcp_servers: &[&str]) -> Kept {
        let mut kept = Kept::of(&SessionOptions::default());
        kept.mcp_servers = mcp_servers.iter().map(|name| (*name).to_owned()).collect();
        kept
    }

    #[test]
    fn what_was_not_kept_is_asked_for_by_name() {
        let id = SessionId::generate();
        let error = kept(&[])
            .secrets(id, None, Resume::default())
            .expect_err("no env");
        assert!(error.message.contains("{ env }"), "{error}");
        let env = || Resume {
            env: Some([("A".to_owned(), "1".to_owned())].into()),
            mcp_servers: None,
        };
        let error = kept(&["files"])
            .secrets(id, None, env())
            .expect_err("no servers");
        assert_eq!(error.code, Code::EnvRequired);
        assert!(error.message.contains("files"), "{error}");
        assert_eq!(
            kept(&[])
                .secrets(id, None, env())
                .expect("enough")
                .env
                .len(),
            1
        );
    }

    #[test]
    fn a_record_that_cannot_be_read_allows_nothing() {
        assert_eq!(Kept::parse("?").permission_policy, PermissionPolicy::Reject);
        let text = Kept::of(&SessionOptions::default()).to_text();
        assert_eq!(
            Kept::parse(&text).permission_policy,
            PermissionPolicy::Allow
        );
    }
}
