//! A VM as a durable thing: it has a key and a directory, runs when something needs it, and holds
//! sessions.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard};
use tokio::time::timeout;

use super::awake::{Awake, Ending, Gate};
use super::client::Settings;
use super::emission::{Emission, Notice, ShutdownReason};
use super::life::all_told;
use super::limits;
use super::network::{self, Moment, NetworkRules};
use super::outlet::Outlet;
use super::processes::{self, Processes};
use super::secrets;
use super::sessions::Slot;
use super::shells::Shells;
use crate::agents::{Installed, Lease};
use crate::error::{Code, Error, Result};
use crate::ids::{SessionId, VmKey};
use crate::images;
use crate::store::{History, Page, Query, SessionRecord, Store};
use crate::vm::limits::out_of_memory;
use crate::vm::namespace::{self, BootOptions, HostLock};
use crate::vm::{DynVm, GuestPath, User, Vm, VmEnd, VmError};

/// Database of a VM, in its directory.
pub(super) const DATABASE: &str = "vm.db";

/// What ends takes no longer to be gone, most often: then it is known why.
const END_IS_NEAR: Duration = Duration::from_secs(1);

/// What ends in order has this long, beside what its agents have for a cancelled turn. Then the VM is ended
/// with all that is in it: nothing in there may keep it from that by not answering.
const ORDERLY: Duration = Duration::from_secs(15);

/// One VM of this process, behind every handle of its key.
pub(super) struct Machine {
    pub(super) key: VmKey,
    pub(super) dir: PathBuf,
    pub(super) base_cache: PathBuf,
    /// Whether what interrupted deletions have left in this data directory was cleared.
    swept: Arc<AtomicBool>,
    /// What runs. Held while it boots or ends: both happen once, whoever asks.
    running: Arc<AsyncMutex<Running>>,
    /// The VM that was booted last, for who can't wait for `running`.
    latest: Arc<Mutex<Option<Weak<dyn Vm>>>>,
    /// Every call that needs the VM passes it, before it takes any lock.
    gate: Arc<Gate>,
    /// One end of the VM at a time.
    ends: AsyncMutex<()>,
    pub(super) slots: Mutex<HashMap<SessionId, Arc<Slot>>>,
    pub(super) emission: Arc<Emission>,
    /// What callers have started in it.
    /// Of processes and shells.
    pub(super) outlet: Arc<Outlet>,
    pub(super) processes: Arc<Processes>,
    pub(super) shells: Arc<Shells>,
    /// Open clients that have asked for this VM.
    users: Mutex<HashSet<u64>>,
}

#[derive(Default)]
struct Running {
    vm: Option<DynVm>,
    store: Option<Store>,
    /// Makes this process the only writer of the store, also when the VM has died on its own.
    lock: Option<HostLock>,
    /// What the agents of the running VM, and what they left in its background, may run on.
    leases: Vec<Lease>,
    /// What the running VM's files are.
    image: Option<images::Image>,
    /// When the rules of its network were given.
    rules: Moment,
}

impl Running {
    /// Puts these rules into force, unless later ones are.
    async fn hold(&mut self, vm: &DynVm, network: &NetworkRules) -> Result<()> {
        let given = network.given_at();
        if given > self.rules {
            // Before: they come into force though the caller gives up.
            let before = std::mem::replace(&mut self.rules, given);
            if let Err(error) = vm.set_network(network.get()).await {
                self.rules = before;
                return Err(error.into());
            }
        }
        Ok(())
    }
}

impl Machine {
    pub(super) fn new(key: VmKey, data_dir: &Path, swept: Arc<AtomicBool>) -> Self {
        Self {
            dir: data_dir.join("vms").join(key.id().to_string()),
            base_cache: data_dir.join("base"),
            key,
            running: Arc::default(),
            latest: Arc::default(),
            gate: Gate::new(),
            ends: AsyncMutex::default(),
            slots: Mutex::default(),
            swept,
            emission: Arc::default(),
            outlet: Arc::default(),
            processes: Arc::new(Processes::new(processes::ENDED)),
            shells: Arc::default(),
            users: Mutex::default(),
        }
    }

    pub(super) fn add_user(&self, client: u64) {
        self.users().insert(client);
    }

    pub(super) fn is_used(&self) -> bool {
        !self.users().is_empty()
    }

    /// `true`: nobody else has it open.
    pub(super) fn remove_user(&self, client: u64) -> bool {
        let mut users = self.users();
        users.remove(&client) && users.is_empty()
    }

    /// Lets a call in that needs the VM, and keeps the VM awake for it. Waits for an end of the VM that
    /// is under way.
    pub(super) async fn awake(self: &Arc<Self>, settings: &Settings) -> Awake {
        self.enter(settings, false).await
    }

    /// The same for one that makes a session: it is told when the VM is to end, which then waits for it.
    pub(super) async fn awake_to_make(self: &Arc<Self>, settings: &Settings) -> Awake {
        self.enter(settings, true).await
    }

    async fn enter(self: &Arc<Self>, settings: &Settings, making: bool) -> Awake {
        let machine = Arc::downgrade(self);
        let idle = move |ending| {
            let Some(machine) = machine.upgrade() else {
                return;
            };
            tokio::spawn(async move {
                tracing::debug!(key = %machine.key, "the VM is idle: it is put to sleep");
                if let Err(error) = machine.end(ending, ShutdownReason::Sleep).await {
                    tracing::warn!(%error, key = %machine.key, "an idle VM did not end well");
                }
            });
        };
        self.gate.enter(making, settings.vm.sleep_after, idle).await
    }

    /// The running VM, booted if need be. To be called by who holds an [`Awake`] of this machine.
    pub(super) async fn vm(&self, settings: &Settings) -> Result<DynVm> {
        self.running(settings).await.map(|(vm, _)| vm)
    }

    /// The running VM, booted if need be, and the lock that keeps it so.
    async fn running(&self, settings: &Settings) -> Result<(DynVm, OwnedMutexGuard<Running>)> {
        let mut found = None;
        let (mut running, found) = loop {
            let mut running = Arc::clone(&self.running).lock_owned().await;
            // A call that was let in before: its VM is about to go, or gone.
            if self.gate.is_closed() {
                return Err(self.was_ended());
            }
            if let Some(vm) = running.vm.clone()
                && vm.still_runs().await
            {
                running.hold(&vm, &settings.vm.network).await?;
                return Ok((vm, running));
            }
            // A call that was under way when its client closed must not boot what nobody would end.
            if self.users().is_empty() {
                return Err(Error::new(
                    Code::ClientClosed,
                    format!("the client was closed before VM {} had booted", self.key),
                ));
            }
            if let Some(found) = found {
                break (running, found);
            }
            // What ends the VM does not wait for a download.
            drop(running);
            found = Some(tokio::select! {
                found = Box::pin(self.find_image(settings)) => found?,
                () = self.gate.closed() => return Err(self.was_ended()),
            });
        };
        let (image, lease) = found.map(|found| (found.image, found.lease)).unzip();
        // Before they are read: they may be exchanged in between.
        let rules = settings.vm.network.given_at();
        let options = BootOptions {
            dir: self.dir.clone(),
            key: self.key_json(),
            base_cache: self.base_cache.clone(),
            agents: settings.agents.root().to_owned(),
            policy: Arc::new(settings.policy()),
            denials: Some(network::tell(Arc::clone(&self.emission))),
            limits: settings.vm.limits.clone(),
            mounts: settings.vm.mounts.clone(),
            private: settings.private_directories(),
            image,
            secrets: settings.vm.secrets.clone(),
        };
        self.sweep();
        let (emission, latest) = (Arc::clone(&self.emission), Arc::clone(&self.latest));
        // A boot that has begun is brought to its end, though whoever asked gives up: half of one
        // would hold the directory's lock against the next.
        let booting = tokio::spawn(async move {
            if running.vm.is_some() {
                tracing::warn!(key = %options.key, "the VM has ended on its own: it is booted again");
                end(&mut running, &emission, ShutdownReason::Error).await?;
            }
            let booted = namespace::boot(options).await?;
            let vm: DynVm = booted.vm;
            *latest.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::downgrade(&vm));
            running.vm = Some(Arc::clone(&vm));
            running.rules = rules;
            running.lock = Some(booted.lock);
            running.image = lease;
            emission.notify(&Notice::VmBooted {
                base_changed: booted.base_changed,
                layers_suspect: booted.layers_suspect,
            });
            limits::watch(&vm, Arc::clone(&emission));
            secrets::watch(&vm, Arc::clone(&emission));
            watch(&vm, emission);
            Ok((vm, running))
        });
        let booted = booting.await.unwrap_or_else(|error| {
            Err(Error::new(
                Code::Internal,
                format!("a VM's boot ended: {error}"),
            ))
        })?;
        self.emission.noticed_of_this_run().await;
        Ok(booted)
    }

    /// The VM, if it runs. One that boots or ends at this moment is waited for.
    pub(super) async fn running_vm(&self) -> Option<DynVm> {
        let vm = self.running.lock().await.vm.clone()?;
        vm.still_runs().await.then_some(vm)
    }

    /// Puts these rules into force, if the VM runs. One that boots or ends at this moment is waited for.
    pub(super) async fn hold(&self, network: &NetworkRules) -> Result<bool> {
        let mut running = self.running.lock().await;
        match running.vm.clone() {
            Some(vm) if vm.still_runs().await => running.hold(&vm, network).await.map(|()| true),
            _ => Ok(false),
        }
    }

    /// `VM_BUSY` if another process has it open.
    pub(super) async fn check_not_elsewhere(&self) -> Result<()> {
        Ok(namespace::check_not_elsewhere(&self.dir, &self.key_json()).await?)
    }

    /// Clears, beside the first boot, what interrupted deletions have left.
    fn sweep(&self) {
        if !self.swept.swap(true, Ordering::Relaxed)
            && let Some(vms) = self.dir.parent().map(Path::to_owned)
        {
            tokio::task::spawn_blocking(move || namespace::sweep(&vms));
        }
    }

    /// Begins a call in the VM, booted if need be. If it was found dead before it was told of the call,
    /// then once more, in the next one.
    pub(super) async fn begin<T, F: Future<Output = Result<T, VmError>>>(
        &self,
        settings: &Settings,
        begin: impl Fn(DynVm) -> F,
    ) -> Result<(DynVm, T)> {
        let mut vm = self.vm(settings).await?;
        let mut begun = begin(Arc::clone(&vm)).await;
        if matches!(begun, Err(VmError::NotSent(_))) {
            vm = self.vm(settings).await?;
            begun = begin(Arc::clone(&vm)).await;
        }
        let begun = self.outcome(&vm, begun).await?;
        Ok((vm, begun))
    }

    /// What a call on `vm` comes to: one whose VM was shut down under it was given up on purpose.
    pub(super) async fn outcome<T>(&self, vm: &DynVm, result: Result<T, VmError>) -> Result<T> {
        match result {
            Err(VmError::Interrupted { op, path }) => {
                // Its end may be that of the whole VM, which answers nothing then.
                let answer = vm.stat(&GuestPath::home(), true, User::User).await;
                match answer {
                    Err(ended @ (VmError::Ended(_) | VmError::NotSent(_))) => {
                        Err(self.end_of_call(vm, ended).await)
                    }
                    _ => Err(VmError::Interrupted { op, path }.into()),
                }
            }
            Err(error) => Err(self.end_of_call(vm, error).await),
            Ok(result) => Ok(result),
        }
    }

    async fn end_of_call(&self, vm: &DynVm, error: VmError) -> Error {
        if !matches!(error, VmError::Ended(_) | VmError::NotSent(_)) {
            return error.into();
        }
        if self.was_shut_down(vm).await {
            return self.was_ended();
        }
        // Why is known when all of it is gone. What only seems to be its end is told as what it seems.
        let mut ended = vm.ended();
        let end = tokio::time::timeout(END_IS_NEAR, ended.wait_for(Option::is_some)).await;
        match end.as_ref().map(|end| end.as_ref().map(|end| &**end)) {
            Ok(Ok(Some(VmEnd::OutOfMemory))) => out_of_memory(&**vm).into(),
            _ => error.into(),
        }
    }

    /// What a call comes to whose VM is ended under it.
    pub(super) fn was_ended(&self) -> Error {
        Error::new(
            Code::Aborted,
            format!(
                "VM {} was shut down during the call: by sleep, destroy or close",
                self.key
            ),
        )
    }

    async fn was_shut_down(&self, vm: &DynVm) -> bool {
        // A shutdown that is under way holds the lock to its end.
        let _running = self.running.lock().await;
        matches!(&*vm.ended().borrow(), Some(VmEnd::Shutdown))
    }

    /// The store for writing, with the VM's lock held by the running VM.
    pub(super) async fn open_for_writing(&self, settings: &Settings) -> Result<(DynVm, Store)> {
        let (vm, mut running) = self.running(settings).await?;
        if let Some(store) = running.store.take_if(|store| store.ended().is_some()) {
            // Opening the file again is the way back from a full disk. Who called when it failed was
            // told why.
            self.emission.detach();
            drop(store.close().await);
        }
        if let Some(store) = &running.store {
            return Ok((vm, store.clone()));
        }
        let store = Store::open(self.dir.join(DATABASE), settings.durability).await?;
        self.clear_half_made(&vm, &store).await?;
        self.emission.attach(&store);
        running.store = Some(store.clone());
        drop(running);
        Ok((vm, store))
    }

    /// Keeps in the agent store what an agent of this VM runs on, until the VM has ended.
    pub(super) async fn keep_installed(&self, installed: &Installed) {
        let mut running = self.running.lock().await;
        for lease in installed.leases() {
            if !running.leases.contains(lease) {
                running.leases.push(lease.clone());
            }
        }
    }

    /// Clears away sessions whose host process died while they were made.
    async fn clear_half_made(&self, vm: &DynVm, store: &Store) -> Result<()> {
        for record in store.history().sessions().await? {
            if record.agent_session_id.is_none() {
                self.unmake(vm, store, record.id).await;
            }
        }
        Ok(())
    }

    /// What is kept, whether or not anything runs. `None`: there never was a session.
    pub(super) async fn history(&self) -> Result<Option<History>> {
        // Not the lock: a VM that boots or ends must not keep anybody from reading.
        if let Ok(running) = self.running.try_lock()
            && let Some(store) = &running.store
        {
            return Ok(Some(store.history()));
        }
        // A VM that runs was checked when it booted.
        namespace::check_owner(&self.dir).await?;
        Ok(History::open(self.dir.join(DATABASE)).await?)
    }

    /// The record of a session that exists.
    pub(super) async fn record(&self, session: SessionId) -> Result<SessionRecord> {
        let record = match self.history().await? {
            Some(history) => history.session(session).await?,
            None => None,
        };
        record
            .filter(|record| record.agent_session_id.is_some())
            .map(|record| self.as_it_is(record))
            .ok_or_else(|| not_found(session, &self.key))
    }

    /// Every session, newest first. One that is still being made is none yet.
    pub(super) async fn records(&self) -> Result<Vec<SessionRecord>> {
        let Some(history) = self.history().await? else {
            return Ok(Vec::new());
        };
        let mut records = history.sessions().await?;
        records.retain(|record| record.agent_session_id.is_some());
        Ok(records.into_iter().map(|r| self.as_it_is(r)).collect())
    }

    pub(super) async fn events(&self, session: SessionId, query: Query) -> Result<Page> {
        self.record(session).await?;
        let store = self
            .running
            .try_lock()
            .ok()
            .and_then(|running| running.store.clone());
        if let Some(store) = store {
            return Ok(store.events(session, query).await?);
        }
        match self.history().await? {
            Some(history) => Ok(history.events(session, query).await?),
            None => Err(not_found(session, &self.key)),
        }
    }

    /// Ends what runs, unless a client has asked for this VM meanwhile.
    pub(super) async fn close_unused(self: &Arc<Self>) -> Result<()> {
        match self.gate.close_unless(|| self.is_used()) {
            Some(ending) => self.end_to_end(ending, ShutdownReason::Close).await,
            None => Ok(()),
        }
    }

    /// Ends what runs. Everything that is kept stays, unless it is a [`ShutdownReason::Destroy`], which
    /// removes the VM with all its data.
    pub(super) async fn shut_down(self: &Arc<Self>, reason: ShutdownReason) -> Result<()> {
        self.end_to_end(self.gate.close(), reason).await
    }

    async fn end_to_end(self: &Arc<Self>, ending: Ending, reason: ShutdownReason) -> Result<()> {
        let machine = Arc::clone(self);
        // One that has begun is brought to its end, though whoever asked gives up.
        let ended = tokio::spawn(async move { machine.end(ending, reason).await });
        ended.await.unwrap_or_else(|error| {
            let problem = format!("a VM's end was cut short: {error}");
            Err(Error::new(Code::Internal, problem))
        })
    }

    async fn end(&self, ending: Ending, reason: ShutdownReason) -> Result<()> {
        let one_at_a_time = self.ends.lock().await;
        self.end_in_order(&ending).await;
        let mut running = self.running.lock().await;
        self.gate.stop_timer();
        let mut ended = end(&mut running, &self.emission, reason).await;
        if reason == ShutdownReason::Destroy && ended.is_ok() {
            // From what is deleted now.
            self.emission.drained().await;
            self.emission.clear();
            let deleted = namespace::delete(&self.dir, &self.key_json()).await;
            ended = deleted.map_err(Error::from);
        }
        let gone = (self.processes.all(), self.shells.lives.all());
        drop((running, one_at_a_time, ending));
        if reason == ShutdownReason::Close {
            // Whoever closed listens no more after this.
            self.emission.drained().await;
        }
        self.emission.noticed().await;
        all_told(&gone.0).await;
        all_told(&gone.1).await;
        if reason == ShutdownReason::Destroy && ended.is_ok() {
            self.processes.forget(&gone.0, &self.outlet);
            self.shells.lives.forget(&gone.1, &self.outlet);
        }
        ended
    }

    /// Ends what runs in the VM, the VM itself only if that takes too long.
    async fn end_in_order(&self, ending: &Ending) {
        let mut orderly = pin!(async {
            ending.made().await;
            tokio::join!(
                self.close_agents(),
                self.processes.end_all(),
                self.shells.end_all()
            );
        });
        let limit = ORDERLY.saturating_add(self.cancel_grace());
        if timeout(limit, &mut orderly).await.is_err() {
            tracing::warn!(key = %self.key, "what runs in the VM does not end: the VM is ended with it");
            if let Some(vm) = self.latest_vm() {
                vm.shutdown().await;
            }
            orderly.await;
        }
    }

    /// The longest that an agent which runs has to end a turn.
    fn cancel_grace(&self) -> Duration {
        let slots = self.slots();
        let live = slots.values().filter_map(|slot| slot.shown().upgrade());
        live.map(|live| live.cancel_grace).max().unwrap_or_default()
    }

    fn latest_vm(&self) -> Option<DynVm> {
        let latest = self.latest.lock().unwrap_or_else(PoisonError::into_inner);
        latest.as_ref()?.upgrade()
    }

    fn users(&self) -> MutexGuard<'_, HashSet<u64>> {
        self.users.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn key_json(&self) -> String {
        // An array of strings: always representable.
        serde_json::to_string(&self.key).unwrap_or_default()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.gate.stop_timer();
    }
}

/// The store first, then the VM, then the lock: nobody else may open what is still written.
async fn end(running: &mut Running, emission: &Emission, reason: ShutdownReason) -> Result<()> {
    let store = running.store.take();
    let vm = running.vm.take();
    let closed = match store {
        Some(store) => {
            let failed = store.ended().is_some();
            let closed = store.close().await;
            emission.detach();
            match closed {
                // Whoever wrote when it failed was told.
                Err(error) if failed => {
                    tracing::warn!(%error, "the store had failed before it was closed");
                    Ok(())
                }
                closed => closed,
            }
        }
        None => Ok(()),
    };
    if let Some(vm) = vm {
        let was_running = matches!(&*vm.ended().borrow(), None | Some(VmEnd::Shutdown));
        vm.shutdown().await;
        if was_running {
            emission.notify(&Notice::VmShutdown { reason });
        }
    }
    running.lock = None;
    running.leases.clear();
    running.image = None;
    closed.map_err(Error::from)
}

/// Tells listeners when the VM dies on its own.
fn watch(vm: &DynVm, emission: Arc<Emission>) {
    let mut ended = vm.ended();
    tokio::spawn(async move {
        let died = match ended.wait_for(Option::is_some).await {
            Ok(end) => matches!(&*end, Some(VmEnd::Died(_) | VmEnd::OutOfMemory)),
            Err(_gone) => false,
        };
        if died {
            emission.notify(&Notice::VmShutdown {
                reason: ShutdownReason::Error,
            });
        }
    });
}

fn not_found(session: SessionId, key: &VmKey) -> Error {
    Error::new(
        Code::SessionNotFound,
        format!("no session {session} in VM {key}: listPersistedSessions() lists them"),
    )
}
