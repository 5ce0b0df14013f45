//! From a session that rests to one with a running agent, as it was before.

use std::collections::BTreeSet;
use std::sync::{Arc, PoisonError};

use super::client::Settings;
use super::configuration::Configuration;
use super::environment;
use super::event::{self, DecidedBy, NotRestored, Restored, TurnEnd};
use super::image::check_agent;
use super::instructions;
use super::kept::{Kept, Resume};
use super::live::LiveSession;
use super::machine::Machine;
use super::mcp::check_reachable;
use super::permission;
use super::sessions::{Slot, live_session, plan, text};
use super::start::{self, Starting};
use super::state;
use super::transcript;
use super::transport;
use super::updates::{INTERRUPTED, Updates};
use crate::error::{Code, Error, Result};
use crate::ids::{Seq, SessionId};
use crate::store::{Query, SessionChange, SessionRecord, Status, Store};
use crate::vm::{GuestPath, User};

const PAGE_BYTES: u64 = 1 << 20;

impl Machine {
    /// The session's agent, started again if it does not run. What is `given` replaces what was kept.
    pub(super) async fn resume(
        &self,
        settings: &Settings,
        session: SessionId,
        given: Resume,
    ) -> Result<Arc<LiveSession>> {
        let slot = self.slot(session);
        let stop = slot.stop.notified();
        let mut agent = slot.agent.lock().await;
        self.start_in(&slot, &mut agent, settings, session, given, stop)
            .await
    }

    pub(super) async fn start_in(
        &self,
        slot: &Slot,
        agent: &mut Option<Arc<LiveSession>>,
        settings: &Settings,
        session: SessionId,
        given: Resume,
        stop: impl Future<Output = ()> + Send,
    ) -> Result<Arc<LiveSession>> {
        if let Some(live) = agent {
            if !live.is_ending() {
                // An agent that is not started again goes on under the rules that were given last.
                self.hold(&settings.vm.network).await?;
                return Ok(Arc::clone(live));
            }
            // It may still run, if it is its log that failed.
            live.process.kill().await;
            *agent = None;
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
        let definition = settings.agent(&record.agent_type)?;
        let kept = Kept::parse(&record.settings);
        let installed = tokio::select! {
            installed = self.installed(settings, &definition) => installed?,
            error = &mut stop => return Err(error),
        };
        let was_given = given.env.is_some() || given.mcp_servers.is_some();
        let found = environment::load(&self.dir, session).await?;
        let secrets = kept.secrets(session, found, given)?;
        let policy = settings.policy();
        tokio::select! {
            checked = check_reachable(&secrets.mcp_servers, &policy) => checked?,
            error = &mut stop => return Err(error),
        }
        tokio::select! {
            found = self.find_image(settings) => drop(found?),
            error = &mut stop => return Err(error),
        }
        let (vm, store) = self.open_for_writing(settings).await?;
        self.keep_installed(&installed).await;
        if was_given && kept.persist_env {
            environment::save(&self.dir, session, &secrets).await?;
        }
        let cwd = GuestPath::new(&record.cwd)
            .map_err(|problem| Error::invalid_argument("cwd", problem))?;
        vm.create_dir_all(&cwd, User::User)
            .await
            .map_err(start::bad_cwd)?;
        let policy = kept.permission_policy;
        let launch = plan(&installed, session, &cwd, &secrets.env, policy);
        check_agent(&vm, &record.agent_type, &installed, &launch).await?;
        self.emission.activate(session, store.committed(session)?);
        let wanted = Configuration::of_text(&record.config);
        let updates = Updates::new(
            session,
            store.clone(),
            Arc::clone(&self.emission),
            kept.permission_policy,
            wanted.clone(),
        );
        end_interrupted(&store, session, &updates).await?;
        let programs = instructions::programs(&vm, &launch.env).await?;
        let servers = tokio::select! {
            servers = transport::settle(&vm, &launch, secrets.mcp_servers) => servers?,
            error = &mut stop => return Err(error),
        };
        let setup = kept.setup(settings, cwd, servers, &programs);
        state::prepare(&vm, &launch, setup.instructions.as_deref()).await?;
        let limit = settings.max_message_bytes;
        let name = &record.agent_type;
        let starting = start::start(&vm, name, &launch, setup, updates, limit, &mut stop).await?;
        let process = Arc::clone(&starting.process);
        let restored = tokio::select! {
            restored = self.restore(settings, &record, starting, &store, &wanted) => restored,
            error = &mut stop => Err(error),
        };
        let live = match restored {
            Ok(live) => live,
            Err(error) => {
                process.dismiss().await;
                return Err(error);
            }
        };
        slot.show(&live);
        *agent = Some(Arc::clone(&live));
        Ok(live)
    }

    /// Gives the agent back its conversation and its settings, as far as it takes them.
    async fn restore(
        &self,
        settings: &Settings,
        record: &SessionRecord,
        starting: Starting,
        store: &Store,
        wanted: &Configuration,
    ) -> Result<Arc<LiveSession>> {
        let session = record.id;
        let kept_id = record.agent_session_id.as_deref().unwrap_or_default();
        let mut opened = starting.reopen(kept_id).await?;
        // Some agents keep nothing of a conversation before its first prompt; nor is anything lost.
        let history = store.history();
        let last_turn = history.last_event(session, event::TURN_START).await?;
        let mut report = Restored {
            from_transcript: opened.forgot.take().filter(|_| last_turn.is_some()),
            not_restored: Vec::new(),
        };
        // It may be another version of the agent than the one before.
        let (capabilities, agent_info) = {
            let about = &starting.initialized;
            (
                text(about.agent_capabilities.as_deref()),
                text(about.agent_info.as_deref()),
            )
        };
        let live = live_session(self, settings, session, opened, starting, store);
        for setting in live.updates.configuration().towards(wanted) {
            let what = setting.what.clone();
            if let Err(error) = live.apply(setting).await {
                report.not_restored.push(NotRestored {
                    setting: what,
                    error: error.message,
                });
            }
        }
        live.updates.tell_configuration().await?;
        let is_forgetful = report.from_transcript.is_some();
        if is_forgetful || !report.not_restored.is_empty() {
            live.updates
                .append(event::restored(session, &report))
                .await?;
        }
        if is_forgetful || is_still_to_be_told(store, session).await? {
            let context = transcript::of(&store.history(), session).await?;
            *live.context.lock().unwrap_or_else(PoisonError::into_inner) = context;
        }
        let change = SessionChange {
            agent_session_id: Some(live.agent_session.clone()),
            status: Some(Status::Open),
            capabilities: Some(capabilities),
            agent_info: Some(agent_info),
            ..SessionChange::default()
        };
        store.update_session(session, change).await?;
        Ok(live)
    }
}

/// Whether the agent forgot the conversation at an earlier resume, and had no turn since that told it.
async fn is_still_to_be_told(store: &Store, session: SessionId) -> Result<bool> {
    let history = store.history();
    let Some(forgot) = history.last_event(session, event::RESTORED).await? else {
        return Ok(false);
    };
    if !event::is_from_transcript(&forgot.json) {
        return Ok(false);
    }
    let mut is_told = false;
    each_of_method(store, session, event::TURN_END, forgot.seq, |end| {
        is_told |= event::is_answered(end);
    })
    .await?;
    Ok(!is_told)
}

/// A turn, or a permission request, whose host process died has no end in the log yet.
async fn end_interrupted(store: &Store, session: SessionId, updates: &Updates) -> Result<()> {
    let start = Seq::default();
    let mut open = BTreeSet::new();
    each_of_method(store, session, event::PERMISSION_REQUEST, start, |asked| {
        open.extend(event::permission_of(asked));
    })
    .await?;
    each_of_method(
        store,
        session,
        event::PERMISSION_OUTCOME,
        start,
        |outcome| {
            if let Some(id) = event::permission_of(outcome) {
                open.remove(&id);
            }
        },
    )
    .await?;
    for id in open {
        let outcome = permission::cancelled();
        let by = DecidedBy::Nobody(INTERRUPTED);
        updates
            .append(event::permission_outcome(session, id, &outcome, by))
            .await?;
    }
    let history = store.history();
    let Some(started) = history.last_event(session, event::TURN_START).await? else {
        return Ok(());
    };
    let ended = history.last_event(session, event::TURN_END).await?;
    if ended.is_none_or(|ended| ended.seq < started.seq) {
        let end = TurnEnd::Interrupted("the process that ran this turn ended before it did");
        let turn = event::turn_of(&started.json);
        updates.append(event::turn_end(session, turn, &end)).await?;
    }
    Ok(())
}

/// Looks at the events of a method, which is none of the frequent ones, in bounded portions: what an
/// agent asked is in them.
async fn each_of_method(
    store: &Store,
    session: SessionId,
    method: &str,
    mut since: Seq,
    mut look: impl FnMut(&str) + Send,
) -> Result<()> {
    loop {
        let query = Query {
            since,
            method: Some(method.to_owned()),
            limit: None,
            max_bytes: PAGE_BYTES,
        };
        let page = store.history().events(session, query).await?;
        for event in &page.events {
            since = event.seq;
            look(&event.json);
        }
        if page.complete {
            return Ok(());
        }
    }
}
