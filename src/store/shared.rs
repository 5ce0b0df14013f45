//! What the handles of a store and the writer threads share: the queue and the logs in memory.

use std::any::Any;
use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use tokio::sync::{Semaphore, oneshot, watch};

use super::error::StoreError;
use super::log::Log;
use super::record::{Event, NewSession, Page, Query, SessionChange, SessionRecord, StoredEvent};
use super::writer::{Inserted, Writer};
use super::{Result, pool};
use crate::ids::{Seq, SessionId};

/// Events that wait for their commit may occupy this much memory; then `append` waits.
const QUEUE_BYTES: u32 = 4 << 20;

/// One transaction is at most this big (or one event): others wait for the end of it.
const BATCH_BYTES: usize = 1 << 20;
const BATCH_ITEMS: usize = 2048;

pub(super) type Reply<T> = oneshot::Sender<Result<T>>;

/// Work for the writer, done in the order in which it was queued.
pub(super) enum Item {
    Event {
        session: SessionId,
        number: i64,
        event: StoredEvent,
        /// Permits of the queue's semaphore to be given back.
        permits: u32,
    },
    Insert {
        session: Box<NewSession>,
        reply: Reply<SessionRecord>,
    },
    Update {
        number: i64,
        change: Box<SessionChange>,
        reply: Reply<()>,
    },
    Delete {
        number: i64,
        reply: Reply<()>,
    },
    Flush {
        sync: bool,
        reply: Reply<()>,
    },
    ReleaseMemory,
    Close,
}

pub(super) struct Shared {
    path: PathBuf,
    state: Mutex<State>,
    /// Room in the queue, in bytes.
    room: Semaphore,
    commits: watch::Sender<u64>,
    /// Locked by the one thread whose turn it is; `None` once closed.
    writer: Mutex<Option<Writer>>,
}

struct State {
    logs: HashMap<SessionId, Log>,
    queue: VecDeque<Item>,
    /// A pool thread has this store, or will have it: whoever queues need not schedule it.
    scheduled: bool,
    failed: Option<StoreError>,
    closing: Closing,
}

enum Closing {
    No,
    /// `Item::Close` is queued; these wait for it.
    Queued(Vec<Reply<()>>),
    Done,
}

impl Shared {
    pub(super) fn start(
        path: PathBuf,
        writer: Writer,
        logs: HashMap<SessionId, Log>,
    ) -> Result<Arc<Self>> {
        pool::start().map_err(|errno| StoreError::errno("start a thread for", &path, errno))?;
        let unfinished = writer.has_deletions();
        let shared = Arc::new(Self {
            path,
            state: Mutex::new(State {
                logs,
                queue: VecDeque::new(),
                scheduled: unfinished,
                failed: None,
                closing: Closing::No,
            }),
            room: Semaphore::new(QUEUE_BYTES as usize),
            commits: watch::Sender::new(0),
            writer: Mutex::new(Some(writer)),
        });
        if unfinished {
            pool::schedule(Arc::clone(&shared));
        }
        Ok(shared)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn commits(&self) -> watch::Receiver<u64> {
        self.commits.subscribe()
    }

    pub(super) fn number(&self, session: SessionId) -> Result<i64> {
        self.log(&self.state(), session).map(|log| log.number)
    }

    pub(super) fn committed(&self, session: SessionId) -> Result<Seq> {
        self.log(&self.state(), session).map(Log::committed)
    }

    /// Whether `since` is a number that the session has.
    pub(super) fn check_since(&self, session: SessionId, since: Seq) -> Result<()> {
        let last = self.committed(session)?;
        if since > last {
            return Err(self.ahead(session, since, last));
        }
        Ok(())
    }

    /// A page from memory; `None` when part of it is only in the file.
    pub(super) fn recent(&self, session: SessionId, query: &Query) -> Result<Option<Page>> {
        self.log(&self.state(), session)?
            .recent(query)
            .map_err(|last| self.ahead(session, query.since, last))
    }

    /// Why nothing more will be committed, if so.
    pub(super) fn end(&self) -> Option<StoreError> {
        self.end_of(&self.state())
    }

    /// Why nothing more will become visible, if so: a store that is closing still commits its queue.
    pub(super) fn finished(&self) -> Option<StoreError> {
        let state = self.state();
        match state.closing {
            Closing::Queued(_) => state.failed.clone(),
            Closing::No | Closing::Done => self.end_of(&state),
        }
    }

    /// Whether nothing waits for its commit.
    pub(super) fn is_settled(&self) -> Result<bool> {
        let state = self.state();
        match self.end_of(&state) {
            Some(end) => Err(end),
            None => Ok(state.queue.is_empty() && !state.scheduled),
        }
    }

    pub(super) async fn append(self: &Arc<Self>, session: SessionId, event: Event) -> Result<Seq> {
        // An event that is larger than the whole queue goes in alone.
        let permits = u32::try_from(event.cost()).map_or(QUEUE_BYTES, |cost| cost.min(QUEUE_BYTES));
        match self.room.acquire_many(permits).await {
            // Given back by the writer; until then the event occupies its room.
            Ok(room) => room.forget(),
            // Closed, because nothing will be written any more.
            Err(_) => {
                return Err(self.end().unwrap_or_else(|| StoreError::Closed {
                    path: self.path.clone(),
                }));
            }
        }
        let now = now_ms();
        let mut state = self.state();
        let numbered = match (self.end_of(&state), state.logs.get_mut(&session)) {
            (Some(end), _) => Err(end),
            (None, None) => Err(self.unknown(session)),
            (None, Some(log)) => Ok((log.number, log.give_number(event, now))),
        };
        let (number, event) = numbered.inspect_err(|_| self.room.add_permits(permits as usize))?;
        let seq = event.seq;
        self.enqueue(
            state,
            Item::Event {
                session,
                number,
                event,
                permits,
            },
        );
        Ok(seq)
    }

    pub(super) fn push(self: &Arc<Self>, item: Item) -> Result<()> {
        let state = self.state();
        if let Some(end) = self.end_of(&state) {
            return Err(end);
        }
        self.enqueue(state, item);
        Ok(())
    }

    pub(super) fn delete(self: &Arc<Self>, session: SessionId, reply: Reply<()>) -> Result<()> {
        let mut state = self.state();
        if let Some(end) = self.end_of(&state) {
            return Err(end);
        }
        let number = self.log(&state, session)?.number;
        state.logs.remove(&session);
        self.enqueue(state, Item::Delete { number, reply });
        Ok(())
    }

    pub(super) fn rest(self: &Arc<Self>, session: SessionId) {
        let mut state = self.state();
        if let Some(log) = state.logs.get_mut(&session) {
            log.forget_recent();
        }
        // A store that has ended has released its memory.
        if self.end_of(&state).is_none() {
            self.enqueue(state, Item::ReleaseMemory);
        }
    }

    /// Idempotent; a store that has failed still releases its connection.
    pub(super) fn close(self: &Arc<Self>, reply: Option<Reply<()>>) {
        let mut state = self.state();
        match &mut state.closing {
            Closing::No => {
                state.closing = Closing::Queued(reply.into_iter().collect());
                self.room.close();
                self.enqueue(state, Item::Close);
            }
            Closing::Queued(waiting) => waiting.extend(reply),
            Closing::Done => {
                let failed = state.failed.clone();
                drop(state);
                if let Some(reply) = reply {
                    answer(reply, failed.map_or(Ok(()), Err));
                }
            }
        }
    }

    fn enqueue(self: &Arc<Self>, mut state: MutexGuard<'_, State>, item: Item) {
        state.queue.push_back(item);
        let wake = !std::mem::replace(&mut state.scheduled, true);
        drop(state);
        if wake {
            pool::schedule(Arc::clone(self));
        }
    }

    /// One batch, on a pool thread. Whether there is more to do.
    pub(super) fn take_turn(&self) -> bool {
        let mut slot = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let batch = self.state().next_batch();
        let closes = batch.iter().any(|item| matches!(item, Item::Close));
        if let Some(writer) = slot.as_mut() {
            match self.guarded(|| writer.write(&batch)) {
                Ok(inserted) => {
                    let followup = self.settle(writer, batch, inserted);
                    if let Err(error) = self.guarded(|| writer.follow_up(&followup)) {
                        self.fail(writer, followup, &error);
                    } else {
                        Self::flushed(followup);
                    }
                }
                Err(error) => self.fail(writer, batch, &error),
            }
            if self.end().is_none()
                && writer.has_deletions()
                && let Err(error) = self.guarded(|| writer.delete_some())
            {
                self.fail(writer, Vec::new(), &error);
            }
        }
        if closes && let Some(writer) = slot.take() {
            let closed = self.guarded(|| writer.close());
            self.closed(closed);
        }
        let more = slot.as_ref().is_some_and(Writer::has_deletions);
        let mut state = self.state();
        state.scheduled = !state.queue.is_empty() || (more && state.failed.is_none());
        state.scheduled
    }

    /// A defect in the writer must not look like a write that takes forever.
    fn guarded<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
            let message = panic_message(&*panic);
            tracing::error!(path = %self.path.display(), message, "store writer panicked");
            Err(StoreError::Panicked {
                path: self.path.clone(),
                message,
            })
        })
    }

    /// The batch is committed: make it visible, then answer. Returns what needs more than a commit.
    fn settle(&self, writer: &mut Writer, batch: Vec<Item>, inserted: Vec<Inserted>) -> Vec<Item> {
        let something = !batch.is_empty();
        let mut inserted = inserted.into_iter();
        let mut new = Vec::new();
        let mut done = Vec::new();
        let mut followup = Vec::new();
        let mut room = 0;
        let mut state = self.state();
        for item in batch {
            match item {
                Item::Event {
                    session,
                    event,
                    permits,
                    ..
                } => {
                    room += permits as usize;
                    // Without a log, the session was deleted meanwhile.
                    if let Some(log) = state.logs.get_mut(&session) {
                        log.commit(event);
                    }
                }
                Item::Insert { reply, .. } => {
                    if let Some(Inserted { number, record }) = inserted.next() {
                        let log = Log::new(number, Seq(0), record.created_at);
                        state.logs.insert(record.id, log);
                        new.push((reply, record));
                    }
                }
                Item::Update { reply, .. } => done.push(reply),
                Item::Delete { number, reply } => writer.delete_later(number, Some(reply)),
                Item::Flush { .. } | Item::ReleaseMemory => followup.push(item),
                Item::Close => {}
            }
        }
        drop(state);
        if room > 0 {
            self.room.add_permits(room);
        }
        if something {
            self.wake();
        }
        for (reply, record) in new {
            answer(reply, Ok(record));
        }
        for reply in done {
            answer(reply, Ok(()));
        }
        followup
    }

    fn flushed(followup: Vec<Item>) {
        for item in followup {
            if let Item::Flush { reply, .. } = item {
                answer(reply, Ok(()));
            }
        }
    }

    /// Nothing more will be committed: what is queued is refused, as if it had never been numbered.
    fn fail(&self, writer: &mut Writer, batch: Vec<Item>, error: &StoreError) {
        let mut state = self.state();
        state.failed = Some(error.clone());
        for log in state.logs.values_mut() {
            log.forget_uncommitted();
        }
        let queued = std::mem::take(&mut state.queue);
        let (close, refused) = queued
            .into_iter()
            .partition(|item| matches!(item, Item::Close));
        state.queue = close;
        drop(state);
        self.room.close();
        self.wake();
        for item in batch.into_iter().chain::<VecDeque<_>>(refused) {
            match item {
                Item::Insert { reply, .. } => answer(reply, Err(error.clone())),
                Item::Update { reply, .. }
                | Item::Delete { reply, .. }
                | Item::Flush { reply, .. } => answer(reply, Err(error.clone())),
                Item::Event { .. } | Item::ReleaseMemory | Item::Close => {}
            }
        }
        writer.refuse_deletions(error);
    }

    fn closed(&self, closed: Result<()>) {
        let mut state = self.state();
        let closing = std::mem::replace(&mut state.closing, Closing::Done);
        for log in state.logs.values_mut() {
            log.forget_recent();
        }
        let result = state.failed.clone().map_or(closed, Err);
        drop(state);
        self.wake();
        if let Closing::Queued(waiting) = closing {
            for reply in waiting {
                answer(reply, result.clone());
            }
        }
    }

    fn wake(&self) {
        self.commits.send_modify(|count| *count += 1);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // The state is only changed in short sections without a call that could panic half-way.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn log<'a>(&self, state: &'a State, session: SessionId) -> Result<&'a Log> {
        state
            .logs
            .get(&session)
            .ok_or_else(|| self.unknown(session))
    }

    fn unknown(&self, session: SessionId) -> StoreError {
        StoreError::SessionNotFound {
            path: self.path.clone(),
            session,
        }
    }

    fn ahead(&self, session: SessionId, since: Seq, last: Seq) -> StoreError {
        StoreError::SeqAhead {
            path: self.path.clone(),
            session,
            since,
            last,
        }
    }

    fn end_of(&self, state: &State) -> Option<StoreError> {
        match (&state.failed, &state.closing) {
            (Some(error), _) => Some(error.clone()),
            (None, Closing::No) => None,
            (None, Closing::Queued(_) | Closing::Done) => Some(StoreError::Closed {
                path: self.path.clone(),
            }),
        }
    }
}

impl State {
    fn next_batch(&mut self) -> Vec<Item> {
        let mut bytes = 0;
        let mut count = 0;
        for item in &self.queue {
            if let Item::Event { event, .. } = item {
                bytes += event.cost();
            }
            if count > 0 && (bytes > BATCH_BYTES || count == BATCH_ITEMS) {
                break;
            }
            count += 1;
        }
        self.queue.drain(..count).collect()
    }
}

/// A caller that has gone away does not want its answer.
fn answer<T>(reply: Reply<T>, result: Result<T>) {
    drop(reply.send(result));
}

fn panic_message(panic: &(dyn Any + Send)) -> String {
    panic
        .downcast_ref::<&str>()
        .map(ToString::to_string)
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "a panic without a message".to_owned())
}

/// Milliseconds since the epoch; 0 on a host whose clock is before it.
pub(super) fn now_ms() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .ok()
        .and_then(|time| i64::try_from(time.as_millis()).ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Durability, Store};

    #[tokio::test]
    async fn a_panic_in_the_writer_stops_the_store_and_is_told() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("vm.db");
        let store = Store::open(path, Durability::Normal)
            .await
            .expect("a store");
        let shared = store.shared();
        let error = shared
            .guarded::<()>(|| panic!("on purpose"))
            .expect_err("a panic");
        {
            let mut slot = shared.writer.lock().expect("not poisoned");
            shared.fail(slot.as_mut().expect("open"), Vec::new(), &error);
        }
        let told = store.flush(false).await.expect_err("it has failed");
        assert!(told.to_string().contains("on purpose"), "{told}");
        assert!(matches!(
            store.close().await,
            Err(StoreError::Panicked { .. })
        ));
    }
}
