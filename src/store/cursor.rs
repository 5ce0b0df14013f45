//! Following one session: what was there, then what comes.

use tokio::sync::watch;

use super::record::{Query, StoredEvent};
use super::{Result, Store};
use crate::ids::{Seq, SessionId};

/// A place in a session's log. It sees committed events only, each once, in order; one that keeps up
/// reads from memory, one that has fallen behind reads the file, and neither delays a writer.
pub struct Cursor {
    store: Store,
    session: SessionId,
    at: Seq,
    commits: watch::Receiver<u64>,
}

impl Cursor {
    pub(super) fn new(store: Store, session: SessionId, since: Seq) -> Result<Self> {
        let commits = store.commits();
        store.shared().check_since(session, since)?;
        Ok(Self {
            store,
            session,
            at: since,
            commits,
        })
    }

    /// Number of the last event that was delivered.
    #[must_use]
    pub const fn at(&self) -> Seq {
        self.at
    }

    /// The next events: at least one, and about `max_bytes` of JSON at most. Waits for them.
    ///
    /// When the store fails or closes, everything that was committed is delivered first; then this
    /// returns the error. Dropping the future loses nothing.
    pub async fn next(&mut self, max_bytes: u64) -> Result<Vec<StoredEvent>> {
        loop {
            // Marked as seen before looking, so that a commit in between wakes us again.
            self.commits.mark_unchanged();
            // Asked before looking, since what was committed before the end is delivered first.
            let end = self.store.shared().finished();
            if self.store.committed(self.session)? > self.at {
                let query = Query {
                    since: self.at,
                    method: None,
                    limit: None,
                    max_bytes,
                };
                let page = self.store.events(self.session, query).await?;
                if let Some(last) = page.events.last() {
                    self.at = last.seq;
                    return Ok(page.events);
                }
            }
            if let Some(error) = end {
                return Err(error);
            }
            // The sender lives as long as `self.store`.
            let _ = self.commits.changed().await;
        }
    }
}
