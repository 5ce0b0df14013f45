//! Batches of events on their way to a JavaScript callback.

use std::fmt::Write as _;
use std::sync::Arc;

use napi::bindgen_prelude::{Function, Promise, spawn};
use napi_derive::napi;
use serde_json::{Value, json};
use tokio::sync::watch;

use super::record::{permission_json, text};
use crate::agents::InstallProgress;
use crate::error::Error;
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

/// JSON of an array, put together from the stored texts without parsing them.
fn batch(items: &[Item]) -> String {
    let mut json = String::from("[");
    for (index, item) in items.iter().enumerate() {
        if index > 0 {
            json.push(',');
        }
        match item {
            Item::Event {
                session,
                seq,
                json: event,
            } => {
                // Writing to a String can't fail.
                let _ = write!(
                    json,
                    r#"{{"type":"sessionEvent","value":{{"sessionId":"{session}","sequenceNumber":{},"event":{event}}}}}"#,
                    seq.0
                );
            }
            Item::PermissionRequest { session, request } => {
                let value = permission_json(*session, request);
                json.push_str(r#"{"type":"permissionRequest","value":"#);
                json.push_str(&text(&value));
                json.push('}');
            }
            Item::Notice(notice) => json.push_str(&notice_json(notice)),
        }
    }
    json.push(']');
    json
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
