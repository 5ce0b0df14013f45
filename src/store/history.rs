//! Reading a VM's database: from any process, whether the VM runs or not.

use std::path::PathBuf;

use tokio::sync::Semaphore;

use super::reader::Reader;
use super::record::{Page, Query, SessionRecord, StoredEvent};
use super::{Result, blocking, connection};
use crate::ids::SessionId;

/// Reads at the same time in this process, over all VMs; more wait.
static READS: Semaphore = Semaphore::const_new(8);

/// The read side of a VM's database.
///
/// Each call opens the file, reads in one short transaction, and closes it: an idle history costs
/// nothing, and no reader keeps a writer's WAL from being emptied for long.
#[derive(Debug, Clone)]
pub struct History {
    path: PathBuf,
}

impl History {
    /// `None` when there is no file yet: the VM never had a session.
    pub async fn open(path: PathBuf) -> Result<Option<Self>> {
        let history = Self::of(path);
        let path = history.path.clone();
        let exists = blocking(&history.path, move || {
            Ok(connection::exists(&path)? && Reader::open(&path).map(|_| true)?)
        })
        .await?;
        Ok(exists.then_some(history))
    }

    pub(super) fn of(path: PathBuf) -> Self {
        Self { path }
    }

    /// All sessions, newest first.
    pub async fn sessions(&self) -> Result<Vec<SessionRecord>> {
        self.read(Reader::sessions).await
    }

    pub async fn session(&self, id: SessionId) -> Result<Option<SessionRecord>> {
        self.read(move |reader| reader.session(id)).await
    }

    /// A session's events after `query.since`, in order.
    pub async fn events(&self, id: SessionId, query: Query) -> Result<Page> {
        self.read(move |reader| reader.events(id, &query)).await
    }

    /// A session's last event of this method, if there is one. Its cost does not depend on how many
    /// events the session has.
    pub async fn last_event(&self, id: SessionId, method: &str) -> Result<Option<StoredEvent>> {
        let method = method.to_owned();
        self.read(move |reader| reader.last_event(id, &method))
            .await
    }

    /// Runs `work` in one read transaction of a connection of its own.
    async fn read<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Reader) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let path = self.path.clone();
        // The semaphore is never closed.
        let turn = READS.acquire().await;
        let result = blocking(&self.path, move || {
            let reader = Reader::open(&path)?;
            work(&reader)
        })
        .await;
        drop(turn);
        result
    }
}
