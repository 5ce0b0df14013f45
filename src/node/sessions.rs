//! The session calls of `NativeVm`, beside turns.

#![expect(
    clippy::needless_pass_by_value,
    reason = "napi hands arguments over by value"
)]

use std::sync::Arc;

use napi::Env;
use napi::bindgen_prelude::PromiseRaw;
use napi_derive::napi;
use serde_json::Value;
use serde_json::value::RawValue;
use tokio::sync::{Mutex, watch};

use super::error::{promise, rejection};
use super::options::{parse, query, resume_options, stream};
use super::record::{
    LiveSession, PersistedSession, arrays, in_parts, notifications, permission_json,
    persisted_events, sequenced_events, text,
};
use super::vm::NativeVm;
use crate::acp::has_more_values;
use crate::error::{Code, Error, Result};
use crate::ids::SessionId;
use crate::session::{Change, EventStream, VmHandle};
use crate::store::StoredEvent;

/// What one call returns at most: V8 needs some 10 to 140 bytes for a value, and may have 2 GiB.
const MAX_RESULT: u64 = 256 << 20;
const MAX_VALUES: usize = 5_000_000;

/// A change of the agent's settings, in the caller's words.
enum Setting {
    Model(String),
    Mode(String),
    ThoughtLevel(String),
    Option { id: String, value: String },
}

#[napi]
impl NativeVm {
    /// Returns JSON of the session as it is now.
    #[napi]
    pub fn resume_session<'env>(
        &self,
        env: &'env Env,
        session_id: String,
        options: String,
    ) -> napi::Result<PromiseRaw<'env, String>> {
        let handle = self.handle.clone();
        promise(env, async move {
            let session = SessionId::parse(&session_id)?;
            let view = handle
                .resume_session(session, resume_options(&options)?)
                .await?;
            Ok(text(&LiveSession::from(&view)))
        })
    }

    #[napi]
    pub fn close_session<'env>(
        &self,
        env: &'env Env,
        session_id: String,
    ) -> napi::Result<PromiseRaw<'env, ()>> {
        let handle = self.handle.clone();
        promise(env, async move {
            handle.close_session(SessionId::parse(&session_id)?).await
        })
    }

    #[napi]
    pub fn destroy_session<'env>(
        &self,
        env: &'env Env,
        session_id: String,
    ) -> napi::Result<PromiseRaw<'env, ()>> {
        let handle = self.handle.clone();
        promise(env, async move {
            match SessionId::parse(&session_id) {
                Ok(session) => handle.destroy_session(session).await,
                // What is no id of ours is no session, and as good as destroyed.
                Err(_no_session) => Ok(()),
            }
        })
    }

    /// Returns the JSON of arrays, which together are the list.
    #[napi]
    pub fn list_persisted_sessions<'env>(
        &self,
        env: &'env Env,
    ) -> napi::Result<PromiseRaw<'env, Vec<String>>> {
        let handle = self.handle.clone();
        promise(env, async move {
            let records = handle.sessions().await?;
            let sessions = records.iter().map(PersistedSession::from);
            Ok(arrays(sessions.map(|session| text(&session))))
        })
    }

    /// Returns the JSON of arrays, which together are the list.
    #[napi]
    pub fn list_sessions<'env>(
        &self,
        env: &'env Env,
    ) -> napi::Result<PromiseRaw<'env, Vec<String>>> {
        let handle = self.handle.clone();
        promise(env, async move {
            let views = handle.session_views().await?;
            let sessions = views.iter().map(LiveSession::from);
            Ok(arrays(sessions.map(|session| text(&session))))
        })
    }

    /// Returns JSON.
    #[napi]
    pub fn get_session<'env>(
        &self,
        env: &'env Env,
        session_id: String,
    ) -> napi::Result<PromiseRaw<'env, String>> {
        let handle = self.handle.clone();
        promise(env, async move {
            let view = handle.session_view(SessionId::parse(&session_id)?).await?;
            Ok(text(&LiveSession::from(&view)))
        })
    }

    /// Returns the agent's answer as JSON.
    #[napi]
    pub fn set_model<'env>(
        &self,
        env: &'env Env,
        session_id: String,
        model: String,
    ) -> napi::Result<PromiseRaw<'env, String>> {
        self.change(env, session_id, Setting::Model(model))
    }

    /// Returns the agent's answer as JSON.
    #[napi]
    pub fn set_mode<'env>(
        &self,
        env: &'env Env,
        session_id: String,
        mode_id: String,
    ) -> napi::Result<PromiseRaw<'env, String>> {
        self.change(env, session_id, Setting::Mode(mode_id))
    }

    /// Returns the agent's answer as JSON.
    #[napi]
    pub fn set_thought_level<'env>(
        &self,
        env: &'env Env,
        session_id: String,
        level: String,
    ) -> napi::Result<PromiseRaw<'env, String>> {
        self.change(env, session_id, Setting::ThoughtLevel(level))
    }

    /// `value`: JSON. Returns the agent's answer as JSON.
    #[napi]
    pub fn set_config_option<'env>(
        &self,
        env: &'env Env,
        session_id: String,
        option_id: String,
        value: String,
    ) -> napi::Result<PromiseRaw<'env, String>> {
        let setting = Setting::Option {
            id: option_id,
            value,
        };
        self.change(env, session_id, setting)
    }

    /// `params`: JSON of an object. Returns the agent's answer as JSON.
    #[napi]
    pub fn raw_send<'env>(
        &self,
        env: &'env Env,
        session_id: String,
        method: String,
        params: Option<String>,
    ) -> napi::Result<PromiseRaw<'env, String>> {
        let handle = self.handle.clone();
        promise(env, async move {
            let session = SessionId::parse(&session_id)?;
            let params: Option<Box<RawValue>> = params.as_deref().map(parse).transpose()?;
            let answer = handle.raw_send(session, &method, params.as_deref());
            Ok(answer.await?.get().to_owned())
        })
    }

    /// Returns JSON, `null` for an agent without modes.
    #[napi]
    pub fn get_modes<'env>(
        &self,
        env: &'env Env,
        session_id: String,
    ) -> napi::Result<PromiseRaw<'env, String>> {
        let handle = self.handle.clone();
        promise(env, async move {
            Ok(text(&handle.modes(SessionId::parse(&session_id)?).await?))
        })
    }

    /// Returns JSON of an array.
    #[napi]
    pub fn get_config_options<'env>(
        &self,
        env: &'env Env,
        session_id: String,
    ) -> napi::Result<PromiseRaw<'env, String>> {
        let handle = self.handle.clone();
        promise(env, async move {
            let options = handle.config_options(SessionId::parse(&session_id)?).await;
            Ok(text(&options?))
        })
    }

    /// Returns JSON of arrays, parts of one, of `{ sessionId, seq, createdAt, event }`.
    #[napi]
    pub fn get_session_events<'env>(
        &self,
        env: &'env Env,
        session_id: String,
        options: String,
    ) -> napi::Result<PromiseRaw<'env, Vec<String>>> {
        let handle = self.handle.clone();
        promise(env, async move {
            let (session, events) = events(&handle, &session_id, &options).await?;
            Ok(in_parts(&events, |part| persisted_events(session, part)))
        })
    }

    /// Returns JSON of arrays, parts of one, of `{ sequenceNumber, notification }`.
    #[napi]
    pub fn get_sequenced_events<'env>(
        &self,
        env: &'env Env,
        session_id: String,
        options: String,
    ) -> napi::Result<PromiseRaw<'env, Vec<String>>> {
        let handle = self.handle.clone();
        promise(env, async move {
            let (_, events) = events(&handle, &session_id, &options).await?;
            Ok(in_parts(&events, sequenced_events))
        })
    }

    /// Returns JSON of arrays, parts of one, of notifications.
    #[napi]
    pub fn get_events<'env>(
        &self,
        env: &'env Env,
        session_id: String,
        options: String,
    ) -> napi::Result<PromiseRaw<'env, Vec<String>>> {
        let handle = self.handle.clone();
        promise(env, async move {
            let (_, events) = events(&handle, &session_id, &options).await?;
            Ok(in_parts(&events, notifications))
        })
    }

    #[napi]
    pub fn session_events(
        &self,
        session_id: String,
        options: String,
    ) -> napi::Result<NativeEventStream> {
        let opened = || {
            let (since, follow) = stream(&options)?;
            let session = SessionId::parse(&session_id)?;
            let events = self.handle.event_stream(session, since, follow)?;
            Ok(NativeEventStream {
                session,
                events: Arc::new(Mutex::new(events)),
                closed: watch::Sender::new(false),
            })
        };
        opened().map_err(rejection)
    }

    /// Returns the outcome that the agent got as JSON.
    #[napi]
    pub fn respond_permission<'env>(
        &self,
        env: &'env Env,
        session_id: String,
        permission_id: String,
        answer: String,
    ) -> napi::Result<PromiseRaw<'env, String>> {
        let handle = self.handle.clone();
        // At once, so that of two calls the first decides.
        let answered = SessionId::parse(&session_id)
            .map(|session| handle.respond_permission(session, &permission_id, &answer));
        promise(env, async move {
            let outcome = answered?.await?;
            Ok(text(&serde_json::json!({ "outcome": outcome })))
        })
    }

    /// JSON of what `permissionRequest` tells, of the oldest request that waits and was asked after `after`;
    /// `null` if there is none.
    #[napi]
    pub fn next_pending_permission(&self, after: Option<String>) -> napi::Result<Option<String>> {
        let after = after.and_then(|id| id.parse().ok()).unwrap_or_default();
        let pending = self.handle.next_pending_permission(after);
        let pending = pending.map_err(rejection)?;
        Ok(pending.map(|(session, request)| text(&permission_json(session, &request))))
    }
}

impl NativeVm {
    fn change<'env>(
        &self,
        env: &'env Env,
        session_id: String,
        setting: Setting,
    ) -> napi::Result<PromiseRaw<'env, String>> {
        let handle = self.handle.clone();
        promise(env, async move {
            let session = SessionId::parse(&session_id)?;
            let value: Value;
            let change = match &setting {
                Setting::Model(model) => Change::Model(model),
                Setting::Mode(mode) => Change::Mode(mode),
                Setting::ThoughtLevel(level) => Change::ThoughtLevel(level),
                Setting::Option { id, value: json } => {
                    value = parse(json)?;
                    Change::Option { id, value: &value }
                }
            };
            let answer = handle.change(session, change).await?;
            Ok(answer.get().to_owned())
        })
    }
}

/// All that a query asks for, or an error that says how to ask for less.
async fn events(
    handle: &VmHandle,
    session_id: &str,
    options: &str,
) -> Result<(SessionId, Vec<StoredEvent>)> {
    let query = query(options, MAX_RESULT)?;
    let session = SessionId::parse(session_id)?;
    let page = handle.events(session, query).await?;
    let what = if page.complete {
        match few_values(page.events).await? {
            Some(events) => return Ok((session, events)),
            None => format!("{MAX_VALUES} JSON values"),
        }
    } else {
        format!("{} MiB", MAX_RESULT >> 20)
    };
    Err(Error::new(
        Code::ResultTooLarge,
        format!(
            "the events of session {session} are more than {what}: read them with sessionEvents(), \
             or ask with limit, and go on from the last number with since"
        ),
    ))
}

/// The events, unless they have more values than JavaScript bears.
async fn few_values(events: Vec<StoredEvent>) -> Result<Option<Vec<StoredEvent>>> {
    let length: usize = events.iter().map(|event| event.json.len()).sum();
    if length <= MAX_VALUES {
        return Ok(Some(events));
    }
    let counting = tokio::task::spawn_blocking(move || {
        let texts = events.iter().map(|event| event.json.as_bytes());
        let too_many = has_more_values(texts, MAX_VALUES);
        (!too_many).then_some(events)
    });
    (counting.await).map_err(|error| Error::new(Code::Internal, error.to_string()))
}

/// A session's events, one batch after the other.
#[napi]
pub struct NativeEventStream {
    session: SessionId,
    events: Arc<Mutex<EventStream>>,
    closed: watch::Sender<bool>,
}

#[napi]
impl NativeEventStream {
    /// Returns JSON of an array of `{ sessionId, seq, createdAt, event }`; `null` at the end. Keeps
    /// Node alive until it resolves.
    #[napi]
    pub fn next<'env>(&self, env: &'env Env) -> napi::Result<PromiseRaw<'env, Option<String>>> {
        let (session, events) = (self.session, Arc::clone(&self.events));
        let mut closed = self.closed.subscribe();
        promise(env, async move {
            let mut events = events.lock().await;
            let batch = tokio::select! {
                batch = events.next() => batch?,
                // Also when the stream was collected: nobody asks any more.
                _ = closed.wait_for(|closed| *closed) => None,
            };
            Ok(batch.map(|batch| persisted_events(session, &batch)))
        })
    }

    /// Ends the wait of [`Self::next`].
    #[napi]
    pub fn close(&self) {
        self.closed.send_replace(true);
    }
}
