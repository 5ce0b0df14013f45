//! How the limits of a VM are enforced on this host: for each, what works here.

use std::io::ErrorKind;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use std::{fs, ptr};

use agentvm_guest::protocol::{LimitOp, LimitSpec, ProcessUsage, Request, Rlimit};
use async_trait::async_trait;
use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::utsname::uname;
use tokio::sync::watch;
use tokio::time::timeout;

use super::cgroup::{self, Cgroup, Refused, Signals, Wanted};
use super::control::{Answer, Control};
use super::directory::{blocking, host};
use super::disk::Watch;
use super::free_space;
use super::ids::IdMap;
use super::layout::shm_size;
use super::running::{NamespaceVm, processes, unexpected};
use crate::vm::limits::{DEFAULT_PIDS, InForce, Limited, Limits, Mechanism, Reached, Usage};
use crate::vm::{Limit, Result, VmError};

/// What PID 1 may start beyond what the VM's programs may: a shell for the host's calls, where these
/// have used up theirs.
const RESERVED_PIDS: u64 = 32;

/// Most that a process may open, unless told otherwise: what systemd's services may.
const MAX_FILES: u64 = 1 << 20;

/// How long PID 1 may take to kill what runs in the VM.
const KILLS: Duration = Duration::from_secs(5);

/// After which a disk that could not be looked at is looked at again.
const RETRY: Duration = Duration::from_secs(1);

/// A VM that meets a limit again and again is told of that at most so often.
const NOTICE_INTERVAL: Duration = Duration::from_millis(100);

/// `clock_t`: see [`ProcessUsage::cpu_ticks`].
const MS_PER_TICK: u64 = 10;

/// The limits of one VM.
pub(super) struct Limiter {
    in_force: Vec<InForce>,
    best_effort: bool,
    /// Whether the kernel counts the processes of this VM alone.
    pids_by_rlimit: bool,
    disk_bytes: Option<u64>,
    min_free_disk_bytes: u64,
    booted: Instant,
    state: Mutex<State>,
    reached: watch::Sender<Reached>,
}

struct State {
    /// `None`: there is none, or the VM has ended.
    cgroup: Option<Cgroup>,
}

impl Limiter {
    /// Decides how each limit is enforced, and makes what that needs.
    pub(super) async fn prepare(limits: &Limits, ids: IdMap, directory: &Path) -> Result<Self> {
        let pids_by_rlimit = per_vm_nproc() && !ids.user_is_uncounted();
        let wanted = Wanted {
            memory_bytes: limits.memory_bytes,
            milli_cpus: limits.milli_cpus,
            // Root of the VM could start any number of processes as other users of it.
            pids: limits.pids.filter(|_| ids.root_mapped() || !pids_by_rlimit),
        };
        let (cgroup, refused) = if wanted.nothing() {
            (None, Vec::new())
        } else {
            let wanted = Wanted {
                // In a cgroup it costs nothing.
                pids: Some(limits.pids.unwrap_or(DEFAULT_PIDS)),
                ..wanted
            };
            let (cgroup, refused) = blocking(move || Ok(Cgroup::make(wanted))).await?;
            (Some(cgroup), refused)
        };
        let may_refuse = |limit| match limit {
            Limit::Memory => limits.memory_bytes.is_some(),
            Limit::Cpus => limits.milli_cpus.is_some(),
            Limit::Pids => wanted.pids.is_some(),
            Limit::OpenFiles | Limit::Disk | Limit::FreeDisk => true,
        };
        let files = open_files(limits, ids);
        let refused = refused
            .into_iter()
            .filter(|refused| may_refuse(refused.limit))
            .chain(files.refused);
        if !limits.best_effort
            && let Some(Refused { limit, why }) = { refused }.next()
        {
            return Err(unsupported(limit, why));
        }
        let by_rlimit = pids_by_rlimit.then_some(Mechanism::Rlimit);
        let by_cgroup = |limit| cgroup.as_ref().and_then(|cgroup| cgroup.mechanism(limit));
        let min_free = free_space::floor(limits.min_free_disk_bytes, directory);
        let in_force = [
            (Limit::Memory, limits.memory_bytes, by_cgroup(Limit::Memory)),
            (Limit::Cpus, limits.milli_cpus, by_cgroup(Limit::Cpus)),
            (
                Limit::Pids,
                Some(limits.pids.unwrap_or(DEFAULT_PIDS)),
                by_cgroup(Limit::Pids).or(by_rlimit),
            ),
            (Limit::OpenFiles, Some(files.hard), Some(Mechanism::Rlimit)),
            (Limit::Disk, limits.disk_bytes, Some(Mechanism::Polled)),
            (
                Limit::FreeDisk,
                Some(min_free).filter(|bytes| *bytes > 0),
                Some(Mechanism::Polled),
            ),
        ];
        let in_force = in_force.map(|(limit, value, mechanism)| InForce {
            limit,
            value: value.map(|value| in_unit(limit, value)),
            mechanism: mechanism
                .filter(|_| value.is_some())
                .unwrap_or(Mechanism::None),
        });
        Ok(Self {
            in_force: in_force.to_vec(),
            best_effort: limits.best_effort,
            pids_by_rlimit,
            disk_bytes: limits.disk_bytes,
            min_free_disk_bytes: min_free,
            booted: Instant::now(),
            state: Mutex::new(State { cgroup }),
            reached: watch::Sender::default(),
        })
    }

    /// Makes PID 1 a member of the VM's cgroups. It has started nothing yet.
    pub(super) async fn enter(&mut self, pid: i32) -> Result<()> {
        let Some(cgroup) = self.state().cgroup.take() else {
            return Ok(());
        };
        let (cgroup, entered) = blocking(move || {
            let entered = cgroup.enter(pid);
            Ok((cgroup, entered))
        })
        .await?;
        let Err((file, error)) = entered else {
            self.state().cgroup = Some(cgroup);
            return Ok(());
        };
        let limited = |own: &&mut InForce| cgroup.mechanism(own.limit) == Some(own.mechanism);
        let mut lost = None;
        for own in self.in_force.iter_mut().filter(limited) {
            lost.get_or_insert(own.limit);
            own.mechanism = match own.limit {
                Limit::Pids if self.pids_by_rlimit => Mechanism::Rlimit,
                _ => Mechanism::None,
            };
        }
        // A member of some of them leaves them when PID 1 ends.
        self.state().cgroup = Some(cgroup);
        match lost {
            Some(limit) if !self.best_effort => {
                let why = format!("can't write {}: {error}", file.display());
                Err(unsupported(limit, why))
            }
            _ => Ok(()),
        }
    }

    /// Tells of limits that are met, as long as the VM runs.
    pub(super) fn watch(self: &Arc<Self>) -> Option<tokio::task::JoinHandle<()>> {
        let signals = self.state().cgroup.as_ref().map(Cgroup::signals)?;
        let signals = match signals {
            Ok(signals) => signals,
            Err(error) => {
                tracing::warn!(%error, "limits that a VM meets are told late");
                return None;
            }
        };
        Some(tokio::spawn(Arc::clone(self).tell(signals)))
    }

    async fn tell(self: Arc<Self>, mut signals: Signals) {
        while signals.changed().await.is_ok() {
            self.look();
            tokio::time::sleep(NOTICE_INTERVAL).await;
            // With v1 the notice comes before the process is killed.
            self.look();
        }
    }

    /// Ends what writes when the VM's directory takes too much, or leaves the host too little, as long as
    /// the VM runs.
    pub(super) fn watch_disk(
        self: &Arc<Self>,
        directory: &Path,
        pid: i32,
        control: &Arc<Control>,
    ) -> Option<tokio::task::JoinHandle<()>> {
        let floor = self.min_free_disk_bytes;
        if let Err(error) = free_space::watch(directory, floor, pid, self, control) {
            tracing::warn!(%error, "what a VM leaves free of the disk is not watched");
        }
        let watch = Watch::new(directory.to_owned(), self.disk_bytes?, pid);
        let (limiter, control) = (Arc::clone(self), Arc::clone(control));
        Some(tokio::spawn(async move {
            // A lack of descriptors, for one, passes.
            while let Err(error) = limiter.keep_within(&watch, &control).await {
                tracing::warn!(%error, "the disk use of a VM can't be told for a while");
                tokio::time::sleep(RETRY).await;
            }
        }))
    }

    /// Once over its limit, a VM may go on without growing: what is too much has to be deleted in it.
    async fn keep_within(&self, watch: &Watch, control: &Control) -> Result<()> {
        // One that has too much when it boots may go on, too: something has to be deleted in it.
        loop {
            // What was written until the last was killed counts as what was there.
            let before = watch.used().await?;
            watch.exceeded(before).await?;
            self.kill_all(control, |reached| reached.disk += 1).await?;
        }
    }

    /// Kills everything that runs in the VM.
    pub(super) async fn kill_all(
        &self,
        control: &Control,
        count: impl FnOnce(&mut Reached),
    ) -> Result<()> {
        // First, so that who sees the end of a process finds why.
        self.reached.send_modify(count);
        let id = control.next_id();
        let request = Request::Limits {
            id,
            op: LimitOp::Kill,
        };
        match timeout(KILLS, control.call(id, &request, &[])).await {
            Ok(Ok(Answer::Done)) => Ok(()),
            Ok(Err(error)) => Err(error),
            // Then the VM ends as a whole.
            Ok(Ok(_)) | Err(_) => {
                control.end("PID 1 did not kill what ran, when a limit was met");
                control.hang_up();
                Ok(())
            }
        }
    }

    /// Reads how often limits were met, and tells if that is news.
    pub(super) fn look(&self) -> Reached {
        let state = self.state();
        if let Some(cgroup) = &state.cgroup {
            let (memory, pids) = (cgroup.killed_for_memory(), cgroup.refused_pids());
            self.reached.send_if_modified(|reached| {
                let before = *reached;
                reached.memory = reached.memory.max(memory);
                reached.pids = reached.pids.max(pids);
                *reached != before
            });
        }
        *self.reached.borrow()
    }

    /// The kernel has refused PID 1 a process.
    pub(super) fn refused_pid(&self) {
        // A cgroup has counted it.
        let counted = self.state().cgroup.is_some();
        if counted {
            self.look();
        } else {
            self.reached.send_modify(|reached| reached.pids += 1);
        }
    }

    /// PID 1 kills all that runs in the VM.
    pub(super) fn ended_fork_bomb(&self) {
        self.reached.send_modify(|reached| reached.fork_bombs += 1);
    }

    /// Nothing of the VM is left.
    pub(super) async fn end(&self) {
        self.look();
        let cgroup = self.state().cgroup.take();
        if let Some(cgroup) = cgroup {
            // It logs what it can't remove.
            drop(tokio::task::spawn_blocking(move || drop(cgroup)).await);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl Limited for NamespaceVm {
    fn limits(&self) -> &[InForce] {
        &self.limiter().in_force
    }

    async fn usage(&self) -> Result<Usage> {
        let counted = {
            let state = self.limiter().state();
            state.cgroup.as_ref().map(Cgroup::counted)
        }
        .unwrap_or_default();
        // Of what no controller counts.
        let found =
            if counted.cpu_ms.is_some() && counted.memory_bytes.is_some() && counted.pids.is_some()
            {
                ProcessUsage::default()
            } else {
                self.process_usage().await?
            };
        let by_cgroup = counted.memory_bytes.and_then(|_| {
            self.limiter()
                .state()
                .cgroup
                .as_ref()?
                .mechanism(Limit::Memory)
        });
        let (network_rx_bytes, network_tx_bytes) = self.traffic();
        Ok(Usage {
            cpu_ms: counted
                .cpu_ms
                .unwrap_or_else(|| found.cpu_ticks.saturating_mul(MS_PER_TICK)),
            memory_bytes: counted.memory_bytes.unwrap_or(found.resident_bytes),
            memory_peak_bytes: counted.memory_peak_bytes,
            pids: counted.pids.unwrap_or(found.tasks),
            counted_by: by_cgroup,
            uptime_ms: u64::try_from(self.limiter().booted.elapsed().as_millis())
                .unwrap_or(u64::MAX),
            network_rx_bytes,
            network_tx_bytes,
        })
    }

    fn reached(&self) -> Reached {
        self.limiter().look()
    }

    fn watch_limits(&self) -> watch::Receiver<Reached> {
        self.limiter().reached.subscribe()
    }
}

impl NamespaceVm {
    /// What PID 1 says: a sum that it could make up.
    async fn process_usage(&self) -> Result<ProcessUsage> {
        let id = self.control().next_id();
        let op = LimitOp::Usage;
        match self
            .control()
            .call(id, &Request::Limits { id, op }, &[])
            .await?
        {
            Answer::Usage(usage) => Ok(usage),
            Answer::Failed { errno, .. } => Err(processes(errno)),
            other => Err(unexpected(&other)),
        }
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "JavaScript's numbers are no more exact"
)]
fn in_unit(limit: Limit, value: u64) -> f64 {
    match limit {
        Limit::Cpus => value as f64 / 1000.0,
        _ => value as f64,
    }
}

fn unsupported(limit: Limit, why: String) -> VmError {
    let remedy = match limit {
        Limit::OpenFiles => {
            "Raise the hard limit of the host process (ulimit -Hn), or ask for less"
        }
        _ => cgroup::REMEDY,
    };
    VmError::LimitUnsupported { limit, why, remedy }
}

/// Whether `RLIMIT_NPROC` counts what a user runs in one user namespace, which each VM has one of.
fn per_vm_nproc() -> bool {
    let Ok(kernel) = uname() else {
        return false;
    };
    let release = kernel.release().to_string_lossy();
    let mut numbers = release
        .split(['.', '-'])
        .map_while(|part| part.parse().ok());
    let version: (u32, u32) = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    version >= (5, 14)
}

/// More than this process may have is not its to give.
fn hard_limit(resource: Resource) -> u64 {
    getrlimit(resource).map_or(0, |(_, hard)| hard)
}

struct OpenFiles {
    /// Of programs.
    hard: u64,
    /// That this process can give.
    most: u64,
    refused: Option<Refused>,
}

/// The kernel lets a user have as many descriptors on their way through sockets as each process of his may
/// open. Where all VMs are the host process's own user, it and PID 1 may have more than programs, which
/// then can't use up what these need to hand out a descriptor.
fn open_files(limits: &Limits, ids: IdMap) -> OpenFiles {
    let most = match hard_limit(Resource::RLIMIT_NOFILE) {
        0 => MAX_FILES,
        most => most,
    };
    let share = if ids.root_mapped() { most } else { most / 2 };
    let default = MAX_FILES.min(share);
    let wanted = limits.open_files.unwrap_or(default);
    let refused = (limits.open_files.is_some() && wanted > most).then(|| Refused {
        limit: Limit::OpenFiles,
        why: format!("the host process itself may open {most} files at most"),
    });
    OpenFiles {
        hard: wanted.min(most),
        most,
        refused,
    }
}

/// No core is dumped: no file is so small, and a `core_pattern` that is a pipe obeys this number alone, not
/// 0 (coredump.c).
const CORE: u64 = 1;

/// Gives PID 1 the limit that stops core dumps, where this process has a hard one of 0: raising that takes
/// `CAP_SYS_RESOURCE`. What fails is told by `doctor`.
pub(super) fn stop_core_dumps(pid: i32) {
    if hard_limit(Resource::RLIMIT_CORE) > 0 {
        return;
    }
    let limit = libc::rlimit64 {
        rlim_cur: CORE,
        rlim_max: CORE,
    };
    // SAFETY: a limit that outlives the call, and nowhere to put the old one.
    let set = unsafe { libc::prlimit64(pid, libc::RLIMIT_CORE, &raw const limit, ptr::null_mut()) };
    if let Err(errno) = Errno::result(set) {
        tracing::debug!(%errno, "a core_pattern that is a pipe gets what crashes in this VM");
    }
}

/// Takes from PID 1 what the host process may have to be the last that is killed where memory is short.
/// Where it runs without `CAP_SYS_RESOURCE`, the VM's programs may take it back.
pub(super) fn be_killed_like_others(pid: i32) {
    let path = format!("/proc/{pid}/oom_score_adj");
    let adjusted = fs::read_to_string(&path).and_then(|score| {
        if score.starts_with('-') {
            fs::write(&path, "0")
        } else {
            Ok(())
        }
    });
    if let Err(error) = adjusted {
        tracing::debug!(%error, "where memory is short, this VM is killed when its host process is");
    }
}

/// What PID 1 sets, whatever the host process has.
pub(super) fn spec(limits: &Limits, ids: IdMap) -> Result<LimitSpec> {
    let files = open_files(limits, ids);
    let both = |resource, value| Rlimit {
        resource,
        soft: value,
        hard: value,
    };
    let at_most =
        |resource: u32, of: Resource, most: u64| both(resource, (hard_limit(of) / 4).min(most));
    let mut rlimits = vec![
        both(libc::RLIMIT_NOFILE, files.most),
        // Kernel memory that is counted for the VM's users, and for who runs the host process: one VM gets
        // a quarter.
        at_most(libc::RLIMIT_MEMLOCK, Resource::RLIMIT_MEMLOCK, 64 << 20),
        at_most(libc::RLIMIT_MSGQUEUE, Resource::RLIMIT_MSGQUEUE, 800 << 10),
        at_most(
            libc::RLIMIT_SIGPENDING,
            Resource::RLIMIT_SIGPENDING,
            16 << 10,
        ),
    ];
    // To run before all other programs of the host.
    for resource in [libc::RLIMIT_NICE, libc::RLIMIT_RTPRIO] {
        rlimits.push(both(resource, 0));
    }
    // See `stop_core_dumps`.
    if hard_limit(Resource::RLIMIT_CORE) > 0 {
        rlimits.push(both(libc::RLIMIT_CORE, CORE));
    }
    let mut program_rlimits = vec![Rlimit {
        resource: libc::RLIMIT_NOFILE,
        // select(2) breaks above 1024: who can do more raises it.
        soft: files.hard.min(1024),
        hard: files.hard,
    }];
    if per_vm_nproc() {
        let hard = hard_limit(Resource::RLIMIT_NPROC);
        let wanted = limits.pids.unwrap_or(DEFAULT_PIDS).min(hard);
        let own = wanted.saturating_add(RESERVED_PIDS).min(hard);
        rlimits.push(both(libc::RLIMIT_NPROC, own));
        program_rlimits.push(both(libc::RLIMIT_NPROC, wanted));
    }
    Ok(LimitSpec {
        rlimits,
        program_rlimits,
        sysctls: [per_user_sysctls()?, system_v(limits)].concat(),
    })
}

/// What System V's calls keep in memory without a process that could be killed for it: the kernel's own
/// bounds are next to none. (An ordinary user's VM keeps those: they are for the root of its user namespace
/// to set, and it has none.)
fn system_v(limits: &Limits) -> Vec<(String, String)> {
    // SAFETY: sysconf only returns a number.
    let page = u64::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096);
    let pages = shm_size(limits.memory_bytes) / page;
    [
        ("shmall", pages.to_string()),
        // Queues, of 16 KiB each.
        ("msgmni", "1024".to_owned()),
        // In a set, in all, in a call; sets.
        ("sem", "32000 32000 500 1024".to_owned()),
    ]
    .map(|(name, value)| (format!("kernel/{name}"), value))
    .to_vec()
}

/// The kernel counts these for the user who runs the host process, over all VMs and what else he runs:
/// one VM gets a quarter.
fn per_user_sysctls() -> Result<Vec<(String, String)>> {
    const FEWEST: u64 = 16;
    let mut sysctls = Vec::new();
    for (own, hosts) in [
        ("max_inotify_instances", "inotify/max_user_instances"),
        ("max_inotify_watches", "inotify/max_user_watches"),
        ("max_fanotify_groups", "fanotify/max_user_groups"),
        ("max_fanotify_marks", "fanotify/max_user_marks"),
    ] {
        let path = format!("/proc/sys/fs/{hosts}");
        let text = match fs::read_to_string(&path) {
            // The kernel has no such thing, or a container hides it.
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::NotFound | ErrorKind::PermissionDenied
                ) =>
            {
                continue;
            }
            read => read.map_err(|error| host("can't read", Path::new(&path), error))?,
        };
        if let Ok(most) = text.trim().parse::<u64>() {
            let own = format!("user/{own}");
            sysctls.push((own, (most / 4).max(FEWEST).to_string()));
        }
    }
    Ok(sysctls)
}
