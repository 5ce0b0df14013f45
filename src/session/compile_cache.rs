//! An agent's compiled scripts, made once at its installation for the agent store.
//!
//! Node compiles what it loads, and can keep that: it is a sixth of what `createSession` takes in a VM
//! that has run nothing yet. The scripts must be compiled where every VM has them, by the user who runs
//! them, and by a VM that nobody else has had: what it writes is run in all others.

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::time::Duration;

use uuid::Uuid;

use super::client::{Client, ClientOptions, Settings, VmHandle};
use super::options::{PermissionPolicy, SessionOptions};
use crate::agents::{Agent, ClientAgents, InStore};
use crate::error::{Code, Error, Result};
use crate::ids::VmKey;
use crate::vm::exec::{ExecEnd, ExecOptions};
use crate::vm::{GuestPath, User};

/// Where the agent writes in the VM of this module.
const DIRECTORY: &str = "/home/user/compile-cache";

/// An agent that has not begun its session by then gets no cache. Nothing but speed is lost.
const LIMIT: Duration = Duration::from_mins(1);

/// More is no compile cache of an agent.
const MAX_FILES: usize = 10_000;
const MAX_BYTES: usize = 256 << 20;

/// Runs the agent once in a VM of its own, up to where it waits for its first prompt, and keeps what it
/// has compiled. An agent is as good without: why it has none is only logged.
///
/// It is done to the end though the caller gives up, so that nothing of the VM stays.
pub(super) fn prepare(
    settings: &Settings,
    agent: Agent,
    installed: InStore,
) -> Pin<Box<dyn Future<Output = ()> + Send>> {
    let settings = settings.clone();
    Box::pin(async move {
        let prepared = tokio::spawn(async move {
            let name = agent.name().to_owned();
            match compile(&settings, agent).await {
                Ok(files) => {
                    let kept = settings.agents.keep_compile_cache(&installed, files).await;
                    kept.map_err(Error::from)
                }
                Err(error) => Err(error),
            }
            .map_err(|error| (name, error))
        });
        match prepared.await {
            Ok(Ok(())) => {}
            Ok(Err((agent, error))) => {
                tracing::warn!(%error, agent, "it has no compile cache, and starts slower");
            }
            Err(error) => tracing::error!(%error, "a compile cache could not be prepared"),
        }
    })
}

async fn compile(settings: &Settings, agent: Agent) -> Result<Vec<(PathBuf, Vec<u8>)>> {
    let directory = std::env::temp_dir().join(format!("agentvm-{}", Uuid::now_v7().simple()));
    let failed = |error| {
        let problem = format!("can't make {}: {error}", directory.display());
        Error::new(Code::Internal, problem)
    };
    DirBuilder::new()
        .mode(0o700)
        .create(&directory)
        .map_err(failed)?;
    let files = compile_in(&directory, settings, agent).await;
    let removed = tokio::fs::remove_dir_all(&directory).await;
    if let Err(error) = removed {
        tracing::warn!(%error, directory = %directory.display(), "a temporary VM is left");
    }
    files
}

async fn compile_in(
    directory: &Path,
    settings: &Settings,
    agent: Agent,
) -> Result<Vec<(PathBuf, Vec<u8>)>> {
    let name = agent.name().to_owned();
    let client = Client::new(ClientOptions {
        data_dir: directory.to_owned(),
        settings: Settings {
            auto_install: false,
            configured_agents: match agent {
                Agent::InVersion(agent, version) => ClientAgents::new([], [(agent, version)]),
                Agent::BuiltIn(_) | Agent::Own(_) => ClientAgents::default(),
            },
            max_message_bytes: settings.max_message_bytes,
            ..Settings::new(settings.agents.clone())
        },
    });
    let files = run_in(&client, &name).await;
    client.close().await?;
    files
}

async fn run_in(client: &Client, agent: &str) -> Result<Vec<(PathBuf, Vec<u8>)>> {
    let vm = client.vm(VmKey::new(vec!["compile-cache".to_owned()])?)?;
    let files = run_once(&vm, agent).await;
    vm.destroy().await?;
    files
}

async fn run_once(vm: &VmHandle, agent: &str) -> Result<Vec<(PathBuf, Vec<u8>)>> {
    // Nobody listens there, and nobody has to: no prompt is sent.
    let unused = [
        ("ANTHROPIC_API_KEY", "none"),
        ("ANTHROPIC_BASE_URL", "http://127.0.0.1:9"),
        ("OPENAI_API_KEY", "none"),
        ("OPENAI_BASE_URL", "http://127.0.0.1:9/v1"),
        ("NODE_COMPILE_CACHE", DIRECTORY),
    ];
    let options = SessionOptions {
        env: unused
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .into(),
        permission_policy: PermissionPolicy::Allow,
        persist_env: false,
        ..SessionOptions::default()
    };
    let created = vm
        .create_session(agent, options, tokio::time::sleep(LIMIT))
        .await;
    match created {
        // Node writes when it exits.
        Ok(created) => vm.close_session(created.id).await?,
        // It has loaded what it needs to refuse.
        Err(error) => tracing::debug!(%error, agent, "no session for its compile cache"),
    }
    read(vm).await
}

/// What the agent has written. Through the VM: a path of it means nothing on the host.
async fn read(vm: &VmHandle) -> Result<Vec<(PathBuf, Vec<u8>)>> {
    let list = format!("cd {DIRECTORY} && find . -type f");
    let end = vm.exec(&list, ExecOptions::default()).await?;
    let paths = match end {
        ExecEnd::Exited(output) | ExecEnd::TimedOut(output) => {
            String::from_utf8_lossy(&output.stdout).into_owned()
        }
    };
    let paths: Vec<_> = paths
        .lines()
        .filter_map(|path| path.strip_prefix("./"))
        .collect();
    let mut files = Vec::new();
    let mut bytes = 0;
    for path in &paths {
        let in_vm = GuestPath::new(&format!("{DIRECTORY}/{path}"))
            .map_err(|problem| Error::new(Code::Internal, problem))?;
        let content = vm.read_file(&in_vm, User::User).await?;
        bytes += content.len();
        files.push((PathBuf::from(path), content));
        if files.len() > MAX_FILES || bytes > MAX_BYTES {
            let problem = "the agent has written more than a compile cache";
            return Err(Error::new(Code::Internal, problem));
        }
    }
    if files.is_empty() {
        return Err(Error::new(Code::Internal, "the agent has compiled nothing"));
    }
    Ok(files)
}
