//! One prompt and everything that happens until its answer.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use serde_json::value::RawValue;
use tokio::sync::watch;
use uuid::Uuid;

/// What a prompt resolves to.
#[derive(Debug, Clone)]
pub struct TurnResult {
    /// The agent's JSON-RPC result, as it came.
    pub response: Box<RawValue>,
    /// The agent's message text of this turn.
    pub text: String,
    pub stop_reason: String,
}

/// A turn that is under way.
pub(super) struct Turn {
    pub(super) id: Uuid,
    text: Mutex<String>,
    cancelled: AtomicBool,
    stage: watch::Sender<Stage>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Stage {
    /// The prompt is not with the agent yet.
    Preparing,
    /// A `session/cancel` that is sent now reaches the agent after its prompt.
    Prompted,
    Ended,
}

impl Turn {
    pub(super) fn new() -> Self {
        Self {
            id: Uuid::now_v7(),
            text: Mutex::default(),
            cancelled: AtomicBool::new(false),
            stage: watch::Sender::new(Stage::Preparing),
        }
    }

    pub(super) fn add_text(&self, text: &str) {
        let mut kept = self.text.lock().unwrap_or_else(PoisonError::into_inner);
        kept.push_str(text);
    }

    pub(super) fn take_text(&self) -> String {
        std::mem::take(&mut self.text.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Somebody wants it to end.
    pub(super) fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    pub(super) fn reach(&self, stage: Stage) {
        self.stage.send_replace(stage);
    }

    /// Waits until the turn is in `stage` or past it.
    pub(super) async fn reached(&self, stage: Stage) {
        // The sender is `self`: it can't be gone.
        let _ = self
            .stage
            .subscribe()
            .wait_for(|reached| *reached >= stage)
            .await;
    }
}
