//! A VM as a durable thing: it has a key and a directory, runs when something needs it, and holds
//! sessions.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;
use tokio::sync::{Mutex as AsyncMutex, Notify, OwnedMutexGuard};
use tokio::task::JoinSet;

use super::client::Settings;
use super::emission::{Emission, Notice, ShutdownReason};
use super::environment;
use super::event::{self, TurnEnd};
use super::live::{LiveSession, cancelled_turn};
use super::options::{PermissionPolicy, SessionOptions};
use super::start::{self, Starting};
use super::turn::TurnResult;
use super::updates::Updates;
use crate::agents::{self, Agent, SessionSpec};
use crate::error::{Code, Error, Result};
use crate::ids::{Seq, SessionId, VmKey};
use crate::net::Policy;
use crate::store::{History, NewSession, Page, Query, SessionChange, SessionRecord, Status, Store};
use crate::vm::exec::{ExecOptions, exec};
use crate::vm::namespace::{self, BootOptions};
use crate::vm::{DynVm, GuestPath, User, VmEnd, VmError};

/// Database of a VM, in its directory.
const DATABASE: &str = "vm.db";

/// One VM of this process, behind every handle of its key.
pub(super) struct Machine {
    key: VmKey,
    dir: PathBuf,
    base_cache: PathBuf,
    /// What runs. Held while it boots or ends: both happen once, whoever asks.
    running: Arc<AsyncMutex<Running>>,
    sessions: Mutex<HashMap<SessionId, Arc<Slot>>>,
    pub(super) emission: Arc<Emission>,
    /// Open clients that have asked for this VM.
    users: Mutex<HashSet<u64>>,
}

#[derive(Default)]
struct Running {
    vm: Option<DynVm>,
    store: Option<Store>,
}

/// A session's agent, or its place.
#[derive(Default)]
struct Slot {
    /// Held while an agent starts or ends: a session resumes once, whoever asks, and never has two.
    agent: AsyncMutex<Option<Arc<LiveSession>>>,
    /// Ends the starts that are under way.
    stop: Notify,
    /// Prompts that have not reached an agent yet.
    prompts: AtomicUsize,
}

/// A created session, as its caller gets it.
#[derive(Debug)]
pub struct CreatedSession {
    pub id: SessionId,
    pub agent: String,
    pub capabilities: Option<Box<RawValue>>,
    pub agent_info: Option<Box<RawValue>>,
}

impl Machine {
    pub(super) fn new(key: VmKey, data_dir: &std::path::Path) -> Self {
        Self {
            dir: data_dir.join("vms").join(key.id().to_string()),
            base_cache: data_dir.join("base"),
            key,
            running: Arc::default(),
            sessions: Mutex::default(),
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
    async fn open_for_writing(&self, settings: &Settings) -> Result<(DynVm, Store)> {
        let (vm, mut running) = self.running(settings).await?;
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

    pub(super) async fn create_session(
        &self,
        settings: &Settings,
        agent: Agent,
        options: SessionOptions,
        abort: impl Future<Output = ()> + Send,
    ) -> Result<CreatedSession> {
        let stop = async {
            abort.await;
            Error::new(Code::Aborted, "createSession was aborted")
        };
        tokio::pin!(stop);
        let installed = tokio::select! {
            installed = self.installed(settings, agent) => installed?,
            error = &mut stop => return Err(error),
        };
        // Not cut short: a boot that is dropped half-way would leave the VM busy for a moment.
        let (vm, store) = self.open_for_writing(settings).await?;
        vm.create_dir_all(&options.cwd, User::User)
            .await
            .map_err(start::bad_cwd)?;
        let session = SessionId::generate();
        let launch = plan(&installed, session, &options.cwd, &options.env);
        let made = self.make(
            settings, &vm, &store, session, agent, &options, &launch, &mut stop,
        );
        match made.await {
            Ok(created) => Ok(created),
            Err(error) => {
                self.unmake(&vm, &store, session).await;
                Err(error)
            }
        }
    }

    #[expect(clippy::too_many_arguments, reason = "one caller, whose body it is")]
    async fn make(
        &self,
        settings: &Settings,
        vm: &DynVm,
        store: &Store,
        session: SessionId,
        agent: Agent,
        options: &SessionOptions,
        launch: &agents::Launch,
        stop: &mut (dyn Future<Output = Error> + Send + Unpin),
    ) -> Result<CreatedSession> {
        // First, so that whatever is made after it is found by the next opener if this process dies.
        // Without the agent's own id it does not count as a session yet.
        let record = NewSession {
            id: session,
            agent_type: agent.name().to_owned(),
            agent_session_id: None,
            title: None,
            cwd: options.cwd.as_str().to_owned(),
            status: Status::Open,
            capabilities: text(None),
            agent_info: text(None),
            settings: settings_json(options),
        };
        store.insert_session(record).await?;
        if options.persist_env {
            environment::save(&self.dir, session, &options.env).await?;
        }
        vm.create_dir_all(&launch.state_dir, User::User).await?;
        let updates = Updates::new(session, store.clone(), options.permission_policy);
        let cwd = options.cwd.clone();
        let limit = settings.max_message_bytes;
        let starting =
            start::start(vm, agent.name(), launch, cwd, updates, limit, &mut *stop).await?;
        let opened = async {
            self.emission.activate(session, Seq::default());
            let agent_session = starting.new_session().await?;
            let change = SessionChange {
                agent_session_id: Some(agent_session.clone()),
                capabilities: Some(text(starting.initialized.agent_capabilities.as_deref())),
                agent_info: Some(text(starting.initialized.agent_info.as_deref())),
                ..SessionChange::default()
            };
            store.update_session(session, change).await?;
            store.flush(true).await?;
            Ok::<_, Error>(agent_session)
        };
        let opened = tokio::select! {
            opened = opened => opened,
            error = stop => Err(error),
        };
        let agent_session = match opened {
            Ok(agent_session) => agent_session,
            Err(error) => {
                starting.process.kill().await;
                return Err(error);
            }
        };
        let created = CreatedSession {
            id: session,
            agent: agent.name().to_owned(),
            capabilities: starting.initialized.agent_capabilities.clone(),
            agent_info: starting.initialized.agent_info.clone(),
        };
        let live = self.live_session(session, agent, agent_session, starting, store);
        *self.slot(session).agent.lock().await = Some(live);
        Ok(created)
    }

    /// Takes back everything of a session that could not be made.
    async fn unmake(&self, vm: &DynVm, store: &Store, session: SessionId) {
        let command = format!("rm -rf -- '{}'", agents::state_dir(session).as_str());
        let removed = exec(vm, &command, ExecOptions::default()).await;
        if let Err(error) = removed {
            tracing::debug!(%error, %session, "the state of a failed session goes with its VM");
        }
        if let Err(error) = environment::remove(&self.dir, session).await {
            tracing::warn!(%error, %session, "the environment of a failed session stays");
        }
        if let Err(error) = store.delete_session(session).await {
            tracing::warn!(%error, %session, "the record of a failed session stays, unlisted");
        }
    }

    fn live_session(
        &self,
        session: SessionId,
        agent: Agent,
        agent_session: String,
        starting: Starting,
        store: &Store,
    ) -> Arc<LiveSession> {
        Arc::new(LiveSession {
            id: session,
            agent: agent.name().to_owned(),
            agent_session,
            process: starting.process,
            updates: starting.updates,
            store: store.clone(),
            emission: Arc::clone(&self.emission),
            turn: Mutex::default(),
        })
    }

    async fn installed(&self, settings: &Settings, agent: Agent) -> Result<agents::Installed> {
        let emission = Arc::clone(&self.emission);
        let progress = move |progress| emission.notify(&Notice::InstallProgress(progress));
        let installed = settings
            .agents
            .ensure(agent, settings.auto_install, &progress)
            .await?;
        Ok(installed)
    }

    pub(super) async fn prompt(
        &self,
        settings: &Settings,
        session: SessionId,
        blocks: Vec<Value>,
    ) -> Result<TurnResult> {
        let slot = self.slot(session);
        let stop = slot.stop.notified();
        slot.prompts.fetch_add(1, Ordering::Relaxed);
        let begun = async {
            let mut agent = slot.agent.lock().await;
            let live = self.start_in(&mut agent, settings, session, None, stop);
            // Begun under the lock: a cancel or a close that waits for it finds the turn.
            live.await?.prompt(blocks)
        };
        let begun = begun.await;
        slot.prompts.fetch_sub(1, Ordering::Relaxed);
        match begun {
            Ok(turn) => turn.await,
            Err(error) if error.code == Code::Aborted => Ok(cancelled_turn()),
            Err(error) => Err(error),
        }
    }

    /// The session's agent, started again if it does not run. `env` replaces what was kept.
    pub(super) async fn resume(
        &self,
        settings: &Settings,
        session: SessionId,
        env: Option<environment::Environment>,
    ) -> Result<()> {
        let slot = self.slot(session);
        let stop = slot.stop.notified();
        let mut agent = slot.agent.lock().await;
        let started = self.start_in(&mut agent, settings, session, env, stop);
        started.await.map(drop)
    }

    async fn start_in(
        &self,
        slot: &mut Option<Arc<LiveSession>>,
        settings: &Settings,
        session: SessionId,
        env: Option<environment::Environment>,
        stop: impl Future<Output = ()> + Send,
    ) -> Result<Arc<LiveSession>> {
        if let Some(live) = slot {
            if !live.is_ending() {
                return Ok(Arc::clone(live));
            }
            live.process.ended().await;
            *slot = None;
        }
        let stop = async {
            stop.await;
            let problem = format!("session {session} was closed or cancelled while it resumed");
            Error::new(Code::Aborted, problem)
        };
        tokio::pin!(stop);
        let record = match self.record(session).await {
            Ok(record) => record,
            Err(error) => {
                self.sessions().remove(&session);
                return Err(error);
            }
        };
        let agent = Agent::parse(&record.agent_type)?;
        let installed = tokio::select! {
            installed = self.installed(settings, agent) => installed?,
            error = &mut stop => return Err(error),
        };
        let (vm, store) = self.open_for_writing(settings).await?;
        let kept = serde_json::from_str(&record.settings).unwrap_or(KeptSettings::STRICTEST);
        let env = match env {
            Some(env) => {
                if kept.persist_env {
                    environment::save(&self.dir, session, &env).await?;
                }
                env
            }
            None => environment::load(&self.dir, session).await?,
        };
        let cwd = GuestPath::new(&record.cwd)
            .map_err(|problem| Error::invalid_argument("cwd", problem))?;
        vm.create_dir_all(&cwd, User::User)
            .await
            .map_err(start::bad_cwd)?;
        let launch = plan(&installed, session, &cwd, &env);
        self.emission.activate(session, store.committed(session)?);
        let updates = Updates::new(session, store.clone(), kept.permission_policy);
        self.end_interrupted_turn(&store, &record, &updates).await?;
        let limit = settings.max_message_bytes;
        let name = &record.agent_type;
        let starting = start::start(&vm, name, &launch, cwd, updates, limit, &mut stop).await?;
        let agent_session = record.agent_session_id.unwrap_or_default();
        let loaded = tokio::select! {
            loaded = starting.load_session(&agent_session) => loaded,
            error = &mut stop => Err(error),
        };
        if let Err(error) = loaded {
            starting.process.kill().await;
            return Err(error);
        }
        set_status(&store, session, Status::Open).await?;
        let live = self.live_session(session, agent, agent_session, starting, &store);
        *slot = Some(Arc::clone(&live));
        Ok(live)
    }

    /// A turn whose host process died has no end in the log yet.
    async fn end_interrupted_turn(
        &self,
        store: &Store,
        record: &SessionRecord,
        updates: &Updates,
    ) -> Result<()> {
        let (started, ended) = (
            last_of(store, record.id, event::TURN_START).await?,
            last_of(store, record.id, event::TURN_END).await?,
        );
        if started > ended {
            let end = TurnEnd::Interrupted("the process that ran this turn ended before it did");
            updates
                .append(event::turn_end(record.id, None, &end))
                .await?;
        }
        Ok(())
    }

    /// `false`: no turn is under way.
    pub(super) async fn cancel(&self, session: SessionId) -> Result<bool> {
        let slot = self.sessions().get(&session).map(Arc::clone);
        let Some(slot) = slot else {
            return self.record(session).await.map(|_exists| false);
        };
        let waiting = slot.prompts.load(Ordering::Relaxed) > 0;
        if waiting {
            slot.stop.notify_waiters();
        }
        let live = slot.agent.lock().await.clone();
        match live {
            Some(live) => Ok(live.cancel().await || waiting),
            None if waiting => Ok(true),
            None => self.record(session).await.map(|_exists| false),
        }
    }

    pub(super) async fn close_session(&self, session: SessionId) -> Result<()> {
        let slot = self.sessions().get(&session).map(Arc::clone);
        let Some(slot) = slot else {
            return self.record(session).await.map(drop);
        };
        slot.close(Status::Closed).await;
        Ok(())
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

    /// Asks the agents to end, all at once. That of a session that is being made ends with the VM.
    async fn close_agents(&self) {
        let slots: Vec<_> = self.sessions().values().map(Arc::clone).collect();
        let mut closing = JoinSet::new();
        for slot in slots {
            closing.spawn(async move { slot.close(Status::Suspended).await });
        }
        while let Some(closed) = closing.join_next().await {
            if let Err(error) = closed {
                tracing::error!(%error, "an agent could not be closed");
            }
        }
    }

    fn slot(&self, session: SessionId) -> Arc<Slot> {
        Arc::clone(self.sessions().entry(session).or_default())
    }

    fn sessions(&self) -> MutexGuard<'_, HashMap<SessionId, Arc<Slot>>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn users(&self) -> MutexGuard<'_, HashSet<u64>> {
        self.users.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn key_json(&self) -> String {
        // An array of strings: always representable.
        serde_json::to_string(&self.key).unwrap_or_default()
    }
}

impl Slot {
    /// Ends its agent, and one that is just starting.
    async fn close(&self, status: Status) {
        self.stop.notify_waiters();
        let mut agent = self.agent.lock().await;
        if let Some(live) = agent.as_ref() {
            live.close(status).await;
        }
        *agent = None;
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

async fn set_status(store: &Store, session: SessionId, status: Status) -> Result<()> {
    let change = SessionChange {
        status: Some(status),
        ..SessionChange::default()
    };
    Ok(store.update_session(session, change).await?)
}

/// Number of the last event of a method; `Seq(0)` when there is none.
async fn last_of(store: &Store, session: SessionId, method: &str) -> Result<Seq> {
    let mut last = Seq::default();
    loop {
        let query = Query {
            since: last,
            method: Some(method.to_owned()),
            limit: None,
            max_bytes: 1 << 20,
        };
        let page = store.history().events(session, query).await?;
        if let Some(event) = page.events.last() {
            last = event.seq;
        }
        if page.complete {
            return Ok(last);
        }
    }
}

fn text(raw: Option<&RawValue>) -> Arc<str> {
    raw.map_or("null", RawValue::get).into()
}

fn plan(
    installed: &agents::Installed,
    session: SessionId,
    cwd: &GuestPath,
    env: &environment::Environment,
) -> agents::Launch {
    let env: Vec<_> = env
        .iter()
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect();
    agents::launch(
        installed,
        &SessionSpec {
            id: session,
            cwd,
            env: &env,
        },
    )
}

/// What a resume needs besides the agent's own state.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct KeptSettings {
    permission_policy: PermissionPolicy,
    #[serde(default = "yes")]
    persist_env: bool,
}

/// Sessions of before this was asked kept theirs.
const fn yes() -> bool {
    true
}

impl KeptSettings {
    /// For a record that can't be read.
    const STRICTEST: Self = Self {
        permission_policy: PermissionPolicy::Reject,
        persist_env: false,
    };
}

fn settings_json(options: &SessionOptions) -> Arc<str> {
    let kept = KeptSettings {
        permission_policy: options.permission_policy,
        persist_env: options.persist_env,
    };
    // A struct of plain fields: always representable.
    serde_json::to_string(&kept).unwrap_or_default().into()
}
