//! Sessions and events as JavaScript sees them: JSON, put together from stored texts.

use std::fmt::Write as _;

use serde::Serialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};

use crate::ids::{Seq, SessionId};
use crate::session::{
    CreatedSession, PermissionPolicy, PermissionRequest, SessionView, TurnResult,
};
use crate::store::{SessionRecord, Status, StoredEvent};

pub(super) fn text(value: &impl Serialize) -> String {
    // Maps with string keys: serialising them can't fail.
    serde_json::to_string(value).unwrap_or_default()
}

/// What is known of a session from its VM's file alone.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct PersistedSession<'a> {
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

/// A session as it is now.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct LiveSession<'a> {
    #[serde(flatten)]
    persisted: PersistedSession<'a>,
    permission_policy: PermissionPolicy,
    turn: Option<Value>,
    pending_permissions: &'a [PermissionRequest],
}

impl<'a> From<&'a SessionView> for LiveSession<'a> {
    fn from(view: &'a SessionView) -> Self {
        Self {
            persisted: PersistedSession::from(&view.record),
            permission_policy: view.permission_policy,
            turn: view
                .turn
                .map(|(id, started_at)| json!({ "turnId": id, "startedAt": started_at })),
            pending_permissions: &view.pending_permissions,
        }
    }
}

// Not `json!`: what agents say may hold numbers and depths that a `Value` can't.

/// What `createSession` resolves to.
pub(super) fn created_session(created: &CreatedSession) -> String {
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Created<'a> {
        session_id: SessionId,
        agent_type: &'a str,
        capabilities: Option<&'a RawValue>,
        agent_info: Option<&'a RawValue>,
    }
    text(&Created {
        session_id: created.id,
        agent_type: &created.agent,
        capabilities: created.capabilities.as_deref(),
        agent_info: created.agent_info.as_deref(),
    })
}

/// What `sendPrompt` resolves to.
pub(super) fn turn_result(result: &TurnResult) -> String {
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Turn<'a> {
        response: &'a RawValue,
        text: &'a str,
        stop_reason: &'a str,
    }
    text(&Turn {
        response: &result.response,
        text: &result.text,
        stop_reason: &result.stop_reason,
    })
}

/// The payload of `permissionRequest`.
pub(super) fn permission_json(session: SessionId, request: &PermissionRequest) -> impl Serialize {
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Payload<'a> {
        session_id: SessionId,
        request: &'a PermissionRequest,
    }
    Payload {
        session_id: session,
        request,
    }
}

/// `{ sessionId, seq, createdAt, event }` each.
pub(super) fn persisted_events(session: SessionId, events: &[StoredEvent]) -> String {
    array(events, |json, event| {
        // Writing to a String can't fail.
        let _ = write!(
            json,
            r#"{{"sessionId":"{session}","seq":{},"createdAt":{},"event":{}}}"#,
            event.seq.0, event.created_at, event.json
        );
    })
}

/// `{ sequenceNumber, notification }` each.
pub(super) fn sequenced_events(events: &[StoredEvent]) -> String {
    array(events, |json, event| {
        let _ = write!(
            json,
            r#"{{"sequenceNumber":{},"notification":{}}}"#,
            event.seq.0, event.json
        );
    })
}

/// The notifications alone.
pub(super) fn notifications(events: &[StoredEvent]) -> String {
    array(events, |json, event| json.push_str(&event.json))
}

/// What JavaScript reads at once of what may be much.
const PART: usize = 1 << 18;

/// Parts of the events, of some length or one event each.
pub(super) fn in_parts(
    events: &[StoredEvent],
    text: impl Fn(&[StoredEvent]) -> String,
) -> Vec<String> {
    let mut length = 0;
    let parts = events.chunk_by(|before, next| {
        length += before.json.len();
        let together = length + next.json.len() <= PART;
        if !together {
            length = 0;
        }
        together
    });
    parts.map(text).collect()
}

/// Arrays of these JSON values, of some length or one value each.
pub(super) fn arrays(values: impl Iterator<Item = String>) -> Vec<String> {
    let mut arrays: Vec<String> = Vec::new();
    for value in values {
        match arrays.last_mut() {
            Some(array) if array.len() + value.len() <= PART => {
                array.push(',');
                array.push_str(&value);
            }
            _ => arrays.push(format!("[{value}")),
        }
    }
    for array in &mut arrays {
        array.push(']');
    }
    arrays
}

/// Without parsing the stored texts.
fn array(events: &[StoredEvent], add: impl Fn(&mut String, &StoredEvent)) -> String {
    let texts: usize = events.iter().map(|event| event.json.len() + 128).sum();
    let mut json = String::with_capacity(texts + 2);
    json.push('[');
    for (index, event) in events.iter().enumerate() {
        if index > 0 {
            json.push(',');
        }
        add(&mut json, event);
    }
    json.push(']');
    json
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_arrays_that_are_read_in_turns() {
        let long = format!("{:?}", "x".repeat(PART / 2));
        let values = ["1", "2", &long, &long, "3"].map(str::to_owned);
        let arrays = arrays(values.into_iter());
        let expected = [format!("[1,2,{long}]"), format!("[{long},3]")];
        assert_eq!(arrays, expected);
    }

    #[test]
    fn a_turn_gives_the_answer_as_it_came() {
        let deep = format!("{}{}", "[".repeat(300), "]".repeat(300));
        let answer = format!(r#"{{"stopReason":"end_turn","n":1e400,"deep":{deep}}}"#);
        let result = TurnResult {
            response: RawValue::from_string(answer.clone()).expect("JSON"),
            text: "said".to_owned(),
            stop_reason: "end_turn".to_owned(),
        };
        let json = turn_result(&result);
        let text = r#","text":"said","stopReason":"end_turn"}"#;
        assert_eq!(json, format!(r#"{{"response":{answer}{text}"#));
    }
}
