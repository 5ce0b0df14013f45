//! The sessions of a VM: made, prompted, closed, destroyed.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use serde_json::Value;
use serde_json::value::RawValue;
use tokio::sync::{Mutex as AsyncMutex, Notify};
use tokio::task::JoinSet;

use super::awake::Awake;
use super::client::Settings;
use super::configuration::Configuration;
use super::emission::{Notice, SessionState};
use super::environment::{self, Secrets};
use super::image::check_agent;
use super::instructions;
use super::kept::{Kept, Resume};
use super::live::{LiveSession, cancelled_turn};
use super::machine::Machine;
use super::mcp::check_reachable;
use super::options::{PermissionPolicy, SessionOptions};
use super::start::{self, Opened, Starting};
use super::state;
use super::transport;
use super::turn::TurnResult;
use super::updates::Updates;
use crate::agents::{self, Agent, SessionSpec};
use crate::error::{Code, Error, Result};
use crate::ids::{Seq, SessionId};
use crate::store::{NewSession, SessionChange, SessionRecord, Status, Store, StoreError};
use crate::vm::{DynVm, GuestPath, User};

/// A session's agent, or its place.
#[derive(Default)]
pub(super) struct Slot {
    /// Held while an agent starts or ends: a session resumes once, whoever asks, and never has two.
    pub(super) agent: AsyncMutex<Option<Arc<LiveSession>>>,
    /// The same for who only looks, and waits for no start or end.
    shown: Mutex<Weak<LiveSession>>,
    /// Ends the starts that are under way.
    pub(super) stop: Notify,
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
        // A boot is not cut short; what it needs of an image may be long in coming.
        tokio::select! {
            found = self.find_image(settings) => drop(found?),
            error = &mut stop => return Err(error),
        }
        // Not cut short: a boot that is dropped half-way would leave the VM busy for a moment.
        let (vm, store) = self.open_for_writing(settings).await?;
        self.keep_installed(&installed).await;
        vm.create_dir_all(&options.cwd, User::User)
            .await
            .map_err(start::bad_cwd)?;
        let policy = settings.policy();
        tokio::select! {
            checked = check_reachable(&options.mcp_servers, &policy) => checked?,
            error = &mut stop => return Err(error),
        }
        let session = SessionId::generate();
        let policy = options.permission_policy;
        let launch = plan(&installed, session, &options.cwd, &options.env, policy);
        check_agent(&vm, agent.name(), &installed, &launch).await?;
        // It is listed before it is here: who asks for it then waits, and starts no other agent.
        let slot = self.slot(session);
        let mut own = slot.agent.lock().await;
        let made = self.make(
            settings, &vm, &store, session, &agent, &options, &launch, &mut stop,
        );
        match made.await {
            Ok((created, live)) => {
                slot.show(&live);
                *own = Some(live);
                Ok(created)
            }
            Err(error) => {
                self.unmake(&vm, &store, session).await;
                self.slots().remove(&session);
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
    ) -> Result<(CreatedSession, Arc<LiveSession>)> {
        let kept = Kept::of(options);
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
            settings: kept.to_text(),
            config: Configuration::default().to_text(),
        };
        store.insert_session(record).await?;
        if options.persist_env {
            let secrets = Secrets {
                env: options.env.clone(),
                mcp_servers: options.mcp_servers.clone(),
            };
            environment::save(&self.dir, session, &secrets).await?;
        }
        let updates = Updates::new(
            session,
            store.clone(),
            Arc::clone(&self.emission),
            options.permission_policy,
            Configuration::default(),
        );
        let programs = instructions::programs(vm, &launch.env).await?;
        let servers = tokio::select! {
            servers = transport::settle(vm, launch, options.mcp_servers.clone()) => servers?,
            error = &mut *stop => return Err(error),
        };
        let setup = kept.setup(settings, options.cwd.clone(), servers, &programs);
        state::prepare(vm, launch, setup.instructions.as_deref()).await?;
        let limit = settings.max_message_bytes;
        let starting =
            start::start(vm, agent.name(), launch, setup, updates, limit, &mut *stop).await?;
        let process = Arc::clone(&starting.process);
        let created = CreatedSession {
            id: session,
            agent: agent.name().to_owned(),
            capabilities: starting.initialized.agent_capabilities.clone(),
            agent_info: starting.initialized.agent_info.clone(),
        };
        let opened = async {
            self.emission.activate(session, Seq::default());
            let opened = starting.new_session().await?;
            let live = live_session(self, settings, session, opened, starting, store);
            live.set_up(options).await?;
            let change = SessionChange {
                agent_session_id: Some(live.agent_session.clone()),
                capabilities: Some(text(created.capabilities.as_deref())),
                agent_info: Some(text(created.agent_info.as_deref())),
                ..SessionChange::default()
            };
            store.update_session(session, change).await?;
            store.flush(true).await?;
            Ok(live)
        };
        let opened = tokio::select! {
            opened = opened => opened,
            error = stop => Err(error),
        };
        match opened {
            Ok(live) => Ok((created, live)),
            Err(error) => {
                process.dismiss().await;
                Err(error)
            }
        }
    }

    /// Takes back everything of a session that could not be made.
    pub(super) async fn unmake(&self, vm: &DynVm, store: &Store, session: SessionId) {
        self.emission.forget(session);
        if let Err(error) = self.remove(vm, store, session).await {
            tracing::warn!(%error, %session, "something of a failed session stays, unlisted");
        }
    }

    /// Deletes what there is of a session, its secrets first, its record last: as long as that is there,
    /// it can be tried again.
    async fn remove(&self, vm: &DynVm, store: &Store, session: SessionId) -> Result<()> {
        environment::remove(&self.dir, session).await?;
        state::remove(vm, session).await?;
        match store.delete_session(session).await {
            Err(StoreError::SessionNotFound { .. }) => Ok(()),
            result => Ok(result?),
        }
    }

    pub(super) async fn installed(
        &self,
        settings: &Settings,
        agent: &Agent,
    ) -> Result<agents::Installed> {
        let emission = Arc::clone(&self.emission);
        let progress = move |progress| emission.notify(&Notice::InstallProgress(progress));
        settings.installed(agent, &progress).await
    }

    pub(super) async fn prompt(
        &self,
        settings: &Settings,
        session: SessionId,
        blocks: Vec<Value>,
        awake: Awake,
    ) -> Result<TurnResult> {
        let slot = self.slot(session);
        let stop = slot.stop.notified();
        slot.prompts.fetch_add(1, Ordering::Relaxed);
        let begun = async {
            let mut agent = slot.agent.lock().await;
            let live = self.start_in(
                &slot,
                &mut agent,
                settings,
                session,
                Resume::default(),
                stop,
            );
            // Begun under the lock: a cancel or a close that waits for it finds the turn.
            live.await?.prompt(blocks, awake)
        };
        let begun = begun.await;
        slot.prompts.fetch_sub(1, Ordering::Relaxed);
        match begun {
            Ok(turn) => turn.await,
            Err(error) if error.code == Code::Aborted => Ok(cancelled_turn()),
            Err(error) => Err(error),
        }
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

    /// Deletes a session with everything of it. One that does not exist is as good as deleted.
    pub(super) async fn destroy_session(
        &self,
        settings: &Settings,
        session: SessionId,
    ) -> Result<()> {
        match self.record(session).await {
            Err(error) if error.code == Code::SessionNotFound => return Ok(()),
            record => drop(record?),
        }
        let slot = self.slot(session);
        slot.stop.notify_waiters();
        // Held to the end: whoever waits for it finds no session any more.
        let mut agent = slot.agent.lock().await;
        if let Some(live) = agent.take() {
            live.close(Status::Closed).await;
        }
        let (vm, store) = self.open_for_writing(settings).await?;
        self.remove(&vm, &store, session).await?;
        self.emission.forget(session);
        self.slots().remove(&session);
        self.emission.notify(&Notice::SessionStatus {
            session,
            state: SessionState::Destroyed,
        });
        Ok(())
    }

    /// Asks the agents to end, all at once. One whose session is being made is waited for.
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

    /// The record with the status that could not be written: by a host process that died, or to a full
    /// disk. As long as this process has the VM open, it knows of every agent that runs.
    pub(super) fn as_it_is(&self, mut record: SessionRecord) -> SessionRecord {
        if record.status == Status::Open
            && self.emission.store().is_some()
            && self.shown(record.id).is_none()
        {
            record.status = Status::Suspended;
        }
        record
    }

    pub(super) fn slot(&self, session: SessionId) -> Arc<Slot> {
        Arc::clone(self.slots().entry(session).or_default())
    }

    /// The session's agent, if one runs: without waiting for one that starts.
    pub(super) fn shown(&self, session: SessionId) -> Option<Arc<LiveSession>> {
        let live = self.slots().get(&session)?.shown().upgrade()?;
        (!live.is_ending()).then_some(live)
    }

    pub(super) fn slots(&self) -> MutexGuard<'_, HashMap<SessionId, Arc<Slot>>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Slot {
    pub(super) fn show(&self, live: &Arc<LiveSession>) {
        *self.shown() = Arc::downgrade(live);
        live.watch();
        live.updates.tell_state();
    }

    pub(super) fn shown(&self) -> MutexGuard<'_, Weak<LiveSession>> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }

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

pub(super) fn text(raw: Option<&RawValue>) -> Arc<str> {
    raw.map_or("null", RawValue::get).into()
}

pub(super) fn plan(
    installed: &agents::Installed,
    session: SessionId,
    cwd: &GuestPath,
    env: &environment::Environment,
    policy: PermissionPolicy,
) -> agents::Launch {
    let env: Vec<_> = env
        .iter()
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect();
    let spec = SessionSpec {
        id: session,
        cwd,
        env: &env,
        asks: policy != PermissionPolicy::Allow,
    };
    agents::launch(installed, &spec)
}

/// A conversation that an agent has opened, as a session.
pub(super) fn live_session(
    machine: &Machine,
    settings: &Settings,
    session: SessionId,
    opened: Opened,
    starting: Starting,
    store: &Store,
) -> Arc<LiveSession> {
    Arc::new(LiveSession {
        id: session,
        servers: starting.servers(),
        agent: starting.agent,
        agent_session: opened.agent_session,
        process: starting.process,
        updates: starting.updates,
        store: store.clone(),
        emission: Arc::clone(&machine.emission),
        turn: Mutex::default(),
        cancel_grace: settings.cancel_grace,
        context: Mutex::default(),
        closing: AtomicBool::new(false),
    })
}
