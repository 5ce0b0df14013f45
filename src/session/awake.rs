//! What keeps a VM awake, and what keeps calls out of one that is just ending.
//!
//! A call that needs the VM passes the [`Gate`] at its entry, before it takes any lock, and holds an
//! [`Awake`] until it is over; so does a turn. Whoever ends the VM closes the gate first: with the
//! [`Ending`] come no new calls, and those that wait go on in the VM's next run. A VM that nothing has
//! kept awake for the time that its last caller set ends by itself, which is decided under the lock that
//! calls enter under: it never meets a call.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep_until};

/// Of one VM.
pub(super) struct Gate {
    state: Mutex<State>,
    /// Changed under the lock of `state` only.
    ends: watch::Sender<Ends>,
    /// The last session that was being made is made, or given up.
    made: Notify,
    /// The timer has something else to wait for.
    retimed: Notify,
}

struct State {
    awake: usize,
    /// Sessions that are being made, which end in an orderly way before the VM does.
    making: usize,
    /// When the last that kept the VM awake was over.
    idle_since: Instant,
    /// What the latest caller wants. `None`: never.
    sleep_after: Option<Duration>,
    timer: Option<AbortHandle>,
    /// The timer waits for the VM to become idle.
    timer_waits: bool,
}

/// Ends of the VM.
#[derive(Debug, Clone, Copy, Default)]
struct Ends {
    begun: u64,
    /// Some of them may wait for each other.
    under_way: usize,
}

/// Keeps the VM awake.
pub(super) struct Awake {
    gate: Arc<Gate>,
    making: bool,
    ends: watch::Receiver<Ends>,
    /// Ends that had begun when this entered.
    before: u64,
}

/// Keeps the gate closed.
pub(super) struct Ending {
    gate: Arc<Gate>,
}

/// What a timer is to do.
enum Next {
    /// Wait until then, or until it is retimed.
    At(Instant),
    /// Wait until it is retimed.
    Later,
    End(Ending),
}

impl Gate {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State {
                awake: 0,
                making: 0,
                idle_since: Instant::now(),
                sleep_after: None,
                timer: None,
                timer_waits: false,
            }),
            ends: watch::Sender::default(),
            made: Notify::new(),
            retimed: Notify::new(),
        })
    }

    /// Waits for an end of the VM that is under way. With a `sleep_after`, `idle` is what ends the VM
    /// once it has been idle for so long.
    pub(super) async fn enter<Idle>(
        self: &Arc<Self>,
        making: bool,
        sleep_after: Option<Duration>,
        idle: Idle,
    ) -> Awake
    where
        Idle: FnOnce(Ending) + Send + 'static,
    {
        let mut ends = self.ends.subscribe();
        loop {
            // An error: the sender is gone, which is in `self`.
            let _ = ends.wait_for(|ends| ends.under_way == 0).await;
            let mut state = self.state();
            let Ends { begun, under_way } = *self.ends.borrow();
            if under_way > 0 {
                continue;
            }
            state.awake += 1;
            state.making += usize::from(making);
            if state.sleep_after != sleep_after {
                state.sleep_after = sleep_after;
                self.retimed.notify_one();
            }
            if state.timer.is_none() && sleep_after.is_some() {
                state.timer_waits = false;
                let timer = tokio::spawn(Arc::clone(self).time(idle));
                state.timer = Some(timer.abort_handle());
            }
            drop(state);
            return Awake {
                gate: Arc::clone(self),
                making,
                ends,
                before: begun,
            };
        }
    }

    /// No call enters any more, until this and every other [`Ending`] is dropped.
    pub(super) fn close(self: &Arc<Self>) -> Ending {
        self.closing(&self.state())
    }

    /// The same unless the VM is needed, which is asked when no call can enter.
    pub(super) fn close_unless(self: &Arc<Self>, needed: impl FnOnce() -> bool) -> Option<Ending> {
        let state = self.state();
        (!needed()).then(|| self.closing(&state))
    }

    fn closing(self: &Arc<Self>, _locked: &MutexGuard<'_, State>) -> Ending {
        self.ends.send_modify(|ends| {
            ends.begun += 1;
            ends.under_way += 1;
        });
        Ending {
            gate: Arc::clone(self),
        }
    }

    pub(super) fn is_closed(&self) -> bool {
        self.ends.borrow().under_way > 0
    }

    /// Resolves when an end of the VM is under way.
    pub(super) async fn closed(&self) {
        // An error: the sender is gone, which is in `self`.
        let _ = self
            .ends
            .subscribe()
            .wait_for(|ends| ends.under_way > 0)
            .await;
    }

    /// Ends the timer: nothing runs that could sleep. The next call starts one again.
    pub(super) fn stop_timer(&self) {
        let timer = self.state().timer.take();
        if let Some(timer) = timer {
            timer.abort();
        }
    }

    /// One task for as long as a VM runs: a call that comes and goes leaves it asleep.
    async fn time(self: Arc<Self>, idle: impl FnOnce(Ending) + Send) {
        loop {
            match self.next() {
                Next::At(deadline) => tokio::select! {
                    () = sleep_until(deadline) => {}
                    () = self.retimed.notified() => {}
                },
                Next::Later => self.retimed.notified().await,
                Next::End(ending) => return idle(ending),
            }
        }
    }

    fn next(self: &Arc<Self>) -> Next {
        let mut state = self.state();
        let Some(sleep_after) = state.sleep_after else {
            return Next::Later;
        };
        if state.awake > 0 {
            state.timer_waits = true;
            return Next::Later;
        }
        match state.idle_since.checked_add(sleep_after) {
            // Past what the clock can tell.
            None => Next::Later,
            Some(deadline) if deadline > Instant::now() => Next::At(deadline),
            Some(_) => Next::End(self.closing(&state)),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Awake {
    /// Whether an end of the VM has begun since this entered.
    pub(super) fn has_met_an_end(&self) -> bool {
        self.ends.borrow().begun != self.before
    }

    /// Resolves when an end of the VM has begun.
    pub(super) async fn ending(&self) {
        let mut ends = self.ends.clone();
        // An error: the sender is gone, which is in `self`.
        let _ = ends.wait_for(|ends| ends.begun != self.before).await;
    }
}

impl Drop for Awake {
    fn drop(&mut self) {
        let mut state = self.gate.state();
        state.awake -= 1;
        if state.awake == 0 {
            state.idle_since = Instant::now();
            if std::mem::take(&mut state.timer_waits) {
                self.gate.retimed.notify_one();
            }
        }
        if self.making {
            state.making -= 1;
            if state.making == 0 {
                self.gate.made.notify_waiters();
            }
        }
    }
}

impl Ending {
    /// Waits until no session is being made any more: each was told by [`Awake::ending`].
    pub(super) async fn made(&self) {
        loop {
            let made = self.gate.made.notified();
            if self.gate.state().making == 0 {
                return;
            }
            made.await;
        }
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        let _locked = self.gate.state();
        self.gate.ends.send_modify(|ends| ends.under_way -= 1);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::task::yield_now;
    use tokio::time::{advance, sleep, timeout};

    use super::*;

    const MINUTE: Duration = Duration::from_mins(1);

    /// A gate whose VM ends at once when it may, and how often it did.
    struct Vm {
        gate: Arc<Gate>,
        ends: Arc<AtomicUsize>,
    }

    impl Vm {
        fn new() -> Self {
            Self {
                gate: Gate::new(),
                ends: Arc::default(),
            }
        }

        async fn enter(&self, sleep_after: Option<Duration>) -> Awake {
            self.enter_as(false, sleep_after).await
        }

        async fn enter_as(&self, making: bool, sleep_after: Option<Duration>) -> Awake {
            let (gate, ends) = (Arc::downgrade(&self.gate), Arc::clone(&self.ends));
            let idle = move |ending| {
                ends.fetch_add(1, Ordering::Relaxed);
                gate.upgrade().expect("a gate").stop_timer();
                drop(ending);
            };
            let entered = self.gate.enter(making, sleep_after, idle);
            timeout(MINUTE / 2, entered).await.expect("open")
        }

        async fn ends_after(&self, time: Duration) -> usize {
            for _ in 0..8 {
                yield_now().await;
            }
            advance(time).await;
            for _ in 0..8 {
                yield_now().await;
            }
            self.ends.load(Ordering::Relaxed)
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_vm_sleeps_once_when_it_was_idle_for_so_long() {
        let vm = Vm::new();
        drop(vm.enter(Some(MINUTE)).await);
        assert_eq!(vm.ends_after(Duration::from_millis(59_999)).await, 0);
        assert_eq!(vm.ends_after(Duration::from_millis(1)).await, 1);
        assert_eq!(vm.ends_after(MINUTE * 10).await, 1);
        drop(vm.enter(Some(MINUTE)).await);
        assert_eq!(vm.ends_after(MINUTE).await, 2);
    }

    #[tokio::test(start_paused = true)]
    async fn every_call_begins_the_time_anew() {
        let vm = Vm::new();
        for _ in 0..5 {
            drop(vm.enter(Some(MINUTE)).await);
            assert_eq!(vm.ends_after(MINUTE / 2).await, 0);
        }
        assert_eq!(vm.ends_after(MINUTE / 2).await, 1);
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_sleeps_while_a_call_is_under_way() {
        let vm = Vm::new();
        let (first, second) = (vm.enter(Some(MINUTE)).await, vm.enter(Some(MINUTE)).await);
        assert_eq!(vm.ends_after(MINUTE * 10).await, 0);
        drop(first);
        assert_eq!(vm.ends_after(MINUTE * 10).await, 0);
        drop(second);
        assert_eq!(vm.ends_after(MINUTE / 2).await, 0);
        assert_eq!(vm.ends_after(MINUTE / 2).await, 1);
    }

    #[tokio::test(start_paused = true)]
    async fn the_latest_callers_time_counts() {
        let vm = Vm::new();
        drop(vm.enter(None).await);
        drop(vm.enter(Some(MINUTE * 10)).await);
        assert_eq!(vm.ends_after(MINUTE).await, 0);
        drop(vm.enter(Some(MINUTE)).await);
        assert_eq!(vm.ends_after(MINUTE).await, 1);
        drop(vm.enter(Some(MINUTE)).await);
        drop(vm.enter(None).await);
        assert_eq!(vm.ends_after(MINUTE * 1000).await, 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_time_that_no_clock_can_tell_is_never() {
        let vm = Vm::new();
        drop(vm.enter(Some(Duration::MAX)).await);
        assert_eq!(vm.ends_after(MINUTE).await, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn calls_wait_for_the_last_of_several_ends() {
        let vm = Vm::new();
        let (first, second) = (vm.gate.close(), vm.gate.close());
        let entered = vm.gate.enter(false, None, drop);
        tokio::pin!(entered);
        drop(first);
        assert!(timeout(MINUTE, &mut entered).await.is_err());
        drop(second);
        assert!(timeout(MINUTE, &mut entered).await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn an_end_waits_for_the_sessions_that_are_being_made_and_for_nothing_else() {
        let vm = Vm::new();
        let _call = vm.enter(None).await;
        let making = vm.enter_as(true, None).await;
        let ending = vm.gate.close();
        let made = tokio::spawn(async move { ending.made().await });
        // It is told at once.
        timeout(MINUTE, making.ending()).await.expect("told");
        sleep(MINUTE).await;
        assert!(!made.is_finished());
        drop(making);
        timeout(MINUTE, made)
            .await
            .expect("made")
            .expect("no panic");
    }
}
