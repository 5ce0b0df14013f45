//! Output of processes on its way to listeners, who are handed every byte once.
//!
//! While somebody listens, a process's output is read only as fast as the listeners take it: the
//! [`Delivery`] of a chunk ends when they have. While nobody does, it is read and the end of it kept, for
//! the first listener who comes: no process waits for somebody who may never come.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use tokio::sync::watch;

use crate::vm::Exit;

/// What is kept for listeners that are not there yet, of all processes of a VM together.
const MOST_KEPT: usize = 64 << 20;

/// What is handed over at once.
const BATCH_BYTES: usize = 1 << 20;

/// Who writes: processes and shells have numbers of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// A pid.
    Process(u32),
    Shell(u64),
}

/// Which of a process's outputs. A shell has the first alone: its terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    Stdout,
    Stderr,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct End {
    pub exit: Exit,
    /// Its time limit had passed.
    pub timed_out: bool,
    /// It was ended because its VM was.
    pub with_vm: bool,
}

/// Something that a listener is told.
#[derive(Debug, Clone)]
pub enum Output {
    Data {
        source: Source,
        stream: Stream,
        data: Vec<u8>,
        /// Bytes before these that nobody was there for, and that were not kept.
        dropped: u64,
    },
    /// After all of its output.
    Exit { source: Source, end: End },
}

impl Output {
    fn size(&self) -> usize {
        match self {
            Self::Data { data, .. } => data.len(),
            Self::Exit { .. } => 0,
        }
    }
}

/// What a subscription is for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "one for each event")]
pub struct Interest {
    pub process_output: bool,
    pub process_exit: bool,
    pub shell_data: bool,
    pub shell_exit: bool,
}

impl Interest {
    const fn has_output(self, source: Source) -> bool {
        match source {
            Source::Process(_) => self.process_output,
            Source::Shell(_) => self.shell_data,
        }
    }

    const fn has_exit(self, source: Source) -> bool {
        match source {
            Source::Process(_) => self.process_exit,
            Source::Shell(_) => self.shell_exit,
        }
    }

    const fn is_in(self, output: &Output) -> bool {
        match output {
            Output::Data { source, .. } => self.has_output(*source),
            Output::Exit { source, .. } => self.has_exit(*source),
        }
    }
}

/// Of one VM.
#[derive(Default)]
pub(super) struct Outlet {
    state: Mutex<State>,
}

/// One process's place in an [`Outlet`]; never another's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Channel(u64);

#[derive(Default)]
struct State {
    /// In the order in which they were opened.
    channels: BTreeMap<Channel, Kept>,
    opened: u64,
    /// Bytes, of all channels.
    kept: usize,
    subscribers: Vec<Weak<Subscriber>>,
}

/// What a process has for listeners that are not there yet.
struct Kept {
    source: Source,
    /// Of each stream.
    limit: usize,
    streams: [Tail; 2],
    /// That it has ended, until somebody was told.
    exit: Option<End>,
    has_ended: bool,
}

/// The end of an output.
#[derive(Default)]
struct Tail {
    bytes: VecDeque<u8>,
    dropped: u64,
}

impl Tail {
    /// Drops the beginning; returns how much.
    fn shorten(&mut self, most: usize) -> usize {
        let excess = self.bytes.len().saturating_sub(most);
        self.bytes.drain(..excess);
        self.dropped += excess as u64;
        excess
    }

    fn is_empty(&self) -> bool {
        self.bytes.is_empty() && self.dropped == 0
    }
}

struct Subscriber {
    state: Mutex<Queue>,
    /// Something was queued.
    queued: watch::Sender<u64>,
    /// Something was taken, or is not wanted any more.
    taken: watch::Sender<u64>,
}

#[derive(Default)]
struct Queue {
    interest: Interest,
    items: VecDeque<Output>,
    closed: bool,
}

impl Outlet {
    /// `limit`: bytes that are kept of each stream while nobody listens.
    pub(super) fn open(&self, source: Source, limit: usize) -> Channel {
        let mut state = self.state();
        state.opened += 1;
        let channel = Channel(state.opened);
        let kept = Kept {
            source,
            limit,
            streams: Default::default(),
            exit: None,
            has_ended: false,
        };
        state.channels.insert(channel, kept);
        channel
    }

    /// Output of a process that has not ended.
    pub(super) fn data(&self, channel: Channel, stream: Stream, data: Vec<u8>) -> Delivery {
        let mut state = self.state();
        let Some(source) = state.channels.get(&channel).map(|kept| kept.source) else {
            return Delivery::default();
        };
        let listeners = state.interested(|interest| interest.has_output(source));
        if listeners.is_empty() {
            state.keep(channel, stream, &data);
            return Delivery::default();
        }
        Delivery::of(
            &listeners,
            Output::Data {
                source,
                stream,
                data,
                dropped: 0,
            },
        )
    }

    /// The process has ended: the last that is told of it.
    pub(super) fn exit(&self, channel: Channel, end: End) -> Delivery {
        let mut state = self.state();
        let Some(source) = state.channels.get(&channel).map(|kept| kept.source) else {
            return Delivery::default();
        };
        let listeners = state.interested(|interest| interest.has_exit(source));
        let Some(kept) = state.channels.get_mut(&channel) else {
            return Delivery::default();
        };
        kept.has_ended = true;
        if listeners.is_empty() {
            kept.exit = Some(end);
            return Delivery::default();
        }
        Delivery::of(&listeners, Output::Exit { source, end })
    }

    /// Nobody is to be told of this process any more.
    pub(super) fn forget(&self, channel: Channel) {
        let mut state = self.state();
        if let Some(mut kept) = state.channels.remove(&channel) {
            state.kept -= kept.shorten(0);
        }
    }

    /// Waits until the listeners that are there now have been handed what is queued for them now.
    pub(super) fn handed(&self) -> impl Future<Output = ()> + use<> {
        let listeners = self.state().interested(|_| true);
        let to = listeners.into_iter().map(|listener| {
            let queued = *listener.queued.borrow();
            (listener, queued)
        });
        Delivery { to: to.collect() }.handed()
    }

    pub(super) fn subscribe(self: &Arc<Self>) -> OutputSubscription {
        let subscriber = Arc::new(Subscriber {
            state: Mutex::default(),
            queued: watch::Sender::new(0),
            taken: watch::Sender::new(0),
        });
        self.state().subscribers.push(Arc::downgrade(&subscriber));
        OutputSubscription {
            outlet: Arc::clone(self),
            subscriber,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kept {
    fn shorten(&mut self, most: usize) -> usize {
        self.streams.iter_mut().map(|tail| tail.shorten(most)).sum()
    }
}

impl State {
    fn interested(&mut self, is: impl Fn(Interest) -> bool) -> Vec<Arc<Subscriber>> {
        self.subscribers
            .retain(|subscriber| subscriber.strong_count() > 0);
        let subscribers = self.subscribers.iter().filter_map(Weak::upgrade);
        subscribers
            .filter(|subscriber| {
                let queue = subscriber.state();
                !queue.closed && is(queue.interest)
            })
            .collect()
    }

    fn keep(&mut self, channel: Channel, stream: Stream, data: &[u8]) {
        let Some(own) = self.channels.get_mut(&channel) else {
            return;
        };
        let limit = own.limit;
        let tail = &mut own.streams[stream as usize];
        tail.bytes.extend(data);
        self.kept += data.len();
        self.kept -= tail.shorten(limit);
        // What has ended goes first, the oldest of it; then what is just written.
        for kept in self.channels.values_mut() {
            if self.kept > MOST_KEPT && kept.has_ended {
                self.kept -= kept.shorten(0);
            }
        }
        if self.kept > MOST_KEPT
            && let Some(own) = self.channels.get_mut(&channel)
        {
            let tail = &mut own.streams[stream as usize];
            let most = tail.bytes.len().saturating_sub(self.kept - MOST_KEPT);
            self.kept -= tail.shorten(most);
        }
    }

    /// What was kept for a listener who is there now.
    fn take_kept(&mut self, interest: Interest) -> Vec<Output> {
        let mut taken = Vec::new();
        for kept in self.channels.values_mut() {
            let source = kept.source;
            if interest.has_output(source) {
                for stream in [Stream::Stdout, Stream::Stderr] {
                    let tail = &mut kept.streams[stream as usize];
                    if !tail.is_empty() {
                        let Tail { bytes, dropped } = std::mem::take(tail);
                        self.kept -= bytes.len();
                        let data = Vec::from(bytes);
                        taken.push(Output::Data {
                            source,
                            stream,
                            data,
                            dropped,
                        });
                    }
                }
            }
            if interest.has_exit(source) {
                taken.extend(kept.exit.take().map(|end| Output::Exit { source, end }));
            }
        }
        taken
    }
}

impl Subscriber {
    fn state(&self) -> MutexGuard<'_, Queue> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns how much has to be taken until this is.
    fn push(&self, output: Output) -> u64 {
        self.state().items.push_back(output);
        let mut number = 0;
        self.queued.send_modify(|queued| {
            *queued += 1;
            number = *queued;
        });
        number
    }
}

/// A chunk on its way.
#[derive(Default)]
pub(super) struct Delivery {
    /// Who gets it, and how much each has taken then.
    to: Vec<(Arc<Subscriber>, u64)>,
}

impl Delivery {
    /// To be called under the lock of the outlet: the order is that of the calls.
    fn of(listeners: &[Arc<Subscriber>], output: Output) -> Self {
        let Some((last, others)) = listeners.split_last() else {
            return Self::default();
        };
        let mut to: Vec<_> = others
            .iter()
            .map(|listener| (Arc::clone(listener), listener.push(output.clone())))
            .collect();
        to.push((Arc::clone(last), last.push(output)));
        Self { to }
    }

    /// Waits until everybody has been handed it, or does not listen any more.
    pub(super) async fn handed(self) {
        for (subscriber, number) in self.to {
            let mut taken = subscriber.taken.subscribe();
            // The sender is in `subscriber`, which we hold.
            drop(taken.wait_for(|taken| *taken >= number).await);
        }
    }
}

/// One listener's end. Dropping it ends it.
pub struct OutputSubscription {
    outlet: Arc<Outlet>,
    subscriber: Arc<Subscriber>,
}

impl OutputSubscription {
    /// What it is to be told from now on, with what was kept of it because nobody listened.
    pub fn set_interest(&self, interest: Interest) {
        let mut state = self.outlet.state();
        {
            let mut queue = self.subscriber.state();
            if queue.closed {
                return;
            }
            queue.interest = interest;
        }
        for output in state.take_kept(interest) {
            self.subscriber.push(output);
        }
        drop(state);
        self.skip_unwanted(interest);
    }

    /// Waits for what comes next: never empty. Ask again when the listener has been handed it, after
    /// [`OutputSubscription::taken`].
    pub async fn next(&self) -> Vec<Output> {
        let mut queued = self.subscriber.queued.subscribe();
        loop {
            queued.mark_unchanged();
            let batch = self.batch();
            if !batch.is_empty() {
                return batch;
            }
            // The sender is in `subscriber`, which we hold.
            drop(queued.changed().await);
        }
    }

    fn batch(&self) -> Vec<Output> {
        let mut batch = Vec::new();
        let mut size = 0;
        let mut queue = self.subscriber.state();
        while size < BATCH_BYTES
            && let Some(output) = queue.items.pop_front()
        {
            size += output.size();
            batch.push(output);
        }
        batch
    }

    /// The listener has been handed so many.
    pub fn taken(&self, count: usize) {
        let count = count as u64;
        let taken = |taken: &mut u64| *taken = taken.saturating_add(count);
        self.subscriber.taken.send_modify(taken);
    }

    /// Nothing more is told, and nobody waits for it.
    pub fn close(&self) {
        let _state = self.outlet.state();
        let mut queue = self.subscriber.state();
        queue.closed = true;
        queue.items.clear();
        drop(queue);
        self.subscriber.taken.send_replace(u64::MAX);
    }

    fn skip_unwanted(&self, interest: Interest) {
        let mut queue = self.subscriber.state();
        let before = queue.items.len();
        queue.items.retain(|output| interest.is_in(output));
        let skipped = before - queue.items.len();
        drop(queue);
        if skipped > 0 {
            self.taken(skipped);
        }
    }
}

impl Drop for OutputSubscription {
    fn drop(&mut self) {
        self.close();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    const OUTPUT: Interest = Interest {
        process_output: true,
        process_exit: false,
        shell_data: false,
        shell_exit: false,
    };
    const BOTH: Interest = Interest {
        process_output: true,
        process_exit: true,
        shell_data: false,
        shell_exit: false,
    };
    const END: End = End {
        exit: Exit::Code(0),
        timed_out: false,
        with_vm: false,
    };

    fn text(output: &Output) -> (String, u64) {
        match output {
            Output::Data { data, dropped, .. } => {
                (String::from_utf8(data.clone()).expect("UTF-8"), *dropped)
            }
            Output::Exit { .. } => ("exit".to_owned(), 0),
        }
    }

    async fn is_pending(delivery: impl Future<Output = ()>) -> bool {
        timeout(Duration::from_secs(1), delivery).await.is_err()
    }

    #[tokio::test]
    async fn what_nobody_hears_is_kept_and_its_beginning_dropped() {
        let outlet = Arc::new(Outlet::default());
        let channel = outlet.open(Source::Process(7), 4);
        outlet
            .data(channel, Stream::Stdout, b"abc".to_vec())
            .handed()
            .await;
        outlet
            .data(channel, Stream::Stdout, b"def".to_vec())
            .handed()
            .await;
        outlet.exit(channel, END).handed().await;
        let first = outlet.subscribe();
        first.set_interest(BOTH);
        let told: Vec<_> = first.next().await.iter().map(text).collect();
        assert_eq!(told, [("cdef".to_owned(), 2), ("exit".to_owned(), 0)]);
        let second = outlet.subscribe();
        second.set_interest(BOTH);
        assert_eq!(second.subscriber.state().items.len(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_chunk_is_delivered_when_every_listener_was_handed_it() {
        let outlet = Arc::new(Outlet::default());
        let channel = outlet.open(Source::Process(7), 4);
        let (one, two) = (outlet.subscribe(), outlet.subscribe());
        one.set_interest(OUTPUT);
        two.set_interest(OUTPUT);
        let delivery = outlet.data(channel, Stream::Stderr, b"a".to_vec()).handed();
        tokio::pin!(delivery);
        assert!(is_pending(delivery.as_mut()).await);
        one.taken(one.next().await.len());
        assert!(is_pending(delivery.as_mut()).await);
        two.taken(two.next().await.len());
        assert!(!is_pending(delivery).await);
    }

    #[tokio::test(start_paused = true)]
    async fn who_stops_listening_keeps_nobody_waiting() {
        let outlet = Arc::new(Outlet::default());
        let channel = outlet.open(Source::Process(7), 4);
        let (one, two) = (outlet.subscribe(), outlet.subscribe());
        one.set_interest(OUTPUT);
        two.set_interest(OUTPUT);
        let delivery = outlet.data(channel, Stream::Stdout, b"a".to_vec()).handed();
        tokio::pin!(delivery);
        one.set_interest(Interest::default());
        assert!(is_pending(delivery.as_mut()).await);
        drop(two);
        assert!(!is_pending(delivery).await);
    }

    #[tokio::test]
    async fn all_that_is_kept_is_bounded() {
        let outlet = Arc::new(Outlet::default());
        let channels: Vec<_> = (0..3)
            .map(|pid| outlet.open(Source::Shell(pid), MOST_KEPT))
            .collect();
        let half = vec![0; MOST_KEPT / 2];
        outlet.data(channels[0], Stream::Stdout, half.clone());
        outlet.exit(channels[0], END);
        outlet.data(channels[1], Stream::Stdout, half.clone());
        // What has ended goes.
        outlet.data(channels[2], Stream::Stdout, half.clone());
        assert_eq!(outlet.state().kept, MOST_KEPT);
        outlet.data(channels[2], Stream::Stderr, half);
        assert_eq!(outlet.state().kept, MOST_KEPT);
        let listener = outlet.subscribe();
        listener.set_interest(Interest {
            shell_data: true,
            ..Interest::default()
        });
        let state = listener.subscriber.state();
        let lengths: Vec<_> = state
            .items
            .iter()
            .map(|output| match output {
                Output::Data {
                    source: Source::Shell(number),
                    data,
                    dropped,
                    ..
                } => (*number, data.len(), *dropped),
                other => unreachable!("not asked for: {other:?}"),
            })
            .collect();
        let half = MOST_KEPT / 2;
        assert_eq!(
            lengths,
            [
                (0, 0, half as u64),
                (1, half, 0),
                (2, half, 0),
                (2, 0, half as u64)
            ]
        );
        drop(state);
        assert_eq!(outlet.state().kept, 0);
    }
}
