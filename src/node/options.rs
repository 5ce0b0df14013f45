//! Options as `lib/` sends them: JSON text, parsed once.

use std::collections::BTreeMap;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;
use serde_json::Value;

pub(super) use super::argument::parse;
use super::argument::{MAX_SAFE, Object, Whole, WholeOrFalse};
use super::images::RawImage;
use super::limits::RawLimits;
use super::network::RawNetwork;
use super::secrets::{RawSecrets, secrets};
use crate::agents::{AgentStore, BuiltIn, ClientAgents, OwnAgent, Version};
use crate::error::{Error, Result};
use crate::ids::Seq;
use crate::session::{
    ClientOptions, McpServer, NetworkRules, RawSessionOptions, Resume, RootChoice, SessionOptions,
    Settings, VmSettings, check_environment, check_mcp_servers, text_prompt,
};
use crate::store::{Durability, Query};
use crate::vm::exec::ExecOptions;
use crate::vm::mount::{self, HostMount};
use crate::vm::{GuestPath, User};

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
    /// At least 1024: an agent's first answer is longer than less.
    max_message_bytes: Option<Whole<1024, MAX_MESSAGE_BYTES>>,
    /// By name.
    #[serde(default)]
    agents: BTreeMap<String, Object<RawAgent>>,
    additional_instructions: Option<String>,
    cancel_grace_ms: Option<Whole<0, MAX_SAFE>>,
    // As below: serde can't flatten into a struct that denies unknown fields.
    loopback_exempt_ports: Option<Vec<Whole<1, 65_535>>>,
    network: Option<Object<RawNetwork>>,
    sleep_after_ms: Option<WholeOrFalse<1, MAX_SAFE>>,
    limits: Option<Object<RawLimits>>,
    mounts: Option<Vec<Object<RawMount>>>,
    image: Option<RawImage>,
    secrets: Option<RawSecrets>,
    /// Root of the image store. Beside the agent store unless it is given.
    image_store_dir: Option<PathBuf>,
}

/// What a client's VMs are booted with, and one of them over that.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawVmOptions {
    loopback_exempt_ports: Option<Vec<Whole<1, 65_535>>>,
    network: Option<Object<RawNetwork>>,
    sleep_after_ms: Option<WholeOrFalse<1, MAX_SAFE>>,
    limits: Option<Object<RawLimits>>,
    mounts: Option<Vec<Object<RawMount>>>,
    image: Option<RawImage>,
    secrets: Option<RawSecrets>,
}

impl RawVmOptions {
    /// `over`: what holds where nothing is given.
    fn settings(self, over: &VmSettings) -> Result<VmSettings> {
        let mut settings = over.clone();
        if let Some(ports) = self.loopback_exempt_ports {
            // In the range of a port, as parsed.
            let ports = ports.into_iter();
            settings.loopback_exempt_ports =
                ports.filter_map(|port| port.0.try_into().ok()).collect();
        }
        if let Some(network) = self.network {
            settings.network = NetworkRules::new(network.0.rules("network")?);
        }
        if let Some(sleep_after) = self.sleep_after_ms {
            settings.sleep_after = sleep_after.0.map(Duration::from_millis);
        }
        if let Some(limits) = self.limits {
            settings.limits = limits.0.over(&settings.limits);
        }
        if let Some(raw) = self.mounts {
            settings.mounts = mounts(raw)?;
        }
        if let Some(image) = self.image {
            settings.image = image.0.map_or(RootChoice::HostPrograms, RootChoice::Image);
        }
        if let Some(raw) = self.secrets {
            settings.secrets = secrets(raw)?;
        }
        Ok(settings)
    }
}

/// The options of one VM, over those that it has.
pub(super) fn vm_options(json: &str, over: &VmSettings) -> Result<VmSettings> {
    parse::<RawVmOptions>(json)?.settings(over)
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawMount {
    path: String,
    host_path: PathBuf,
    #[serde(default)]
    read_only: bool,
}

fn mounts(raw: Vec<Object<RawMount>>) -> Result<Vec<HostMount>> {
    let invalid = |index: usize, field: &str, problem: String| {
        Error::invalid_argument(&format!("mounts[{index}].{field}"), problem)
    };
    let mounts = raw.into_iter().enumerate().map(|(index, Object(raw))| {
        HostMount::new(&raw.path, &raw.host_path, raw.read_only)
            .map_err(|(field, problem)| invalid(index, field, problem))
    });
    let mounts: Vec<_> = mounts.collect::<Result<_>>()?;
    mount::check(&mounts).map_err(|wrong| invalid(wrong.index, wrong.field, wrong.problem))?;
    Ok(mounts)
}

/// What V8 holds in one string is less.
const MAX_MESSAGE_BYTES: u64 = 1 << 30;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawAgent {
    /// Of a built-in agent, and then alone.
    version: Option<String>,
    command: Option<String>,
    args: Option<Vec<String>>,
    env: Option<BTreeMap<String, String>>,
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

/// `package`: root of this npm package, which has the adapters; `node`: the Node that runs this.
pub(super) fn client_options(json: &str, package: PathBuf, node: PathBuf) -> Result<ClientOptions> {
    let raw: RawClientOptions = parse(json)?;
    let image_store_dir = raw.image_store_dir.as_ref();
    for (field, path) in [
        ("dataDir", &raw.data_dir),
        ("agentStoreDir", &raw.agent_store_dir),
        ("imageStoreDir", image_store_dir.unwrap_or(&raw.data_dir)),
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
    let mut settings = Settings::new(AgentStore::new(raw.agent_store_dir, package, node));
    settings.configured_agents = client_agents(raw.agents)?;
    settings.auto_install = raw.auto_install;
    settings.durability = match raw.durability {
        RawDurability::Normal => Durability::Normal,
        RawDurability::Full => Durability::Full,
    };
    let vm = RawVmOptions {
        loopback_exempt_ports: raw.loopback_exempt_ports,
        network: raw.network,
        sleep_after_ms: raw.sleep_after_ms,
        limits: raw.limits,
        mounts: raw.mounts,
        image: raw.image,
        secrets: raw.secrets,
    };
    if let Some(images) = raw.image_store_dir {
        settings.images = images;
    }
    settings.vm = vm.settings(&settings.vm)?;
    if let Some(bytes) = raw.max_message_bytes {
        settings.max_message_bytes = usize::try_from(bytes.0).unwrap_or(usize::MAX);
    }
    settings.additional_instructions = raw.additional_instructions;
    if let Some(grace) = raw.cancel_grace_ms {
        settings.cancel_grace = Duration::from_millis(grace.0);
    }
    Ok(ClientOptions {
        data_dir: raw.data_dir,
        settings,
    })
}

fn client_agents(raw: BTreeMap<String, Object<RawAgent>>) -> Result<ClientAgents> {
    let mut own = Vec::new();
    let mut versions = Vec::new();
    for (name, Object(raw)) in raw {
        let field = format!("agents.{name}");
        match BuiltIn::find(&name) {
            Some(agent) if raw.is_version() => {
                if let Some(version) = raw.version {
                    let version = Version::parse(&version).map_err(|problem| {
                        Error::invalid_argument(&format!("{field}.version"), problem)
                    })?;
                    versions.push((agent, version));
                }
            }
            _ => own.push(own_agent(name, raw, &field)?),
        }
    }
    Ok(ClientAgents::new(own, versions))
}

impl RawAgent {
    const fn is_version(&self) -> bool {
        self.command.is_none() && self.args.is_none() && self.env.is_none()
    }
}

fn own_agent(name: String, raw: RawAgent, field: &str) -> Result<OwnAgent> {
    let env = raw.env.unwrap_or_default();
    check_environment(&format!("{field}.env"), &env)?;
    let args = raw.args.unwrap_or_default();
    let command = raw.command.clone().unwrap_or_default();
    let agent = OwnAgent::new(name, command, args, env.into_iter().collect());
    let invalid = |own: Option<&str>, problem: &str| {
        let field = own.map_or_else(|| field.to_owned(), |own| format!("{field}.{own}"));
        Error::invalid_argument(&field, problem)
    };
    match agent {
        // What the name is for comes first.
        Err(wrong) if wrong.field.is_none() => Err(invalid(None, wrong.problem)),
        _ if raw.command.is_none() => Err(invalid(None, "\"command\" is missing")),
        _ if raw.version.is_some() => Err(invalid(
            Some("version"),
            "is for the agents that agentvm brings itself: your own has none",
        )),
        Err(wrong) => Err(invalid(wrong.field, wrong.problem)),
        Ok(agent) => Ok(agent),
    }
}

pub(super) fn session_options(json: &str) -> Result<SessionOptions> {
    parse::<RawSessionOptions>(json)?.try_into()
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct RawResumeOptions {
    env: Option<BTreeMap<String, String>>,
    mcp_servers: Option<Vec<McpServer>>,
}

pub(super) fn resume_options(json: &str) -> Result<Resume> {
    let raw: RawResumeOptions = parse(json)?;
    if let Some(env) = &raw.env {
        check_environment("env", env)?;
    }
    Ok(Resume {
        env: raw.env,
        mcp_servers: raw.mcp_servers.map(check_mcp_servers).transpose()?,
    })
}

/// Which events of a session.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct RawQuery {
    since: Option<Whole<0, MAX_SAFE>>,
    method: Option<String>,
    limit: Option<Whole<0, MAX_SAFE>>,
}

/// A query whose answer is at most `max_bytes` of JSON.
pub(super) fn query(json: &str, max_bytes: u64) -> Result<Query> {
    let raw: RawQuery = parse(json)?;
    Ok(Query {
        since: Seq(raw.since.map_or(0, |since| since.0)),
        method: raw.method,
        limit: raw.limit.map(|limit| limit.0),
        max_bytes,
    })
}

/// Which events of a session an iterator gives.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct RawStream {
    since: Option<Whole<0, MAX_SAFE>>,
    follow: bool,
}

/// `since` and `follow`.
pub(super) fn stream(json: &str) -> Result<(Seq, bool)> {
    let raw: RawStream = parse(json)?;
    Ok((Seq(raw.since.map_or(0, |since| since.0)), raw.follow))
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(super) struct RawExecOptions {
    env: BTreeMap<String, String>,
    cwd: Option<String>,
    user: RawUser,
    timeout_ms: Option<Whole<1, MAX_SAFE>>,
    max_output_bytes: Option<Whole<0, MAX_SAFE>>,
}

#[derive(Default, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum RawUser {
    #[default]
    User,
    Root,
}

impl RawUser {
    pub(super) const fn user(self) -> User {
        match self {
            Self::User => User::User,
            Self::Root => User::Root,
        }
    }
}

pub(super) fn exec_options(json: &str, stdin: Vec<u8>) -> Result<ExecOptions> {
    let raw: RawExecOptions = parse(json)?;
    check_environment("env", &raw.env)?;
    let default = ExecOptions::default();
    Ok(ExecOptions {
        env: raw.env.into_iter().collect(),
        cwd: match raw.cwd {
            Some(cwd) => path("cwd", &cwd)?,
            None => default.cwd,
        },
        user: raw.user.user(),
        stdin,
        timeout: raw.timeout_ms.map(|ms| Duration::from_millis(ms.0)),
        max_output_bytes: raw
            .max_output_bytes
            .map_or(default.max_output_bytes, |bytes| {
                usize::try_from(bytes.0).unwrap_or(usize::MAX)
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

    fn client(json: &str) -> Result<ClientOptions> {
        let mut all: Value = serde_json::from_str(json).expect("JSON");
        all["dataDir"] = "/data".into();
        all["agentStoreDir"] = "/agents".into();
        client_options(&all.to_string(), "/package".into(), "/node".into())
    }

    #[test]
    fn a_client_option_that_is_not_given_has_the_documented_default() {
        let settings = client("{}").expect("valid").settings;
        assert_eq!(settings.vm.sleep_after, Some(Duration::from_mins(15)));
        assert_eq!(settings.cancel_grace, Duration::from_secs(5));
        assert_eq!(settings.max_message_bytes, 64 << 20);
        assert_eq!(settings.additional_instructions, None);
        assert!(settings.auto_install);
    }

    #[test]
    fn a_vm_sleeps_after_the_given_time_or_never() {
        for (json, sleep_after) in [
            (r#"{"sleepAfterMs":1}"#, Some(Duration::from_millis(1))),
            (r#"{"sleepAfterMs":false}"#, None),
        ] {
            assert_eq!(
                client(json).expect(json).settings.vm.sleep_after,
                sleep_after
            );
        }
    }

    #[test]
    fn a_vm_has_what_its_client_has_unless_it_is_given_its_own() {
        let client = client(r#"{"sleepAfterMs":1,"loopbackExemptPorts":[80]}"#)
            .expect("valid")
            .settings
            .vm;
        let own = vm_options(r#"{"sleepAfterMs":2}"#, &client).expect("valid");
        assert_eq!(own.sleep_after, Some(Duration::from_millis(2)));
        assert_eq!(own.loopback_exempt_ports, [80]);
        let none = vm_options(r#"{"loopbackExemptPorts":[]}"#, &client).expect("valid");
        assert_eq!(none.loopback_exempt_ports, [] as [u16; 0]);
        let wrong = vm_options(r#"{"dataDir":"/d"}"#, &client).expect_err("not of a VM");
        assert!(
            wrong.message.contains("there is no \"dataDir\""),
            "{wrong:?}"
        );
    }

    #[test]
    fn a_wrong_client_option_is_named_in_the_words_of_javascript() {
        for (json, problem) in [
            (
                r#"{"loopbackExemptPorts":[80,70000]}"#,
                "loopbackExemptPorts[1]: must be a whole number between 1 and 65535, not 70000",
            ),
            (
                r#"{"loopbackExemptPorts":[0]}"#,
                "loopbackExemptPorts[0]: must be a whole number between 1 and 65535, not 0",
            ),
            (
                r#"{"maxMessageBytes":1.5}"#,
                "maxMessageBytes: must be a whole number between 1024 and 1073741824, not 1.5",
            ),
            (
                r#"{"sleepAfterMs":0}"#,
                "sleepAfterMs: must be a whole number of at least 1, or false, not 0",
            ),
            (
                r#"{"sleepAfterMs":true}"#,
                "sleepAfterMs: must be a whole number of at least 1, or false, not true",
            ),
            (
                r#"{"cancelGraceMs":-1}"#,
                "cancelGraceMs: must be a whole number of at least 0, not -1",
            ),
        ] {
            let error = client(json).expect_err(json);
            assert_eq!(error.message, problem);
        }
    }

    #[test]
    fn a_wrong_own_agent_is_named_with_its_field() {
        for (json, named) in [
            (r#"{"agents":{"pi":{"command":"bot"}}}"#, "agents.pi: "),
            (
                r#"{"agents":{"my bot":{"command":"bot"}}}"#,
                "agents.my bot: ",
            ),
            (
                r#"{"agents":{"bot":{"command":"a/b"}}}"#,
                "agents.bot.command: ",
            ),
            (r#"{"agents":{"bot":{}}}"#, "agents.bot"),
            (
                r#"{"agents":{"bot":{"command":"b","env":{"=":""}}}}"#,
                "agents.bot.env: ",
            ),
            (
                r#"{"agents":{"bot":{"command":"b","arg":[]}}}"#,
                "agents.bot.arg: ",
            ),
        ] {
            let error = client(json).expect_err(json);
            assert_eq!(error.code.as_str(), "INVALID_ARGUMENT");
            assert!(error.message.starts_with(named), "{error}");
        }
    }

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
