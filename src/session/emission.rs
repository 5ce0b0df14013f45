//! From the committed log to the listeners.
//!
//! A [`Subscription`] is a cursor: for each session it knows the number of the last event that its
//! listener has been handed. It reads committed events only, in batches, and moves on when the
//! listener has taken a batch; a slow listener delays itself and nobody else.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use uuid::Uuid;

use super::event::{PERMISSION_REQUEST, permission_of};
use super::permission::{PermissionRequest, Permissions};
use crate::agents::InstallProgress;
use crate::error::Result;
use crate::ids::{Seq, SessionId};
use crate::images;
use crate::net::secrets::Misdirected;
use crate::net::{Denial, Refused};
use crate::store::{History, Page, Query, Store, StoreError, StoredEvent};
use crate::vm::Limit;

/// What is read of a session at once. For a listener that has fallen behind what is in memory, each
/// page opens the file.
const PAGE_EVENTS: u64 = 2048;
const PAGE_BYTES: u64 = 1 << 20;

/// What is handed over at once: enough to amortise the way to JavaScript, and little enough to be young
/// garbage there when the listener has seen it.
const MAX_BATCH: usize = 512;
const MIN_BATCH: usize = 8;

/// Different hosts that a slow listener is still to hear of.
const MAX_MISDIRECTED: usize = 64;
/// Refusals of the network that wait for a slow listener.
const MAX_DENIALS: usize = 512;

/// Bytes in a batch, for each event that it may have: one that is longer than all of it comes alone.
const BATCH_BYTES: usize = 512;

/// A listener that takes longer for a batch gets smaller ones.
const SLOW: Duration = Duration::from_millis(100);

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
    ImageProgress(images::Progress),
    LimitReached {
        limit: Limit,
        detail: String,
    },
    SecretMisdirected(Misdirected),
    NetworkDenied(Denial),
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

/// Numbers of sessions' last events.
type Committed = HashMap<SessionId, Seq>;

/// Where committed events are read.
#[derive(Default)]
enum Source {
    /// There was no store yet, or it is deleted.
    #[default]
    None,
    Store(Store),
    /// The store is closed: slow listeners are still told what it had, up to these numbers.
    Closed(History, Committed),
}

impl Source {
    /// Number of a session's last event that listeners are told.
    fn committed(&self, session: SessionId) -> Option<Seq> {
        match self {
            Self::None => None,
            // An unknown session was deleted since.
            Self::Store(store) => store.committed(session).ok(),
            Self::Closed(_, last) => last.get(&session).copied(),
        }
    }
}

#[derive(Default)]
struct State {
    source: Source,
    /// Sessions that may get events, with the last number that is history to a new subscription.
    active: HashMap<SessionId, Seq>,
    subscribers: Vec<Weak<Subscriber>>,
}

struct Subscriber {
    state: Mutex<Position>,
    moved: watch::Sender<u64>,
}

struct Position {
    delivered: HashMap<SessionId, Seq>,
    /// Events that have been read and are yet to be handed over: all that follow what is delivered.
    ahead: VecDeque<(SessionId, StoredEvent)>,
    notices: VecDeque<Notice>,
    /// What was committed when the VM ended, for each end among the notices.
    ends: VecDeque<Committed>,
    /// Notices that were queued here, and that the listener has been handed, since it is there.
    queued: u64,
    told: u64,
    closed: bool,
    /// Events in a batch: fewer for a listener that takes long for them, which would otherwise learn
    /// of everything else late.
    batch: usize,
    /// When the listener got its last batch.
    handed: Option<Instant>,
}

impl Default for Position {
    fn default() -> Self {
        Self {
            delivered: HashMap::new(),
            ahead: VecDeque::new(),
            notices: VecDeque::new(),
            ends: VecDeque::new(),
            queued: 0,
            told: 0,
            closed: false,
            batch: MAX_BATCH,
            handed: None,
        }
    }
}

impl Emission {
    /// Follows this store from now on.
    pub(super) fn attach(&self, store: &Store) {
        self.state().source = Source::Store(store.clone());
        self.bump();
    }

    /// Lets go of the store, to which nothing more is committed: listeners that are behind read its
    /// file.
    pub(super) fn detach(&self) {
        let mut state = self.state();
        if let Source::Store(store) = &state.source {
            let history = store.history();
            state.source = Source::Closed(history, state.committed());
        }
        drop(state);
        self.bump();
    }

    /// There is nothing left to be told of.
    pub(super) fn clear(&self) {
        let mut state = self.state();
        state.source = Source::None;
        let sessions: Vec<_> = state.active.drain().map(|(session, _)| session).collect();
        drop(state);
        for session in sessions {
            self.forget(session);
        }
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
            let mut position = subscriber.state();
            position.delivered.remove(&session);
            position.ahead.retain(|(own, _)| *own != session);
            drop(position);
            subscriber.moved();
        }
        drop(state);
        // An end of the VM may have waited for what it said.
        self.bump();
    }

    /// The requests of agents that wait for the caller.
    pub(super) const fn permissions(&self) -> &Permissions {
        &self.permissions
    }

    /// Changes when there is another store or session to follow.
    pub(super) fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// The store, as long as this process has it open.
    pub(super) fn store(&self) -> Option<Store> {
        match &self.state().source {
            Source::Store(store) => Some(store.clone()),
            Source::None | Source::Closed(..) => None,
        }
    }

    pub(super) fn notify(&self, notice: &Notice) {
        let mut state = self.state();
        let committed = matches!(notice, Notice::VmShutdown { .. }).then(|| state.committed());
        for subscriber in state.subscribers() {
            let mut position = subscriber.state();
            position.ends.extend(committed.clone());
            position.push(notice.clone());
        }
        drop(state);
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

    /// Waits until the listeners that are there now have been handed everything that is committed.
    pub(super) async fn drained(&self) {
        let last = self.state().committed();
        for (session, last) in last {
            self.delivered(session, last).await;
        }
    }

    /// Waits until the listeners that are there now have been handed every notice until now: a call
    /// that caused one must not let Node exit before.
    pub(super) async fn noticed(&self) {
        self.noticed_unless(|_| false).await;
    }

    /// The same, but for listeners that are still to be told what an earlier run of the VM has said.
    pub(super) async fn noticed_of_this_run(&self) {
        self.noticed_unless(|position| !position.ends.is_empty())
            .await;
    }

    async fn noticed_unless(&self, is_late: impl Fn(&Position) -> bool + Send + Sync) {
        let subscribers = self.state().subscribers();
        for subscriber in subscribers {
            let mut moved = subscriber.moved.subscribe();
            let queued = subscriber.state().queued;
            loop {
                {
                    let position = subscriber.state();
                    if position.closed || position.told >= queued || is_late(&position) {
                        break;
                    }
                }
                // The sender is in `subscriber`, which we hold.
                drop(moved.changed().await);
            }
        }
    }

    /// Committed events; `None`: there are none after `query.since`.
    async fn page(&self, session: SessionId, query: Query) -> Result<Option<Page>, StoreError> {
        let (store, history) = {
            let state = self.state();
            let last = state.source.committed(session);
            if last.is_none_or(|last| last <= query.since) {
                return Ok(None);
            }
            match &state.source {
                Source::None => return Ok(None),
                Source::Store(store) => (Some(store.clone()), None),
                Source::Closed(history, _) => (None, Some(history.clone())),
            }
        };
        match (store, history) {
            (Some(store), _) => store.events(session, query).await.map(Some),
            (None, Some(history)) => history.events(session, query).await.map(Some),
            (None, None) => Ok(None),
        }
    }

    pub(super) fn subscribe(self: &Arc<Self>) -> Subscription {
        let mut state = self.state();
        let delivered = state
            .active
            .keys()
            .map(|session| {
                let last = state.source.committed(*session);
                (*session, last.unwrap_or_default())
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
    /// Of all sessions that may get events.
    fn committed(&self) -> Committed {
        let last = |session: &SessionId| Some((*session, self.source.committed(*session)?));
        self.active.keys().filter_map(last).collect()
    }

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
    /// To how long the listener took for a batch.
    fn adapt(&mut self) {
        let Some(handed) = self.handed.take() else {
            return;
        };
        let took = handed.elapsed();
        if took > SLOW {
            self.batch = (self.batch / 2).max(MIN_BATCH);
        } else if took < SLOW / 4 {
            self.batch = (self.batch * 2).min(MAX_BATCH);
        }
    }

    /// Progress replaces the progress before it, and a session's state the one before it, so that a
    /// slow listener holds few notices.
    fn push(&mut self, mut notice: Notice) {
        if let Notice::SecretMisdirected(misdirected) = &mut notice {
            self.count(misdirected);
        }
        let replaced = match &notice {
            Notice::InstallProgress(_) => self
                .notices
                .back_mut()
                .filter(|last| matches!(last, Notice::InstallProgress(_))),
            Notice::ImageProgress(_) => self
                .notices
                .back_mut()
                .filter(|last| matches!(last, Notice::ImageProgress(_))),
            Notice::SessionStatus { session, .. } => self.of_this_run().find(
                |queued| matches!(queued, Notice::SessionStatus { session: own, .. } if own == session),
            ),
            // It counts: the latest says all.
            Notice::LimitReached { limit, .. } => self.of_this_run().find(
                |queued| matches!(queued, Notice::LimitReached { limit: own, .. } if own == limit),
            ),
            Notice::SecretMisdirected(own) => self.of_this_run().find(
                |queued| matches!(queued, Notice::SecretMisdirected(queued) if queued.is_alike(own)),
            ),
            Notice::NetworkDenied(denial) => return self.push_denial(denial.clone()),
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

impl Position {
    /// What waits since the last end of the VM: nothing of before is exchanged for what comes after.
    fn of_this_run(&mut self) -> impl Iterator<Item = &mut Notice> {
        let is_end = |notice: &Notice| matches!(notice, Notice::VmShutdown { .. });
        let begin = self.notices.iter().rposition(is_end).unwrap_or(0);
        self.notices.range_mut(begin..)
    }

    /// Adds to it what is queued of the same, and gives up its host where there are too many.
    fn count(&mut self, misdirected: &mut Misdirected) {
        let mut queued: Vec<_> = Vec::new();
        for notice in self.of_this_run() {
            if let Notice::SecretMisdirected(notice) = notice {
                queued.push(&*notice);
            }
        }
        if queued.len() >= MAX_MISDIRECTED && !queued.iter().any(|own| own.is_alike(misdirected)) {
            misdirected.forget_host();
        }
        let alike = queued.into_iter().find(|own| own.is_alike(misdirected));
        misdirected.count += alike.map_or(0, |own| own.count);
    }

    /// What was refused several times since the listener last came counts so many times, and what is more
    /// than it can want to read is counted together.
    fn push_denial(&mut self, denial: Denial) {
        let mut kinds = 0;
        let mut others = None;
        for notice in self.of_this_run() {
            let Notice::NetworkDenied(queued) = notice else {
                continue;
            };
            if queued.refused == denial.refused {
                queued.count = queued.count.saturating_add(denial.count);
                return;
            }
            kinds += 1;
            if queued.refused == Refused::others() {
                others = Some(queued);
            }
        }
        let notice = match others {
            _ if kinds < MAX_DENIALS => denial,
            Some(others) => {
                others.count = others.count.saturating_add(denial.count);
                return;
            }
            None => Denial {
                refused: Refused::others(),
                count: denial.count,
            },
        };
        self.notices.push_back(Notice::NetworkDenied(notice));
        self.queued += 1;
    }

    /// Takes the notices that come before an end of the VM.
    fn notices_to_end(&mut self) -> Vec<Item> {
        let mut notices = self.notices.iter();
        let end = notices.position(|notice| matches!(notice, Notice::VmShutdown { .. }));
        let count = end.unwrap_or(self.notices.len());
        self.notices.drain(..count).map(Item::Notice).collect()
    }

    /// Whether the next end of the VM follows what is delivered, with what is `handed` over now.
    fn may_end(&self, handed: &Committed) -> bool {
        let is_reached = |(session, last): (&SessionId, &Seq)| {
            // Nothing is known of a session that was deleted.
            let reached = self.delivered.get(session);
            reached
                .is_none_or(|reached| reached.max(handed.get(session).unwrap_or(reached)) >= last)
        };
        (self.ends.front()).is_some_and(|committed| committed.iter().all(is_reached))
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
            let (mut commits, sessions) = {
                let state = self.emission.state();
                let sessions: Vec<SessionId> = state.active.keys().copied().collect();
                let commits = match &state.source {
                    Source::Store(store) => Some(store.commits()),
                    Source::None | Source::Closed(..) => None,
                };
                (commits, sessions)
            };
            // Before looking, so that a commit in between wakes us again.
            if let Some(commits) = &mut commits {
                commits.mark_unchanged();
            }
            let has_read_ahead = !self.subscriber.state().ahead.is_empty();
            if !has_read_ahead {
                self.read(sessions).await?;
            }
            let items = self.items();
            if !items.is_empty() {
                return Ok(items);
            }
            let Some(mut commits) = commits else {
                // The sender is in `emission`, which we hold.
                drop(changed.changed().await);
                continue;
            };
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
                        // Not of one that was forgotten.
                        if let Some(delivered) = position.delivered.get_mut(session) {
                            *delivered = *seq;
                        }
                    }
                    Item::PermissionRequest { .. } => {}
                    Item::Notice(_) => position.told += 1,
                }
            }
            position.adapt();
        }
        self.subscriber.moved();
    }

    /// What is to be handed over now, of what was read.
    fn items(&self) -> Vec<Item> {
        let mut position = self.subscriber.state();
        let mut items = position.notices_to_end();
        let mut room = Some(position.batch * BATCH_BYTES);
        let fits = |(_, event): &&(SessionId, StoredEvent)| {
            room = room.and_then(|room| room.checked_sub(event.json.len()));
            room.is_some()
        };
        let ahead = position.ahead.iter().take(position.batch);
        let count = ahead.take_while(fits).count();
        let count = count.max(position.ahead.len().min(1));
        let mut handed = Committed::new();
        for (session, event) in position.ahead.drain(..count) {
            // A request that was answered meanwhile is history.
            let waiting = (event.method == PERMISSION_REQUEST)
                .then(|| permission_of(&event.json))
                .flatten()
                .and_then(|id| self.emission.permissions.get(id));
            handed.insert(session, event.seq);
            items.push(Item::Event {
                session,
                seq: event.seq,
                json: event.json,
            });
            items.extend(waiting.map(|request| Item::PermissionRequest { session, request }));
        }
        // A VM's end comes after what was said before it, in as many batches as that takes.
        while position.may_end(&handed)
            && let Some(end) = position.notices.pop_front()
        {
            position.ends.pop_front();
            items.push(Item::Notice(end));
            items.append(&mut position.notices_to_end());
        }
        position.handed = Some(Instant::now());
        items
    }

    /// Reads what follows what is delivered, of each session.
    async fn read(&self, sessions: Vec<SessionId>) -> Result<()> {
        for session in sessions {
            let delivered = |position: &Position| position.delivered.get(&session).copied();
            let Some(since) = delivered(&self.subscriber.state()) else {
                continue;
            };
            let query = Query {
                since,
                method: None,
                limit: Some(PAGE_EVENTS),
                max_bytes: PAGE_BYTES,
            };
            let page = match self.emission.page(session, query).await {
                // Deleted, maybe by another process: nothing of it is waited for.
                Err(StoreError::SessionNotFound { .. }) => {
                    self.subscriber.state().delivered.remove(&session);
                    self.subscriber.moved();
                    continue;
                }
                Ok(None) => continue,
                Ok(Some(page)) => page,
                Err(error) => return Err(error.into()),
            };
            let mut position = self.subscriber.state();
            if delivered(&position).is_none() {
                // It was forgotten while it was read.
                continue;
            }
            let events = page.events.into_iter();
            position.ahead.extend(events.map(|event| (session, event)));
        }
        Ok(())
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.subscriber.state().closed = true;
        self.subscriber.moved();
    }
}
