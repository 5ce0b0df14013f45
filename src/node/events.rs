//! Batches of events on their way to a JavaScript callback.

use std::fmt::Write as _;
use std::sync::Arc;

use napi::bindgen_prelude::{Function, Promise, spawn};
use napi_derive::napi;
use serde_json::{Value, json};
use tokio::sync::watch;

use super::images::image_progress_json;
use super::record::{permission_json, text};
use crate::agents::InstallProgress;
use crate::error::Error;
use crate::net::Denial;
use crate::session::{Item, Notice, SessionState, ShutdownReason, Subscription};

/// A callback that is called until this is closed.
#[napi]
pub struct NativeSubscription {
    closed: watch::Sender<bool>,
}

#[napi]
impl NativeSubscription {
    #[napi]
    pub fn close(&self) {
        self.closed.send_replace(true);
    }
}

/// Hands batches to `callback`, the next one when the promise of the last has resolved: what it has
/// not taken stays in the log, and costs no memory.
pub(super) fn deliver(
    subscription: Arc<Subscription>,
    callback: &Function<'_, String, Promise<()>>,
) -> napi::Result<NativeSubscription> {
    let callback = callback
        .build_threadsafe_function()
        .weak::<true>()
        .callee_handled::<false>()
        .build()?;
    let closed = watch::Sender::new(false);
    let mut closing = closed.subscribe();
    spawn(async move {
        let deliver = async {
            loop {
                let items = match subscription.next().await {
                    Ok(items) => items,
                    Err(error) => {
                        // The listener has to know that nothing more comes.
                        drop(callback.call_async(failure(&error)).await);
                        return;
                    }
                };
                // An error means that the JavaScript environment is going away.
                let Ok(taken) = callback.call_async(batch(&items)).await else {
                    return;
                };
                if taken.await.is_err() {
                    return;
                }
                subscription.taken(&items);
            }
        };
        tokio::select! {
            () = deliver => {}
            _ = closing.wait_for(|closed| *closed) => {}
        }
    });
    Ok(NativeSubscription { closed })
}

/// JSON of an array, put together from the stored texts without parsing them. Consecutive events of a
/// session are one item, `sessionEvents`, with the number of the first: reading this is most of what
/// JavaScript does for an event.
fn batch(items: &[Item]) -> String {
    let length = |item: &Item| match item {
        Item::Event { json, .. } => json.len() + 1,
        Item::PermissionRequest { .. } | Item::Notice(_) => 0,
    };
    let mut json = String::with_capacity(items.iter().map(length).sum::<usize>() + 256);
    json.push('[');
    for (index, run) in items.chunk_by(is_next).enumerate() {
        if index > 0 {
            json.push(',');
        }
        match run {
            [Item::Event { session, seq, .. }, ..] => {
                // Writing to a String can't fail.
                let _ = write!(
                    json,
                    r#"{{"type":"sessionEvents","value":{{"sessionId":"{session}","first":{},"events":["#,
                    seq.0
                );
                for (index, item) in run.iter().enumerate() {
                    if let Item::Event { json: event, .. } = item {
                        json.push_str(if index > 0 { "," } else { "" });
                        json.push_str(event);
                    }
                }
                json.push_str("]}}");
            }
            [Item::PermissionRequest { session, request }, ..] => {
                let value = permission_json(*session, request);
                json.push_str(r#"{"type":"permissionRequest","value":"#);
                json.push_str(&text(&value));
                json.push('}');
            }
            [Item::Notice(notice), ..] => json.push_str(&notice_json(notice)),
            [] => {}
        }
    }
    json.push(']');
    json
}

/// Whether `item` is the event that follows `previous` in its session.
fn is_next(previous: &Item, item: &Item) -> bool {
    let Item::Event { session, seq, .. } = item else {
        return false;
    };
    matches!(previous, Item::Event { session: own, seq: before, .. }
        if own == session && before.next() == *seq)
}

fn failure(error: &Error) -> String {
    let value = json!({ "code": error.code.as_str(), "message": error.message });
    json!([{ "type": "error", "value": value }]).to_string()
}

fn notice_json(notice: &Notice) -> String {
    let value = match notice {
        Notice::VmBooted {
            base_changed,
            layers_suspect,
        } => json!({
            "type": "vmBooted",
            "value": { "baseChanged": base_changed, "layersSuspect": layers_suspect },
        }),
        Notice::VmShutdown { reason } => json!({
            "type": "vmShutdown",
            "value": { "reason": match reason {
                ShutdownReason::Sleep => "sleep",
                ShutdownReason::Destroy => "destroy",
                ShutdownReason::Close => "close",
                ShutdownReason::Error => "error",
            } },
        }),
        Notice::InstallProgress(progress) => json!({
            "type": "installProgress",
            "value": progress_json(progress),
        }),
        Notice::ImageProgress(progress) => json!({
            "type": "imageProgress",
            "value": image_progress_json(progress),
        }),
        Notice::LimitReached { limit, detail } => json!({
            "type": "limitReached",
            "value": { "limit": limit.as_str(), "detail": detail },
        }),
        Notice::SecretMisdirected(misdirected) => json!({
            "type": "secretMisdirected",
            "value": {
                "secret": misdirected.secret,
                "host": misdirected.host,
                "port": misdirected.port,
                "place": misdirected.place.as_str(),
                "count": misdirected.count,
            },
        }),
        Notice::NetworkDenied(Denial { refused, count }) => json!({
            "type": "networkDenied",
            "value": {
                "host": refused.host,
                "port": refused.port,
                "protocol": refused.protocol.as_str(),
                "rule": refused.rule.as_ref().map_or_else(|| "*".to_owned(), ToString::to_string),
                "count": count,
            },
        }),
        Notice::SessionStatus { session, state } => {
            let (status, turn, pending) = match state {
                SessionState::Open {
                    turn,
                    pending_permissions,
                } => ("open", *turn, *pending_permissions),
                SessionState::Closed => ("closed", None, 0),
                SessionState::Suspended => ("suspended", None, 0),
                SessionState::Destroyed => ("destroyed", None, 0),
            };
            json!({
                "type": "sessionStatus",
                "value": {
                    "sessionId": session,
                    "status": status,
                    "turnId": turn,
                    "pendingPermissions": pending,
                },
            })
        }
    };
    value.to_string()
}

pub(super) fn progress_json(progress: &InstallProgress) -> Value {
    json!({
        "agentType": progress.agent,
        "step": progress.step.as_str(),
        "message": progress.message,
        "done": progress.done,
        "total": progress.total,
        "bytes": progress.bytes,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{Seq, SessionId};

    fn event(session: SessionId, seq: u64) -> Item {
        let json = format!(r#"{{"n":{seq}}}"#).into();
        let seq = Seq(seq);
        Item::Event { session, seq, json }
    }

    #[test]
    fn consecutive_events_of_a_session_are_one_item() {
        let (one, two) = (SessionId::generate(), SessionId::generate());
        let shutdown = Notice::VmShutdown {
            reason: ShutdownReason::Sleep,
        };
        let items = [
            event(one, 4),
            event(one, 5),
            event(two, 6),
            event(one, 6),
            Item::Notice(shutdown),
            event(one, 7),
            event(one, 9),
        ];
        let told: Value = serde_json::from_str(&batch(&items)).expect("JSON");
        let run = |session, first: u64, events: Value| {
            let value = json!({ "sessionId": session, "first": first, "events": events });
            json!({ "type": "sessionEvents", "value": value })
        };
        let expected = json!([
            run(one, 4, json!([{ "n": 4 }, { "n": 5 }])),
            run(two, 6, json!([{ "n": 6 }])),
            run(one, 6, json!([{ "n": 6 }])),
            { "type": "vmShutdown", "value": { "reason": "sleep" } },
            run(one, 7, json!([{ "n": 7 }])),
            run(one, 9, json!([{ "n": 9 }])),
        ]);
        assert_eq!(told, expected);
    }
}
