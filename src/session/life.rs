//! The life of what a caller has started in a VM, a process or a shell: from its start to when listeners
//! have been told of its end, and for a while beyond.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::watch;
use tokio::time::Instant;

use super::client::{VmHandle, closed_error};
use super::outlet::{Channel, End, Outlet};
use crate::error::Result;
use crate::vm::{Command, DynVm, Exit, GuestPath, KILL_AGAIN, User, VmError, exited};

/// How long what runs has to end when its VM is put to sleep, closed or destroyed.
pub(super) const GRACE: Duration = Duration::from_secs(1);

/// What a caller has started.
#[derive(Debug, Clone)]
pub struct Started {
    pub pid: u32,
    pub argv: Vec<String>,
    pub cwd: GuestPath,
    pub user: User,
    /// Milliseconds since the epoch.
    pub started_at: u64,
    /// `None` while it runs.
    pub end: Option<End>,
}

pub(super) struct Life {
    pub(super) pid: u32,
    pub(super) channel: Channel,
    /// In it a process's number is its own until it has ended.
    vm: DynVm,
    command: Command,
    started_at: u64,
    stage: watch::Sender<Stage>,
    /// Its VM is being ended.
    with_vm: AtomicBool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Running,
    /// What it has written is yet to be handed over.
    Exited,
    /// Listeners have been told everything.
    Ended(End),
}

/// What it writes.
pub(super) trait Output {
    /// Hands over what comes, to the end.
    fn pump(&mut self, outlet: &Outlet, channel: Channel) -> impl Future<Output = ()> + Send;

    /// Hands over what is there when it has exited. Not until nothing comes: what it left running may
    /// write faster than anybody reads.
    fn drain(&mut self, outlet: &Outlet, channel: Channel) -> impl Future<Output = ()> + Send;
}

impl Life {
    pub(super) fn new(vm: DynVm, pid: u32, command: Command, channel: Channel) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        Self {
            pid,
            channel,
            vm,
            command,
            started_at: now.map_or(0, |now| u64::try_from(now.as_millis()).unwrap_or(0)),
            stage: watch::Sender::new(Stage::Running),
            with_vm: AtomicBool::new(false),
        }
    }

    pub(super) fn view(&self) -> Started {
        let stage = *self.stage.borrow();
        Started {
            pid: self.pid,
            argv: self.command.argv.clone(),
            cwd: self.command.cwd.clone(),
            user: self.command.user,
            started_at: self.started_at,
            end: match stage {
                Stage::Ended(end) => Some(end),
                Stage::Running | Stage::Exited => None,
            },
        }
    }

    pub(super) fn runs(&self) -> bool {
        *self.stage.borrow() == Stage::Running
    }

    /// Resolves when it has exited.
    pub(super) fn gone(&self) -> impl Future<Output = ()> + Send + use<> {
        // Held by the future: its end would be an end.
        let mut stage = self.stage.subscribe();
        async move {
            // Without a sender nobody asks any more.
            let _ = stage.wait_for(|stage| *stage != Stage::Running).await;
        }
    }

    /// Resolves when listeners have been told of its end.
    pub(super) async fn told(&self) -> Option<End> {
        let mut stage = self.stage.subscribe();
        // The sender is in `self`.
        match stage
            .wait_for(|stage| matches!(stage, Stage::Ended(_)))
            .await
            .as_deref()
        {
            Ok(Stage::Ended(end)) => Some(*end),
            _ => None,
        }
    }

    /// Signals it with its process group. What has ended hears nothing.
    pub(super) async fn signal(&self, signal: i32) -> Result<()> {
        if !self.runs() {
            return Ok(());
        }
        or_ended(self.vm.signal(self.pid, signal).await)
    }

    /// Kills it with everything in its session.
    pub(super) async fn kill(&self) -> Result<()> {
        if !self.runs() {
            return Ok(());
        }
        or_ended(self.vm.kill(self.pid).await)
    }

    /// Asks it to end. What is stopped hears of it when it goes on.
    pub(super) async fn ask_to_end(&self, signal: i32) {
        for signal in [signal, libc::SIGCONT] {
            if let Err(error) = self.signal(signal).await {
                tracing::debug!(%error, pid = self.pid, signal, "not asked to end");
            }
        }
    }

    /// The same because its VM is going to be ended.
    pub(super) fn ends_with_vm(&self) {
        self.with_vm.store(true, Ordering::Relaxed);
    }

    /// Hands over what it writes, and its end. What is to be done before it counts as ended is the
    /// caller's, and then [`Lives::ended`].
    pub(super) async fn attend(
        &self,
        outlet: &Outlet,
        exit: &mut watch::Receiver<Option<Exit>>,
        output: &mut impl Output,
        timeout: Option<Duration>,
    ) -> End {
        let mut timed_out = false;
        let exit = {
            let deadline = tokio::time::sleep(timeout.unwrap_or(Duration::MAX));
            let pump = output.pump(outlet, self.channel);
            tokio::pin!(pump, deadline);
            let mut is_read = false;
            loop {
                tokio::select! {
                    exit = exited(exit) => break exit,
                    () = &mut pump, if !is_read => is_read = true,
                    () = &mut deadline => {
                        timed_out = true;
                        // Its processes may make others meanwhile.
                        deadline.as_mut().reset(Instant::now() + KILL_AGAIN);
                        if let Err(error) = self.kill().await {
                            tracing::debug!(%error, pid = self.pid, "not killed: its VM ends");
                        }
                    }
                }
            }
        };
        if exit.is_none() {
            // Its VM ends or has died, and kills whatever is in it: until then it may write.
            drop(self.vm.ended().wait_for(Option::is_some).await);
        }
        let end = End {
            exit: exit.unwrap_or(Exit::Signal(libc::SIGKILL)),
            timed_out,
            with_vm: self.with_vm.load(Ordering::Relaxed) || exit.is_none(),
        };
        self.stage.send_replace(Stage::Exited);
        output.drain(outlet, self.channel).await;
        outlet.exit(self.channel, end).handed().await;
        end
    }
}

/// Resolves when listeners have been told of the end of each: for who has ended their VM.
pub(super) async fn all_told<K: Sync, T: AsRef<Life> + Send + Sync>(all: &[(K, Arc<T>)]) {
    for (_, own) in all {
        (**own).as_ref().told().await;
    }
}

/// A VM that ends takes with it what runs in it.
fn or_ended(done: Result<(), VmError>) -> Result<()> {
    match done {
        Err(VmError::Ended(_) | VmError::NotSent(_)) => Ok(()),
        done => Ok(done?),
    }
}

impl VmHandle {
    /// Waits until listeners have been told of an end.
    pub(super) async fn told(&self, life: &Life) -> Result<End> {
        let mut closed = self.client.closed();
        let told = async {
            let end = life.told().await;
            // Also those who came after it had ended, with what was kept for them.
            self.machine.outlet.handed().await;
            end.ok_or_else(|| self.machine.was_ended())
        };
        tokio::select! {
            biased;
            end = told => end,
            _ = closed.wait_for(|closed| *closed) => Err(closed_error()),
        }
    }
}

/// Those of one kind in a VM, by name: what runs, and what has ended last.
pub(super) struct Lives<K, T> {
    known: Mutex<Known<K, T>>,
    /// Most that have ended.
    most: usize,
}

struct Known<K, T> {
    by_name: BTreeMap<K, Arc<T>>,
    /// The oldest first.
    ended: VecDeque<(K, Arc<T>)>,
}

impl<K: Copy + Ord, T: AsRef<Life>> Lives<K, T> {
    pub(super) const fn new(most: usize) -> Self {
        let known = Known {
            by_name: BTreeMap::new(),
            ended: VecDeque::new(),
        };
        Self {
            known: Mutex::new(known),
            most,
        }
    }

    pub(super) fn get(&self, name: K) -> Option<Arc<T>> {
        self.known().by_name.get(&name).cloned()
    }

    pub(super) fn all(&self) -> Vec<(K, Arc<T>)> {
        let known = self.known();
        let all = known.by_name.iter();
        all.map(|(name, own)| (*name, Arc::clone(own))).collect()
    }

    pub(super) fn running(&self) -> Vec<Arc<T>> {
        let known = self.known();
        let running = known
            .by_name
            .values()
            .filter(|own| (***own).as_ref().runs());
        running.cloned().collect()
    }

    /// The number of a process that has ended may come again: then the new one has its place.
    pub(super) fn insert(&self, name: K, new: &Arc<T>, outlet: &Outlet) {
        let mut known = self.known();
        if let Some(old) = known.by_name.insert(name, Arc::clone(new)) {
            let before = known.ended.len();
            known.ended.retain(|(_, ended)| !Arc::ptr_eq(ended, &old));
            // Otherwise listeners are still to be told of what it wrote.
            if known.ended.len() < before {
                outlet.forget((*old).as_ref().channel);
            }
        }
    }

    /// Listeners have been told of this end.
    pub(super) fn ended(&self, name: K, own: &Arc<T>, end: End, outlet: &Outlet) {
        let mut known = self.known();
        let present = known.by_name.get(&name);
        if present.is_none_or(|present| !Arc::ptr_eq(present, own)) {
            // Another has its name already, or its VM was destroyed.
            outlet.forget((**own).as_ref().channel);
        } else {
            known.ended.push_back((name, Arc::clone(own)));
            if known.ended.len() > self.most
                && let Some((name, oldest)) = known.ended.pop_front()
            {
                known.by_name.remove(&name);
                outlet.forget((*oldest).as_ref().channel);
            }
        }
        drop(known);
        (**own).as_ref().stage.send_replace(Stage::Ended(end));
    }

    /// Nothing is known of these any more: for who has destroyed their VM.
    pub(super) fn forget(&self, gone: &[(K, Arc<T>)], outlet: &Outlet) {
        let mut known = self.known();
        for (name, own) in gone {
            let present = known.by_name.get(name);
            if present.is_some_and(|present| Arc::ptr_eq(present, own)) {
                known.by_name.remove(name);
                known.ended.retain(|(_, ended)| !Arc::ptr_eq(ended, own));
                outlet.forget((**own).as_ref().channel);
            }
        }
    }

    fn known(&self) -> MutexGuard<'_, Known<K, T>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
