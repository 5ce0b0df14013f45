//! What the store holds, as plain data. JSON is kept as the exact text it came as.

use std::borrow::Cow;
use std::sync::Arc;

use crate::ids::{Seq, SessionId};

/// The method of nearly all events of a session.
pub const SESSION_UPDATE: &str = "session/update";

/// What is known of a session's agent process from the file alone.
///
/// A store that says `Open` while no process has the VM open was cut off: the host process died.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Its agent runs, or ran when the host process died.
    Open,
    /// Closed by its owner.
    Closed,
    /// Its agent was stopped by a fault (it exited, the disk was full); a prompt resumes it.
    Suspended,
}

impl Status {
    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Closed => "closed",
            Self::Suspended => "suspended",
        }
    }

    pub(super) fn parse(text: &str) -> Option<Self> {
        [Self::Open, Self::Closed, Self::Suspended]
            .into_iter()
            .find(|status| status.as_str() == text)
    }
}

/// A session to be added. `capabilities`, `agent_info`, `settings` and `config` are JSON texts.
#[derive(Debug, Clone)]
pub struct NewSession {
    pub id: SessionId,
    pub agent_type: String,
    /// The agent's private ACP id of this session, once it has told.
    pub agent_session_id: Option<String>,
    pub title: Option<String>,
    /// Working directory inside the VM.
    pub cwd: String,
    pub status: Status,
    pub capabilities: Arc<str>,
    pub agent_info: Arc<str>,
    /// What resuming needs besides the agent's own state: model, mode, options, MCP servers, …
    pub settings: Arc<str>,
    /// The agent's last known configuration: what it offers, and what of it is chosen.
    pub config: Arc<str>,
}

/// A session as it is stored. Times are milliseconds since the epoch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionRecord {
    pub id: SessionId,
    pub agent_type: String,
    pub agent_session_id: Option<String>,
    pub title: Option<String>,
    pub cwd: String,
    pub status: Status,
    pub capabilities: Arc<str>,
    pub agent_info: Arc<str>,
    pub settings: Arc<str>,
    /// `{}` in a session of before this was kept.
    pub config: Arc<str>,
    /// Number of its last event; `Seq(0)` when there is none.
    pub last_seq: Seq,
    pub created_at: i64,
    /// Of its last event or change, whichever came later.
    pub updated_at: i64,
}

/// Changes to a session: `None` leaves a field as it is.
#[derive(Debug, Clone, Default)]
pub struct SessionChange {
    pub agent_session_id: Option<String>,
    pub title: Option<String>,
    pub cwd: Option<String>,
    pub status: Option<Status>,
    pub capabilities: Option<Arc<str>>,
    pub agent_info: Option<Arc<str>>,
    pub settings: Option<Arc<str>>,
    pub config: Option<Arc<str>>,
}

/// An event to be appended: the exact JSON text of a notification, and its method for filtering.
#[derive(Debug, Clone)]
pub struct Event {
    pub method: Cow<'static, str>,
    pub json: Arc<str>,
}

impl Event {
    /// The common case, without an allocation for the method.
    #[must_use]
    pub const fn session_update(json: Arc<str>) -> Self {
        Self {
            method: Cow::Borrowed(SESSION_UPDATE),
            json,
        }
    }
}

/// A committed event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredEvent {
    pub seq: Seq,
    /// Milliseconds since the epoch; never less than that of the event before.
    pub created_at: i64,
    pub method: Cow<'static, str>,
    pub json: Arc<str>,
}

impl StoredEvent {
    /// What the event occupies in memory, roughly.
    pub(super) fn cost(&self) -> usize {
        event_cost(&self.method, &self.json)
    }
}

impl Event {
    pub(super) fn cost(&self) -> usize {
        event_cost(&self.method, &self.json)
    }
}

const fn event_cost(method: &str, json: &str) -> usize {
    size_of::<StoredEvent>() + method.len() + json.len()
}

/// Which events of a session.
#[derive(Debug, Clone)]
pub struct Query {
    /// Exclusive: the first event is the one after it.
    pub since: Seq,
    /// Only events of this method.
    pub method: Option<String>,
    /// At most so many events.
    pub limit: Option<u64>,
    /// The page ends before it exceeds so many bytes of JSON, but has at least one event.
    pub max_bytes: u64,
}

/// A run of events, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    pub events: Vec<StoredEvent>,
    /// Whether this is all that the query asked for; if not, `max_bytes` ended the page and the
    /// next one starts after its last event (with a `limit` reduced by what was delivered).
    pub complete: bool,
}

/// Gathers a page until its query is satisfied or its bytes are used up.
pub(super) struct PageBuilder {
    events: Vec<StoredEvent>,
    events_left: u64,
    bytes_left: u64,
    complete: bool,
}

impl PageBuilder {
    pub(super) fn new(query: &Query) -> Self {
        Self {
            events: Vec::new(),
            events_left: query.limit.unwrap_or(u64::MAX),
            bytes_left: query.max_bytes,
            complete: true,
        }
    }

    /// Whether another event may belong to this page.
    pub(super) const fn wants_more(&self) -> bool {
        self.events_left > 0
    }

    /// Whether an event with so much JSON still belongs to this page; `false` ends it.
    pub(super) fn accepts(&mut self, json_len: usize) -> bool {
        if !self.wants_more() {
            return false;
        }
        if json_len as u64 > self.bytes_left && !self.events.is_empty() {
            self.complete = false;
            return false;
        }
        true
    }

    pub(super) fn push(&mut self, event: StoredEvent) {
        self.events_left -= 1;
        self.bytes_left = self.bytes_left.saturating_sub(event.json.len() as u64);
        self.events.push(event);
    }

    pub(super) fn finish(self) -> Page {
        Page {
            events: self.events,
            complete: self.complete,
        }
    }
}
