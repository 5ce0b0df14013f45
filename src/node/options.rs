//! Options as `lib/` sends them: JSON text, parsed once.

use std::collections::BTreeMap;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::agents::AgentStore;
use crate::error::{Error, Result};
use crate::session::{
    ClientOptions, RawSessionOptions, SessionOptions, Settings, check_environment, text_prompt,
};
use crate::store::Durability;
use crate::vm::exec::ExecOptions;
use crate::vm::{GuestPath, User};

/// What is left unset means the documented default.
pub(super) fn parse<T: DeserializeOwned>(json: &str) -> Result<T> {
    let mut deserializer = serde_json::Deserializer::from_str(json);
    serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
        let field = error.path().to_string();
        let field = if field == "." { "options" } else { &field };
        // Without serde_json's position: the caller did not write this text.
        let problem = error.inner().to_string();
        let problem = problem
            .split_once(" at line ")
            .map_or(problem.as_str(), |(problem, _)| problem);
        Error::invalid_argument(field, problem)
    })
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawClientOptions {
    data_dir: PathBuf,
    /// Root of the agent store.
    agent_store_dir: PathBuf,
    #[serde(default = "yes")]
    auto_install: bool,
    #[serde(default)]
    durability: RawDurability,
    #[serde(default)]
    loopback_exempt_ports: Vec<u16>,
    #[serde(default = "default_message_bytes")]
    max_message_bytes: u32,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum RawDurability {
    #[default]
    Normal,
    Full,
}

const fn yes() -> bool {
    true
}

const fn default_message_bytes() -> u32 {
    64 << 20
}

/// `package`: root of this npm package, which has the adapters; `node`: the Node that runs this.
pub(super) fn client_options(json: &str, package: PathBuf, node: PathBuf) -> Result<ClientOptions> {
    let raw: RawClientOptions = parse(json)?;
    for (field, path) in [
        ("dataDir", &raw.data_dir),
        ("agentStoreDir", &raw.agent_store_dir),
    ] {
        if path.as_os_str().is_empty() {
            return Err(Error::invalid_argument(field, "a path must not be empty"));
        }
        if path.as_os_str().as_bytes().contains(&0) {
            return Err(Error::invalid_argument(
                field,
                "a path must not contain NUL",
            ));
        }
    }
    if raw.max_message_bytes < 1024 {
        return Err(Error::invalid_argument(
            "maxMessageBytes",
            "must be at least 1024: an agent's first answer is longer than less",
        ));
    }
    if raw.loopback_exempt_ports.contains(&0) {
        return Err(Error::invalid_argument(
            "loopbackExemptPorts",
            "0 is no port",
        ));
    }
    Ok(ClientOptions {
        data_dir: raw.data_dir,
        settings: Settings {
            agents: AgentStore::new(raw.agent_store_dir, package, node),
            auto_install: raw.auto_install,
            durability: match raw.durability {
                RawDurability::Normal => Durability::Normal,
                RawDurability::Full => Durability::Full,
            },
            loopback_exempt_ports: raw.loopback_exempt_ports,
            max_message_bytes: raw.max_message_bytes as usize,
        },
    })
}

pub(super) fn session_options(json: &str) -> Result<SessionOptions> {
    parse::<RawSessionOptions>(json)?.try_into()
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(super) struct RawResumeOptions {
    env: Option<BTreeMap<String, String>>,
}

impl RawResumeOptions {
    pub(super) fn checked_env(self) -> Result<Option<BTreeMap<String, String>>> {
        if let Some(env) = &self.env {
            check_environment("env", env)?;
        }
        Ok(self.env)
    }
}

/// Which events of a session.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(super) struct RawQuery {
    pub(super) since: u64,
    pub(super) limit: Option<u64>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(super) struct RawExecOptions {
    env: BTreeMap<String, String>,
    cwd: Option<String>,
    user: RawUser,
    timeout_ms: Option<u64>,
    max_output_bytes: Option<u64>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(super) struct RawFileOptions {
    user: RawUser,
}

impl RawFileOptions {
    pub(super) const fn user(&self) -> User {
        self.user.user()
    }
}

#[derive(Default, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum RawUser {
    #[default]
    User,
    Root,
}

impl RawUser {
    const fn user(self) -> User {
        match self {
            Self::User => User::User,
            Self::Root => User::Root,
        }
    }
}

pub(super) fn exec_options(json: &str, stdin: Vec<u8>) -> Result<ExecOptions> {
    let raw: RawExecOptions = parse(json)?;
    check_environment("env", &raw.env)?;
    if raw.timeout_ms == Some(0) {
        // Elsewhere in Node, 0 means that there is none.
        return Err(Error::invalid_argument(
            "timeoutMs",
            "must be at least 1: leave it out for no time limit",
        ));
    }
    let default = ExecOptions::default();
    Ok(ExecOptions {
        env: raw.env.into_iter().collect(),
        cwd: match raw.cwd {
            Some(cwd) => path("cwd", &cwd)?,
            None => default.cwd,
        },
        user: raw.user.user(),
        stdin,
        timeout: raw.timeout_ms.map(Duration::from_millis),
        max_output_bytes: raw
            .max_output_bytes
            .map_or(default.max_output_bytes, |bytes| {
                usize::try_from(bytes).unwrap_or(usize::MAX)
            }),
    })
}

/// A prompt: a text, or ACP content blocks. What is in a block is for the agent to judge.
pub(super) fn prompt(json: &str) -> Result<Vec<Value>> {
    let blocks = match parse(json)? {
        Value::String(text) => return Ok(text_prompt(&text)),
        Value::Array(blocks) => blocks,
        _ => {
            return Err(Error::invalid_argument(
                "text",
                "a prompt is a string or an array of ACP content blocks",
            ));
        }
    };
    for (index, block) in blocks.iter().enumerate() {
        if !block["type"].is_string() {
            return Err(Error::invalid_argument(
                &format!("text[{index}]"),
                "an ACP content block is an object with a type",
            ));
        }
    }
    Ok(blocks)
}

pub(super) fn command(text: &str) -> Result<&str> {
    if text.contains('\0') {
        return Err(Error::invalid_argument("command", "contains a NUL byte"));
    }
    Ok(text)
}

pub(super) fn path(field: &str, text: &str) -> Result<GuestPath> {
    GuestPath::new(text).map_err(|problem| Error::invalid_argument(field, problem))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_option_is_named_with_its_path() {
        for (json, named) in [
            (r#"{"env":{"A":1}}"#, "env.A"),
            (r#"{"timeoutMs":"soon"}"#, "timeoutMs"),
            (r#"{"timeoutMs":0}"#, "timeoutMs"),
            (r#"{"user":"admin"}"#, "user"),
            (r#"{"cwd":""}"#, "cwd"),
            (r#"{"tiemoutMs":1}"#, "tiemoutMs"),
        ] {
            let error = exec_options(json, Vec::new()).expect_err(json);
            assert_eq!(error.code.as_str(), "INVALID_ARGUMENT");
            assert!(error.message.starts_with(named), "{error}");
            assert!(!error.message.contains("line 1"), "{error}");
        }
    }
}
