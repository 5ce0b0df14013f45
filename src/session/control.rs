//! What a caller asks of a session beside prompts: its settings, its state, its permissions.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::value::{RawValue, to_raw_value};
use serde_json::{Value, json};
use uuid::Uuid;

use super::client::Settings;
use super::configuration::{Configuration, Setting};
use super::kept::{Kept, Resume};
use super::live::LiveSession;
use super::machine::Machine;
use super::options::{PermissionPolicy, SessionOptions};
use super::permission::PermissionRequest;
use crate::error::{Code, Error, Result};
use crate::ids::SessionId;
use crate::store::SessionRecord;

/// A session as it is now.
#[derive(Debug)]
pub struct SessionView {
    pub record: SessionRecord,
    pub permission_policy: PermissionPolicy,
    /// The turn that is under way, and when it began, in milliseconds since the epoch.
    pub turn: Option<(Uuid, u64)>,
    /// The oldest first.
    pub pending_permissions: Vec<PermissionRequest>,
}

/// What a caller wants to be different.
#[derive(Debug)]
pub enum Change<'a> {
    Model(&'a str),
    Mode(&'a str),
    ThoughtLevel(&'a str),
    Option { id: &'a str, value: &'a Value },
}

/// Methods with a call of their own, without which the session would lose track of its agent.
const RESERVED: [(&str, &str); 8] = [
    ("initialize", "createSession"),
    ("authenticate", "env of createSession"),
    ("session/new", "createSession"),
    ("session/load", "resumeSession"),
    ("session/resume", "resumeSession"),
    ("session/close", "closeSession"),
    ("session/prompt", "sendPrompt"),
    ("session/cancel", "cancelPrompt"),
];

impl Machine {
    /// Changes a setting of a session, which is resumed for it; returns the agent's answer.
    pub(super) async fn change(
        &self,
        settings: &Settings,
        session: SessionId,
        change: Change<'_>,
    ) -> Result<Box<RawValue>> {
        let live = self.resume(settings, session, Resume::default()).await?;
        live.change(change).await
    }

    /// Asks the agent anything that ACP, or the agent alone, knows.
    pub(super) async fn raw_send(
        &self,
        settings: &Settings,
        session: SessionId,
        method: &str,
        params: Option<&RawValue>,
    ) -> Result<Box<RawValue>> {
        if let Some((_, call)) = RESERVED.iter().find(|(reserved, _)| *reserved == method) {
            let problem =
                format!("{method} has a call of its own, which keeps the log right: {call}");
            return Err(Error::invalid_argument("method", problem));
        }
        // Value by value, so that they reach the agent exactly as they were written.
        let mut fields: BTreeMap<String, Box<RawValue>> = match params {
            Some(params) => serde_json::from_str(params.get())
                .map_err(|_| Error::invalid_argument("params", "must be an object"))?,
            None => BTreeMap::new(),
        };
        let live = self.resume(settings, session, Resume::default()).await?;
        let public = json!(session).to_string();
        let own = fields.get("sessionId").map(|id| id.get());
        if own.is_none_or(|id| id == public)
            && let Ok(id) = to_raw_value(&live.agent_session)
        {
            fields.insert("sessionId".to_owned(), id);
        }
        let answer = live.ask_for(method, &fields).await?;
        live.updates.tell_configuration().await?;
        Ok(answer)
    }

    /// What the agent offers and is set to, as it last said.
    pub(super) async fn configuration(&self, session: SessionId) -> Result<Configuration> {
        match self.shown(session) {
            Some(live) => Ok(live.updates.configuration()),
            None => Ok(Configuration::of_text(&self.record(session).await?.config)),
        }
    }

    /// The request is taken before this returns, so that of two callers the first has it.
    pub(super) fn respond_permission(
        self: Arc<Self>,
        session: SessionId,
        permission: &str,
        answer: &str,
    ) -> impl Future<Output = Result<Value>> + use<> {
        let live = self.shown(session);
        let taken = live
            .as_ref()
            .map(|live| live.updates.take_permission(permission, answer));
        let no_agent = Error::new(
            Code::PermissionNotFound,
            format!(
                "session {session} has no running agent, and so no permission request {permission:?} \
                 that waits: what was asked before ended as cancelled"
            ),
        );
        async move {
            let (Some(live), Some(taken)) = (live, taken) else {
                self.record(session).await?;
                return Err(no_agent);
            };
            let (pending, outcome) = taken?;
            live.updates.respond(pending, outcome).await
        }
    }

    pub(super) async fn view(&self, session: SessionId) -> Result<SessionView> {
        let record = self.record(session).await?;
        Ok(self.view_of(record))
    }

    pub(super) async fn views(&self) -> Result<Vec<SessionView>> {
        let records = self.records().await?;
        Ok(records
            .into_iter()
            .map(|record| self.view_of(record))
            .collect())
    }

    fn view_of(&self, record: SessionRecord) -> SessionView {
        let turn = self.shown(record.id).and_then(|live| live.turn());
        SessionView {
            permission_policy: Kept::parse(&record.settings).permission_policy,
            turn: turn.map(|turn| (turn.id, turn.started_at)),
            pending_permissions: self.emission.permissions().of(record.id),
            record,
        }
    }

    /// The oldest request of this VM that waits, that was asked after this one, and that listeners may have
    /// been told of.
    pub(super) fn next_pending_permission(
        &self,
        after: Uuid,
    ) -> Option<(SessionId, PermissionRequest)> {
        let store = self.emission.store()?;
        let is_committed = |session, seq| {
            store
                .committed(session)
                .is_ok_and(|committed| seq <= committed)
        };
        self.emission.permissions().next(after, is_committed)
    }
}

impl LiveSession {
    async fn change(&self, change: Change<'_>) -> Result<Box<RawValue>> {
        let now = self.updates.configuration();
        let agent = &self.agent;
        let setting = match change {
            Change::Model(model) => now.model(agent, model)?,
            Change::Mode(mode) => now.mode(agent, mode)?,
            Change::ThoughtLevel(level) => now.thought_level(agent, level)?,
            Change::Option { id, value } => now.option(agent, id, value)?,
        };
        let answer = self.apply(setting).await?;
        self.updates.tell_configuration().await?;
        Ok(answer)
    }

    /// What a new session was asked to begin with. The model first: others depend on it.
    pub(super) async fn set_up(&self, options: &SessionOptions) -> Result<()> {
        let wanted = [
            options.model.as_deref().map(Change::Model),
            options.mode.as_deref().map(Change::Mode),
            options.thought_level.as_deref().map(Change::ThoughtLevel),
        ];
        for change in wanted.into_iter().flatten() {
            self.change(change).await?;
        }
        self.updates.tell_configuration().await
    }

    /// Asks for a setting, without telling the log.
    pub(super) async fn apply(&self, setting: Setting) -> Result<Box<RawValue>> {
        let Setting {
            method, mut params, ..
        } = setting;
        params["sessionId"] = json!(self.agent_session);
        self.ask_for(method, &params).await
    }
}
