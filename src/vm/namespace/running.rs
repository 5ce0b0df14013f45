//! A VM that runs: what it is asked, as requests to its PID 1.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use agentvm_guest::protocol::{Account, FailedAt, Request, Turn};
use async_trait::async_trait;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use tokio::sync::watch;

use super::authorities;
use super::control::{Answer, Control, Received};
use super::directory::{Directory, blocking, host};
use super::files::Tasks;
use super::guest::Guest;
use super::ids::IdMap;
use super::limits::Limiter;
use super::npm_config;
use super::secrets;
use crate::net::secrets::{Interceptor, Secrets, Sightings};
use crate::net::{Network, Rules};
use crate::pipe;
use crate::vm::environment::add_images;
use crate::vm::limits::no_more_pids;
use crate::vm::{
    Command, Commands, Extent, Foreground, GuestPath, Image, Limited, Moment, Open, Process,
    Result, User, Vm, VmEnd, VmError,
};

/// A running VM.
pub struct NamespaceVm {
    pub(super) control: Arc<Control>,
    ended: watch::Receiver<Option<VmEnd>>,
    /// Tells the supervisor to end the VM.
    stop: watch::Sender<bool>,
    ids: IdMap,
    /// Dropped with the VM: its connections end.
    pub(super) network: Mutex<Option<Network>>,
    limiter: Arc<Limiter>,
    pub(super) tasks: Tasks,
    image: Option<Image>,
    /// Of a VM that was booted with secrets.
    secrets: Option<Arc<Interceptor>>,
}

impl NamespaceVm {
    #[expect(clippy::too_many_arguments, reason = "the parts of a VM")]
    pub(super) fn run(
        directory: Directory,
        control: Control,
        guest: Guest,
        network: Option<Network>,
        limiter: Limiter,
        ids: IdMap,
        image: Option<Image>,
        secrets: Option<Arc<Interceptor>>,
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
            limiter: Arc::new(limiter),
            tasks: Tasks::default(),
            image,
            secrets,
        });
        let limiter = Arc::clone(&vm.limiter);
        let weak = Arc::downgrade(&vm);
        tokio::spawn(async move {
            let watching = [
                limiter.watch(),
                limiter.watch_disk(directory.path(), guest.pid(), &control),
            ];
            let mut end = tokio::select! {
                why = control.run(|| limiter.ended_fork_bomb()) => VmEnd::Died(why),
                _ = stopped.wait_for(|stop| *stop) => VmEnd::Shutdown,
            };
            control.end("it was shut down");
            control.hang_up();
            let killed = guest.gone().await;
            for watching in watching.into_iter().flatten() {
                watching.abort();
            }
            limiter.end().await;
            // The kernel takes PID 1 where nothing else of the VM is left to kill.
            if killed && matches!(end, VmEnd::Died(_)) && limiter.look().memory > 0 {
                end = VmEnd::OutOfMemory;
            }
            let network = weak.upgrade().and_then(|vm| {
                let mut network = vm.network.lock().unwrap_or_else(PoisonError::into_inner);
                network.take()
            });
            if let Some(network) = network {
                network.end().await;
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

    pub(super) fn limiter(&self) -> &Limiter {
        &self.limiter
    }

    /// Bytes received and sent.
    pub(super) fn traffic(&self) -> (u64, u64) {
        let network = self.network.lock().unwrap_or_else(PoisonError::into_inner);
        network.as_ref().map_or((0, 0), |network| {
            let traffic = network.traffic();
            (traffic.received(), traffic.sent())
        })
    }

    /// Why PID 1 has started no program.
    pub(super) fn not_started(&self, command: &Command, answer: Answer) -> VmError {
        let program = command.argv.first().cloned().unwrap_or_default();
        match answer {
            Answer::Failed {
                errno,
                at: FailedAt::Cwd,
            } => VmError::File {
                op: "can't enter the working directory",
                path: command.cwd.as_str().to_owned(),
                errno,
            },
            // fork(2), execve(2): no other cause of it is left here.
            Answer::Failed {
                errno: Errno::EAGAIN,
                ..
            } => {
                self.limiter.refused_pid();
                no_more_pids(self, &program)
            }
            Answer::Failed { errno, .. } => VmError::Spawn { program, errno },
            other => unexpected(&other),
        }
    }

    pub(super) fn control(&self) -> &Control {
        &self.control
    }

    pub(super) fn account(&self, user: User) -> Result<Account> {
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

    /// What a program is started with.
    pub(super) fn environment(&self, command: &Command) -> Vec<Vec<u8>> {
        let mut env = command.env.clone();
        if let Some(image) = &self.image {
            add_images(&mut env, &image.env);
        }
        if let Some(secrets) = &self.secrets {
            let npm = npm_config::authorities().filter(|_| self.image.is_none());
            secrets::add(&mut env, secrets, npm);
        }
        authorities::add(&mut env);
        env.iter()
            .map(|(name, value)| format!("{name}={value}").into_bytes())
            .collect()
    }
}

#[async_trait]
impl Vm for NamespaceVm {
    async fn spawn(&self, command: &Command) -> Result<Process> {
        let user = self.account(command.user)?;
        let pipe = || {
            let failed = |error| host("can't make a pipe for", Path::new("stdio"), error);
            pipe::pipe().map_err(failed)
        };
        let ((stdin_theirs, stdin), (stdout, stdout_theirs), (stderr, stderr_theirs)) =
            (pipe()?, pipe()?, pipe()?);
        let bytes = |text: &String| text.clone().into_bytes();
        let before = self.reached();
        let id = self.control.next_id();
        let request = Request::Spawn {
            id,
            argv: command.argv.iter().map(bytes).collect(),
            env: self.environment(command),
            cwd: command.cwd.to_bytes(),
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
                before,
            }),
            answer => Err(self.not_started(command, answer)),
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
            path: path.to_bytes(),
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
            path: path.to_bytes(),
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

    async fn set_network(&self, rules: Rules) -> Result<()> {
        let change = {
            let network = self.network.lock().unwrap_or_else(PoisonError::into_inner);
            network.as_ref().map(|network| network.set_rules(rules))
        };
        let Some(change) = change else {
            return Ok(()); // it reaches nothing
        };
        let changed = blocking(move || Ok(change())).await?;
        if let Err(error) = changed {
            // One that ends has no rules any more.
            if self.still_runs().await {
                return Err(host(
                    "can't change the network of",
                    Path::new("the VM"),
                    error,
                ));
            }
        }
        Ok(())
    }

    async fn still_runs(&self) -> bool {
        if self.control.is_connected() {
            return true;
        }
        self.wait_for_end().await;
        false
    }

    fn image(&self) -> Option<&Image> {
        self.image.as_ref()
    }

    fn set_secrets(&self, secrets: &Secrets) -> bool {
        match &self.secrets {
            Some(own) => own.set(secrets),
            None if secrets.is_empty() => {}
            None => return false,
        }
        true
    }

    fn misdirected_secrets(&self) -> Option<Arc<Sightings>> {
        let secrets = self.secrets.as_ref()?;
        Some(Arc::clone(secrets.sightings()))
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
pub(super) fn regular_file(received: Received, path: &GuestPath, op: &'static str) -> Result<File> {
    let stat = nix::sys::stat::fstat(&received).map_err(|errno| VmError::File {
        op,
        path: path.as_str().to_owned(),
        errno,
    })?;
    let found = match stat.st_mode & libc::S_IFMT {
        // What it says depends on who reads: here that would be the host process.
        libc::S_IFREG if is_procfs(&received) => "a file of /proc",
        libc::S_IFREG => return Ok(File::from(received.take())),
        libc::S_IFDIR => "a directory",
        libc::S_IFIFO => "a FIFO",
        libc::S_IFCHR | libc::S_IFBLK => "a device",
        libc::S_IFSOCK => "a socket",
        _ => "something else",
    };
    tracing::debug!(fd = received.as_fd().as_raw_fd(), found, "not handed on");
    Err(VmError::NotRegular {
        path: path.as_str().to_owned(),
        found,
    })
}

fn is_procfs(descriptor: impl AsFd) -> bool {
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

pub(super) fn processes(errno: Errno) -> VmError {
    VmError::File {
        op: "can't list the processes in",
        path: "/proc".to_owned(),
        errno,
    }
}

pub(super) fn unexpected(answer: &Answer) -> VmError {
    VmError::Protocol(format!("an answer of another kind ({answer:?})"))
}
