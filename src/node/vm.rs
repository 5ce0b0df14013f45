//! `NativeVm`.

#![expect(
    clippy::needless_pass_by_value,
    reason = "napi hands arguments over by value"
)]

use std::fmt::Write as _;
use std::sync::Arc;

use napi::bindgen_prelude::{Buffer, Function, Uint8Array};
use napi_derive::napi;
use serde::Serialize;
use serde_json::json;
use serde_json::value::RawValue;
use tokio::sync::watch;

use super::error::{aborted, rejection};
use super::events::{NativeSubscription, deliver};
use super::options::{
    self, RawFileOptions, RawQuery, RawResumeOptions, exec_options, parse, path, session_options,
};
use crate::error::{Code, Error};
use crate::ids::{Seq, SessionId};
use crate::session::VmHandle;
use crate::store::{Page, Query, SessionRecord, Status};
use crate::vm::Exit;
use crate::vm::exec::ExecEnd;

/// What one call returns at most: V8 holds strings of 512 MiB.
const MAX_RESULT: u64 = 256 << 20;

/// A VM as `lib/vm.ts` uses it.
#[napi]
pub struct NativeVm {
    handle: VmHandle,
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
    fn signal(&self) -> watch::Receiver<bool> {
        self.aborted.subscribe()
    }
}

/// Resolves when the call is aborted.
async fn aborting(mut abort: watch::Receiver<bool>) {
    // Without a sender nobody can abort any more.
    if abort.wait_for(|aborted| *aborted).await.is_err() {
        std::future::pending::<()>().await;
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
    pub async fn create_session(
        &self,
        agent_type: String,
        options: String,
        abort: &NativeAbort,
    ) -> napi::Result<String> {
        let options = session_options(&options).map_err(rejection)?;
        let aborting = aborting(abort.signal());
        let created = self
            .handle
            .create_session(&agent_type, options, aborting)
            .await
            .map_err(rejection)?;
        Ok(json(&json!({
            "sessionId": created.id,
            "agentType": created.agent,
            "capabilities": created.capabilities,
            "agentInfo": created.agent_info,
        })))
    }

    /// `prompt`: JSON of a string, or of an array of ACP content blocks. Returns JSON.
    #[napi]
    pub async fn send_prompt(&self, session_id: String, prompt: String) -> napi::Result<String> {
        let prompt = async {
            let session = SessionId::parse(&session_id)?;
            let blocks = options::prompt(&prompt)?;
            self.handle.send_prompt(session, blocks).await
        };
        let result = prompt.await.map_err(rejection)?;
        Ok(json(&json!({
            "response": result.response,
            "text": result.text,
            "stopReason": result.stop_reason,
        })))
    }

    #[napi]
    pub async fn cancel_prompt(&self, session_id: String) -> napi::Result<bool> {
        let session = SessionId::parse(&session_id).map_err(rejection)?;
        let cancelled = self.handle.cancel_prompt(session).await;
        cancelled.map_err(rejection)
    }

    /// Returns JSON of the session's record.
    #[napi]
    pub async fn resume_session(
        &self,
        session_id: String,
        options: String,
    ) -> napi::Result<String> {
        let resume = async {
            let session = SessionId::parse(&session_id)?;
            let options: RawResumeOptions = parse(&options)?;
            let env = options.checked_env()?;
            self.handle.resume_session(session, env).await
        };
        let record = resume.await.map_err(rejection)?;
        Ok(json(&PersistedSession::from(&record)))
    }

    #[napi]
    pub async fn close_session(&self, session_id: String) -> napi::Result<()> {
        let session = SessionId::parse(&session_id).map_err(rejection)?;
        self.handle.close_session(session).await.map_err(rejection)
    }

    /// Returns JSON of an array.
    #[napi]
    pub async fn list_persisted_sessions(&self) -> napi::Result<String> {
        let records = self.handle.sessions().await.map_err(rejection)?;
        let sessions: Vec<_> = records.iter().map(PersistedSession::from).collect();
        Ok(json(&sessions))
    }

    /// Returns JSON of an array.
    #[napi]
    pub async fn get_session_events(
        &self,
        session_id: String,
        options: String,
    ) -> napi::Result<String> {
        let events = async {
            let session = SessionId::parse(&session_id)?;
            let query: RawQuery = parse(&options)?;
            let page = self
                .handle
                .events(
                    session,
                    Query {
                        since: Seq(query.since),
                        method: None,
                        limit: query.limit,
                        max_bytes: MAX_RESULT,
                    },
                )
                .await?;
            if !page.complete {
                return Err(Error::new(
                    Code::ResultTooLarge,
                    format!(
                        "the events of session {session} are more than {} MiB: ask with limit, and \
                         go on from the last seq with since",
                        MAX_RESULT >> 20
                    ),
                ));
            }
            Ok(persisted_events(session, &page))
        };
        events.await.map_err(rejection)
    }

    #[napi]
    pub async fn exec(
        &self,
        command: String,
        options: String,
        stdin: Option<Uint8Array>,
        abort: &NativeAbort,
    ) -> napi::Result<NativeExecResult> {
        let stdin = stdin.map_or_else(Vec::new, |bytes| bytes.to_vec());
        let options = exec_options(&options, stdin).map_err(rejection)?;
        let command = options::command(&command).map_err(rejection)?;
        let limit = options.timeout;
        // Dropping an exec kills its processes.
        let ended = tokio::select! {
            ended = self.handle.exec(command, options) => ended.map_err(rejection)?,
            () = aborting(abort.signal()) => return Err(aborted()),
        };
        let output = match ended {
            ExecEnd::Exited(output) => output,
            ExecEnd::TimedOut(output) => {
                let limit = limit.unwrap_or_default().as_millis();
                let error = Error::new(
                    Code::Timeout,
                    format!("{command:?} was killed: it ran longer than timeoutMs ({limit})"),
                );
                return Err(rejection(error.with_data(json!({
                    "stdout": String::from_utf8_lossy(&output.stdout),
                    "stderr": String::from_utf8_lossy(&output.stderr),
                }))));
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

    #[napi]
    pub async fn read_file(&self, file: String, options: String) -> napi::Result<Buffer> {
        let read = async {
            let options: RawFileOptions = parse(&options)?;
            let path = path("path", &file)?;
            self.handle.read_file(&path, options.user()).await
        };
        read.await.map(Buffer::from).map_err(rejection)
    }

    #[napi]
    pub async fn write_file(
        &self,
        file: String,
        content: Uint8Array,
        options: String,
    ) -> napi::Result<()> {
        let write = async {
            let options: RawFileOptions = parse(&options)?;
            let path = path("path", &file)?;
            let content = content.to_vec();
            self.handle.write_file(&path, content, options.user()).await
        };
        write.await.map_err(rejection)
    }

    #[napi]
    pub async fn destroy(&self) -> napi::Result<()> {
        self.handle.destroy().await.map_err(rejection)
    }

    #[napi]
    pub async fn sleep(&self) -> napi::Result<()> {
        self.handle.sleep().await.map_err(rejection)
    }

    #[napi]
    pub async fn wake(&self) -> napi::Result<()> {
        self.handle.wake().await.map_err(rejection)
    }

    /// Calls `callback` with JSON of an array of items, one batch at a time, until it is closed. Does
    /// not keep Node alive.
    #[napi]
    pub fn subscribe(
        &self,
        callback: Function<'_, String, ()>,
    ) -> napi::Result<NativeSubscription> {
        let subscription = Arc::new(self.handle.subscribe().map_err(rejection)?);
        deliver(subscription, &callback)
    }
}

impl NativeVm {
    pub(super) const fn new(handle: VmHandle) -> Self {
        Self { handle }
    }
}

/// A session's record as JavaScript sees it.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct PersistedSession<'a> {
    session_id: SessionId,
    agent_type: &'a str,
    capabilities: &'a RawValue,
    agent_info: &'a RawValue,
    cwd: &'a str,
    status: &'static str,
    last_sequence_number: Seq,
    /// Milliseconds since the epoch.
    created_at: i64,
    updated_at: i64,
}

impl<'a> From<&'a SessionRecord> for PersistedSession<'a> {
    fn from(record: &'a SessionRecord) -> Self {
        let raw = |text: &'a str| serde_json::from_str(text).unwrap_or(RawValue::NULL);
        Self {
            session_id: record.id,
            agent_type: &record.agent_type,
            capabilities: raw(&record.capabilities),
            agent_info: raw(&record.agent_info),
            cwd: &record.cwd,
            status: match record.status {
                Status::Open => "open",
                Status::Closed => "closed",
                Status::Suspended => "suspended",
            },
            last_sequence_number: record.last_seq,
            created_at: record.created_at,
            updated_at: record.updated_at,
        }
    }
}

/// Put together from the stored texts, without parsing them.
fn persisted_events(session: SessionId, page: &Page) -> String {
    let texts: usize = page.events.iter().map(|event| event.json.len() + 128).sum();
    let mut json = String::with_capacity(texts + 2);
    json.push('[');
    for (index, event) in page.events.iter().enumerate() {
        if index > 0 {
            json.push(',');
        }
        // Writing to a String can't fail.
        let _ = write!(
            json,
            r#"{{"sessionId":"{session}","seq":{},"createdAt":{},"event":"#,
            event.seq.0, event.created_at
        );
        json.push_str(&event.json);
        json.push('}');
    }
    json.push(']');
    json
}

fn json(value: &impl Serialize) -> String {
    // Maps with string keys: serialising them can't fail.
    serde_json::to_string(value).unwrap_or_default()
}

fn signal_name(number: i32) -> String {
    nix::sys::signal::Signal::try_from(number).map_or_else(
        |_real_time| format!("SIG{number}"),
        |signal| signal.as_str().to_owned(),
    )
}
