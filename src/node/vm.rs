//! `NativeVm`.

#![expect(
    clippy::needless_pass_by_value,
    reason = "napi hands arguments over by value"
)]

use std::sync::Arc;
use std::time::Duration;

use napi::Env;
use napi::bindgen_prelude::{Buffer, Function, Promise, PromiseRaw, Uint8Array};
use napi_derive::napi;
use serde_json::json;
use tokio::sync::watch;

use super::error::{aborted, promise, rejection};
use super::events::{NativeSubscription, deliver};
use super::options::{self, exec_options, session_options};
use super::record::{created_session, turn_result};
use crate::error::{Code, Error, Result};
use crate::ids::SessionId;
use crate::session::VmHandle;
use crate::vm::Exit;
use crate::vm::exec::ExecEnd;

/// A VM as `lib/vm.ts` uses it.
#[napi]
pub struct NativeVm {
    pub(super) handle: VmHandle,
}

/// Ends calls that it was given to. One for each call that can be aborted.
#[napi]
pub struct NativeAbort {
    aborted: watch::Sender<bool>,
}

#[napi]
impl NativeAbort {
    #[napi(constructor)]
    pub fn new() -> Self {
        Self {
            aborted: watch::Sender::new(false),
        }
    }

    #[napi]
    pub fn abort(&self) {
        self.aborted.send_replace(true);
    }
}

impl NativeAbort {
    pub(super) fn signal(&self) -> watch::Receiver<bool> {
        self.aborted.subscribe()
    }
}

/// Resolves when the call is aborted.
pub(super) async fn aborting(mut abort: watch::Receiver<bool>) {
    // Without a sender nobody can abort any more.
    if abort.wait_for(|aborted| *aborted).await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// What `call` comes to, unless it is aborted: then it is dropped.
pub(super) async fn unless_aborted<T>(
    abort: watch::Receiver<bool>,
    call: impl Future<Output = Result<T>> + Send,
) -> Result<T> {
    tokio::select! {
        done = call => done,
        () = aborting(abort) => Err(aborted()),
    }
}

/// How an exec ended.
#[napi(object)]
pub struct NativeExecResult {
    pub stdout: Buffer,
    pub stderr: Buffer,
    pub exit_code: Option<i32>,
    pub signal: Option<String>,
    pub truncated: bool,
}

#[napi]
impl NativeVm {
    /// Returns JSON of the created session.
    #[napi]
    pub fn create_session<'env>(
        &self,
        env: &'env Env,
        agent_type: String,
        options: String,
        abort: &NativeAbort,
    ) -> napi::Result<PromiseRaw<'env, String>> {
        let handle = self.handle.clone();
        let abort = abort.signal();
        promise(env, async move {
            let options = session_options(&options)?;
            let created = handle
                .create_session(&agent_type, options, aborting(abort))
                .await?;
            Ok(created_session(&created))
        })
    }

    /// `prompt`: JSON of a string, or of an array of ACP content blocks. Returns JSON.
    #[napi]
    pub fn send_prompt<'env>(
        &self,
        env: &'env Env,
        session_id: String,
        prompt: String,
    ) -> napi::Result<PromiseRaw<'env, String>> {
        let handle = self.handle.clone();
        promise(env, async move {
            let session = SessionId::parse(&session_id)?;
            let blocks = options::prompt(&prompt)?;
            let result = handle.send_prompt(session, blocks).await?;
            Ok(turn_result(&result))
        })
    }

    #[napi]
    pub fn cancel_prompt<'env>(
        &self,
        env: &'env Env,
        session_id: String,
    ) -> napi::Result<PromiseRaw<'env, bool>> {
        let handle = self.handle.clone();
        promise(env, async move {
            handle.cancel_prompt(SessionId::parse(&session_id)?).await
        })
    }

    #[napi]
    pub fn exec<'env>(
        &self,
        env: &'env Env,
        command: String,
        options: String,
        stdin: Option<Uint8Array>,
        abort: &NativeAbort,
    ) -> napi::Result<PromiseRaw<'env, NativeExecResult>> {
        let handle = self.handle.clone();
        let abort = abort.signal();
        let stdin = stdin.map_or_else(Vec::new, |bytes| bytes.to_vec());
        promise(env, async move {
            let options = exec_options(&options, stdin)?;
            let command = options::command(&command)?;
            let limit = options.timeout;
            // Dropping an exec kills its processes.
            let ended = unless_aborted(abort, handle.exec(command, options)).await?;
            exec_result(command, limit, ended)
        })
    }

    #[napi]
    pub fn destroy<'env>(&self, env: &'env Env) -> napi::Result<PromiseRaw<'env, ()>> {
        let handle = self.handle.clone();
        promise(env, async move { handle.destroy().await })
    }

    #[napi]
    pub fn sleep<'env>(&self, env: &'env Env) -> napi::Result<PromiseRaw<'env, ()>> {
        let handle = self.handle.clone();
        promise(env, async move { handle.sleep().await })
    }

    #[napi]
    pub fn wake<'env>(&self, env: &'env Env) -> napi::Result<PromiseRaw<'env, ()>> {
        let handle = self.handle.clone();
        promise(env, async move { handle.wake().await })
    }

    /// Calls `callback` with JSON of an array of items until it is closed: with the next one when the
    /// promise of the last has resolved. Does not keep Node alive.
    #[napi(ts_args_type = "callback: (batch: string) => Promise<void>")]
    pub fn subscribe(
        &self,
        callback: Function<'_, String, Promise<()>>,
    ) -> napi::Result<NativeSubscription> {
        let subscription = Arc::new(self.handle.subscribe().map_err(rejection)?);
        deliver(subscription, &callback)
    }
}

impl NativeVm {
    pub(super) const fn new(handle: VmHandle) -> Self {
        Self { handle }
    }

    pub(super) const fn handle(&self) -> &VmHandle {
        &self.handle
    }
}

fn exec_result(command: &str, limit: Option<Duration>, ended: ExecEnd) -> Result<NativeExecResult> {
    let output = match ended {
        ExecEnd::Exited(output) => output,
        ExecEnd::TimedOut(output) => {
            let limit = limit.unwrap_or_default().as_millis();
            let error = Error::new(
                Code::Timeout,
                format!("{command:?} was killed: it ran longer than timeoutMs ({limit})"),
            );
            return Err(error.with_data(json!({
                "stdout": String::from_utf8_lossy(&output.stdout),
                "stderr": String::from_utf8_lossy(&output.stderr),
            })));
        }
    };
    let (exit_code, signal) = match output.exit {
        Exit::Code(code) => (Some(code), None),
        Exit::Signal(number) => (None, Some(signal_name(number))),
    };
    Ok(NativeExecResult {
        stdout: output.stdout.into(),
        stderr: output.stderr.into(),
        exit_code,
        signal,
        truncated: output.truncated,
    })
}

pub(super) fn signal_name(number: i32) -> String {
    nix::sys::signal::Signal::try_from(number).map_or_else(
        |_real_time| format!("SIG{number}"),
        |signal| signal.as_str().to_owned(),
    )
}
