//! What one client's handle of a VM does with the sessions in it, beside their turns.

use std::sync::Arc;

use serde_json::Value;
use serde_json::value::RawValue;
use uuid::Uuid;

use super::client::VmHandle;
use super::control::{Change, SessionView};
use super::permission::PermissionRequest;
use super::stream::EventStream;
use crate::error::Result;
use crate::ids::{Seq, SessionId};

impl VmHandle {
    /// Deletes a session with its events, its environment and its agent's state of it. Does nothing to
    /// one that does not exist.
    pub async fn destroy_session(&self, session: SessionId) -> Result<()> {
        let (settings, awake) = self.awake().await?;
        let destroyed = self.machine.destroy_session(settings, session).await;
        destroyed.map_err(|error| self.explain(&awake, error))
    }

    /// All sessions as they are now, newest first. Boots nothing.
    pub async fn session_views(&self) -> Result<Vec<SessionView>> {
        self.open()?;
        self.machine.views().await
    }

    /// A session as it is now. Boots nothing.
    pub async fn session_view(&self, session: SessionId) -> Result<SessionView> {
        self.open()?;
        self.machine.view(session).await
    }

    /// Changes a setting, and returns the agent's answer. A session without a running agent is resumed
    /// first.
    pub async fn change(&self, session: SessionId, change: Change<'_>) -> Result<Box<RawValue>> {
        let (settings, awake) = self.awake().await?;
        let changed = self.machine.change(settings, session, change).await;
        changed.map_err(|error| self.explain(&awake, error))
    }

    /// Sends a request of any method, and returns the agent's answer. `sessionId` of `params` is set to
    /// the agent's own id where it is missing, or ours.
    pub async fn raw_send(
        &self,
        session: SessionId,
        method: &str,
        params: Option<&RawValue>,
    ) -> Result<Box<RawValue>> {
        let (settings, awake) = self.awake().await?;
        let sent = self.machine.raw_send(settings, session, method, params);
        sent.await.map_err(|error| self.explain(&awake, error))
    }

    /// ACP's modes of a session, as the agent last told them; `None` if it has none. Boots nothing.
    pub async fn modes(&self, session: SessionId) -> Result<Option<Value>> {
        self.open()?;
        Ok(self.machine.configuration(session).await?.offered_modes())
    }

    /// ACP's configuration options of a session, as the agent last told them. Boots nothing.
    pub async fn config_options(&self, session: SessionId) -> Result<Vec<Value>> {
        self.open()?;
        let configuration = self.machine.configuration(session).await?;
        Ok(configuration.config_options().to_vec())
    }

    /// Answers a request for permission with one of its options: `once`, `always`, `reject`, or the id
    /// of one. Resolves to the outcome that the agent got. Whoever calls first decides.
    pub fn respond_permission(
        &self,
        session: SessionId,
        permission: &str,
        answer: &str,
    ) -> impl Future<Output = Result<Value>> + use<> {
        let answered = self.open().map(|_| {
            let machine = Arc::clone(&self.machine);
            machine.respond_permission(session, permission, answer)
        });
        async move { answered?.await }
    }

    /// The oldest request for permission that waits and was asked after this one (nil: of all).
    pub fn next_pending_permission(
        &self,
        after: Uuid,
    ) -> Result<Option<(SessionId, PermissionRequest)>> {
        self.open()?;
        Ok(self.machine.next_pending_permission(after))
    }

    /// A session's events after `since`, and with `follow` those that come. Boots nothing.
    pub fn event_stream(
        &self,
        session: SessionId,
        since: Seq,
        follow: bool,
    ) -> Result<EventStream> {
        self.open()?;
        let machine = Arc::clone(&self.machine);
        let closed = self.client.closed();
        Ok(EventStream::new(machine, closed, session, since, follow))
    }
}
