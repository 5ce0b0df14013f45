//! From 'this agent, this session' to a process that speaks ACP and has the conversation.

use std::sync::Arc;
use std::time::Duration;

use agent_client_protocol_schema::ProtocolVersion;
use nix::errno::Errno;
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};
use tokio::sync::watch;

use super::mcp::{McpCapabilities, McpServer};
use super::options::PermissionPolicy;
use super::orphans::Orphans;
use super::process::AgentProcess;
use super::tail::{Tail, follow};
use super::updates::{NewSession, Updates};
use crate::acp::{Connection, RequestError, count_values};
use crate::agents::Launch;
use crate::error::{Code, Error, Result};
use crate::vm::{Command, Commands, DynVm, GuestPath, User, VmError};

/// An agent that prints something else than the protocol and then says nothing does not speak it.
const GARBAGE_GRACE: Duration = Duration::from_secs(10);

/// Bytes of an agent's capabilities, and of its info, and JSON values: they are kept and listed with every session.
const MAX_ABOUT: usize = 64 << 10;
const MAX_ABOUT_VALUES: usize = 4096;

/// Bytes of an agent's own id of a session, which goes along with every request.
const MAX_SESSION_ID: usize = 64 << 10;

/// What an agent says about itself.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Initialized {
    protocol_version: ProtocolVersion,
    /// As they came.
    #[serde(default)]
    pub(super) agent_capabilities: Option<Box<RawValue>>,
    #[serde(default)]
    pub(super) agent_info: Option<Box<RawValue>>,
}

/// What an agent is told whenever a conversation is opened.
pub(super) struct Setup {
    pub(super) cwd: GuestPath,
    pub(super) mcp_servers: Vec<McpServer>,
    /// For its system prompt.
    pub(super) instructions: Option<String>,
    pub(super) policy: PermissionPolicy,
}

/// An agent process that has answered `initialize`.
pub(super) struct Starting {
    pub(super) agent: String,
    pub(super) process: Arc<AgentProcess>,
    pub(super) updates: Arc<Updates>,
    pub(super) initialized: Initialized,
    setup: Setup,
}

/// Starts the agent's process and shakes hands. When it fails, or `stop` resolves first, the process is
/// gone.
pub(super) async fn start(
    vm: &DynVm,
    agent: &str,
    launch: &Launch,
    setup: Setup,
    updates: Arc<Updates>,
    max_message_bytes: usize,
    stop: &mut (dyn Future<Output = Error> + Send + Unpin),
) -> Result<Starting> {
    let started = vm
        .spawn(&Command {
            argv: launch.argv.clone(),
            env: launch.env.clone(),
            cwd: setup.cwd.clone(),
            user: User::User,
        })
        .await
        .map_err(|error| bad_start(agent, error))?;
    let unusable = |error: std::io::Error| {
        Error::new(Code::Internal, format!("the pipes of {agent}: {error}"))
    };
    let stderr = Tail::default();
    follow(started.stderr, stderr.clone()).map_err(unusable)?;
    let connection = Connection::start(
        started.stdin,
        started.stdout,
        max_message_bytes,
        updates.clone(),
    )
    .map_err(unusable)?;
    let process = AgentProcess::watch(
        vm.clone(),
        started.pid,
        connection,
        stderr,
        started.exit,
        Orphans::of(launch),
        started.before,
    );
    let initialized = tokio::select! {
        initialized = initialize(agent, &process, &updates) => initialized,
        error = stop => Err(error),
    };
    let initialized = match initialized {
        Ok(initialized) => initialized,
        Err(error) => {
            process.dismiss().await;
            return Err(error);
        }
    };
    Ok(Starting {
        agent: agent.to_owned(),
        process,
        updates,
        initialized,
        setup,
    })
}

/// An agent's program that can't be run is not there, as far as its caller is concerned.
fn bad_start(agent: &str, error: VmError) -> Error {
    match error {
        VmError::Spawn {
            program,
            errno: errno @ (Errno::ENOENT | Errno::EACCES | Errno::ENOEXEC | Errno::ELOOP),
        } => Error::new(
            Code::AgentNotInstalled,
            format!(
                "agent {agent:?} has no program that could be started: {program:?} in the VM: {}. A \
                 name without a slash is looked up on the session's PATH, as user \"user\"",
                errno.desc()
            ),
        ),
        other => bad_cwd(other),
    }
}

/// A file operation of a start is about the working directory.
pub(super) fn bad_cwd(error: VmError) -> Error {
    match error {
        VmError::File { errno, path, .. } => Error::invalid_argument(
            "cwd",
            format!(
                "{path:?} can't be used as working directory in the VM: {}",
                match errno {
                    // To make it was tried.
                    Errno::EEXIST => Errno::ENOTDIR.desc(),
                    errno => errno.desc(),
                }
            ),
        ),
        other => other.into(),
    }
}

async fn initialize(agent: &str, process: &AgentProcess, updates: &Updates) -> Result<Initialized> {
    const METHOD: &str = "initialize";
    let params = json!({
        "protocolVersion": ProtocolVersion::V1,
        "clientCapabilities": { "fs": { "readTextFile": false, "writeTextFile": false }, "terminal": false },
        "clientInfo": { "name": "agentvm", "title": "agentvm", "version": env!("CARGO_PKG_VERSION") },
    });
    let request = process.connection.request(METHOD, &params);
    let response = match unless_garbage(request, updates.stray_seen()).await {
        Some(Ok(response)) => response,
        Some(Err(error)) => return Err(process.explain(agent, METHOD, error, updates).await),
        None => return Err(not_acp(agent, &updates.strays().text())),
    };
    let initialized: Initialized = serde_json::from_str(response.get()).map_err(|error| {
        let problem = format!("{agent}: its answer to initialize is malformed: {error}");
        Error::new(Code::AgentProtocol, problem)
    })?;
    let about = [&initialized.agent_capabilities, &initialized.agent_info];
    let is_too_much =
        |about: &str| about.len() > MAX_ABOUT || count_values(about) > MAX_ABOUT_VALUES;
    if about
        .into_iter()
        .flatten()
        .any(|about| is_too_much(about.get()))
    {
        let problem = format!(
            "{agent} says more than {MAX_ABOUT} bytes or {MAX_ABOUT_VALUES} JSON values about itself"
        );
        return Err(Error::new(Code::AgentProtocol, problem));
    }
    if initialized.protocol_version != ProtocolVersion::V1 {
        return Err(Error::new(
            Code::AgentProtocol,
            format!("{agent} speaks another version of ACP than 1, which is the one supported"),
        ));
    }
    Ok(initialized)
}

/// `None`: no answer [`GARBAGE_GRACE`] after the first line that was no protocol. An agent that says
/// nothing at all may take as long as it likes.
async fn unless_garbage<T>(
    answer: impl Future<Output = T> + Send,
    mut stray: watch::Receiver<bool>,
) -> Option<T> {
    let garbage = async {
        if stray.wait_for(|seen| *seen).await.is_err() {
            // Nobody is left who could see one.
            std::future::pending::<()>().await;
        }
        tokio::time::sleep(GARBAGE_GRACE).await;
    };
    tokio::select! {
        answer = answer => Some(answer),
        () = garbage => None,
    }
}

fn not_acp(agent: &str, output: &str) -> Error {
    Error::new(
        Code::AgentProtocol,
        format!("{agent} does not speak ACP on its stdout; it printed:\n{output}"),
    )
}

/// A conversation that an agent has opened.
pub(super) struct Opened {
    /// The agent's own id of it.
    pub(super) agent_session: String,
    /// Why it does not remember what was said before, if so.
    pub(super) forgot: Option<String>,
}

impl Starting {
    /// Opens a new conversation.
    pub(super) async fn new_session(&self) -> Result<Opened> {
        self.updates.starting();
        let response = self.request("session/new", &self.params(None)?).await?;
        let session: NewSession = serde_json::from_str(response.get()).map_err(|error| {
            let problem = format!(
                "{}: its answer to session/new is malformed: {error}",
                self.agent
            );
            Error::new(Code::AgentProtocol, problem)
        })?;
        let bytes = session.session_id.len();
        if bytes > MAX_SESSION_ID {
            let problem = format!(
                "{}: its name of the session has {bytes} bytes, more than {MAX_SESSION_ID}",
                self.agent
            );
            return Err(Error::new(Code::AgentProtocol, problem));
        }
        Ok(Opened {
            agent_session: session.session_id,
            forgot: None,
        })
    }

    /// Goes on with a conversation, in the best way that the agent has: as if it had never ended,
    /// else by repeating what was said (which is not logged again), else with a new conversation,
    /// which has to be told what was said.
    pub(super) async fn reopen(&self, agent_session: &str) -> Result<Opened> {
        let capabilities = self.capabilities();
        let can_resume = !capabilities["sessionCapabilities"]["resume"].is_null();
        let can_load = capabilities["loadSession"] == true;
        let mut refusals = Vec::new();
        for (method, offered) in [("session/resume", can_resume), ("session/load", can_load)] {
            if !offered {
                continue;
            }
            self.updates.replaying(agent_session.to_owned());
            let params = self.params(Some(agent_session))?;
            match self.request(method, &params).await {
                Ok(_opened) => {
                    return Ok(Opened {
                        agent_session: agent_session.to_owned(),
                        forgot: None,
                    });
                }
                // Without a key, or an agent, the next way fails too.
                Err(error) if error.code != Code::AgentError => return Err(error),
                Err(error) => refusals.push(format!("{method}: {}", error.message)),
            }
        }
        let forgot = if refusals.is_empty() {
            format!("{} can't continue a session", self.agent)
        } else {
            refusals.join("; ")
        };
        Ok(Opened {
            forgot: Some(forgot),
            ..self.new_session().await?
        })
    }

    /// Command lines of the servers that it starts.
    pub(super) fn servers(&self) -> Commands {
        let servers = self.setup.mcp_servers.iter();
        servers.filter_map(McpServer::command_line).collect()
    }

    fn capabilities(&self) -> Value {
        let raw = self.initialized.agent_capabilities.as_deref();
        raw.and_then(|raw| serde_json::from_str(raw.get()).ok())
            .unwrap_or_default()
    }

    /// Of a request that opens a conversation.
    fn params(&self, agent_session: Option<&str>) -> Result<Value> {
        let capabilities = self.capabilities();
        let offered = McpCapabilities::deserialize(&capabilities["mcpCapabilities"]);
        let offered = offered.unwrap_or_default();
        let servers = self.setup.mcp_servers.iter();
        let servers: Vec<_> = servers
            .map(|server| server.to_acp(&self.agent, offered))
            .collect::<Result<_>>()?;
        let mut params = json!({
            "cwd": self.setup.cwd.as_str(),
            "mcpServers": servers,
            "_meta": { "agentvm": { "permissionPolicy": self.setup.policy } },
        });
        if let Some(id) = agent_session {
            params["sessionId"] = json!(id);
        }
        if let Some(text) = &self.setup.instructions {
            // How agents took it before ACP had a word for it.
            params["_meta"]["systemPrompt"] = json!({ "append": text });
            if !capabilities["sessionCapabilities"]["systemPrompt"].is_null() {
                let content = [json!({ "type": "text", "text": text })];
                params["systemPrompt"] = json!({ "mode": "append", "content": content });
            }
        }
        Ok(params)
    }

    async fn request(&self, method: &str, params: &Value) -> Result<Box<RawValue>> {
        let response: Result<_, RequestError> =
            self.process.connection.request(method, params).await;
        match response {
            Ok(response) => Ok(response),
            Err(error) => Err(self
                .process
                .explain(&self.agent, method, error, &self.updates)
                .await),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn an_agent_that_prints_garbage_and_never_answers_is_given_up_after_the_grace() {
        let (_stray, seen) = watch::channel(true);
        let began = tokio::time::Instant::now();
        assert_eq!(unless_garbage(pending::<()>(), seen).await, None);
        assert_eq!(began.elapsed(), GARBAGE_GRACE);
    }

    #[tokio::test(start_paused = true)]
    async fn an_agent_that_is_only_slow_is_waited_for() {
        let (stray, seen) = watch::channel(false);
        let slow = async { tokio::time::sleep(Duration::from_hours(1)).await };
        assert_eq!(unless_garbage(slow, seen.clone()).await, Some(()));
        stray.send_replace(true);
        let noisy = async { tokio::time::sleep(GARBAGE_GRACE / 2).await };
        assert_eq!(unless_garbage(noisy, seen).await, Some(()));
    }
}
