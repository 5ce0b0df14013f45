//! An agent that asks for permission, and who answers it.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use serde_json::{Value, json};
use uuid::Uuid;

use super::options::PermissionPolicy;
use crate::acp::{Connection, MAX_VALUES, count_values};
use crate::error::{Code, Error, Result};
use crate::ids::{Seq, SessionId};

/// The method with which an agent asks.
pub(super) const REQUEST: &str = "session/request_permission";

/// What waits in one session at most: an agent that asks for more is answered as cancelled. All values
/// of a session's requests are what one message may have, for JavaScript reads them at once.
const MAX_PENDING: usize = 256;
const MAX_PENDING_BYTES: usize = 64 << 20;
const MAX_PENDING_VALUES: usize = MAX_VALUES;

/// Bytes of options that are looked into: a parsed value takes many times its text, and each request that
/// waits keeps one.
const MAX_OPTIONS: usize = 16 << 10;

/// A request that waits for the caller.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PermissionRequest {
    pub permission_id: Uuid,
    /// The tool's own name if the agent gives it, else its ACP kind.
    pub tool_name: String,
    /// What the tool would do, in the agent's words.
    pub description: String,
    /// `[{ optionId, name, kind }]`, as they came; empty if they are not a list.
    pub options: Value,
    /// The agent's whole request, with our session id.
    pub params: Box<RawValue>,
}

/// One answer that the agent offers.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Offered {
    option_id: String,
    #[serde(default)]
    name: String,
    /// As `allow_once`; others than ACP's are kept, and can be chosen by their id only.
    #[serde(default)]
    kind: String,
}

/// The parts of a request that are looked into. What the tool was called with is not: it may hold
/// numbers and depths that a [`Value`] can't.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Params<'a> {
    #[serde(borrow)]
    options: Option<&'a RawValue>,
    #[serde(borrow)]
    tool_call: Option<&'a RawValue>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct ToolCall<'a> {
    #[serde(borrow, rename = "toolCallId")]
    id: Option<&'a RawValue>,
    #[serde(borrow)]
    name: Option<&'a RawValue>,
    #[serde(borrow)]
    kind: Option<&'a RawValue>,
    #[serde(borrow)]
    title: Option<&'a RawValue>,
}

/// What a part of a message says, if it is there and is what it should be.
fn read<'a, T: Deserialize<'a>>(part: Option<&'a RawValue>) -> Option<T> {
    part.and_then(|part| serde_json::from_str(part.get()).ok())
}

/// All requests of a VM that wait, the oldest first (ids are `UUIDv7`).
#[derive(Default)]
pub(super) struct Permissions {
    pending: Mutex<BTreeMap<Uuid, Pending>>,
}

/// Where the answer to a request goes.
pub(super) struct Pending {
    pub(super) session: SessionId,
    /// The turn that it belongs to, if it came in one.
    pub(super) turn: Option<Uuid>,
    /// Number of the event that logs it, once it has one.
    seq: Option<Seq>,
    pub(super) request: PermissionRequest,
    values: usize,
    offered: Vec<Offered>,
    connection: Connection,
    /// JSON-RPC id of the agent's request.
    id: Box<RawValue>,
}

impl Pending {
    /// Sends the answer to the agent.
    pub(super) async fn answer(&self, outcome: &Value) {
        // A `Value` of string keys: always representable.
        if let Ok(answer) = serde_json::value::to_raw_value(&json!({ "outcome": outcome })) {
            self.connection.respond(&self.id, Ok(&answer)).await;
        }
    }
}

/// What an agent's request says.
pub(super) struct Asked {
    pub(super) request: PermissionRequest,
    /// JSON values in it.
    values: usize,
    offered: Vec<Offered>,
}

impl Asked {
    /// `params`: with our session id. `tool`: what is known of a tool call from before, since the
    /// request need not repeat it.
    pub(super) fn new(params: Box<RawValue>, tool: impl FnOnce(&str) -> Option<KnownTool>) -> Self {
        let asked: Params = read(Some(&*params)).unwrap_or_default();
        let options = asked
            .options
            .filter(|options| options.get().len() <= MAX_OPTIONS);
        let options: Vec<Value> = read(options).unwrap_or_default();
        let offered = options
            .iter()
            .filter_map(|option| Offered::deserialize(option).ok())
            .collect();
        let call: ToolCall = read(asked.tool_call).unwrap_or_default();
        let id: Option<String> = read(call.id);
        let known = id.and_then(|id| tool(&id)).unwrap_or_default();
        let tool_name = read(call.name)
            .or(known.name)
            .or_else(|| read(call.kind))
            .or(known.kind);
        Self {
            values: count_values(params.get()),
            request: PermissionRequest {
                permission_id: Uuid::now_v7(),
                tool_name: tool_name.unwrap_or_else(|| "other".to_owned()),
                description: read(call.title).or(known.title).unwrap_or_default(),
                options: Value::Array(options),
                params,
            },
            offered,
        }
    }

    /// The answer of a policy: the narrowest option of its kind that the agent offers. `None`: it is
    /// for the caller to answer.
    pub(super) fn decide(&self, policy: PermissionPolicy) -> Option<Value> {
        let chosen = match policy {
            PermissionPolicy::Ask => return None,
            PermissionPolicy::Allow => of_kinds(&self.offered, &ALLOW),
            PermissionPolicy::Reject => of_kinds(&self.offered, &REJECT),
        };
        Some(chosen.map_or_else(cancelled, selected))
    }

    pub(super) fn pending(
        self,
        session: SessionId,
        turn: Option<Uuid>,
        connection: Connection,
        id: &RawValue,
    ) -> Pending {
        Pending {
            session,
            turn,
            seq: None,
            request: self.request,
            values: self.values,
            offered: self.offered,
            connection,
            id: id.to_owned(),
        }
    }
}

const ALLOW: [&str; 2] = ["allow_once", "allow_always"];
const REJECT: [&str; 2] = ["reject_once", "reject_always"];

fn of_kinds<'a>(offered: &'a [Offered], kinds: &[&str]) -> Option<&'a Offered> {
    kinds
        .iter()
        .find_map(|kind| offered.iter().find(|option| option.kind == *kind))
}

fn selected(option: &Offered) -> Value {
    json!({ "outcome": "selected", "optionId": option.option_id })
}

/// ACP's outcome of a request that nobody decided.
pub(super) fn cancelled() -> Value {
    json!({ "outcome": "cancelled" })
}

/// What a `tool_call` update said.
#[derive(Debug, Default, Clone)]
pub(super) struct KnownTool {
    pub(super) name: Option<String>,
    pub(super) kind: Option<String>,
    pub(super) title: Option<String>,
}

impl Permissions {
    /// To be called before its event is logged: whoever sees the event finds the request.
    pub(super) fn add(&self, pending: Pending) {
        self.pending()
            .insert(pending.request.permission_id, pending);
    }

    pub(super) fn logged(&self, id: Uuid, seq: Seq) {
        if let Some(pending) = self.pending().get_mut(&id) {
            pending.seq = Some(seq);
        }
    }

    /// Takes the request that `id` names, with the outcome that `answer` chooses. Whoever comes first
    /// has it.
    pub(super) fn take(
        &self,
        session: SessionId,
        id: &str,
        answer: &str,
    ) -> Result<(Pending, Value)> {
        let not_found = || {
            Error::new(
                Code::PermissionNotFound,
                format!(
                    "no permission request {id:?} waits in session {session}: it was answered, or \
                     its turn, session or agent has ended; getSession() lists those that wait"
                ),
            )
        };
        let key = Uuid::try_parse(id).map_err(|_| not_found())?;
        let mut pending = self.pending();
        let found = pending.get(&key).filter(|found| found.session == session);
        let outcome = chosen(&found.ok_or_else(not_found)?.offered, answer)?;
        let taken = pending.remove(&key).ok_or_else(not_found)?;
        Ok((taken, outcome))
    }

    /// Takes what nobody will answer any more.
    pub(super) fn take_all(&self, is_over: impl Fn(&Pending) -> bool) -> Vec<Pending> {
        let mut pending = self.pending();
        pending
            .extract_if(.., |_, pending| is_over(pending))
            .map(|(_, over)| over)
            .collect()
    }

    /// Those of a session.
    pub(super) fn of(&self, session: SessionId) -> Vec<PermissionRequest> {
        let pending = self.pending();
        let own = pending.values().filter(|own| own.session == session);
        own.map(|own| own.request.clone()).collect()
    }

    /// The oldest that was asked after this one, of those whose event is one that listeners may have met.
    pub(super) fn next(
        &self,
        after: Uuid,
        is_committed: impl Fn(SessionId, Seq) -> bool,
    ) -> Option<(SessionId, PermissionRequest)> {
        let pending = self.pending();
        let mut later = pending.range((Bound::Excluded(after), Bound::Unbounded));
        let (_, found) =
            later.find(|(_, own)| own.seq.is_some_and(|seq| is_committed(own.session, seq)))?;
        Some((found.session, found.request.clone()))
    }

    /// How many wait in a session.
    pub(super) fn count(&self, session: SessionId) -> usize {
        let pending = self.pending();
        pending
            .values()
            .filter(|pending| pending.session == session)
            .count()
    }

    /// Whether a session has room for one more request that waits: for the first it always has.
    pub(super) fn has_room(&self, session: SessionId, asked: &Asked) -> bool {
        let pending = self.pending();
        let own = pending.values().filter(|own| own.session == session);
        let (mut count, mut bytes, mut values) = (0, 0, asked.values);
        for waiting in own {
            count += 1;
            bytes += waiting.request.params.get().len();
            values += waiting.values;
        }
        count == 0
            || (count < MAX_PENDING && bytes < MAX_PENDING_BYTES && values <= MAX_PENDING_VALUES)
    }

    /// The request, if it still waits.
    pub(super) fn get(&self, id: Uuid) -> Option<PermissionRequest> {
        self.pending()
            .get(&id)
            .map(|pending| pending.request.clone())
    }

    fn pending(&self) -> MutexGuard<'_, BTreeMap<Uuid, Pending>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An exact `optionId`, or a word for the kinds that agents usually offer.
fn chosen(offered: &[Offered], answer: &str) -> Result<Value> {
    let exact = offered.iter().find(|option| option.option_id == answer);
    let by_word = || match answer {
        "once" => of_kinds(offered, &ALLOW[..1]),
        "always" => of_kinds(offered, &ALLOW[1..]),
        "reject" => of_kinds(offered, &REJECT),
        _ => None,
    };
    exact.or_else(by_word).map(selected).ok_or_else(|| {
        let ids: Vec<_> = offered
            .iter()
            .map(|option| format!("{:?} ({:?})", option.option_id, option.name))
            .collect();
        Error::invalid_argument(
            "answer",
            format!(
                "{answer:?} is none of the request's options: {}",
                ids.join(", ")
            ),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(options: &Value) -> Asked {
        let params = json!({
            "sessionId": "s",
            "toolCall": { "toolCallId": "t1" },
            "options": options,
        });
        let raw = serde_json::value::to_raw_value(&params).expect("JSON");
        Asked::new(raw, |id| {
            (id == "t1").then(|| KnownTool {
                kind: Some("execute".to_owned()),
                title: Some("rm -rf /".to_owned()),
                name: None,
            })
        })
    }

    fn usual() -> Value {
        json!([
            { "optionId": "a", "name": "Always", "kind": "allow_always" },
            { "optionId": "o", "name": "Once", "kind": "allow_once" },
            { "optionId": "r", "name": "No", "kind": "reject_once" },
        ])
    }

    #[test]
    fn a_policy_chooses_the_narrowest_option_of_its_kind() {
        let asked = asked(&usual());
        let decided = |policy| asked.decide(policy).expect("decided")["optionId"].clone();
        assert_eq!(decided(PermissionPolicy::Allow), "o");
        assert_eq!(decided(PermissionPolicy::Reject), "r");
        assert_eq!(asked.decide(PermissionPolicy::Ask), None);
    }

    #[test]
    fn without_a_fitting_option_the_request_is_cancelled() {
        let decided = asked(&json!([])).decide(PermissionPolicy::Allow);
        assert_eq!(decided, Some(cancelled()));
    }

    #[test]
    fn an_answer_is_a_word_or_an_exact_id() {
        let offered = asked(&usual()).offered;
        let id = |answer| chosen(&offered, answer).expect(answer)["optionId"].clone();
        assert_eq!(id("once"), "o");
        assert_eq!(id("always"), "a");
        assert_eq!(id("reject"), "r");
        assert_eq!(id("a"), "a");
        let error = chosen(&offered, "maybe").expect_err("no option");
        assert!(error.message.contains("\"Always\""), "{error}");
    }

    #[test]
    fn a_word_is_not_answered_with_something_wider() {
        let offered =
            asked(&json!([{ "optionId": "a", "name": "Always", "kind": "allow_always" }]));
        assert!(chosen(&offered.offered, "once").is_err());
    }

    #[test]
    fn what_the_request_leaves_out_is_taken_from_the_tool_call_before_it() {
        let request = asked(&usual()).request;
        assert_eq!(request.tool_name, "execute");
        assert_eq!(request.description, "rm -rf /");
    }

    #[test]
    fn options_that_are_no_list_are_none() {
        for odd in [json!("allow"), json!({ "optionId": "a" }), Value::Null] {
            let asked = asked(&odd);
            assert_eq!(asked.request.options, json!([]));
            assert_eq!(asked.decide(PermissionPolicy::Allow), Some(cancelled()));
        }
    }
}
