//! A VM as a durable thing: it has a key and a directory, runs when something needs it, and holds
//! sessions.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;
use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard};
use tokio::task::JoinSet;

use super::client::Settings;
use super::emission::{Emission, Notice, ShutdownReason};
use super::environment;
use super::event::{self, TurnEnd};
use super::live::LiveSession;
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

/// A session's agent, or its place. Held while one starts: a session resumes once, whoever asks.
type Slot = AsyncMutex<Option<Arc<LiveSession>>>;

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
        self.emission.attach(&store);
        running.store = Some(store.clone());
        drop(running);
        Ok((vm, store))
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
        let aborted = || Error::new(Code::Aborted, "createSession was aborted");
        tokio::pin!(abort);
        let ready = async {
            let installed = self.installed(settings, agent).await?;
            let (vm, store) = self.open_for_writing(settings).await?;
            Ok::<_, Error>((installed, vm, store))
        };
        let (installed, vm, store) = tokio::select! {
            ready = ready => ready?,
            () = &mut abort => return Err(aborted()),
        };
        vm.create_dir_all(&options.cwd, User::User)
            .await
            .map_err(start::bad_cwd)?;
        let session = SessionId::generate();
        let launch = plan(&installed, session, &options.cwd, &options.env);
        let made = tokio::select! {
            made = self.make(settings, &vm, &store, session, agent, &options, &launch) => made,
            () = &mut abort => Err(aborted()),
        };
        match made {
            Ok(created) => Ok(created),
            Err(error) => {
                self.unmake(&vm, &store, session, &launch.state_dir).await;
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
    ) -> Result<CreatedSession> {
        if options.persist_env {
            environment::save(&self.dir, session, &options.env).await?;
        }
        vm.create_dir_all(&launch.state_dir, User::User).await?;
        let updates = Updates::new(session, store.clone(), options.permission_policy);
        let cwd = options.cwd.clone();
        let limit = settings.max_message_bytes;
        let starting = start::start(vm, agent.name(), launch, cwd, updates, limit).await?;
        // Without the agent's own id it does not count as a session yet: a crash leaves no half of one.
        let record = NewSession {
            id: session,
            agent_type: agent.name().to_owned(),
            agent_session_id: None,
            title: None,
            cwd: options.cwd.as_str().to_owned(),
            status: Status::Open,
            capabilities: text(starting.initialized.agent_capabilities.as_deref()),
            agent_info: text(starting.initialized.agent_info.as_deref()),
            settings: settings_json(options),
        };
        let opened = async {
            store.insert_session(record).await?;
            self.emission.activate(session, Seq::default());
            let agent_session = starting.new_session().await?;
            let change = SessionChange {
                agent_session_id: Some(agent_session.clone()),
                ..SessionChange::default()
            };
            store.update_session(session, change).await?;
            store.flush(true).await?;
            Ok::<_, Error>(agent_session)
        };
        let agent_session = match opened.await {
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
        *self.slot(session).lock().await = Some(live);
        Ok(created)
    }

    /// Takes back everything of a session that could not be made.
    async fn unmake(&self, vm: &DynVm, store: &Store, session: SessionId, state_dir: &GuestPath) {
        let command = format!("rm -rf -- '{}'", state_dir.as_str());
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
        let live = self.resume(settings, session, None).await?;
        live.prompt(blocks).await
    }

    /// The session's agent, started again if it does not run. `env` replaces what was kept.
    pub(super) async fn resume(
        &self,
        settings: &Settings,
        session: SessionId,
        env: Option<environment::Environment>,
    ) -> Result<Arc<LiveSession>> {
        let slot = self.slot(session);
        let mut slot = slot.lock().await;
        if let Some(live) = slot.as_ref().filter(|live| !live.has_ended()) {
            return Ok(Arc::clone(live));
        }
        let record = match self.record(session).await {
            Ok(record) => record,
            Err(error) => {
                self.sessions().remove(&session);
                return Err(error);
            }
        };
        let agent = Agent::parse(&record.agent_type)?;
        let installed = self.installed(settings, agent).await?;
        let (vm, store) = self.open_for_writing(settings).await?;
        let env = match env {
            Some(env) => {
                environment::save(&self.dir, session, &env).await?;
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
        let policy = serde_json::from_str::<KeptSettings>(&record.settings)
            .map_or(PermissionPolicy::Reject, |kept| kept.permission_policy);
        let updates = Updates::new(session, store.clone(), policy);
        self.end_interrupted_turn(&store, &record, &updates).await?;
        let limit = settings.max_message_bytes;
        let starting = start::start(&vm, &record.agent_type, &launch, cwd, updates, limit).await?;
        let agent_session = record.agent_session_id.unwrap_or_default();
        if let Err(error) = starting.load_session(&agent_session).await {
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
        // A session that was closed, or whose agent failed, has ended its turn.
        if record.status != Status::Open {
            return Ok(());
        }
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
        let live = {
            let slot = self.sessions().get(&session).map(Arc::clone);
            match slot {
                Some(slot) => slot.lock().await.clone(),
                None => None,
            }
        };
        match live {
            Some(live) => Ok(live.cancel().await),
            None => self.record(session).await.map(|_exists| false),
        }
    }

    pub(super) async fn close_session(&self, session: SessionId) -> Result<()> {
        let slot = self.sessions().get(&session).map(Arc::clone);
        let Some(slot) = slot else {
            return self.record(session).await.map(drop);
        };
        let live = slot.lock().await.take();
        if let Some(live) = live {
            live.close(Status::Closed).await;
        }
        Ok(())
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

    /// Asks the agents to end, all at once. One that is just starting ends with the VM.
    async fn close_agents(&self) {
        let slots = std::mem::take(&mut *self.sessions());
        let mut closing = JoinSet::new();
        for slot in slots.into_values() {
            let live = slot.try_lock().ok().and_then(|mut slot| slot.take());
            if let Some(live) = live {
                closing.spawn(async move { live.close(Status::Suspended).await });
            }
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
}

fn settings_json(options: &SessionOptions) -> Arc<str> {
    let kept = KeptSettings {
        permission_policy: options.permission_policy,
    };
    // A struct of plain fields: always representable.
    serde_json::to_string(&kept).unwrap_or_default().into()
}
