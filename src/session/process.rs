//! The process of an agent: what it says on its way out, and its end.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use serde_json::value::RawValue;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::timeout;

use super::orphans::Orphans;
use super::tail::Tail;
use super::updates::Updates;
use crate::acp::{Closed, Connection, RequestError};
use crate::error::{Code, Error};
use crate::vm::{DynVm, Exit, KILL_AGAIN, Reached, exited, limits};

/// How long an agent has to exit after its stdin was closed.
const CLOSE_GRACE: Duration = Duration::from_secs(5);

/// The same for one whose start is given up.
const DISMISS_GRACE: Duration = Duration::from_secs(1);

/// How long the output of an exited agent may stay open: by then everything that it wrote itself has
/// been read, and what it left running may hold the pipe for ever.
const DRAIN: Duration = Duration::from_millis(500);

/// An agent's process, watched.
pub(super) struct AgentProcess {
    pub(super) vm: DynVm,
    pub(super) pid: u32,
    pub(super) connection: Connection,
    stderr: Tail,
    pub(super) exit: watch::Receiver<Option<Exit>>,
    /// Set once it is gone and everything that it wrote has been handled.
    pub(super) end: watch::Receiver<Option<AgentEnd>>,
    /// What the VM had met of its limits before it was started.
    before: Reached,
}

/// How an agent process ended.
#[derive(Debug, Clone)]
pub(super) enum AgentEnd {
    Exited(Exit),
    /// It broke the protocol and was stopped.
    Stopped(Closed),
    /// Its VM ended first.
    VmEnded,
}

/// A start that is given up must not leave its process running.
impl Drop for AgentProcess {
    fn drop(&mut self) {
        if self.end.borrow().is_some() {
            return;
        }
        let (vm, pid) = (self.vm.clone(), self.pid);
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            // An error: the VM is gone, and the process with it.
            drop(runtime.spawn(async move { vm.signal(pid, libc::SIGKILL).await }));
        }
    }
}

impl AgentProcess {
    /// Watches a started agent.
    pub(super) fn watch(
        vm: DynVm,
        pid: u32,
        connection: Connection,
        stderr: Tail,
        mut exit: watch::Receiver<Option<Exit>>,
        orphans: Option<Orphans>,
        before: Reached,
    ) -> Arc<Self> {
        let (ended, end) = watch::channel(None);
        let process = Arc::new(Self {
            vm: vm.clone(),
            pid,
            connection: connection.clone(),
            stderr,
            exit: exit.clone(),
            end,
            before,
        });
        let mut closed = connection.closed();
        tokio::spawn(async move {
            let end = tokio::select! {
                exit = exited(&mut exit) => {
                    let drained = closed.wait_for(Option::is_some);
                    if timeout(DRAIN, drained).await.is_err() {
                        connection.end();
                    }
                    exit.map_or(AgentEnd::VmEnded, AgentEnd::Exited)
                }
                why = async { closed.wait_for(Option::is_some).await.ok().and_then(|why| why.clone()) } => {
                    // Nobody can talk to it any more. Let it say why on stderr, if it is exiting.
                    match timeout(DRAIN, exited(&mut exit)).await {
                        Ok(exit) => exit.map_or(AgentEnd::VmEnded, AgentEnd::Exited),
                        Err(_still_running) => {
                            if let Err(error) = vm.signal(pid, libc::SIGKILL).await {
                                tracing::debug!(%error, pid, "the agent's VM is gone too");
                            }
                            while timeout(KILL_AGAIN, exited(&mut exit)).await.is_err() {
                                drop(vm.kill(pid).await);
                            }
                            AgentEnd::Stopped(why.unwrap_or(Closed::Eof))
                        }
                    }
                }
            };
            let is_clean = matches!(end, AgentEnd::Exited(Exit::Code(0)) | AgentEnd::VmEnded);
            if let (false, Some(orphans)) = (is_clean, orphans) {
                orphans.end(&vm).await;
            }
            // How it exits after we stopped listening is our doing.
            let broken = match &*connection.closed().borrow() {
                Some(why @ Closed::Protocol(_)) => Some(AgentEnd::Stopped(why.clone())),
                _ => None,
            };
            ended.send_replace(Some(broken.unwrap_or(end)));
        });
        process
    }

    /// Closes its stdin, and stops it if it does not exit then.
    pub(super) async fn close(&self) {
        self.connection.close_input();
        let mut end = self.end.clone();
        if timeout(CLOSE_GRACE, end.wait_for(Option::is_some))
            .await
            .is_err()
        {
            self.kill().await;
        }
    }

    /// Ends one whose start is given up: it may hold locks that it should let go of, and it is not waited
    /// for as long as for one that has a conversation.
    pub(super) async fn dismiss(&self) {
        self.connection.close_input();
        let mut end = self.end.clone();
        if timeout(DISMISS_GRACE, end.wait_for(Option::is_some))
            .await
            .is_err()
        {
            self.kill().await;
        }
    }

    /// Stops it by force, with everything in its session.
    pub(super) async fn kill(&self) {
        loop {
            if let Err(error) = self.vm.kill(self.pid).await {
                tracing::debug!(%error, pid = self.pid, "the agent's VM is gone too");
            }
            if timeout(KILL_AGAIN, self.ended()).await.is_ok() {
                return;
            }
        }
    }

    pub(super) async fn ended(&self) -> AgentEnd {
        let mut end = self.end.clone();
        let ended = end.wait_for(Option::is_some).await;
        ended
            .ok()
            .and_then(|end| end.clone())
            .unwrap_or(AgentEnd::VmEnded)
    }

    /// Turns a request that has no result into what the caller should read.
    pub(super) async fn explain(
        &self,
        agent: &str,
        method: &str,
        error: RequestError,
        updates: &Updates,
    ) -> Error {
        match error {
            RequestError::Rpc(error) => {
                let code = if error.code == AUTH_REQUIRED {
                    Code::AuthRequired
                } else {
                    Code::AgentError
                };
                let data = error.data.as_deref().map(RawValue::get);
                let data: Value = data
                    .filter(|data| data.len() <= MAX_ERROR_DATA)
                    .and_then(|data| serde_json::from_str(data).ok())
                    .unwrap_or_default();
                Error::new(code, format!("{agent}: {}", bounded(&error.message)))
                    .with_data(json!({ "code": error.code, "data": data }))
            }
            RequestError::Closed(_) => {
                let end = self.ended().await;
                if let Some(error) = updates.failure() {
                    return error;
                }
                self.end_error(agent, method, &end, updates)
            }
        }
    }

    fn end_error(&self, agent: &str, method: &str, end: &AgentEnd, updates: &Updates) -> Error {
        let what = match end {
            AgentEnd::Exited(Exit::Code(code)) => format!("exited with code {code}"),
            AgentEnd::Exited(Exit::Signal(signal)) => format!("was killed by signal {signal}"),
            AgentEnd::Stopped(why) => format!("was stopped, because {why}"),
            AgentEnd::VmEnded => "ended with its VM".to_owned(),
        };
        // Itself, or what it is a wrapper for.
        if let AgentEnd::Exited(Exit::Signal(libc::SIGKILL) | Exit::Code(137)) = end
            && let Some(error) =
                limits::killed(&*self.vm, &format!("{agent} was killed"), self.before)
        {
            return error.into();
        }
        let code = match end {
            AgentEnd::Stopped(Closed::Protocol(_)) => Code::AgentProtocol,
            _ => Code::AgentExited,
        };
        let (stderr, strays) = (self.stderr.text(), updates.strays().text());
        let mut message = format!("{agent} {what} before it answered {method}");
        if !stderr.is_empty() {
            message.push_str("\nIts stderr ends with:\n");
            message.push_str(&stderr);
        }
        if !strays.is_empty() {
            message.push_str("\nOn stdout, but no protocol:\n");
            message.push_str(&strays);
        }
        Error::new(code, message)
    }
}

/// Bytes of an agent's own words that an error's message takes along.
const MAX_MESSAGE: usize = 64 << 10;

fn bounded(message: &str) -> Cow<'_, str> {
    if message.len() <= MAX_MESSAGE {
        return message.into();
    }
    let (end, bytes) = (message.floor_char_boundary(MAX_MESSAGE), message.len());
    format!("{} … ({bytes} bytes in all)", &message[..end]).into()
}

/// Bytes of an agent's `data` that an error takes along; longer ones are left out.
const MAX_ERROR_DATA: usize = 1 << 20;

/// ACP's code for 'authenticate first'.
const AUTH_REQUIRED: i64 = -32000;
