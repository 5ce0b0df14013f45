//! Where data lies, which VMs are known, and their common end.

use std::collections::HashMap;
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::awake::Awake;
use super::compile_cache;
use super::control::SessionView;
use super::emission::{ShutdownReason, Subscription};
use super::image::RootChoice;
use super::kept::Resume;
use super::machine::Machine;
use super::network::NetworkRules;
use super::options::SessionOptions;
use super::sessions::CreatedSession;
use super::turn::TurnResult;
use crate::agents::{
    Agent, AgentStore, Available, ClientAgents, InstallProgress, Installed, Removal, StoreEntry,
};
use crate::error::{Code, Error, Result};
use crate::ids::{SessionId, VmId, VmKey};
use crate::net::secrets::Secrets;
use crate::net::{Policy, Rules};
use crate::store::{Durability, Page, Query, SessionRecord};
use crate::vm::exec::{self, ExecEnd, ExecOptions};
use crate::vm::mount::HostMount;
use crate::vm::namespace::{self, Made};
use crate::vm::{DynVm, Limits};

/// What a client is made with.
#[derive(Debug, Clone)]
pub struct ClientOptions {
    /// Holds `vms/` and `base/`. Made when something needs it.
    pub data_dir: PathBuf,
    pub settings: Settings,
}

/// What a client's calls do to a VM that they boot and sessions that they start.
#[derive(Debug, Clone)]
pub struct Settings {
    pub agents: AgentStore,
    /// Root of the store of images.
    pub images: PathBuf,
    /// The client's own, beside the built-in ones, and versions of these.
    pub configured_agents: ClientAgents,
    /// Install an agent that a session needs.
    pub auto_install: bool,
    pub durability: Durability,
    /// Longest line that an agent may send.
    pub max_message_bytes: usize,
    /// For every session, beside its own.
    pub additional_instructions: Option<String>,
    /// How long an agent has to obey a cancel before it is stopped.
    pub cancel_grace: Duration,
    pub vm: VmSettings,
}

/// What a VM is booted with: the client's, or what `getOrCreate` was given over it.
#[derive(Debug, Clone)]
pub struct VmSettings {
    /// Ports of the host's loopback that are reachable from the VM on `127.0.0.1` and `::1`.
    pub loopback_exempt_ports: Vec<u16>,
    /// What else of the network.
    pub network: NetworkRules,
    /// How long a VM that nothing needs goes on running. `None`: for ever.
    pub sleep_after: Option<Duration>,
    pub limits: Limits,
    /// Directories and files of the host in the VM.
    pub mounts: Vec<HostMount>,
    /// Instead of the host's programs.
    pub image: RootChoice,
    /// What VMs use and do not get.
    pub secrets: Secrets,
}

/// The documented defaults.
impl Default for VmSettings {
    fn default() -> Self {
        Self {
            loopback_exempt_ports: Vec::new(),
            network: NetworkRules::default(),
            sleep_after: Some(Duration::from_mins(15)),
            limits: Limits::default(),
            mounts: Vec::new(),
            image: RootChoice::default(),
            secrets: Secrets::default(),
        }
    }
}

impl Settings {
    /// The documented defaults.
    #[must_use]
    pub fn new(agents: AgentStore) -> Self {
        Self {
            images: agents.root().with_file_name("images"),
            agents,
            configured_agents: ClientAgents::default(),
            auto_install: true,
            durability: Durability::Normal,
            max_message_bytes: 64 << 20,
            additional_instructions: None,
            cancel_grace: Duration::from_secs(5),
            vm: VmSettings::default(),
        }
    }

    fn with(&self, vm: VmSettings) -> Arc<Self> {
        Arc::new(Self { vm, ..self.clone() })
    }

    /// What VMs may connect to.
    pub(super) fn policy(&self) -> Policy {
        Policy::new(&self.vm.loopback_exempt_ports).with_rules(self.vm.network.get())
    }

    /// What no mount may show: the agent store, and every data directory that this process knows.
    pub(super) fn private_directories(&self) -> Vec<PathBuf> {
        let mut private = vec![self.agents.root().to_owned(), self.images.clone()];
        private.extend(DataDir::all().iter().map(|data| data.path.clone()));
        private
    }

    /// An agent that is ready to be launched. If it had to be installed for that, with its compile cache.
    pub(super) async fn installed(
        &self,
        agent: &Agent,
        progress: &(dyn Fn(InstallProgress) + Send + Sync),
    ) -> Result<Installed> {
        let installed = self
            .agents
            .ensure(agent, self.auto_install, progress)
            .await?;
        match &installed {
            Installed::BuiltIn(new) if new.is_new && new.lacks_compile_cache() => {
                compile_cache::prepare(self, agent.clone(), new.clone()).await;
                Ok(self
                    .agents
                    .ensure(agent, self.auto_install, progress)
                    .await?)
            }
            _ => Ok(installed),
        }
    }

    /// The agent that `createSession` calls `name`.
    pub(super) fn agent(&self, name: &str) -> Result<Agent> {
        Ok(Agent::find(name, &self.configured_agents)?)
    }
}

/// An open data directory. Clients of one process on the same directory share its VMs.
#[derive(Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

pub(super) struct Inner {
    id: u64,
    data: Arc<DataDir>,
    settings: Arc<Settings>,
    closed: watch::Sender<bool>,
}

/// One data directory of this process.
struct DataDir {
    path: PathBuf,
    swept: Arc<AtomicBool>,
    machines: Mutex<HashMap<VmId, Arc<Machine>>>,
}

/// The data directories that clients of this process have open.
static OPEN: Mutex<Vec<Weak<DataDir>>> = Mutex::new(Vec::new());

impl DataDir {
    fn all() -> Vec<Arc<Self>> {
        let open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        open.iter().filter_map(Weak::upgrade).collect()
    }

    /// The one of this path, whoever asked for it first.
    fn open(path: &Path) -> Arc<Self> {
        let path = real_path(path);
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|data| data.strong_count() > 0);
        let known = open.iter().filter_map(Weak::upgrade);
        if let Some(data) = known.into_iter().find(|data| data.path == path) {
            return data;
        }
        let data = Arc::new(Self {
            path,
            swept: Arc::default(),
            machines: Mutex::default(),
        });
        open.push(Arc::downgrade(&data));
        data
    }

    fn machines(&self) -> MutexGuard<'_, HashMap<VmId, Arc<Machine>>> {
        self.machines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The path without symlinks, also of what is not there yet.
fn real_path(path: &Path) -> PathBuf {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    for above in path.ancestors() {
        let Ok(mut real) = std::fs::canonicalize(above) else {
            continue;
        };
        // `above` is one of its ancestors.
        for below in path.strip_prefix(above).unwrap_or(&path).components() {
            match below {
                Component::ParentDir => drop(real.pop()),
                below => real.push(below),
            }
        }
        return real;
    }
    path
}

impl Client {
    #[must_use]
    pub fn new(options: ClientOptions) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self {
            inner: Arc::new(Inner {
                id: NEXT.fetch_add(1, Ordering::Relaxed),
                data: DataDir::open(&options.data_dir),
                settings: Arc::new(options.settings),
                closed: watch::Sender::new(false),
            }),
        }
    }

    /// The VM of this key. Does no I/O: it boots when something needs it.
    pub fn vm(&self, key: VmKey) -> Result<VmHandle> {
        self.vm_with(key, self.inner.settings.vm.clone())
    }

    /// The same, booted by this handle with other settings than the client's.
    pub fn vm_with(&self, key: VmKey, mut vm: VmSettings) -> Result<VmHandle> {
        // What is exchanged by one handle is not exchanged in others.
        vm.secrets = vm.secrets.apart();
        vm.network = vm.network.apart();
        self.handle(key, self.inner.settings.with(vm))
    }

    /// The same instead of a handle from before, with which it shares what confines the VM: calls that are under
    /// way there have the secrets and the rules of the network that are given here.
    pub fn vm_instead(
        &self,
        key: VmKey,
        before: &VmHandle,
        mut vm: VmSettings,
    ) -> Result<VmHandle> {
        self.inner.check_open()?;
        let own = &before.settings.vm;
        if !vm.network.is(&own.network) {
            own.network.set(vm.network.get());
            vm.network = own.network.clone();
        }
        if !vm.secrets.is(&own.secrets) {
            own.secrets.set(&vm.secrets);
            vm.secrets = own.secrets.clone();
        }
        self.handle(key, self.inner.settings.with(vm))
    }

    /// The VMs that the data directory has, by key, whichever process has made them. Boots nothing.
    pub async fn list_vms(&self) -> Result<Vec<Made>> {
        let vms = self.data_dir()?.join("vms");
        Ok(namespace::list(&vms).await?)
    }

    /// What a VM is booted with that is asked for without more.
    #[must_use]
    pub fn vm_settings(&self) -> &VmSettings {
        &self.inner.settings.vm
    }

    /// Directories of the VMs in all data directories that this process has open.
    pub(super) fn vm_directories() -> Vec<PathBuf> {
        let data = DataDir::all();
        let vms = data
            .iter()
            .filter_map(|data| std::fs::read_dir(data.path.join("vms")).ok());
        vms.flatten().flatten().map(|entry| entry.path()).collect()
    }

    pub(super) fn data_dir(&self) -> Result<&Path> {
        self.inner.check_open()?;
        Ok(&self.inner.data.path)
    }

    pub(super) fn settings(&self) -> Result<&Settings> {
        self.inner.check_open()?;
        Ok(&self.inner.settings)
    }

    fn handle(&self, key: VmKey, settings: Arc<Settings>) -> Result<VmHandle> {
        let data = &self.inner.data;
        // One step for `close`, which takes the machines after it has marked the client as closed.
        let mut machines = data.machines();
        self.inner.check_open()?;
        let machine = Arc::clone(
            machines
                .entry(key.id())
                .or_insert_with(|| Arc::new(Machine::new(key, &data.path, data.swept.clone()))),
        );
        machine.add_user(self.inner.id);
        drop(machines);
        Ok(VmHandle {
            client: Arc::clone(&self.inner),
            settings,
            machine,
        })
    }

    /// Puts an agent into the store, if it is not there yet: `pi`, or `pi@0.87.1` in an exact version.
    pub async fn install(
        &self,
        agent: &str,
        progress: &(dyn Fn(InstallProgress) + Send + Sync),
    ) -> Result<()> {
        self.inner.check_open()?;
        let settings = &self.inner.settings;
        let agent = Agent::find_version(agent, &settings.configured_agents)?;
        let installed = settings.agents.ensure(&agent, true, progress).await?;
        if let Installed::BuiltIn(installed) = installed
            && installed.lacks_compile_cache()
        {
            compile_cache::prepare(settings, agent, installed).await;
        }
        Ok(())
    }

    /// The built-in agents, as this client runs them.
    pub async fn available(&self) -> Result<Vec<Available>> {
        self.inner.check_open()?;
        let Settings {
            agents,
            configured_agents,
            ..
        } = &*self.inner.settings;
        Ok(agents.available(configured_agents).await?)
    }

    /// What is in the agent store.
    pub async fn installed(&self) -> Result<Vec<StoreEntry>> {
        self.inner.check_open()?;
        Ok(self.inner.settings.agents.list().await?)
    }

    /// Removes an agent from the store: `pi` in all versions, or `pi@0.87.1`.
    pub async fn uninstall(&self, agent: &str) -> Result<Removal> {
        self.inner.check_open()?;
        let Settings {
            agents,
            configured_agents,
            ..
        } = &*self.inner.settings;
        let named = Agent::find_version(agent, configured_agents)?;
        let built_in = named.built_in().ok_or_else(|| {
            let problem = format!("{agent:?} is an agent of your own: it is not in the store");
            Error::invalid_argument("agent", problem)
        })?;
        let version = agent.split_once('@').map(|(_, version)| version);
        Ok(agents.remove(built_in, version).await?)
    }

    /// Removes from the store what this version of agentvm never uses. `pretend`: removes nothing.
    pub async fn prune(&self, pretend: bool) -> Result<Removal> {
        self.inner.check_open()?;
        Ok(self.inner.settings.agents.prune(pretend).await?)
    }

    /// Ends what this client's VMs run, unless another client has them open too. Deletes nothing.
    pub async fn close(&self) -> Result<()> {
        if self.inner.closed.send_replace(true) {
            return Ok(());
        }
        let unused: Vec<_> = {
            let machines = self.inner.data.machines();
            machines
                .values()
                .filter(|machine| machine.remove_user(self.inner.id))
                .cloned()
                .collect()
        };
        let mut ending = JoinSet::new();
        for machine in unused {
            ending.spawn(async move { machine.close_unused().await });
        }
        let mut result = Ok(());
        while let Some(ended) = ending.join_next().await {
            let ended =
                ended.unwrap_or_else(|error| Err(Error::new(Code::Internal, error.to_string())));
            // Every VM is ended; the first failure is told.
            result = result.and(ended);
        }
        // A closed client's handles refuse every call: nobody needs a machine without users.
        let mut machines = self.inner.data.machines();
        machines.retain(|_, machine| machine.is_used());
        drop(machines);
        result
    }
}

impl Inner {
    /// Whatever failed because the client was closed meanwhile failed for that.
    fn explain(&self, error: Error) -> Error {
        match (self.check_open(), &error.code) {
            (Err(closed), Code::AgentExited | Code::Aborted | Code::VmExited) => Error::new(
                closed.code,
                format!("the client was closed meanwhile: {}", error.message),
            ),
            _ => error,
        }
    }

    fn check_open(&self) -> Result<()> {
        if *self.closed.borrow() {
            return Err(closed_error());
        }
        Ok(())
    }

    /// Becomes true when the client is closed.
    pub(super) fn closed(&self) -> watch::Receiver<bool> {
        self.closed.subscribe()
    }
}

pub(super) fn closed_error() -> Error {
    Error::new(
        Code::ClientClosed,
        "this client is closed: make another one with createClient()",
    )
}

/// One client's view of a VM.
#[derive(Clone)]
pub struct VmHandle {
    pub(super) client: Arc<Inner>,
    settings: Arc<Settings>,
    pub(super) machine: Arc<Machine>,
}

impl VmHandle {
    /// What this handle boots the VM with.
    #[must_use]
    pub fn vm_settings(&self) -> &VmSettings {
        &self.settings.vm
    }

    /// Starts an agent in a new session. Nothing of it is left if it fails, or when `abort` resolves
    /// first.
    pub async fn create_session(
        &self,
        agent: &str,
        options: SessionOptions,
        abort: impl Future<Output = ()> + Send,
    ) -> Result<CreatedSession> {
        let settings = self.open()?;
        let agent = settings.agent(agent)?;
        let machine = &self.machine;
        let awake = machine.awake_to_make(settings).await;
        self.open()?;
        let mut closed = self.client.closed.subscribe();
        // Another client may keep the VM running: this start ends with its own.
        let abort = async {
            tokio::select! {
                () = abort => {}
                _ = closed.wait_for(|closed| *closed) => {}
                () = awake.ending() => {}
            }
        };
        let created = machine.create_session(settings, agent, options, abort);
        created.await.map_err(|error| self.explain(&awake, error))
    }

    /// Runs a turn. A session without a running agent is resumed first.
    pub async fn send_prompt(&self, session: SessionId, blocks: Vec<Value>) -> Result<TurnResult> {
        self.open()?;
        if blocks.iter().all(is_empty_text) {
            return Err(Error::invalid_argument(
                "text",
                "a prompt must not be empty",
            ));
        }
        let (settings, awake) = self.awake().await?;
        // One that the VM's end meets is cancelled, which is no error.
        let turn = self.machine.prompt(settings, session, blocks, awake);
        turn.await.map_err(|error| self.client.explain(error))
    }

    /// `false`: no turn was under way.
    pub async fn cancel_prompt(&self, session: SessionId) -> Result<bool> {
        self.open()?;
        self.machine.cancel(session).await
    }

    /// Starts the agent of a session that has none running, and returns the session's record.
    pub async fn resume_session(&self, session: SessionId, given: Resume) -> Result<SessionView> {
        let (settings, awake) = self.awake().await?;
        let resumed = self.machine.resume(settings, session, given).await;
        resumed.map_err(|error| self.explain(&awake, error))?;
        self.machine.view(session).await
    }

    pub async fn close_session(&self, session: SessionId) -> Result<()> {
        self.open()?;
        self.machine.close_session(session).await
    }

    /// Sessions in the store, newest first. Boots nothing.
    pub async fn sessions(&self) -> Result<Vec<SessionRecord>> {
        self.open()?;
        self.machine.records().await
    }

    /// Committed events of a session. Boots nothing.
    pub async fn events(&self, session: SessionId, query: Query) -> Result<Page> {
        self.open()?;
        self.machine.events(session, query).await
    }

    pub async fn exec(&self, command: &str, options: ExecOptions) -> Result<ExecEnd> {
        let (settings, _awake) = self.awake().await?;
        let start = |vm: DynVm| {
            let options = &options;
            async move { exec::start(&vm, command, options).await }
        };
        let (vm, process) = self.machine.begin(settings, start).await?;
        let ended = exec::attend(&vm, process, options).await;
        self.machine.outcome(&vm, ended).await
    }

    /// Other rules of the network, for every boot from now on, also those that calls have asked for already.
    pub fn set_network(&self, rules: Rules) {
        self.settings.vm.network.set(rules);
    }

    /// Puts this handle's rules of the network into force, if the VM runs. It is not booted for that.
    pub async fn apply_network(&self) -> Result<()> {
        let settings = self.open()?;
        // A boot that is under way is waited for.
        if self.machine.hold(&settings.vm.network).await? {
            return Ok(());
        }
        // One that runs elsewhere would keep the rules that it has.
        self.machine.check_not_elsewhere().await
    }

    /// Ends what runs, keeps everything that is kept.
    pub async fn sleep(&self) -> Result<()> {
        self.open()?;
        self.machine.shut_down(ShutdownReason::Sleep).await
    }

    /// Boots the VM if it does not run.
    pub async fn wake(&self) -> Result<()> {
        let (settings, _awake) = self.awake().await?;
        self.machine.vm(settings).await.map(drop)
    }

    /// Deletes the VM with its files and sessions. A later call starts with an empty one.
    pub async fn destroy(&self) -> Result<()> {
        self.open()?;
        self.machine.shut_down(ShutdownReason::Destroy).await
    }

    /// Follows what happens from now on.
    pub fn subscribe(&self) -> Result<Subscription> {
        self.open()?;
        Ok(self.machine.emission.subscribe())
    }

    /// What every call that needs the VM begins with. It holds the [`Awake`] until it is over.
    pub(super) async fn awake(&self) -> Result<(&Settings, Awake)> {
        let awake = self.machine.awake(self.open()?).await;
        // It may have been closed while the VM's end was waited for.
        Ok((self.open()?, awake))
    }

    /// What a call that needs an agent failed for, if its VM, or its client, has ended meanwhile.
    pub(super) fn explain(&self, awake: &Awake, error: Error) -> Error {
        let given_up = [Code::AgentExited, Code::Aborted, Code::VmExited].contains(&error.code);
        let error = if given_up && awake.has_met_an_end() {
            self.machine.was_ended()
        } else {
            error
        };
        self.client.explain(error)
    }

    pub(super) fn open(&self) -> Result<&Settings> {
        self.client.check_open()?;
        Ok(&self.settings)
    }
}

/// A prompt of plain text as ACP content blocks.
#[must_use]
pub fn text_prompt(text: &str) -> Vec<Value> {
    vec![json!({ "type": "text", "text": text })]
}

/// Models refuse it, or answer what was said before.
fn is_empty_text(block: &Value) -> bool {
    block["type"] == "text" && block["text"] == ""
}
