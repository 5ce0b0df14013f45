//! One prompt and everything that happens until its answer.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::value::RawValue;
use tokio::sync::watch;
use uuid::Uuid;

use crate::vm::{Foreground, Moment};

/// What a prompt resolves to.
#[derive(Debug, Clone)]
pub struct TurnResult {
    /// The agent's JSON-RPC result, as it came.
    pub response: Box<RawValue>,
    /// The agent's message text of this turn, without what the agent took back, and with a blank
    /// line between messages. Its first [`TurnResult::MAX_TEXT`] bytes at most: the log has all of it.
    pub text: String,
    pub stop_reason: String,
}

impl TurnResult {
    /// Bytes of text that are kept in memory for a turn.
    pub const MAX_TEXT: usize = 16 << 20;
}

/// What stands between two messages in the text of a turn.
const SEPARATOR: &str = "\n\n";

/// A turn that is under way.
pub(super) struct Turn {
    pub(super) id: Uuid,
    /// Milliseconds since the epoch.
    pub(super) started_at: u64,
    /// The same for the VM: which commands are the turn's.
    pub(super) began: Moment,
    /// What it had in the foreground when it was cancelled.
    foreground: Mutex<Option<Foreground>>,
    text: Mutex<Text>,
    cancelled: AtomicBool,
    stage: watch::Sender<Stage>,
}

/// What the agent has said in a turn. Only the message that it is at can still be taken back.
#[derive(Debug, Default)]
struct Text {
    settled: String,
    /// Id of the last message, and how long `settled` was before it.
    last: Option<(Box<str>, usize)>,
}

impl Text {
    fn add(&mut self, message: Option<&str>, text: &str) {
        if text.is_empty() {
            return;
        }
        let last = self.last.as_ref().map(|(id, _)| &**id);
        if message != last {
            self.last = message.map(|id| (id.into(), self.settled.len()));
            // Between a remark before a tool call and the answer after it.
            if !self.settled.is_empty() {
                self.push(SEPARATOR);
            }
        }
        self.push(text);
    }

    fn push(&mut self, text: &str) {
        let room = TurnResult::MAX_TEXT - self.settled.len();
        self.settled
            .push_str(&text[..text.floor_char_boundary(room)]);
    }

    fn discard(&mut self, message: &str) {
        if let Some((_, begin)) = self.last.take_if(|(id, _)| **id == *message) {
            self.settled.truncate(begin);
        }
    }
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
    pub(super) fn new(began: Moment) -> Self {
        Self {
            began,
            foreground: Mutex::default(),
            id: Uuid::now_v7(),
            started_at: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |since| {
                    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
                }),
            text: Mutex::default(),
            cancelled: AtomicBool::new(false),
            stage: watch::Sender::new(Stage::Preparing),
        }
    }

    pub(super) fn add_text(&self, message: Option<&str>, text: &str) {
        self.text().add(message, text);
    }

    pub(super) fn discard_text(&self, message: &str) {
        self.text().discard(message);
    }

    pub(super) fn take_text(&self) -> String {
        std::mem::take(&mut *self.text()).settled
    }

    fn text(&self) -> MutexGuard<'_, Text> {
        self.text.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn saw(&self, foreground: Foreground) {
        *self
            .foreground
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(foreground);
    }

    pub(super) fn take_foreground(&self) -> Option<Foreground> {
        self.foreground
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_message_that_is_taken_back_goes() {
        let mut text = Text::default();
        text.add(Some("a"), "one");
        text.add(Some("b"), "tw");
        text.add(Some("b"), "o");
        text.discard("a");
        text.discard("b");
        text.discard("b");
        assert_eq!(text.settled, "one");
        text.add(Some("c"), "three");
        assert_eq!(text.settled, "one\n\nthree");
    }

    #[test]
    fn a_blank_line_stands_between_messages_and_not_within_one() {
        let mut text = Text::default();
        for (message, chunk) in [("a", ""), ("b", "I'll "), ("b", "look."), ("c", "Done.")] {
            text.add(Some(message), chunk);
        }
        assert_eq!(text.settled, "I'll look.\n\nDone.");
    }

    #[test]
    fn chunks_of_an_agent_that_names_no_messages_are_joined() {
        let mut text = Text::default();
        text.add(None, "one ");
        text.add(None, "two");
        assert_eq!(text.settled, "one two");
    }

    #[test]
    fn text_has_a_bound_between_characters() {
        let mut text = Text::default();
        text.add(None, &"x".repeat(TurnResult::MAX_TEXT - 1));
        text.add(None, "ü");
        text.add(None, "");
        assert_eq!(text.settled.len(), TurnResult::MAX_TEXT - 1);
    }
}
