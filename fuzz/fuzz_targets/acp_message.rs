//! A line of an agent gets the session's public id, and not a byte else of it changes: what was JSON
//! stays the same JSON.

#![no_main]

use agentvm::acp::{Message, outer_session_id, with_session_id};
use libfuzzer_sys::fuzz_target;
use serde_json::Value;

const PUBLIC: &str = "01890000-0000-7000-8000-000000000000";

fuzz_target!(|line: &str| {
    let params = match Message::parse(line) {
        Some(Message::Notification { params, .. } | Message::Request { params, .. }) => params,
        Some(Message::Response { .. }) | None => return,
    };
    let private = outer_session_id(params);
    let public = with_session_id(line, params, PUBLIC);

    let Some(Message::Notification { params, .. } | Message::Request { params, .. }) =
        Message::parse(&public)
    else {
        panic!("another kind of message: {public}");
    };
    if private.is_some() {
        assert_eq!(
            outer_session_id(params).as_deref(),
            Some(PUBLIC),
            "{public}"
        );
    }
    // Replaced a second time, it stays as it is.
    assert_eq!(with_session_id(&public, params, PUBLIC), public);

    // A key that comes twice, or a number that Value can't hold, is not for Value to compare.
    let (Ok(mut before), Ok(after)) = (
        serde_json::from_str::<Value>(line),
        serde_json::from_str::<Value>(&public),
    ) else {
        return;
    };
    if let Some(id) = before.pointer_mut("/params/sessionId") {
        *id = Value::from(PUBLIC);
    }
    assert_eq!(before, after);
});
