//! The events that agentvm itself adds to a session's log.
//!
//! They make the transcript complete on its own: who asked what, where a turn begins, how it ended.
//! Each is a JSON-RPC notification like the agent's, marked with `_meta.agentvm`.

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::acp::has_outer_meta;
use crate::error::Error;
use crate::ids::SessionId;
use crate::store::Event;
pub(super) use crate::store::SESSION_UPDATE;

/// What runs a turn; its answer ends it.
pub(super) const PROMPT: &str = "session/prompt";

/// Of an adapter of ours: the agent repeats a failed model request.
pub(super) const RETRY: &str = "_agentvm/retry";

/// Methods of what agentvm adds.
const OWN: &str = "_agentvm/";

/// What in the `_meta` of an event says that it is ours.
pub(super) const MARK: &str = "agentvm";

/// Whether a message of an agent looks like one that only agentvm itself may add to the log.
///
/// Who reads the log, and every resume, relies on those: an agent could tell of a permission that
/// nobody gave, or of a turn that has not ended.
pub(super) fn is_reserved(method: &str, params: Option<&RawValue>) -> bool {
    (method.starts_with(OWN) && method != RETRY) || has_outer_meta(params, MARK)
}

pub(super) const TURN_START: &str = "_agentvm/turn_start";
pub(super) const TURN_END: &str = "_agentvm/turn_end";
pub(super) const PERMISSION_REQUEST: &str = "_agentvm/permission_request";
pub(super) const PERMISSION_OUTCOME: &str = "_agentvm/permission_outcome";
pub(super) const RESTORED: &str = "_agentvm/session_restored";

#[derive(Serialize)]
struct Notification<P> {
    jsonrpc: &'static str,
    method: &'static str,
    params: P,
}

fn event(method: &'static str, params: impl Serialize) -> Event {
    let notification = Notification {
        jsonrpc: "2.0",
        method,
        params,
    };
    Event {
        method: method.into(),
        // Maps with string keys: serialising them can't fail.
        json: serde_json::to_string(&notification)
            .unwrap_or_default()
            .into(),
    }
}

pub(super) fn turn_start(session: SessionId, turn: Uuid) -> Event {
    event(
        TURN_START,
        json!({ "sessionId": session, "turnId": turn, "_meta": { "agentvm": {} } }),
    )
}

/// The id of the turn that a [`turn_start`] began.
pub(super) fn turn_of(json: &str) -> Option<Uuid> {
    let event: Value = serde_json::from_str(json).ok()?;
    serde_json::from_value(event["params"]["turnId"].clone()).ok()
}

/// One content block of a prompt.
pub(super) fn user_message(session: SessionId, turn: Uuid, block: &Value) -> Event {
    event(
        SESSION_UPDATE,
        json!({
            "sessionId": session,
            "update": { "sessionUpdate": "user_message_chunk", "content": block },
            "_meta": { "agentvm": { "turnId": turn } },
        }),
    )
}

/// How a turn ended.
#[derive(Debug)]
pub(super) enum TurnEnd<'a> {
    /// The agent answered; `response` is its JSON-RPC result.
    Answered {
        stop_reason: &'a str,
        response: &'a RawValue,
    },
    /// The agent, or something on the way to it, failed.
    Failed(&'a Error),
    /// The process that ran it died, was closed, or the VM ended.
    Interrupted(&'a str),
}

pub(super) fn turn_end(session: SessionId, turn: Option<Uuid>, end: &TurnEnd<'_>) -> Event {
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Params<'a> {
        session_id: SessionId,
        #[serde(rename = "_meta")]
        meta: Value,
        #[serde(skip_serializing_if = "Option::is_none")]
        turn_id: Option<Uuid>,
        #[serde(skip_serializing_if = "Option::is_none")]
        stop_reason: Option<&'a str>,
        /// As it came.
        #[serde(skip_serializing_if = "Option::is_none")]
        response: Option<&'a RawValue>,
        #[serde(skip_serializing_if = "Option::is_none")]
        error: Option<Value>,
        #[serde(skip_serializing_if = "Option::is_none")]
        interrupted: Option<Value>,
    }
    let mut params = Params {
        session_id: session,
        meta: json!({ "agentvm": {} }),
        turn_id: turn,
        stop_reason: None,
        response: None,
        error: None,
        interrupted: None,
    };
    match end {
        TurnEnd::Answered {
            stop_reason,
            response,
        } => {
            params.stop_reason = Some(stop_reason);
            params.response = Some(response);
        }
        TurnEnd::Failed(error) => {
            let mut failure = json!({ "code": error.code.as_str(), "message": error.message });
            if let Some(data) = &error.data {
                failure["data"] = data.clone();
            }
            params.error = Some(failure);
        }
        TurnEnd::Interrupted(reason) => params.interrupted = Some(json!({ "reason": reason })),
    }
    event(TURN_END, params)
}

/// A permission request of the agent; `request` is its params, with our session id.
pub(super) fn permission_request(
    session: SessionId,
    turn: Option<Uuid>,
    permission: Uuid,
    request: &RawValue,
) -> Event {
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Params<'a> {
        session_id: SessionId,
        permission_id: Uuid,
        #[serde(skip_serializing_if = "Option::is_none")]
        turn_id: Option<Uuid>,
        /// As it came.
        request: &'a RawValue,
        #[serde(rename = "_meta")]
        meta: Value,
    }
    event(
        PERMISSION_REQUEST,
        Params {
            session_id: session,
            permission_id: permission,
            turn_id: turn,
            request,
            meta: json!({ "agentvm": {} }),
        },
    )
}

/// Who decided a permission request.
#[derive(Debug, Clone, Copy)]
pub(super) enum DecidedBy {
    Policy,
    Caller,
    /// Nobody: what it was about is over, for this reason.
    Nobody(&'static str),
}

/// What the agent was answered; `outcome` is ACP's.
pub(super) fn permission_outcome(
    session: SessionId,
    permission: Uuid,
    outcome: &Value,
    by: DecidedBy,
) -> Event {
    let mut params = json!({
        "sessionId": session,
        "permissionId": permission,
        "outcome": outcome,
        "decidedBy": match by {
            DecidedBy::Policy => "policy",
            DecidedBy::Caller => "caller",
            DecidedBy::Nobody(_) => "agentvm",
        },
        "_meta": { "agentvm": {} },
    });
    if let DecidedBy::Nobody(reason) = by {
        params["reason"] = json!(reason);
    }
    event(PERMISSION_OUTCOME, params)
}

/// The id in a [`permission_request`] or [`permission_outcome`].
pub(super) fn permission_of(json: &str) -> Option<Uuid> {
    // Not a `Value`: the agent's request is in it, with whatever numbers and depths.
    #[derive(Deserialize)]
    struct Event {
        params: Params,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Params {
        permission_id: Uuid,
    }
    let event: Event = serde_json::from_str(json).ok()?;
    Some(event.params.permission_id)
}

/// Whether a [`turn_end`] says that the agent answered.
pub(super) fn is_answered(json: &str) -> bool {
    // Not a `Value`: the agent's answer is in it.
    #[derive(Deserialize)]
    struct Event {
        params: Params,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Params {
        #[serde(default)]
        stop_reason: Option<String>,
    }
    serde_json::from_str::<Event>(json).is_ok_and(|event| event.params.stop_reason.is_some())
}

/// An update that the agent did not send, about a change that it made all the same.
pub(super) fn untold_update(session: SessionId, update: &Value) -> Event {
    event(
        SESSION_UPDATE,
        json!({
            "sessionId": session,
            "update": update,
            "_meta": { "agentvm": { "synthetic": true } },
        }),
    )
}

/// A resume that could not bring back everything.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Restored {
    /// The agent's own memory of the conversation is gone: it is given the transcript instead.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) from_transcript: Option<String>,
    /// Settings that the agent no longer takes, with its reasons.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) not_restored: Vec<NotRestored>,
}

#[derive(Debug, Serialize)]
pub(super) struct NotRestored {
    pub(super) setting: String,
    pub(super) error: String,
}

/// Whether a [`restored`] says that the agent has forgotten the conversation.
pub(super) fn is_from_transcript(json: &str) -> bool {
    let event = serde_json::from_str::<Value>(json);
    event.is_ok_and(|event| event["params"]["fromTranscript"].is_string())
}

pub(super) fn restored(session: SessionId, restored: &Restored) -> Event {
    let mut params = json!(restored);
    params["sessionId"] = json!(session);
    params["_meta"] = json!({ "agentvm": {} });
    event(RESTORED, params)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_start_of_a_turn_names_it() {
        let turn = Uuid::now_v7();
        let start = turn_start(SessionId::generate(), turn);
        assert_eq!(turn_of(&start.json), Some(turn));
    }

    #[test]
    fn an_answer_is_kept_as_it_came() {
        let deep = format!("{}{}", "[".repeat(300), "]".repeat(300));
        let answer = format!(r#"{{"stopReason":"end_turn","n":1e400,"deep":{deep}}}"#);
        let response = RawValue::from_string(answer.clone()).expect("JSON");
        let end = TurnEnd::Answered {
            stop_reason: "end_turn",
            response: &response,
        };
        let event = turn_end(SessionId::generate(), Some(Uuid::now_v7()), &end);
        assert!(event.json.contains(&answer));
        assert!(is_answered(&event.json));
    }

    #[test]
    fn an_agent_may_say_only_what_is_its_own() {
        assert!(is_reserved(TURN_END, None));
        assert!(is_reserved("_agentvm/new", None));
        assert!(!is_reserved(RETRY, None));
        assert!(!is_reserved("_own/thing", Some(RawValue::NULL)));
        let ours = turn_start(SessionId::generate(), Uuid::now_v7()).json;
        let ours: Value = serde_json::from_str(&ours).expect("JSON");
        let params = serde_json::value::to_raw_value(&ours["params"]).expect("JSON");
        assert!(is_reserved(SESSION_UPDATE, Some(&params)));
    }
}
