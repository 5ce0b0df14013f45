//! From the committed log to the listeners.
//!
//! A [`Subscription`] is a cursor: for each session it knows the number of the last event that its
//! listener has been handed. It reads committed events only, in batches, and moves on when the
//! listener has taken a batch; a slow listener delays itself and nobody else.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use tokio::sync::watch;
use uuid::Uuid;

use super::event::{PERMISSION_REQUEST, permission_of};
use super::permission::{PermissionRequest, Permissions};
use crate::agents::InstallProgress;
use crate::error::Result;
use crate::ids::{Seq, SessionId};
use crate::store::{Query, Store, StoreError};

/// Limits of one batch: large enough to amortise the way to JavaScript, small enough that it does not
/// block the event loop for long.
const BATCH_EVENTS: u64 = 512;
const BATCH_BYTES: u64 = 1 << 20;

/// Something that a listener is told.
#[derive(Debug, Clone)]
pub enum Item {
    Event {
        session: SessionId,
        seq: Seq,
        /// Exact JSON of the notification.
        json: Arc<str>,
    },
    /// The event before it is a request that waits for an answer.
    PermissionRequest {
        session: SessionId,
        request: PermissionRequest,
    },
    Notice(Notice),
}

/// What happens to a VM rather than in a session: told to who listens now, not kept.
#[derive(Debug, Clone)]
pub enum Notice {
    VmBooted {
        base_changed: bool,
        layers_suspect: bool,
    },
    VmShutdown {
        reason: ShutdownReason,
    },
    InstallProgress(InstallProgress),
    SessionStatus {
        session: SessionId,
        state: SessionState,
    },
}

/// What a session is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SessionState {
    /// Its agent runs.
    Open {
        turn: Option<Uuid>,
        pending_permissions: usize,
    },
    Closed,
    /// Its agent does not run, though nobody closed it.
    Suspended,
    /// It is gone with everything of it.
    Destroyed,
}

/// Why a VM no longer runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShutdownReason {
    Sleep,
    Destroy,
    Close,
    /// It died on its own.
    Error,
}

/// What the subscriptions of one VM follow.
#[derive(Default)]
pub(super) struct Emission {
    state: Mutex<State>,
    permissions: Permissions,
    /// Wakes subscriptions when there is something else to wait for than before.
    changed: watch::Sender<u64>,
}

#[derive(Default)]
struct State {
    store: Option<Store>,
    /// Sessions that may get events, with the last number that is history to a new subscription.
    active: HashMap<SessionId, Seq>,
    subscribers: Vec<Weak<Subscriber>>,
}

struct Subscriber {
    state: Mutex<Position>,
    moved: watch::Sender<u64>,
}

#[derive(Default)]
struct Position {
    delivered: HashMap<SessionId, Seq>,
    notices: VecDeque<Notice>,
    /// Notices that were queued here, and that the listener has been handed, since it is there.
    queued: u64,
    told: u64,
    closed: bool,
}

impl Emission {
    /// Follows this store from now on.
    pub(super) fn attach(&self, store: &Store) {
        self.state().store = Some(store.clone());
        self.bump();
    }

    /// Lets go of the store: nothing more will be committed.
    pub(super) fn detach(&self) {
        let mut state = self.state();
        state.store = None;
        state.active.clear();
        drop(state);
        self.bump();
    }

    /// A session may get events from now on; what it has until `last` is history.
    pub(super) fn activate(&self, session: SessionId, last: Seq) {
        let mut state = self.state();
        state.active.insert(session, last);
        for subscriber in state.subscribers() {
            let mut position = subscriber.state();
            position.delivered.entry(session).or_insert(last);
        }
        drop(state);
        self.bump();
    }

    /// The session is deleted: there is nothing of it to follow.
    pub(super) fn forget(&self, session: SessionId) {
        let mut state = self.state();
        state.active.remove(&session);
        for subscriber in state.subscribers() {
            subscriber.state().delivered.remove(&session);
            subscriber.moved();
        }
    }

    /// The requests of agents that wait for the caller.
    pub(super) const fn permissions(&self) -> &Permissions {
        &self.permissions
    }

    /// Changes when there is another store or session to follow.
    pub(super) fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    pub(super) fn store(&self) -> Option<Store> {
        self.state().store.clone()
    }

    pub(super) fn notify(&self, notice: &Notice) {
        let subscribers = self.state().subscribers();
        for subscriber in subscribers {
            subscriber.state().push(notice.clone());
        }
        self.bump();
    }

    /// Waits until the listeners that are there now have been handed everything up to `seq`.
    pub(super) async fn delivered(&self, session: SessionId, seq: Seq) {
        let subscribers = self.state().subscribers();
        for subscriber in subscribers {
            let mut moved = subscriber.moved.subscribe();
            loop {
                {
                    let position = subscriber.state();
                    // Nothing is known of a session that was deleted.
                    let reached = position.delivered.get(&session);
                    if position.closed || reached.is_none_or(|reached| *reached >= seq) {
                        break;
                    }
                }
                // The sender is in `subscriber`, which we hold.
                drop(moved.changed().await);
            }
        }
    }

    /// Waits until the listeners that are there now have been handed everything that is committed:
    /// before the store goes, from which they are told.
    pub(super) async fn drained(&self) {
        let (store, sessions) = {
            let state = self.state();
            let sessions: Vec<SessionId> = state.active.keys().copied().collect();
            (state.store.clone(), sessions)
        };
        let Some(store) = store else {
            return;
        };
        for session in sessions {
            if let Ok(last) = store.committed(session) {
                self.delivered(session, last).await;
            }
        }
    }

    /// Waits until the listeners that are there now have been handed every notice until now: a call
    /// that caused one must not let Node exit before.
    pub(super) async fn noticed(&self) {
        let subscribers = self.state().subscribers();
        for subscriber in subscribers {
            let mut moved = subscriber.moved.subscribe();
            let queued = subscriber.state().queued;
            loop {
                {
                    let position = subscriber.state();
                    if position.closed || position.told >= queued {
                        break;
                    }
                }
                // The sender is in `subscriber`, which we hold.
                drop(moved.changed().await);
            }
        }
    }

    pub(super) fn subscribe(self: &Arc<Self>) -> Subscription {
        let mut state = self.state();
        let delivered = state
            .active
            .keys()
            .map(|session| {
                let last = state
                    .store
                    .as_ref()
                    .and_then(|store| store.committed(*session).ok())
                    .unwrap_or_default();
                (*session, last)
            })
            .collect();
        let subscriber = Arc::new(Subscriber {
            state: Mutex::new(Position {
                delivered,
                ..Position::default()
            }),
            moved: watch::Sender::new(0),
        });
        state.subscribers.push(Arc::downgrade(&subscriber));
        drop(state);
        Subscription {
            emission: Arc::clone(self),
            subscriber,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn bump(&self) {
        self.changed.send_modify(|count| *count += 1);
    }
}

impl State {
    fn subscribers(&mut self) -> Vec<Arc<Subscriber>> {
        self.subscribers
            .retain(|subscriber| subscriber.strong_count() > 0);
        self.subscribers.iter().filter_map(Weak::upgrade).collect()
    }
}

impl Subscriber {
    fn state(&self) -> MutexGuard<'_, Position> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn moved(&self) {
        self.moved.send_modify(|count| *count += 1);
    }
}

impl Position {
    /// Progress replaces the progress before it, and a session's state the one before it, so that a
    /// slow listener holds few notices.
    fn push(&mut self, notice: Notice) {
        let replaced = match &notice {
            Notice::InstallProgress(_) => self
                .notices
                .back_mut()
                .filter(|last| matches!(last, Notice::InstallProgress(_))),
            Notice::SessionStatus { session, .. } => self.notices.iter_mut().find(
                |queued| matches!(queued, Notice::SessionStatus { session: own, .. } if own == session),
            ),
            Notice::VmBooted { .. } | Notice::VmShutdown { .. } => None,
        };
        if let Some(replaced) = replaced {
            *replaced = notice;
        } else {
            self.notices.push_back(notice);
            self.queued += 1;
        }
    }
}

/// One listener's cursor over everything that a VM tells. Dropping it ends it.
pub struct Subscription {
    emission: Arc<Emission>,
    subscriber: Arc<Subscriber>,
}

impl Subscription {
    /// Waits for the next items: never empty. Ask again when the listener has taken them, after
    /// [`Subscription::taken`].
    pub async fn next(&self) -> Result<Vec<Item>> {
        loop {
            let mut changed = self.emission.changed.subscribe();
            let (store, sessions) = {
                let state = self.emission.state();
                let sessions: Vec<SessionId> = state.active.keys().copied().collect();
                (state.store.clone(), sessions)
            };
            let notices = std::mem::take(&mut self.subscriber.state().notices);
            if !notices.is_empty() {
                return Ok(notices.into_iter().map(Item::Notice).collect());
            }
            let Some(store) = store else {
                // The sender is in `emission`, which we hold.
                drop(changed.changed().await);
                continue;
            };
            let mut commits = store.commits();
            // Before looking, so that a commit in between wakes us again.
            commits.mark_unchanged();
            let items = self.read(&store, sessions).await?;
            if !items.is_empty() {
                return Ok(items);
            }
            tokio::select! {
                _ = changed.changed() => {}
                committed = commits.changed() => {
                    if committed.is_err() {
                        // The store is closed: `detach` follows.
                        drop(changed.changed().await);
                    }
                }
            }
        }
    }

    /// The listener has been handed these items.
    pub fn taken(&self, items: &[Item]) {
        {
            let mut position = self.subscriber.state();
            for item in items {
                match item {
                    Item::Event { session, seq, .. } => {
                        position.delivered.insert(*session, *seq);
                    }
                    Item::PermissionRequest { .. } => {}
                    Item::Notice(_) => position.told += 1,
                }
            }
        }
        self.subscriber.moved();
    }

    async fn read(&self, store: &Store, sessions: Vec<SessionId>) -> Result<Vec<Item>> {
        let mut items = Vec::new();
        for session in sessions {
            let since = self.subscriber.state().delivered.get(&session).copied();
            let since = since.unwrap_or_default();
            match store.committed(session) {
                Ok(last) if last > since => {}
                Ok(_) | Err(StoreError::SessionNotFound { .. }) => continue,
                Err(error) => return Err(error.into()),
            }
            let query = Query {
                since,
                method: None,
                limit: Some(BATCH_EVENTS),
                max_bytes: BATCH_BYTES,
            };
            let page = match store.events(session, query).await {
                // Deleted since it was looked up.
                Err(StoreError::SessionNotFound { .. }) => continue,
                page => page?,
            };
            for event in page.events {
                // One that was answered meanwhile is history.
                let waiting = (event.method == PERMISSION_REQUEST)
                    .then(|| permission_of(&event.json))
                    .flatten()
                    .and_then(|id| self.emission.permissions.get(id));
                items.push(Item::Event {
                    session,
                    seq: event.seq,
                    json: event.json,
                });
                items.extend(waiting.map(|request| Item::PermissionRequest { session, request }));
            }
        }
        Ok(items)
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.subscriber.state().closed = true;
        self.subscriber.moved();
    }
}
