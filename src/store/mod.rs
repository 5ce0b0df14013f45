//! One `SQLite` file per VM: its sessions and their events. The only place with SQL.
//!
//! - [`Store`] writes: it belongs to the process that holds the VM's lock. It numbers events,
//!   commits them in groups, and keeps the recent ones in memory.
//! - [`History`] reads: also from other processes, and while no VM runs.
//! - [`Cursor`] follows one session: what was there, then what comes, each event once.
//!
//! # How an event gets in
//!
//! [`Store::append`] numbers the event and queues it; it waits only while the queue is full, and
//! that wait is the back-pressure on the agent's pipe. A thread of the process-wide [`pool`] takes
//! what has gathered, from all sessions of the VM, and commits it as one transaction. Only then is
//! the event visible: in memory, to cursors, to everyone.
//!
//! When a commit fails (a full disk, an I/O error) the store has *failed*: what was queued is
//! dropped as if it had never been numbered, every later write returns the same error, and what was
//! committed stays readable. Opening the file again is the way back.

mod connection;
#[cfg(test)]
mod cost;
mod cursor;
mod error;
mod history;
mod log;
mod pool;
mod reader;
mod record;
mod schema;
mod shared;
mod writer;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::sync::{oneshot, watch};

pub use self::cursor::Cursor;
pub use self::error::StoreError;
pub use self::history::History;
pub use self::record::{
    Event, NewSession, Page, Query, SESSION_UPDATE, SessionChange, SessionRecord, Status,
    StoredEvent,
};
use self::shared::{Item, Shared};
use self::writer::Writer;
use crate::ids::{Seq, SessionId};

pub type Result<T, E = StoreError> = std::result::Result<T, E>;

/// What a power cut may take back. The death of the process never takes back anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Durability {
    /// What was committed since the last [`Store::flush`] with `sync`.
    #[default]
    Normal,
    /// Nothing: every batch is synced to the disk before it becomes visible.
    Full,
}

/// A VM's database, open for writing. Clones are handles to the same store; when the last one is
/// dropped, what is queued is still committed and the file is closed in the background.
#[derive(Clone)]
pub struct Store {
    handle: Arc<Handle>,
}

struct Handle {
    shared: Arc<Shared>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.shared.close(None);
    }
}

impl Store {
    /// Opens `path`, making it (mode 0600) when it is missing and migrating it when it is old.
    ///
    /// The caller holds the VM's lock: a second writer is not expected, only readers are. A file
    /// that is no intact database is [`StoreError::Corrupt`], and is left as it is.
    pub async fn open(path: PathBuf, durability: Durability) -> Result<Self> {
        blocking(&path.clone(), move || {
            let (writer, logs) = Writer::open(&path, durability)?;
            let shared = Shared::start(path, writer, logs)?;
            Ok(Self {
                handle: Arc::new(Handle { shared }),
            })
        })
        .await
    }

    /// The database file.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.shared().path()
    }

    /// Adds a session; its events start at 1.
    pub async fn insert_session(&self, session: NewSession) -> Result<SessionRecord> {
        self.request(|reply| Item::Insert {
            session: Box::new(session),
            reply,
        })
        .await
    }

    /// Changes what `change` names; the rest stays.
    pub async fn update_session(&self, id: SessionId, change: SessionChange) -> Result<()> {
        let number = self.shared().number(id)?;
        self.request(|reply| Item::Update {
            number,
            change: Box::new(change),
            reply,
        })
        .await
    }

    /// Removes a session and its events, and gives their space back to the file system.
    ///
    /// The session is gone at once; its events go in small steps between the commits of others. A
    /// deletion that is cut short is finished when the file is next opened.
    pub async fn delete_session(&self, id: SessionId) -> Result<()> {
        let (reply, answer) = oneshot::channel();
        self.shared().delete(id, reply)?;
        self.answer(answer).await
    }

    /// Numbers the event and queues it for the next commit.
    ///
    /// Waits only while the queue is full (4 MiB). Dropping the future before it resolves appends
    /// nothing. The event is visible when [`Self::committed`] reaches its number.
    pub async fn append(&self, session: SessionId, event: Event) -> Result<Seq> {
        self.shared().append(session, event).await
    }

    /// Resolves when everything appended before is committed and, with `sync`, also survives a power
    /// cut. Without `sync`, and with nothing queued, it costs nothing.
    pub async fn flush(&self, sync: bool) -> Result<()> {
        if !sync && self.shared().is_settled()? {
            return Ok(());
        }
        self.request(|reply| Item::Flush { sync, reply }).await
    }

    /// Number of the session's last committed event; `Seq(0)` when there is none.
    pub fn committed(&self, session: SessionId) -> Result<Seq> {
        self.shared().committed(session)
    }

    /// Changes whenever something was committed in any session, and when the store fails or closes.
    /// Slow receivers see only the latest value: it says 'look again', not what to look at.
    #[must_use]
    pub fn commits(&self) -> watch::Receiver<u64> {
        self.shared().commits()
    }

    /// Committed events of a session: from memory when they are recent, else from the file.
    pub async fn events(&self, session: SessionId, query: Query) -> Result<Page> {
        if let Some(page) = self.shared().recent(session, &query)? {
            return Ok(page);
        }
        self.history().events(session, query).await
    }

    /// Follows a session from the event after `since`.
    pub fn cursor(&self, session: SessionId, since: Seq) -> Result<Cursor> {
        Cursor::new(self.clone(), session, since)
    }

    /// Why it takes nothing more: a commit failed, or it is closed. `None` while it works.
    #[must_use]
    pub fn ended(&self) -> Option<StoreError> {
        self.shared().finished()
    }

    /// The session rests: its recent events and the page cache leave memory. Nothing else changes.
    pub fn rest(&self, session: SessionId) {
        self.shared().rest(session);
    }

    /// Reads of the file, which go on working when this store has failed or is closed.
    #[must_use]
    pub fn history(&self) -> History {
        History::of(self.path().to_owned())
    }

    /// Commits what is queued, checkpoints and closes the file; resolves when that is done. Later
    /// writes are [`StoreError::Closed`]. Returns the error of a store that had failed.
    pub async fn close(&self) -> Result<()> {
        let (reply, answer) = oneshot::channel();
        self.shared().close(Some(reply));
        self.answer(answer).await
    }

    fn shared(&self) -> &Arc<Shared> {
        &self.handle.shared
    }

    async fn request<T>(&self, item: impl FnOnce(oneshot::Sender<Result<T>>) -> Item) -> Result<T> {
        let (reply, answer) = oneshot::channel();
        self.shared().push(item(reply))?;
        self.answer(answer).await
    }

    /// Every queued request is answered, also by a store that fails or closes.
    async fn answer<T>(&self, answer: oneshot::Receiver<Result<T>>) -> Result<T> {
        answer.await.unwrap_or_else(|_| {
            Err(StoreError::Panicked {
                path: self.path().to_owned(),
                message: "a request was dropped without an answer".to_owned(),
            })
        })
    }
}

/// Runs `work` off the async threads.
async fn blocking<T: Send + 'static>(
    path: &Path,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(panic) => Err(StoreError::Panicked {
            path: path.to_owned(),
            message: panic.to_string(),
        }),
    }
}
