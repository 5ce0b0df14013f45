//! A VM as a durable thing: it has a key and a directory, runs when something needs it, and holds
//! sessions.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard};

use super::client::Settings;
use super::emission::{Emission, Notice, ShutdownReason};
use super::sessions::Slot;
use crate::error::{Code, Error, Result};
use crate::ids::{SessionId, VmKey};
use crate::net::Policy;
use crate::store::{History, Page, Query, SessionRecord, Store};
use crate::vm::namespace::{self, BootOptions};
use crate::vm::{DynVm, VmEnd, VmError};

/// Database of a VM, in its directory.
pub(super) const DATABASE: &str = "vm.db";

/// One VM of this process, behind every handle of its key.
pub(super) struct Machine {
    key: VmKey,
    pub(super) dir: PathBuf,
    base_cache: PathBuf,
    /// Whether what interrupted deletions have left in this data directory was cleared.
    swept: Arc<AtomicBool>,
    /// What runs. Held while it boots or ends: both happen once, whoever asks.
    running: Arc<AsyncMutex<Running>>,
    pub(super) slots: Mutex<HashMap<SessionId, Arc<Slot>>>,
    pub(super) emission: Arc<Emission>,
    /// Open clients that have asked for this VM.
    users: Mutex<HashSet<u64>>,
}

#[derive(Default)]
struct Running {
    vm: Option<DynVm>,
    store: Option<Store>,
}

impl Machine {
    pub(super) fn new(key: VmKey, data_dir: &Path, swept: Arc<AtomicBool>) -> Self {
        Self {
            dir: data_dir.join("vms").join(key.id().to_string()),
            base_cache: data_dir.join("base"),
            key,
            running: Arc::default(),
            slots: Mutex::default(),
            swept,
            emission: Arc::default(),
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

    /// The running VM, booted if need be.
    pub(super) async fn vm(&self, settings: &Settings) -> Result<DynVm> {
        self.running(settings).await.map(|(vm, _)| vm)
    }

    /// The running VM, booted if need be, and the lock that keeps it so.
    async fn running(&self, settings: &Settings) -> Result<(DynVm, OwnedMutexGuard<Running>)> {
        let mut running = Arc::clone(&self.running).lock_owned().await;
        if let Some(vm) = &running.vm
            && vm.ended().borrow().is_none()
        {
            return Ok((Arc::clone(vm), running));
        }
        // A call that was under way when its client closed must not boot what nobody would end.
        if self.users().is_empty() {
            return Err(Error::new(
                Code::ClientClosed,
                format!("the client was closed before VM {} had booted", self.key),
            ));
        }
        let options = BootOptions {
            dir: self.dir.clone(),
            key: self.key_json(),
            base_cache: self.base_cache.clone(),
            agents: settings.agents.root().to_owned(),
            policy: Arc::new(Policy::new(&settings.loopback_exempt_ports)),
        };
        self.sweep();
        let emission = Arc::clone(&self.emission);
        // A boot that has begun is brought to its end, though whoever asked gives up: half of one
        // would hold the directory's lock against the next.
        let booting = tokio::spawn(async move {
            if running.vm.is_some() {
                tracing::warn!(key = %options.key, "the VM has ended on its own: it is booted again");
                end(&mut running, &emission, ShutdownReason::Error).await?;
            }
            let booted = namespace::boot(options).await?;
            let vm: DynVm = booted.vm;
            running.vm = Some(Arc::clone(&vm));
            emission.notify(&Notice::VmBooted {
                base_changed: booted.base_changed,
                layers_suspect: booted.layers_suspect,
            });
            watch(&vm, emission);
            Ok((vm, running))
        });
        let booted = booting.await.unwrap_or_else(|error| {
            Err(Error::new(
                Code::Internal,
                format!("a VM's boot ended: {error}"),
            ))
        })?;
        self.emission.noticed().await;
        Ok(booted)
    }

    /// Clears, beside the first boot, what interrupted deletions have left.
    fn sweep(&self) {
        if !self.swept.swap(true, Ordering::Relaxed)
            && let Some(vms) = self.dir.parent().map(Path::to_owned)
        {
            tokio::task::spawn_blocking(move || namespace::sweep(&vms));
        }
    }

    /// What a call on `vm` comes to: one whose VM was shut down under it was given up on purpose.
    pub(super) async fn outcome<T>(&self, vm: &DynVm, result: Result<T, VmError>) -> Result<T> {
        match result {
            Err(VmError::Ended(_)) if self.was_shut_down(vm).await => Err(Error::new(
                Code::Aborted,
                format!(
                    "VM {} was shut down during the call: by sleep, destroy or close",
                    self.key
                ),
            )),
            result => Ok(result?),
        }
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
            .ok_or_else(|| not_found(session, &self.key))
    }

    /// Every session, newest first. One that is still being made is none yet.
    pub(super) async fn records(&self) -> Result<Vec<SessionRecord>> {
        let Some(history) = self.history().await? else {
            return Ok(Vec::new());
        };
        let mut records = history.sessions().await?;
        records.retain(|record| record.agent_session_id.is_some());
        Ok(records)
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
    pub(super) async fn close_unused(&self) -> Result<()> {
        if !self.users().is_empty() {
            return Ok(());
        }
        self.shut_down(ShutdownReason::Close).await
    }

    /// Ends what runs. Everything that is kept stays.
    pub(super) async fn shut_down(&self, reason: ShutdownReason) -> Result<()> {
        self.close_agents().await;
        let mut running = self.running.lock().await;
        let ended = end(&mut running, &self.emission, reason).await;
        drop(running);
        self.emission.noticed().await;
        ended
    }

    /// Removes the VM with all its data.
    pub(super) async fn destroy(&self) -> Result<()> {
        self.close_agents().await;
        let mut running = self.running.lock().await;
        end(&mut running, &self.emission, ShutdownReason::Destroy).await?;
        namespace::delete(&self.dir, &self.key_json()).await?;
        drop(running);
        self.emission.noticed().await;
        Ok(())
    }

    fn users(&self) -> MutexGuard<'_, HashSet<u64>> {
        self.users.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn key_json(&self) -> String {
        // An array of strings: always representable.
        serde_json::to_string(&self.key).unwrap_or_default()
    }
}

/// The store first: the VM's lock, which makes this process its only writer, goes with the VM.
async fn end(running: &mut Running, emission: &Emission, reason: ShutdownReason) -> Result<()> {
    let store = running.store.take();
    let vm = running.vm.take();
    let closed = match store {
        Some(store) => {
            emission.detach();
            store.close().await
        }
        None => Ok(()),
    };
    if let Some(vm) = vm {
        let was_running = vm.ended().borrow().is_none();
        vm.shutdown().await;
        if was_running {
            emission.notify(&Notice::VmShutdown { reason });
        }
    }
    closed.map_err(Error::from)
}

/// Tells listeners when the VM dies on its own.
fn watch(vm: &DynVm, emission: Arc<Emission>) {
    let mut ended = vm.ended();
    tokio::spawn(async move {
        let died = match ended.wait_for(Option::is_some).await {
            Ok(end) => matches!(&*end, Some(VmEnd::Died(_))),
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
