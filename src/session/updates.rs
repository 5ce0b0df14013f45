//! What an agent says on its own, on its way into the log.

use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use agent_client_protocol_schema::v1::{
    PermissionOption, PermissionOptionKind, RequestPermissionRequest,
};
use async_trait::async_trait;
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};
use std::borrow::Cow;
use tokio::sync::watch;

use super::event;
use super::options::PermissionPolicy;
use super::tail::Tail;
use super::turn::Turn;
use crate::acp::{Connection, Handler, Request, RpcError, outer_session_id, with_session_id};
use crate::error::Error;
use crate::ids::SessionId;
use crate::store::{Event, Store};

/// Takes the agent's messages, in order, from its connection to the store.
pub(super) struct Updates {
    session: SessionId,
    store: Store,
    policy: PermissionPolicy,
    /// What was no protocol: its end explains an agent that does not work.
    strays: Tail,
    stray_seen: watch::Sender<bool>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    phase: Phase,
    turn: Option<Arc<Turn>>,
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
    Replaying,
    Live {
        agent_session: String,
    },
}

/// Parts of `session/update` that are looked into; everything else is only passed on.
#[derive(Deserialize)]
struct UpdateParams<'a> {
    #[serde(borrow)]
    update: Update<'a>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Update<'a> {
    #[serde(borrow)]
    #[serde(rename = "sessionUpdate")]
    kind: Cow<'a, str>,
    #[serde(borrow, default)]
    message_id: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    content: Option<&'a RawValue>,
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
    #[serde(borrow)]
    text: Cow<'a, str>,
}

impl Updates {
    pub(super) fn new(session: SessionId, store: Store, policy: PermissionPolicy) -> Arc<Self> {
        Arc::new(Self {
            session,
            store,
            policy,
            strays: Tail::default(),
            stray_seen: watch::Sender::new(false),
            state: Mutex::default(),
        })
    }

    pub(super) fn replaying(&self) {
        self.state().phase = Phase::Replaying;
    }

    pub(super) fn live(&self, agent_session: String) {
        self.state().phase = Phase::Live { agent_session };
    }

    pub(super) fn set_turn(&self, turn: Option<Arc<Turn>>) {
        self.state().turn = turn;
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
    fn is_news(&self, method: &str, agent_session: Option<&str>) -> bool {
        match &self.state().phase {
            Phase::Starting => true,
            Phase::Replaying => method != event::SESSION_UPDATE,
            Phase::Live { agent_session: own } => {
                agent_session.is_none_or(|session| session == own)
            }
        }
    }

    /// Queues an event. It waits when the disk can't follow: that is the agent's back-pressure.
    pub(super) async fn append(&self, event: Event) -> Result<(), Error> {
        let appended = self.store.append(self.session, event).await;
        appended.map(drop).map_err(|error| {
            let error = Error::from(error);
            self.state().failed.get_or_insert(error).clone()
        })
    }

    async fn append_or_end(&self, event: Event) -> ControlFlow<()> {
        match self.append(event).await {
            Ok(()) => ControlFlow::Continue(()),
            Err(_kept_in_state) => ControlFlow::Break(()),
        }
    }

    /// Adds the text of an `agent_message_chunk` to the turn that is under way.
    fn note_text(&self, params: Option<&RawValue>) {
        let Some(turn) = self.state().turn.clone() else {
            return;
        };
        let chunk = params
            .and_then(|params| serde_json::from_str::<UpdateParams<'_>>(params.get()).ok())
            .map(|params| params.update)
            .filter(|update| update.kind == "agent_message_chunk");
        let Some(chunk) = chunk else {
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
}

#[async_trait]
impl Handler for Updates {
    async fn notification(
        &self,
        line: &str,
        method: &str,
        params: Option<&RawValue>,
    ) -> ControlFlow<()> {
        let agent_session = outer_session_id(params);
        if !self.is_news(method, agent_session.as_deref()) {
            tracing::debug!(session = %self.session, method, "not about this session, or not new");
            return ControlFlow::Continue(());
        }
        if method == event::SESSION_UPDATE {
            self.note_text(params);
        } else if method == event::RETRY {
            self.note_retry(params);
        }
        let json = with_session_id(line, params, &self.session.to_string());
        let event = if method == event::SESSION_UPDATE {
            Event::session_update(json.into())
        } else {
            Event {
                method: method.to_owned().into(),
                json: json.into(),
            }
        };
        self.append_or_end(event).await
    }

    async fn request(&self, connection: &Connection, request: Request<'_>) -> ControlFlow<()> {
        if request.method != "session/request_permission" {
            let error = RpcError::method_not_found(request.method);
            connection.respond(request.id, Err(&error)).await;
            return ControlFlow::Continue(());
        }
        let options = request
            .params
            .and_then(|params| serde_json::from_str::<RequestPermissionRequest>(params.get()).ok())
            .map_or_else(Vec::new, |request| request.options);
        let outcome = decide(self.policy, &options);
        let shown = with_session_id(request.line, request.params, &self.session.to_string());
        let shown: Value = serde_json::from_str(&shown).unwrap_or_default();
        let event = event::permission(self.session, &shown["params"], &outcome["outcome"]);
        let flow = self.append_or_end(event).await;
        // A `Value` of string keys: always representable.
        if let Ok(answer) = serde_json::value::to_raw_value(&outcome) {
            connection.respond(request.id, Ok(&answer)).await;
        }
        flow
    }

    /// The turn is over: what follows is not its text.
    fn answered(&self, method: &str) {
        if method == event::PROMPT {
            self.state().turn = None;
        }
    }

    async fn stray(&self, line: &[u8]) -> ControlFlow<()> {
        self.strays.push(line);
        self.strays.push(b"\n");
        self.stray_seen.send_replace(true);
        ControlFlow::Continue(())
    }
}

/// The answer of a policy: the narrowest option of its kind that the agent offers.
fn decide(policy: PermissionPolicy, options: &[PermissionOption]) -> Value {
    let kinds = match policy {
        PermissionPolicy::Allow => [
            PermissionOptionKind::AllowOnce,
            PermissionOptionKind::AllowAlways,
        ],
        PermissionPolicy::Reject => [
            PermissionOptionKind::RejectOnce,
            PermissionOptionKind::RejectAlways,
        ],
    };
    let chosen = kinds
        .iter()
        .find_map(|kind| options.iter().find(|option| option.kind == *kind));
    match chosen {
        Some(option) => {
            json!({ "outcome": { "outcome": "selected", "optionId": option.option_id } })
        }
        None => json!({ "outcome": { "outcome": "cancelled" } }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(json: Value) -> Vec<PermissionOption> {
        serde_json::from_value(json).expect("options")
    }

    #[test]
    fn a_policy_chooses_the_narrowest_option_of_its_kind() {
        let offered = options(json!([
            { "optionId": "a", "name": "Always", "kind": "allow_always" },
            { "optionId": "o", "name": "Once", "kind": "allow_once" },
            { "optionId": "r", "name": "No", "kind": "reject_once" },
        ]));
        let chosen = |policy| decide(policy, &offered)["outcome"]["optionId"].clone();
        assert_eq!(chosen(PermissionPolicy::Allow), "o");
        assert_eq!(chosen(PermissionPolicy::Reject), "r");
    }

    #[test]
    fn without_a_fitting_option_the_request_is_cancelled() {
        assert_eq!(
            decide(PermissionPolicy::Allow, &[])["outcome"]["outcome"],
            "cancelled"
        );
    }
}
