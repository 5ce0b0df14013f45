//! What an agent says on its own, on its way into the log.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::fmt;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use serde::de::Visitor;
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use serde_json::value::RawValue;
use tokio::sync::{Mutex as AsyncMutex, watch};
use uuid::Uuid;

use super::configuration::{Configuration, Observed};
use super::emission::{Emission, Notice, SessionState};
use super::event::{self, DecidedBy};
use super::options::PermissionPolicy;
use super::permission::{self, Asked, KnownTool, Pending, Permissions};
use super::tail::Tail;
use super::turn::Turn;
use crate::acp::{
    self, Connection, Handler, OuterSessionIds, Request, RpcError, has_field, outer_session_id,
    with_session_id,
};
use crate::error::{Error, Result};
use crate::ids::{Seq, SessionId};
use crate::store::{Event, SessionChange, Store};

/// Tool calls that a permission request may refer to.
const KNOWN_TOOLS: usize = 64;

/// Longest id, name, kind or title of such a call, in bytes of JSON.
const KNOWN_TEXT: usize = 8 << 10;

/// Reasons why nobody answers a permission request any more.
pub(super) const CANCELLED: &str = "cancelled";
pub(super) const TURN_ENDED: &str = "turn_ended";
pub(super) const SESSION_CLOSED: &str = "session_closed";
pub(super) const AGENT_EXITED: &str = "agent_exited";
pub(super) const INTERRUPTED: &str = "interrupted";
const TOO_MANY: &str = "too_many_requests";

/// Takes the agent's messages, in order, from its connection to the store.
pub(super) struct Updates {
    session: SessionId,
    store: Store,
    emission: Arc<Emission>,
    policy: PermissionPolicy,
    /// What was no protocol: its end explains an agent that does not work.
    strays: Tail,
    stray_seen: watch::Sender<bool>,
    /// Held while a request is logged, so that its outcome comes after it.
    asking: AsyncMutex<()>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    phase: Phase,
    turn: Option<Arc<Turn>>,
    /// What the agent is set to.
    configuration: Configuration,
    /// The same as the log has it.
    told: Configuration,
    /// The latest tool calls by their ids.
    tools: VecDeque<(String, KnownTool)>,
    /// Why the log takes nothing more.
    failed: Option<Error>,
}

/// Which of the agent's messages are news.
#[derive(Default, Clone)]
enum Phase {
    /// Until the agent has named its session: everything that it says is about that one.
    #[default]
    Starting,
    /// It repeats the conversation that the log already has.
    Replaying {
        agent_session: String,
    },
    Live {
        agent_session: String,
    },
}

/// Requests whose answer opens the conversation.
const OPENING: [&str; 3] = ["session/new", "session/resume", "session/load"];

/// The part of the answer to `session/new` that there must be.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct NewSession {
    pub(super) session_id: String,
}

impl State {
    /// The conversation is open: from now on there is news of it.
    fn open(&mut self, answer: &RawValue) {
        self.configuration = Configuration::of_answer(answer);
        // What the log of a new session has not said yet goes without saying: it begins so.
        if self.told == Configuration::default() {
            self.told = self.configuration.clone();
        }
        let named = serde_json::from_str::<NewSession>(answer.get());
        let agent_session = match (&self.phase, named) {
            (Phase::Replaying { agent_session }, _) => agent_session.clone(),
            (_, Ok(named)) => named.session_id,
            // Whoever asked will find out.
            (_, Err(_malformed)) => return,
        };
        self.phase = Phase::Live { agent_session };
    }
}

/// Parts of `session/update` that are looked into; everything else is only passed on.
#[derive(Deserialize)]
struct UpdateParams<'a> {
    #[serde(
        borrow,
        default,
        rename = "sessionId",
        deserialize_with = "acp::present"
    )]
    session_id: Option<&'a RawValue>,
    #[serde(borrow, default, rename = "_meta", deserialize_with = "acp::present")]
    meta: Option<&'a RawValue>,
    #[serde(borrow)]
    update: Update<'a>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Update<'a> {
    #[serde(borrow, rename = "sessionUpdate")]
    kind: Cow<'a, str>,
    #[serde(borrow, default)]
    message_id: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    content: Option<&'a RawValue>,
    #[serde(borrow, default)]
    tool_call_id: Option<&'a RawValue>,
    #[serde(borrow, default)]
    title: Option<&'a RawValue>,
    #[serde(borrow, default, rename = "kind")]
    tool_kind: Option<&'a RawValue>,
    #[serde(borrow, default)]
    name: Option<&'a RawValue>,
    #[serde(borrow, default)]
    current_mode_id: Option<&'a RawValue>,
    #[serde(borrow, default)]
    config_options: Option<&'a RawValue>,
}

/// The part of our adapters' `_agentvm/retry` that says which text is void.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RetryParams<'a> {
    #[serde(borrow, default)]
    discarded_message_id: Option<Cow<'a, str>>,
}

#[derive(Deserialize)]
struct TextBlock<'a> {
    #[serde(rename = "type", borrow)]
    kind: Cow<'a, str>,
    #[serde(borrow, deserialize_with = "lossy")]
    text: Cow<'a, str>,
}

/// A text as far as it is one: a chunk may end with half of a character.
fn lossy<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Cow<'de, str>, D::Error> {
    struct Lossy;

    impl<'de> Visitor<'de> for Lossy {
        type Value = Cow<'de, str>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a text")
        }

        fn visit_borrowed_bytes<E>(self, text: &'de [u8]) -> Result<Self::Value, E> {
            Ok(String::from_utf8_lossy(text))
        }

        fn visit_bytes<E>(self, text: &[u8]) -> Result<Self::Value, E> {
            Ok(String::from_utf8_lossy(text).into_owned().into())
        }
    }

    deserializer.deserialize_bytes(Lossy)
}

impl Updates {
    /// `told`: what the log says of the agent's configuration.
    pub(super) fn new(
        session: SessionId,
        store: Store,
        emission: Arc<Emission>,
        policy: PermissionPolicy,
        told: Configuration,
    ) -> Arc<Self> {
        Arc::new(Self {
            session,
            store,
            emission,
            policy,
            strays: Tail::default(),
            stray_seen: watch::Sender::new(false),
            asking: AsyncMutex::default(),
            state: Mutex::new(State {
                told,
                ..State::default()
            }),
        })
    }

    pub(super) fn starting(&self) {
        self.state().phase = Phase::Starting;
    }

    pub(super) fn replaying(&self, agent_session: String) {
        self.state().phase = Phase::Replaying { agent_session };
    }

    pub(super) fn set_turn(&self, turn: Option<Arc<Turn>>) {
        self.state().turn = turn;
    }

    pub(super) fn configuration(&self) -> Configuration {
        self.state().configuration.clone()
    }

    /// A request that changes the configuration was granted.
    pub(super) fn granted(&self, method: &str, params: &Value, answer: &RawValue) {
        self.state().configuration.granted(method, params, answer);
    }

    /// Tells the log what changed without a word of the agent, and keeps the configuration.
    pub(super) async fn tell_configuration(&self) -> Result<()> {
        let (untold, configuration) = {
            let mut state = self.state();
            let untold = state.configuration.untold_updates(&state.told);
            state.told = state.configuration.clone();
            (untold, state.configuration.to_text())
        };
        for update in &untold {
            self.append(event::untold_update(self.session, update))
                .await?;
        }
        let change = SessionChange {
            config: Some(configuration),
            ..SessionChange::default()
        };
        Ok(self.store.update_session(self.session, change).await?)
    }

    pub(super) fn strays(&self) -> &Tail {
        &self.strays
    }

    /// Becomes true with the first line that is no protocol.
    pub(super) fn stray_seen(&self) -> watch::Receiver<bool> {
        self.stray_seen.subscribe()
    }

    /// Why the store refused an event, after which the connection was ended.
    pub(super) fn failure(&self) -> Option<Error> {
        self.state().failed.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a message about `agent_session` belongs into the log.
    fn is_news(&self, agent_session: Option<&str>, update: Option<&str>) -> bool {
        let (own, is_replay) = match &self.state().phase {
            Phase::Starting => return true,
            Phase::Replaying { agent_session } => (agent_session.clone(), true),
            Phase::Live { agent_session } => (agent_session.clone(), false),
        };
        agent_session.is_none_or(|session| session == own)
            && (!is_replay || update.is_none_or(is_state))
    }

    /// Queues an event. It waits when the disk can't follow: that is the agent's back-pressure.
    pub(super) async fn append(&self, event: Event) -> Result<Seq> {
        let appended = self.store.append(self.session, event).await;
        appended.map_err(|error| {
            let error = Error::from(error);
            self.state().failed.get_or_insert(error).clone()
        })
    }

    /// Appends, and where that fails ends the connection: the error is kept in the state.
    async fn append_or_end(&self, event: Event) -> ControlFlow<()> {
        flow(&self.append(event).await)
    }

    /// What an update means for the turn and the session.
    fn note(&self, update: &Update<'_>) {
        match &*update.kind {
            "agent_message_chunk" => self.note_text(update),
            "tool_call" | "tool_call_update" if self.policy == PermissionPolicy::Ask => {
                self.note_tool(update);
            }
            "current_mode_update" => self.observe(Observed::mode(update.current_mode_id)),
            "config_option_update" => self.observe(Observed::options(update.config_options)),
            _ => {}
        }
    }

    /// The agent is set differently now, and the log says so.
    fn observe(&self, change: Option<Observed>) {
        if let Some(change) = change {
            let mut state = self.state();
            state.configuration.observe(&change);
            state.told.observe(&change);
        }
    }

    /// Adds the text of an `agent_message_chunk` to the turn that is under way.
    fn note_text(&self, chunk: &Update<'_>) {
        let Some(turn) = self.state().turn.clone() else {
            return;
        };
        let text = chunk
            .content
            .and_then(|content| serde_json::from_str::<TextBlock<'_>>(content.get()).ok())
            .filter(|block| block.kind == "text");
        if let Some(block) = text {
            turn.add_text(chunk.message_id.as_deref(), &block.text);
        }
    }

    fn note_tool(&self, call: &Update<'_>) {
        // For a person to read: longer ones are not kept until a request needs them.
        let text = |raw: Option<&RawValue>| {
            raw.filter(|raw| raw.get().len() <= KNOWN_TEXT)
                .and_then(|raw| serde_json::from_str::<String>(raw.get()).ok())
        };
        let Some(id) = text(call.tool_call_id) else {
            return;
        };
        let mut state = self.state();
        let known = state.tools.iter().position(|(own, _)| *own == id);
        let mut tool = known
            .and_then(|at| state.tools.remove(at))
            .map_or_else(KnownTool::default, |(_, tool)| tool);
        tool.name = text(call.name).or(tool.name);
        tool.kind = text(call.tool_kind).or(tool.kind);
        tool.title = text(call.title).or(tool.title);
        state.tools.push_back((id, tool));
        if state.tools.len() > KNOWN_TOOLS {
            state.tools.pop_front();
        }
    }

    fn known_tool(&self, id: &str) -> Option<KnownTool> {
        let state = self.state();
        let known = state.tools.iter().find(|(own, _)| own == id);
        known.map(|(_, tool)| tool.clone())
    }

    /// The agent starts a message again: what it said of it so far is void.
    fn note_retry(&self, params: Option<&RawValue>) {
        let retry = params
            .and_then(|params| serde_json::from_str::<RetryParams<'_>>(params.get()).ok())
            .and_then(|retry| retry.discarded_message_id);
        let turn = self.state().turn.clone();
        if let (Some(turn), Some(message)) = (turn, retry) {
            turn.discard_text(&message);
        }
    }

    /// Answers, as cancelled, the requests of a turn, or with `None` all of this session.
    pub(super) async fn give_up_permissions(&self, turn: Option<Uuid>, reason: &'static str) {
        let asking = self.asking.lock().await;
        let over = self.permissions().take_all(|pending| {
            pending.session == self.session && turn.is_none_or(|turn| pending.turn == Some(turn))
        });
        drop(asking);
        if over.is_empty() {
            return;
        }
        let outcome = permission::cancelled();
        for pending in over {
            let (id, by) = (pending.request.permission_id, DecidedBy::Nobody(reason));
            let event = event::permission_outcome(self.session, id, &outcome, by);
            if let Err(error) = self.append(event).await {
                tracing::debug!(%error, permission = %id, "the log does not have its outcome");
            }
            // An agent that reads nothing must not hold up the end of its turn.
            let outcome = outcome.clone();
            tokio::spawn(async move { pending.answer(&outcome).await });
        }
        self.tell_state();
    }

    /// Takes a request and the outcome that the caller's answer chooses: whoever comes first has it.
    pub(super) fn take_permission(
        &self,
        permission: &str,
        answer: &str,
    ) -> Result<(Pending, Value)> {
        self.permissions().take(self.session, permission, answer)
    }

    /// Hands the caller's answer to the agent; returns the outcome as the agent got it.
    pub(super) async fn respond(&self, pending: Pending, outcome: Value) -> Result<Value> {
        let id = pending.request.permission_id;
        let event = event::permission_outcome(self.session, id, &outcome, DecidedBy::Caller);
        let logged = self.append(event).await;
        pending.answer(&outcome).await;
        self.tell_state();
        logged.map(|_seq| outcome)
    }

    /// Tells who listens what the session is doing now.
    pub(super) fn tell_state(&self) {
        let turn = self.state().turn.as_ref().map(|turn| turn.id);
        self.emission.notify(&Notice::SessionStatus {
            session: self.session,
            state: SessionState::Open {
                turn,
                pending_permissions: self.permissions().count(self.session),
            },
        });
    }

    fn permissions(&self) -> &Permissions {
        self.emission.permissions()
    }
}

fn flow<T>(appended: &Result<T>) -> ControlFlow<()> {
    match appended {
        Ok(_) => ControlFlow::Continue(()),
        Err(_kept_in_state) => ControlFlow::Break(()),
    }
}

fn changes_configuration(kind: &str) -> bool {
    matches!(kind, "current_mode_update" | "config_option_update")
}

/// Whether an update tells how the session is now, rather than what was said in it.
fn is_state(kind: &str) -> bool {
    changes_configuration(kind)
        || matches!(
            kind,
            "available_commands_update" | "session_info_update" | "usage_update"
        )
}

#[async_trait]
impl Handler for Updates {
    async fn notification(
        &self,
        line: &str,
        method: &str,
        params: Option<&RawValue>,
    ) -> ControlFlow<()> {
        let is_update = method == event::SESSION_UPDATE;
        // These come by the thousand: what is needed of one is read at once.
        let read = params
            .filter(|_| is_update)
            .and_then(|params| serde_json::from_str::<UpdateParams<'_>>(params.get()).ok());
        let is_reserved = match &read {
            Some(params) => has_field(params.meta, event::MARK),
            None => event::is_reserved(method, params),
        };
        if is_reserved {
            tracing::warn!(session = %self.session, method, "an agent's message in agentvm's name");
            return ControlFlow::Continue(());
        }
        let (ids, update) = match read {
            Some(params) => (
                OuterSessionIds::only(params.session_id),
                Some(params.update),
            ),
            None => (OuterSessionIds::of(params), None),
        };
        let agent_session = ids.name();
        // One that can't be read is treated like what was said.
        let kind = is_update.then(|| update.as_ref().map_or("", |update| &*update.kind));
        if !self.is_news(agent_session.as_deref(), kind) {
            tracing::debug!(session = %self.session, method, "not about this session, or not new");
            return ControlFlow::Continue(());
        }
        if let Some(update) = &update {
            self.note(update);
        } else if method == event::RETRY {
            self.note_retry(params);
        }
        let json = ids.replaced(line, &self.session.to_string());
        let event = if method == event::SESSION_UPDATE {
            Event::session_update(json.into())
        } else {
            Event {
                method: method.to_owned().into(),
                json: json.into(),
            }
        };
        let appended = self.append_or_end(event).await;
        if appended.is_continue() && kind.is_some_and(changes_configuration) {
            return flow(&self.tell_configuration().await);
        }
        appended
    }

    async fn request(&self, connection: &Connection, request: Request<'_>) -> ControlFlow<()> {
        if request.method != permission::REQUEST {
            let error = RpcError::method_not_found(request.method);
            connection.respond(request.id, Err(&error)).await;
            return ControlFlow::Continue(());
        }
        let agent_session = outer_session_id(request.params);
        if !self.is_news(agent_session.as_deref(), None) {
            let error = RpcError::invalid_params("this client has no such session");
            connection.respond(request.id, Err(&error)).await;
            return ControlFlow::Continue(());
        }
        let params = request.params.unwrap_or(RawValue::NULL);
        let params = with_session_id(params.get(), Some(params), &self.session.to_string());
        let asked = Asked::new(
            RawValue::from_string(params).unwrap_or_else(|_| RawValue::NULL.to_owned()),
            |id| self.known_tool(id),
        );
        let turn = self.state().turn.clone();
        let turn_id = turn.as_ref().map(|turn| turn.id);
        let is_cancelled = || turn.as_ref().is_some_and(|turn| turn.is_cancelled());
        let id = asked.request.permission_id;
        let asking = event::permission_request(self.session, turn_id, id, &asked.request.params);
        let nobody = |reason| Some((permission::cancelled(), DecidedBy::Nobody(reason)));
        let decided = if is_cancelled() {
            nobody(CANCELLED)
        } else if let Some(outcome) = asked.decide(self.policy) {
            Some((outcome, DecidedBy::Policy))
        } else if self.permissions().has_room(self.session, &asked) {
            None
        } else {
            nobody(TOO_MANY)
        };
        let pending = asked.pending(self.session, turn_id, connection.clone(), request.id);
        if let Some((outcome, by)) = decided {
            let logged = self.append_or_end(asking).await;
            if logged.is_break() {
                return logged;
            }
            let event = event::permission_outcome(self.session, id, &outcome, by);
            let flow = self.append_or_end(event).await;
            pending.answer(&outcome).await;
            return flow;
        }
        let asking_now = self.asking.lock().await;
        self.permissions().add(pending);
        let logged = self.append(asking).await;
        match &logged {
            Ok(seq) => self.permissions().logged(id, *seq),
            Err(_) => drop(
                self.permissions()
                    .take_all(|own| own.request.permission_id == id),
            ),
        }
        drop(asking_now);
        // Whoever hears that one waits finds it: not before it is committed. An error is that of `logged`,
        // or comes with the next event.
        drop(self.store.flush(false).await);
        self.tell_state();
        if is_cancelled() {
            // Whoever cancelled may have looked for requests just before this one was there.
            self.give_up_permissions(turn_id, CANCELLED).await;
        }
        flow(&logged)
    }

    fn answered(&self, method: &str, result: Option<&RawValue>) {
        let mut state = self.state();
        if method == event::PROMPT {
            // The turn is over: what follows is not its text.
            state.turn = None;
        }
        let Some(result) = result else {
            return;
        };
        if OPENING.contains(&method) {
            state.open(result);
        } else {
            state.configuration.told_by(method, result);
        }
    }

    async fn stray(&self, line: &[u8]) -> ControlFlow<()> {
        self.strays.push(line);
        self.strays.push(b"\n");
        self.stray_seen.send_replace(true);
        ControlFlow::Continue(())
    }
}
