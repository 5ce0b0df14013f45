//! A session with a running agent process.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use serde_json::{Value, json};
use tokio::time::timeout;

use super::awake::Awake;
use super::emission::{Emission, Notice, SessionState};
use super::event::{self, TurnEnd};
use super::process::AgentProcess;
use super::turn::{Stage, Turn, TurnResult};
use super::updates::{AGENT_EXITED, CANCELLED, SESSION_CLOSED, TURN_ENDED, Updates};
use crate::acp::RequestError;
use crate::error::{Code, Error, Result};
use crate::ids::SessionId;
use crate::store::{SessionChange, Status, Store};
use crate::vm::{Commands, Extent, Foreground};

/// The agent process of one session and the conversation with it.
pub(super) struct LiveSession {
    pub(super) id: SessionId,
    pub(super) agent: String,
    pub(super) agent_session: String,
    pub(super) process: Arc<AgentProcess>,
    pub(super) updates: Arc<Updates>,
    pub(super) store: Store,
    pub(super) emission: Arc<Emission>,
    pub(super) turn: Mutex<Option<Arc<Turn>>>,
    /// How long it has to obey a cancel before it is stopped.
    pub(super) cancel_grace: Duration,
    /// Its MCP servers, which outlive a turn.
    pub(super) servers: Commands,
    /// What it has to be told with its next prompt, because it does not remember.
    pub(super) context: Mutex<Option<String>>,
    /// Its owner ends it: how it ends is no fault.
    pub(super) closing: AtomicBool,
}

/// Answer to `session/prompt`, as far as we look into it.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct PromptResponse {
    stop_reason: String,
}

impl LiveSession {
    /// Looks after what an agent that ends on its own leaves open. To be called once.
    pub(super) fn watch(self: &Arc<Self>) {
        let mut end = self.process.end.clone();
        // Only its owner keeps a session, and its agent, alive.
        let session = Arc::downgrade(self);
        tokio::spawn(async move {
            // An error: the session was dropped, and its agent with it.
            if end.wait_for(Option::is_some).await.is_err() {
                return;
            }
            let Some(session) = session.upgrade() else {
                return;
            };
            session
                .updates
                .give_up_permissions(None, AGENT_EXITED)
                .await;
            // A turn that is under way says so itself when it has ended.
            if !session.closing.load(Ordering::Relaxed) && session.current().is_none() {
                session.set_status(Status::Suspended).await;
            }
        });
    }

    /// Asks the agent for something about this session; its answer, or its error, as it came.
    pub(super) async fn ask_for(
        &self,
        method: &str,
        params: &(impl Serialize + Sync),
    ) -> Result<Box<RawValue>> {
        let answer = self.process.connection.request(method, params).await;
        let answer = match answer {
            Ok(answer) => answer,
            Err(error) => return Err(self.request_error(method, error).await),
        };
        // What a caller sends may hold numbers and depths that a `Value` can't; then it is no setting.
        let params = serde_json::to_value(params).unwrap_or_default();
        self.updates.granted(method, &params, &answer);
        Ok(answer)
    }

    /// Starts a turn, which runs to its end although the caller may stop waiting: a cancel that comes
    /// after this finds it. It keeps the VM awake.
    pub(super) fn prompt(
        self: &Arc<Self>,
        blocks: Vec<Value>,
        awake: Awake,
    ) -> Result<impl Future<Output = Result<TurnResult>> + use<>> {
        let turn = self.begin_turn()?;
        let session = Arc::clone(self);
        let task = tokio::spawn(async move {
            let _awake = awake;
            session.run_turn(&turn, blocks).await
        });
        Ok(async move {
            task.await.unwrap_or_else(|error| {
                Err(Error::new(
                    Code::Internal,
                    format!("a turn's task ended: {error}"),
                ))
            })
        })
    }

    fn begin_turn(&self) -> Result<Arc<Turn>> {
        let mut current = self.current();
        if current.is_some() {
            return Err(Error::new(
                Code::SessionBusy,
                format!(
                    "session {} is in the middle of a turn: wait for its sendPrompt, or call cancelPrompt",
                    self.id
                ),
            ));
        }
        let turn = Arc::new(Turn::new(self.process.vm.now()));
        *current = Some(Arc::clone(&turn));
        Ok(turn)
    }

    async fn run_turn(&self, turn: &Arc<Turn>, blocks: Vec<Value>) -> Result<TurnResult> {
        self.updates.set_turn(Some(Arc::clone(turn)));
        self.updates.tell_state();
        let result = self.ask(turn, &blocks).await;
        self.updates.set_turn(None);
        let reason = if turn.is_cancelled() {
            CANCELLED
        } else if self.process.exit.borrow().is_some() {
            AGENT_EXITED
        } else {
            TURN_ENDED
        };
        self.updates
            .give_up_permissions(Some(turn.id), reason)
            .await;
        let end = match &result {
            Ok(answer) => TurnEnd::Answered {
                stop_reason: &answer.stop_reason,
                response: &answer.response,
            },
            Err(error) => TurnEnd::Failed(error),
        };
        let logged = self
            .updates
            .append(event::turn_end(self.id, Some(turn.id), &end))
            .await;
        let settled = match logged {
            Ok(seq) => self
                .store
                .flush(true)
                .await
                .map(|()| seq)
                .map_err(Error::from),
            Err(error) => Err(error),
        };
        if self.store.ended().is_some() {
            // Nothing that it says could be kept.
            self.end_foreground(turn, Extent::WithAgent).await;
            self.process.kill().await;
        } else if turn.is_cancelled() {
            // Before the next turn begins, whose commands it must not hit.
            self.end_foreground(turn, Extent::Foreground).await;
        }
        let has_ended = self.has_ended() && !self.closing.load(Ordering::Relaxed);
        if has_ended {
            self.set_status(Status::Suspended).await;
        }
        *self.current() = None;
        if !has_ended {
            self.updates.tell_state();
        }
        turn.reach(Stage::Ended);
        // Whoever prompts waits for slow listeners; a cancel, and the next turn, do not.
        if let Ok(seq) = settled {
            self.emission.delivered(self.id, seq).await;
        }
        // The turn's own failure says more than that of its bookkeeping.
        let result = result?;
        settled?;
        Ok(result)
    }

    async fn ask(&self, turn: &Turn, blocks: &[Value]) -> Result<TurnResult> {
        self.updates
            .append(event::turn_start(self.id, turn.id))
            .await?;
        for block in blocks {
            self.updates
                .append(event::user_message(self.id, turn.id, block))
                .await?;
        }
        // The agent is asked nothing that the log might not have.
        self.store.flush(false).await?;
        let context = self.context().clone();
        let remembered = context.map(|text| json!({ "type": "text", "text": text }));
        let prompt: Vec<_> = remembered.iter().chain(blocks).collect();
        let params = json!({ "sessionId": self.agent_session, "prompt": prompt });
        let answer = self
            .process
            .connection
            .start_request(event::PROMPT, &params)
            .await;
        turn.reach(Stage::Prompted);
        let response = match answer.wait().await {
            Ok(response) => response,
            // What was asked for has happened, however the agent puts it.
            Err(error) if turn.is_cancelled() => cancelled_response(&error),
            Err(error) => return Err(self.request_error(event::PROMPT, error).await),
        };
        // From now on the agent has it in its own memory.
        self.context().take();
        let parsed: PromptResponse = serde_json::from_str(response.get()).map_err(|error| {
            Error::new(
                Code::AgentProtocol,
                format!(
                    "{}: its answer to session/prompt has no valid stopReason ({error})",
                    self.agent
                ),
            )
        })?;
        if parsed.stop_reason == "cancelled" && !turn.is_cancelled() {
            return Err(Error::new(
                Code::AgentError,
                format!(
                    "{} ended the turn as cancelled, though nobody asked for that",
                    self.agent
                ),
            ));
        }
        Ok(TurnResult {
            response,
            text: turn.take_text(),
            stop_reason: parsed.stop_reason,
        })
    }

    /// Ends the turn that is under way. `false`: there is none.
    pub(super) async fn cancel(&self) -> bool {
        let Some(turn) = self.current().clone() else {
            return false;
        };
        turn.cancel();
        let connection = &self.process.connection;
        let params = json!({ "sessionId": self.agent_session });
        // Before the agent is told: of a command whose shell it kills nothing would say whose it was.
        if let Some(foreground) = self.foreground(&turn).await {
            turn.saw(foreground);
        }
        let obeyed = timeout(self.cancel_grace, async {
            // An agent that reads nothing can keep even the prompt from being sent.
            turn.reached(Stage::Prompted).await;
            connection.notify("session/cancel", &params).await;
            // ACP: whoever cancels answers what the agent still asks.
            self.updates
                .give_up_permissions(Some(turn.id), CANCELLED)
                .await;
            turn.reached(Stage::Ended).await;
        });
        if obeyed.await.is_err() {
            tracing::warn!(session = %self.id, "the agent ignored session/cancel: it is stopped");
            self.end_foreground(&turn, Extent::WithAgent).await;
            self.process.kill().await;
            turn.reached(Stage::Ended).await;
        }
        true
    }

    /// What the turn has in the foreground now. `None`: its VM is gone, and everything with it.
    async fn foreground(&self, turn: &Turn) -> Option<Foreground> {
        let AgentProcess { vm, pid, .. } = &*self.process;
        let seen = vm.foreground(*pid, turn.began, self.servers.clone());
        match seen.await {
            Ok(foreground) => Some(foreground),
            Err(error) => {
                tracing::debug!(%error, session = %self.id, "the VM is gone too");
                None
            }
        }
    }

    /// Ends the commands of a turn; those that the agent has put into the background live on.
    async fn end_foreground(&self, turn: &Turn, extent: Extent) {
        let foreground = match turn.take_foreground() {
            Some(seen) => Some(seen),
            // Nobody has looked yet, or whoever cancels looks just now.
            None => self.foreground(turn).await,
        };
        let Some(foreground) = foreground else {
            return;
        };
        match self.process.vm.end_foreground(&foreground, extent).await {
            Ok(0) => {}
            Ok(ended) => tracing::debug!(session = %self.id, ended, "commands of a cancelled turn"),
            Err(error) => tracing::debug!(%error, session = %self.id, "the VM is gone too"),
        }
    }

    /// Ends the agent process: the turn first, then by closing its stdin, then by force. The record
    /// then says `status`.
    pub(super) async fn close(&self, status: Status) {
        self.closing.store(true, Ordering::Relaxed);
        self.cancel().await;
        self.updates.give_up_permissions(None, SESSION_CLOSED).await;
        self.process.close().await;
        self.set_status(status).await;
        self.store.rest(self.id);
    }

    /// Nothing can be asked of it any more, though the last that it wrote may still be on its way; or
    /// nothing that it says could be kept.
    pub(super) fn is_ending(&self) -> bool {
        self.has_ended()
            || self.store.ended().is_some()
            || self.process.exit.borrow().is_some()
            || self.process.connection.closed().borrow().is_some()
    }

    async fn set_status(&self, status: Status) {
        let change = SessionChange {
            status: Some(status),
            ..SessionChange::default()
        };
        if let Err(error) = self.store.update_session(self.id, change).await {
            tracing::warn!(%error, session = %self.id, ?status, "the session's status is not stored");
        }
        self.emission.notify(&Notice::SessionStatus {
            session: self.id,
            state: match status {
                Status::Closed => SessionState::Closed,
                Status::Open | Status::Suspended => SessionState::Suspended,
            },
        });
    }

    pub(super) fn has_ended(&self) -> bool {
        self.process.end.borrow().is_some()
    }

    pub(super) async fn request_error(&self, method: &str, error: RequestError) -> Error {
        self.process
            .explain(&self.agent, method, error, &self.updates)
            .await
    }

    /// The turn that is under way.
    pub(super) fn turn(&self) -> Option<Arc<Turn>> {
        self.current().clone()
    }

    fn context(&self) -> MutexGuard<'_, Option<String>> {
        self.context.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn current(&self) -> MutexGuard<'_, Option<Arc<Turn>>> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A turn that was cancelled before the agent could be told of it.
pub(super) fn cancelled_turn() -> TurnResult {
    let reason = "the turn was cancelled while its session resumed";
    TurnResult {
        response: cancelled_response(&reason),
        text: String::new(),
        stop_reason: "cancelled".to_owned(),
    }
}

/// The answer of a turn that was cancelled, when the agent itself gives none.
fn cancelled_response(error: &impl ToString) -> Box<RawValue> {
    let response = json!({
        "stopReason": "cancelled",
        "_meta": { "agentvm": { "error": error.to_string() } },
    });
    // Maps with string keys: always representable.
    serde_json::value::to_raw_value(&response).unwrap_or_default()
}
