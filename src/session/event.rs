//! The events that agentvm itself adds to a session's log.
//!
//! They make the transcript complete on its own: who asked what, where a turn begins, how it ended.
//! Each is a JSON-RPC notification like the agent's, marked with `_meta.agentvm`.

use serde::Serialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::error::Error;
use crate::ids::SessionId;
use crate::store::Event;
pub(super) use crate::store::SESSION_UPDATE;

/// What runs a turn; its answer ends it.
pub(super) const PROMPT: &str = "session/prompt";

/// Of an adapter of ours: the agent repeats a failed model request.
pub(super) const RETRY: &str = "_agentvm/retry";

pub(super) const TURN_START: &str = "_agentvm/turn_start";
pub(super) const TURN_END: &str = "_agentvm/turn_end";
pub(super) const PERMISSION: &str = "_agentvm/permission";

#[derive(Serialize)]
struct Notification<'a> {
    jsonrpc: &'static str,
    method: &'a str,
    params: Value,
}

fn event(method: &'static str, params: Value) -> Event {
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
    let mut params = json!({ "sessionId": session, "_meta": { "agentvm": {} } });
    if let Some(turn) = turn {
        params["turnId"] = json!(turn);
    }
    match end {
        TurnEnd::Answered {
            stop_reason,
            response,
        } => {
            params["stopReason"] = json!(stop_reason);
            params["response"] = serde_json::from_str(response.get()).unwrap_or_default();
        }
        TurnEnd::Failed(error) => {
            params["error"] = json!({ "code": error.code.as_str(), "message": error.message });
            if let Some(data) = &error.data {
                params["error"]["data"] = data.clone();
            }
        }
        TurnEnd::Interrupted(reason) => params["interrupted"] = json!({ "reason": reason }),
    }
    event(TURN_END, params)
}

/// A permission request of the agent and what became of it.
pub(super) fn permission(session: SessionId, request: &Value, outcome: &Value) -> Event {
    event(
        PERMISSION,
        json!({
            "sessionId": session,
            "request": request,
            "outcome": outcome,
            "_meta": { "agentvm": { "decidedBy": "policy" } },
        }),
    )
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
}
