//! A session's events as they are and as they come, for one reader.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::watch;

use super::client::closed_error;
use super::machine::{DATABASE, Machine};
use crate::error::{Code, Result};
use crate::ids::{Seq, SessionId};
use crate::store::{Query, StoredEvent};

/// Limits of one batch.
const BATCH_EVENTS: u64 = 512;
const BATCH_BYTES: u64 = 1 << 18;

/// How often a VM that does not run in this process is looked at: another process may have it open.
const LOOK_AGAIN: Duration = Duration::from_millis(250);

/// History, then what comes: each event once, in order.
///
/// It reads the log and nothing else, so that it neither boots a VM nor keeps one awake, and goes on
/// over sleep, resume and the VM's stay in other processes.
pub struct EventStream {
    machine: Arc<Machine>,
    closed: watch::Receiver<bool>,
    session: SessionId,
    since: Seq,
    follow: bool,
    /// Whether the session was there when this began.
    began: bool,
}

impl EventStream {
    pub(super) const fn new(
        machine: Arc<Machine>,
        closed: watch::Receiver<bool>,
        session: SessionId,
        since: Seq,
        follow: bool,
    ) -> Self {
        Self {
            machine,
            closed,
            session,
            since,
            follow,
            began: false,
        }
    }

    /// The next events. `None`: there are no more, because the session was destroyed, or because
    /// nobody wants to follow it further than to its present end.
    ///
    /// Dropping the future loses nothing.
    pub async fn next(&mut self) -> Result<Option<Vec<StoredEvent>>> {
        loop {
            if *self.closed.borrow() {
                return Err(closed_error());
            }
            let emission = &self.machine.emission;
            // Before looking, so that what happens in between wakes this again.
            let mut changes = emission.changes();
            changes.mark_unchanged();
            let mut commits = emission.store().map(|store| store.commits());
            if let Some(commits) = &mut commits {
                commits.mark_unchanged();
            }
            let seen = commits.is_none().then(|| self.file_state());
            let query = Query {
                since: self.since,
                method: None,
                limit: Some(BATCH_EVENTS),
                max_bytes: BATCH_BYTES,
            };
            let page = match self.machine.events(self.session, query).await {
                Ok(page) => page,
                Err(error) if self.began && error.code == Code::SessionNotFound => return Ok(None),
                Err(error) => return Err(error),
            };
            self.began = true;
            if let Some(last) = page.events.last() {
                self.since = last.seq;
                return Ok(Some(page.events));
            }
            if !self.follow {
                return Ok(None);
            }
            // The senders live as long as what they tell of: an error means 'look again'.
            let mut closed = self.closed.clone();
            tokio::select! {
                _ = changes.changed() => {}
                _ = closed.wait_for(|closed| *closed) => {}
                () = async {
                    match (commits, seen) {
                        (Some(mut commits), _) => drop(commits.changed().await),
                        (None, seen) => self.file_changes(seen.unwrap_or_default()).await,
                    }
                } => {}
            }
        }
    }

    /// Resolves when the database is another one than it was.
    async fn file_changes(&self, seen: FileState) {
        while self.file_state() == seen {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    fn file_state(&self) -> FileState {
        let database = self.machine.dir.join(DATABASE);
        let mut wal = database.clone().into_os_string();
        wal.push("-wal");
        [database, PathBuf::from(wal)].map(|file| {
            let metadata = std::fs::metadata(file).ok()?;
            Some((metadata.len(), metadata.modified().ok()?))
        })
    }
}

/// Length and time of the database and its WAL.
type FileState = [Option<(u64, SystemTime)>; 2];
