//! VMs from Linux namespaces, with the static guest as PID 1. No root, no daemon, no setuid helper.

mod base;
mod control;
mod directory;
mod ids;
mod layout;
mod preparation;
mod seccomp;
mod starter;
mod trees;
mod unsupported;

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use agentvm_guest::net::NetSockets;
use agentvm_guest::protocol::{Account, FailedAt, NetState, Reply, Request, Turn};
use async_trait::async_trait;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;

use self::control::{Answer, Control};
use self::directory::{Directory, LastBoot, host};
use self::ids::IdMap;
use self::preparation::{BootMessage, Prepared};
use super::{
    Command, Commands, Extent, Foreground, GuestPath, Moment, Open, Process, Result, User, Vm,
    VmEnd, VmError,
};
use crate::net::{Network, Policy};

pub use self::directory::HostLock;
pub use self::layout::AGENTS;

/// What a VM is booted from.
#[derive(Debug, Clone)]
pub struct BootOptions {
    /// `<dataDir>/vms/<id>`: made if missing.
    pub dir: PathBuf,
    /// The VM's key as JSON, kept in `vm.json` and named in errors.
    pub key: String,
    /// `<dataDir>/base`: what is derived from the host's `/etc`, shared by VMs.
    pub base_cache: PathBuf,
    /// The agent store, mounted read-only at [`AGENTS`].
    pub agents: PathBuf,
    pub policy: Arc<Policy>,
}

/// A VM that has just booted.
pub struct Booted {
    pub vm: Arc<NamespaceVm>,
    /// To be held until nothing writes to the VM's directory any more.
    pub lock: HostLock,
    /// The host's programs have changed since this VM last booted: its writable layers lie on
    /// another base now.
    pub base_changed: bool,
    /// The host crashed while this VM ran: what was written outside of the durable directories
    /// (`/home/user`, `/root`, `/var`) may be incomplete.
    pub layers_suspect: bool,
}

/// Boots a VM, or says what the host lacks for it. A failure leaves nothing behind but the VM's
/// directory.
pub async fn boot(options: BootOptions) -> Result<Booted> {
    // The kernel needs a millisecond for the namespaces, the disk as long for the directories: at
    // the same time.
    let (started, prepared) = tokio::join!(starter::start(), preparation::prepare(&options));
    let started = match started {
        Ok(started) => started,
        Err(error) => {
            // What is wrong with the VM's directory comes first: that is the caller's own.
            prepared?;
            return Err(unsupported::namespaces(error.step, error.errno));
        }
    };
    let pid = started.pid;
    let (guest, control) = Guest::adopt(started)?;
    match furnish(pid, &control, prepared, &options).await {
        Ok(Furnished {
            directory,
            ids,
            network,
            last,
        }) => Ok(Booted {
            lock: directory.host_lock(),
            vm: NamespaceVm::run(directory, control, guest, network, ids),
            base_changed: last.base_changed,
            layers_suspect: last.layers_suspect,
        }),
        Err(error) => {
            // PID 1 exits when its socket closes. The caller hears of the failure when nothing is
            // left of the attempt.
            drop(control);
            guest.gone().await;
            Err(error)
        }
    }
}

/// What a guest has become a VM with.
struct Furnished {
    directory: Directory,
    ids: IdMap,
    network: Option<Network>,
    last: LastBoot,
}

/// Turns a waiting guest into a VM in its directory.
async fn furnish(
    pid: i32,
    control: &Control,
    prepared: Result<Prepared>,
    options: &BootOptions,
) -> Result<Furnished> {
    let prepared = prepared?;
    let (ids, last) = (prepared.ids, prepared.last);
    ids.write(pid)
        .map_err(|(file, errno)| unsupported::id_map(file, errno))?;
    let (directory, message) = prepared.message(pid, options).await?;
    let (net, sockets) = first_reply(control, message, directory.lock()).await?;
    let network = match net {
        NetState::Up { v6 } => Some(start_network(sockets, v6, Arc::clone(&options.policy))?),
        NetState::Down { step, errno } => {
            let step = String::from_utf8_lossy(&step);
            tracing::warn!(%step, errno = %Errno::from_raw(errno), "this VM has no network");
            None
        }
    };
    Ok(Furnished {
        directory,
        ids,
        network,
        last,
    })
}

/// Removes a VM's directory with everything in it. Waits for a VM that is still being torn down.
pub async fn delete(dir: &Path, key: &str) -> Result<()> {
    if !dir.exists() {
        return Ok(());
    }
    Directory::open(dir, key, IdMap::of_this_process())
        .await?
        .remove()
        .await
}

/// Fails where [`boot`] would, because other users can change the data directory that `dir` lies in, or
/// could exchange it: what is read there could be anybody's. A directory that does not exist is fine.
pub async fn check_owner(dir: &Path) -> Result<()> {
    let vms = dir.parent().unwrap_or(dir).to_owned();
    directory::blocking(move || directory::check_owner(&vms)).await
}

/// Clears what an interrupted [`delete`] has left in `<dataDir>/vms`.
pub fn sweep(vms: &Path) {
    directory::sweep(vms);
}

async fn first_reply(
    control: &Control,
    BootMessage { spec, trees }: BootMessage,
    lock: &File,
) -> Result<(NetState, Vec<OwnedFd>)> {
    let mut descriptors = vec![lock.as_fd()];
    descriptors.extend(trees.iter().map(AsFd::as_fd));
    let sent = control
        .send(&Request::Boot(Box::new(spec)), &descriptors)
        .await;
    // A guest that failed early has said why before it closed its end.
    let reply = control.receive().await.map_err(VmError::Protocol)?;
    match (reply, sent) {
        (Some((Reply::Ready { net }, sockets)), Ok(())) => Ok((net, sockets)),
        (Some((Reply::BootFailed { step, errno }, _)), _) => Err(unsupported::boot_step(
            String::from_utf8_lossy(&step).into_owned(),
            Errno::from_raw(errno),
        )),
        (Some(_), _) => Err(VmError::Protocol("another first message".to_owned())),
        (None, Err(error)) => Err(VmError::Ended(format!("PID 1 died at its start: {error}"))),
        (None, Ok(())) => Err(VmError::Ended("PID 1 died while it booted".to_owned())),
    }
}

fn start_network(sockets: Vec<OwnedFd>, v6: bool, policy: Arc<Policy>) -> Result<Network> {
    let missing = || VmError::Protocol("a boot report without its sockets".to_owned());
    let mut sockets = sockets.into_iter();
    let mut next = || sockets.next().ok_or_else(missing);
    let sockets = NetSockets {
        tcp4: next()?,
        dns_udp: next()?,
        dns_tcp: next()?,
        tcp6: v6.then(next).transpose()?,
    };
    Network::start(sockets, policy)
        .map_err(|error| VmError::Protocol(format!("unusable network sockets: {error}")))
}

/// PID 1 as the host sees it. Reaped when it is gone, also if nobody waits for that.
struct Guest {
    pidfd: Option<AsyncFd<OwnedFd>>,
}

impl Guest {
    /// Takes charge of a guest that has been started.
    fn adopt(mut started: starter::Started) -> Result<(Self, Control)> {
        let unusable = |error| host("can't watch", Path::new("PID 1"), error);
        let (pidfd, control) = started
            .take()
            .ok_or_else(|| unusable(Errno::EBADF.into()))?;
        // SAFETY: an OwnedFd that nobody replaces or closes while the AsyncFd owns it.
        match unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) } {
            Ok(pidfd) => {
                let guest = Self { pidfd: Some(pidfd) };
                let control = Control::new(control).map_err(unusable)?;
                Ok((guest, control))
            }
            Err(refused) => {
                let (pidfd, error) = refused.into_parts();
                drop(control);
                starter::reap(&pidfd);
                Err(unusable(error))
            }
        }
    }

    /// Waits until PID 1, and with it every process of the VM, is gone.
    async fn gone(mut self) {
        if let Some(pidfd) = &self.pidfd {
            // Still ours meanwhile: a caller that gives up waiting leaves it to `drop`.
            reap(pidfd).await;
        }
        self.pidfd = None;
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if let (Some(pidfd), Ok(runtime)) =
            (self.pidfd.take(), tokio::runtime::Handle::try_current())
        {
            drop(runtime.spawn(async move { reap(&pidfd).await }));
        }
    }
}

async fn reap(pidfd: &AsyncFd<OwnedFd>) {
    // A pidfd becomes readable when its process has exited.
    if let Err(error) = pidfd.readable().await {
        tracing::error!(%error, "can't wait for PID 1");
    }
    starter::reap(pidfd.get_ref());
}

/// A running VM.
pub struct NamespaceVm {
    control: Arc<Control>,
    ended: watch::Receiver<Option<VmEnd>>,
    /// Tells the supervisor to end the VM.
    stop: watch::Sender<bool>,
    ids: IdMap,
    /// Dropped with the VM: its connections end.
    network: Mutex<Option<Network>>,
}

impl NamespaceVm {
    fn run(
        directory: Directory,
        control: Control,
        guest: Guest,
        network: Option<Network>,
        ids: IdMap,
    ) -> Arc<Self> {
        let control = Arc::new(control);
        let (ended_sender, ended) = watch::channel(None);
        let (stop, mut stopped) = watch::channel(false);
        let vm = Arc::new(Self {
            control: Arc::clone(&control),
            ended,
            stop,
            ids,
            network: Mutex::new(network),
        });
        let weak = Arc::downgrade(&vm);
        tokio::spawn(async move {
            let end = tokio::select! {
                why = control.run() => VmEnd::Died(why),
                _ = stopped.wait_for(|stop| *stop) => VmEnd::Shutdown,
            };
            control.end("it was shut down");
            control.hang_up();
            guest.gone().await;
            if let Some(vm) = weak.upgrade() {
                *vm.network.lock().unwrap_or_else(PoisonError::into_inner) = None;
            }
            drop(directory);
            ended_sender.send_replace(Some(end));
        });
        vm
    }

    async fn wait_for_end(&self) {
        let mut ended = self.ended.clone();
        // An error means that the supervisor is gone, which it only is after the end.
        drop(ended.wait_for(Option::is_some).await);
    }

    fn account(&self, user: User) -> Result<Account> {
        match user {
            User::User => Ok(Account::User),
            User::Root if self.ids.root_mapped() => Ok(Account::Root),
            User::Root => Err(VmError::User(
                "this VM has no root: an ordinary user of the host can map one id only. Run as \
                 user, or run the host process as root"
                    .to_owned(),
            )),
        }
    }
}

#[async_trait]
impl Vm for NamespaceVm {
    async fn spawn(&self, command: &Command) -> Result<Process> {
        let user = self.account(command.user)?;
        let pipe = || {
            nix::unistd::pipe2(OFlag::O_CLOEXEC)
                .map_err(|errno| host("can't make a pipe for", Path::new("stdio"), errno.into()))
        };
        let ((stdin_theirs, stdin), (stdout, stdout_theirs), (stderr, stderr_theirs)) =
            (pipe()?, pipe()?, pipe()?);
        for ours in [&stdin, &stdout, &stderr] {
            // Of this end only: the program's must block.
            nix::fcntl::fcntl(ours, nix::fcntl::F_SETFL(OFlag::O_NONBLOCK))
                .map_err(|errno| host("can't set up", Path::new("stdio"), errno.into()))?;
        }
        let bytes = |text: &String| text.clone().into_bytes();
        let id = self.control.next_id();
        let request = Request::Spawn {
            id,
            argv: command.argv.iter().map(bytes).collect(),
            env: command
                .env
                .iter()
                .map(|(name, value)| format!("{name}={value}").into_bytes())
                .collect(),
            cwd: command.cwd.as_str().as_bytes().to_vec(),
            user,
        };
        let stdio = [
            stdin_theirs.as_fd(),
            stdout_theirs.as_fd(),
            stderr_theirs.as_fd(),
        ];
        match self.control.call(id, &request, &stdio).await? {
            Answer::Spawned(child) => Ok(Process {
                pid: child.pid,
                stdin,
                stdout,
                stderr,
                exit: child.exit,
            }),
            Answer::Failed {
                errno,
                at: FailedAt::Cwd,
            } => Err(VmError::File {
                op: "can't enter the working directory",
                path: command.cwd.as_str().to_owned(),
                errno,
            }),
            Answer::Failed { errno, .. } => Err(VmError::Spawn {
                program: command.argv.first().cloned().unwrap_or_default(),
                errno,
            }),
            other => Err(unexpected(&other)),
        }
    }

    async fn signal(&self, pid: u32, signal: i32) -> Result<()> {
        let id = self.control.next_id();
        let request = Request::Signal {
            id,
            pid: pid.cast_signed(),
            signal,
        };
        match self.control.call(id, &request, &[]).await? {
            Answer::Done => Ok(()),
            Answer::Failed { errno, .. } => Err(VmError::Spawn {
                program: format!("signal {signal} to process {pid}"),
                errno,
            }),
            other => Err(unexpected(&other)),
        }
    }

    async fn kill(&self, pid: u32) -> Result<()> {
        let id = self.control.next_id();
        let leader = pid.cast_signed();
        let request = Request::EndSession { id, leader };
        match self.control.call(id, &request, &[]).await? {
            Answer::Done => Ok(()),
            Answer::Failed { errno, .. } => Err(processes(errno)),
            other => Err(unexpected(&other)),
        }
    }

    fn now(&self) -> Moment {
        // PID 1 is in this process's time namespace and no process of a VM makes another: its /proc
        // shows the same clock.
        let mut now = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // SAFETY: clock_gettime writes the struct; every kernel has this clock.
        unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut now) };
        let [seconds, nanoseconds] =
            [now.tv_sec, now.tv_nsec].map(|part| u64::try_from(part).unwrap_or(0));
        Moment {
            nanoseconds: seconds * 1_000_000_000 + nanoseconds,
        }
    }

    async fn foreground(&self, pid: u32, since: Moment, spare: Commands) -> Result<Foreground> {
        let id = self.control.next_id();
        let request = Request::Foreground {
            id,
            agent: pid.cast_signed(),
            turn: turn(since, &spare),
        };
        match self.control.call(id, &request, &[]).await? {
            Answer::Foreground(agent, seen) => Ok(Foreground {
                agent,
                since,
                spare,
                seen,
            }),
            Answer::Failed { errno, .. } => Err(processes(errno)),
            other => Err(unexpected(&other)),
        }
    }

    async fn end_foreground(&self, foreground: &Foreground, extent: Extent) -> Result<u32> {
        let Some(agent) = foreground.agent else {
            return Ok(0);
        };
        let id = self.control.next_id();
        let request = Request::EndForeground {
            id,
            agent,
            turn: turn(foreground.since, &foreground.spare),
            seen: foreground.seen.clone(),
            agent_too: extent == Extent::WithAgent,
        };
        match self.control.call(id, &request, &[]).await? {
            Answer::ForegroundEnded(killed) => Ok(killed),
            Answer::Failed { errno, .. } => Err(processes(errno)),
            other => Err(unexpected(&other)),
        }
    }

    async fn open(&self, path: &GuestPath, open: Open, user: User) -> Result<File> {
        let user = self.account(user)?;
        let (op, flags) = match open {
            Open::Read => ("can't read", OFlag::O_RDONLY),
            Open::Write => (
                "can't write",
                OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_TRUNC,
            ),
        };
        let id = self.control.next_id();
        let request = Request::Open {
            id,
            path: path.as_str().as_bytes().to_vec(),
            flags: flags.bits(),
            mode: 0o644,
            user,
        };
        match self.control.call(id, &request, &[]).await? {
            Answer::Opened(descriptor) => regular_file(descriptor, path, op),
            Answer::Failed { errno, .. } => Err(VmError::File {
                op,
                path: path.as_str().to_owned(),
                errno,
            }),
            other => Err(unexpected(&other)),
        }
    }

    async fn create_dir_all(&self, path: &GuestPath, user: User) -> Result<()> {
        let id = self.control.next_id();
        let request = Request::MakeDirs {
            id,
            path: path.as_str().as_bytes().to_vec(),
            user: self.account(user)?,
        };
        match self.control.call(id, &request, &[]).await? {
            Answer::Done => Ok(()),
            Answer::Failed { errno, .. } => Err(VmError::File {
                op: "can't make the directory",
                path: path.as_str().to_owned(),
                errno,
            }),
            other => Err(unexpected(&other)),
        }
    }

    async fn still_runs(&self) -> bool {
        if self.control.is_connected() {
            return true;
        }
        self.wait_for_end().await;
        false
    }

    fn ended(&self) -> watch::Receiver<Option<VmEnd>> {
        self.ended.clone()
    }

    async fn shutdown(&self) {
        self.stop.send_replace(true);
        self.wait_for_end().await;
    }
}

impl Drop for NamespaceVm {
    fn drop(&mut self) {
        self.stop.send_replace(true);
    }
}

/// What PID 1 handed out is not to be trusted: reading a device or a FIFO could block for ever or
/// act on the host.
fn regular_file(descriptor: OwnedFd, path: &GuestPath, op: &'static str) -> Result<File> {
    let stat = nix::sys::stat::fstat(&descriptor).map_err(|errno| VmError::File {
        op,
        path: path.as_str().to_owned(),
        errno,
    })?;
    let found = match stat.st_mode & libc::S_IFMT {
        // What it says depends on who reads: here that would be the host process.
        libc::S_IFREG if is_procfs(&descriptor) => "a file of /proc (exec can read it)",
        libc::S_IFREG => return Ok(File::from(descriptor)),
        libc::S_IFDIR => "a directory",
        libc::S_IFIFO => "a FIFO",
        libc::S_IFCHR | libc::S_IFBLK => "a device",
        libc::S_IFSOCK => "a socket",
        _ => "something else",
    };
    tracing::debug!(fd = descriptor.as_raw_fd(), found, "not handed on");
    Err(VmError::NotRegular {
        path: path.as_str().to_owned(),
        found,
    })
}

fn is_procfs(descriptor: &OwnedFd) -> bool {
    nix::sys::statfs::fstatfs(descriptor)
        .is_ok_and(|fs| fs.filesystem_type() == nix::sys::statfs::PROC_SUPER_MAGIC)
}

fn turn(since: Moment, spare: &[Vec<String>]) -> Turn {
    let bytes = |word: &String| word.clone().into_bytes();
    Turn {
        since: since.nanoseconds,
        spare: spare
            .iter()
            .map(|command| command.iter().map(bytes).collect())
            .collect(),
    }
}

fn processes(errno: Errno) -> VmError {
    VmError::File {
        op: "can't list the processes in",
        path: "/proc".to_owned(),
        errno,
    }
}

fn unexpected(answer: &Answer) -> VmError {
    VmError::Protocol(format!("an answer of another kind ({answer:?})"))
}
