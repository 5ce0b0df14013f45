//! The sessions of a VM: made, prompted, resumed, closed.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;
use tokio::sync::{Mutex as AsyncMutex, Notify};
use tokio::task::JoinSet;

use super::client::Settings;
use super::emission::Notice;
use super::environment;
use super::event::{self, TurnEnd};
use super::live::{LiveSession, cancelled_turn};
use super::machine::Machine;
use super::options::{PermissionPolicy, SessionOptions};
use super::start::{self, Starting};
use super::turn::TurnResult;
use super::updates::Updates;
use crate::agents::{self, Agent, SessionSpec};
use crate::error::{Code, Error, Result};
use crate::ids::{Seq, SessionId};
use crate::store::{NewSession, SessionChange, SessionRecord, Status, Store};
use crate::vm::exec::{ExecOptions, exec};
use crate::vm::{DynVm, GuestPath, User};

/// A session's agent, or its place.
#[derive(Default)]
pub(super) struct Slot {
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
            installed = self.installed(settings, &agent) => installed?,
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
            settings, &vm, &store, session, &agent, &options, &launch, &mut stop,
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
        agent: &Agent,
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
            config: "{}".into(),
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
    pub(super) async fn unmake(&self, vm: &DynVm, store: &Store, session: SessionId) {
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
        agent: &Agent,
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

    async fn installed(&self, settings: &Settings, agent: &Agent) -> Result<agents::Installed> {
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
            // It may still run, if it is its log that failed.
            live.process.kill().await;
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
                self.slots().remove(&session);
                return Err(error);
            }
        };
        let agent = settings.agent(&record.agent_type)?;
        let installed = tokio::select! {
            installed = self.installed(settings, &agent) => installed?,
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
        let live = self.live_session(session, &agent, agent_session, starting, &store);
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
        let history = store.history();
        let Some(started) = history.last_event(record.id, event::TURN_START).await? else {
            return Ok(());
        };
        let ended = history.last_event(record.id, event::TURN_END).await?;
        if ended.is_none_or(|ended| ended.seq < started.seq) {
            let end = TurnEnd::Interrupted("the process that ran this turn ended before it did");
            let turn = event::turn_of(&started.json);
            updates
                .append(event::turn_end(record.id, turn, &end))
                .await?;
        }
        Ok(())
    }

    /// `false`: no turn is under way.
    pub(super) async fn cancel(&self, session: SessionId) -> Result<bool> {
        let slot = self.slots().get(&session).map(Arc::clone);
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
        let slot = self.slots().get(&session).map(Arc::clone);
        let Some(slot) = slot else {
            return self.record(session).await.map(drop);
        };
        slot.close(Status::Closed).await;
        Ok(())
    }

    /// Asks the agents to end, all at once. That of a session that is being made ends with the VM.
    pub(super) async fn close_agents(&self) {
        let slots: Vec<_> = self.slots().values().map(Arc::clone).collect();
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
        Arc::clone(self.slots().entry(session).or_default())
    }

    fn slots(&self) -> MutexGuard<'_, HashMap<SessionId, Arc<Slot>>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
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
async fn set_status(store: &Store, session: SessionId, status: Status) -> Result<()> {
    let change = SessionChange {
        status: Some(status),
        ..SessionChange::default()
    };
    Ok(store.update_session(session, change).await?)
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
