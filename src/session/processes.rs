//! Processes that callers start: each is attended to its end, and keeps its VM awake until then.

use std::collections::{HashMap, VecDeque};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::io::AsyncWriteExt;
use tokio::net::unix::pipe;
use tokio::sync::{Mutex as AsyncMutex, watch};

use super::awake::Awake;
use super::client::{VmHandle, closed_error};
use super::outlet::{Channel, End, Interest, Outlet, OutputSubscription, Source, Stream};
use crate::error::{Code, Error, Result};
use crate::vm::{
    Command, DynVm, Exit, GuestPath, Process, ProcessInfo, User, VmError, environment, exited,
};

/// Processes that have ended and are still known: the latest.
const ENDED: usize = 128;

/// Most that is read of a pipe at once.
const CHUNK: usize = 64 * 1024;

/// How long processes have to end on SIGTERM when their VM is put to sleep, closed or destroyed.
pub(super) const GRACE: Duration = Duration::from_secs(1);

/// How [`VmHandle::spawn`] starts a program.
#[derive(Debug, Clone)]
pub struct SpawnOptions {
    /// Over the VM's default environment.
    pub env: Vec<(String, String)>,
    pub cwd: GuestPath,
    pub user: User,
    /// Written to its stdin, which is closed then. `None`: stdin stays open, for
    /// [`VmHandle::write_process_stdin`].
    pub stdin: Option<Vec<u8>>,
    /// The process is killed when it passes, with everything in its session.
    pub timeout: Option<Duration>,
    /// Kept of stdout and of stderr each while nobody listens.
    pub max_output_bytes: usize,
}

impl Default for SpawnOptions {
    fn default() -> Self {
        Self {
            env: Vec::new(),
            cwd: GuestPath::home(),
            user: User::User,
            stdin: None,
            timeout: None,
            max_output_bytes: 256 << 10,
        }
    }
}

/// A process that a caller has started.
#[derive(Debug, Clone)]
pub struct Spawned {
    pub pid: u32,
    pub argv: Vec<String>,
    pub cwd: GuestPath,
    pub user: User,
    /// Milliseconds since the epoch.
    pub started_at: u64,
    /// `None` while it runs.
    pub end: Option<End>,
}

/// Those of one VM.
#[derive(Default)]
pub(super) struct Processes {
    pub(super) outlet: Arc<Outlet>,
    records: Mutex<Records>,
}

#[derive(Default)]
struct Records {
    /// The number of a process that has ended may come again: then the new one has its place.
    by_pid: HashMap<u32, Arc<Record>>,
    /// The oldest first.
    ended: VecDeque<Arc<Record>>,
}

struct Record {
    pid: u32,
    channel: Channel,
    command: Command,
    started_at: u64,
    /// In it a process's number is its own until it has ended.
    vm: DynVm,
    /// Taken by one write after the other. `None`: closed.
    stdin: Arc<AsyncMutex<Option<pipe::Sender>>>,
    state: watch::Sender<State>,
    /// Its VM is being ended.
    with_vm: AtomicBool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Running,
    /// What it has written is yet to be handed over.
    Exited,
    /// Listeners have been told everything.
    Ended(End),
}

impl VmHandle {
    /// Starts a program, which is not looked for in a shell, as leader of a session and process group of
    /// its own.
    pub async fn spawn(&self, argv: Vec<String>, options: SpawnOptions) -> Result<u32> {
        let (settings, awake) = self.awake().await?;
        let command = Command {
            argv,
            env: environment::merge(options.user, options.env),
            cwd: options.cwd,
            user: options.user,
        };
        let spawn = |vm: DynVm| {
            let command = &command;
            async move { vm.spawn(command).await }
        };
        let (vm, process) = self.machine.begin(settings, spawn).await?;
        let processes = Arc::clone(&self.machine.processes);
        let attended = Attended {
            awake,
            stdin: options.stdin,
            timeout: options.timeout,
        };
        processes.take(vm, command, process, options.max_output_bytes, attended)
    }

    /// Writes to a process's stdin: what is written first arrives first. Resolves when the pipe has taken
    /// all of it.
    pub fn write_process_stdin(
        &self,
        pid: u32,
        data: Vec<u8>,
    ) -> impl Future<Output = Result<()>> + use<> {
        let queued = self.process(pid).map(|record| {
            let mut turn = Box::pin(Arc::clone(&record.stdin).lock_owned());
            // Its place in the order is that of this call.
            let place = turn.as_mut().poll(&mut Context::from_waker(Waker::noop()));
            (record, turn, place)
        });
        async move {
            let (record, turn, place) = queued?;
            let mut stdin = match place {
                Poll::Ready(stdin) => stdin,
                Poll::Pending => turn.await,
            };
            let pipe = stdin.as_mut().ok_or_else(|| record.stdin_closed())?;
            let mut state = record.state.subscribe();
            let written = tokio::select! {
                written = pipe.write_all(&data) => written,
                // A pipe may outlive the process that it is for.
                _ = state.wait_for(|state| *state != State::Running) => return Err(record.stdin_closed()),
            };
            written.map_err(|error| match error.kind() {
                std::io::ErrorKind::BrokenPipe => record.stdin_closed(),
                _ => Error::new(
                    error
                        .raw_os_error()
                        .map_or(Code::Internal, Code::from_errno),
                    format!("can't write to the stdin of process {pid}: {error}"),
                ),
            })
        }
    }

    /// Closes a process's stdin, after what is being written. One that is closed is no error.
    pub fn close_process_stdin(&self, pid: u32) -> impl Future<Output = Result<()>> + use<> {
        let queued = self.process(pid).map(|record| {
            let mut turn = Box::pin(Arc::clone(&record.stdin).lock_owned());
            let place = turn.as_mut().poll(&mut Context::from_waker(Waker::noop()));
            (turn, place)
        });
        async move {
            let (turn, place) = queued?;
            let mut stdin = match place {
                Poll::Ready(stdin) => stdin,
                Poll::Pending => turn.await,
            };
            *stdin = None;
            Ok(())
        }
    }

    /// Waits until a process has ended and listeners have been told so.
    pub async fn wait_process(&self, pid: u32) -> Result<End> {
        let record = self.process(pid)?;
        let mut state = record.state.subscribe();
        let mut closed = self.client.closed();
        tokio::select! {
            biased;
            ended = state.wait_for(|state| matches!(state, State::Ended(_))) => {
                // The sender is in `record`, which we hold.
                match ended.as_deref() {
                    Ok(State::Ended(end)) => Ok(*end),
                    _ => Err(self.machine.was_ended()),
                }
            }
            _ = closed.wait_for(|closed| *closed) => Err(closed_error()),
        }
    }

    /// Signals a process with its process group. One that has ended is no error.
    pub async fn signal_process(&self, pid: u32, signal: i32) -> Result<()> {
        let record = self.process(pid)?;
        if !record.runs() {
            return Ok(());
        }
        or_ended(record.vm.signal(pid, signal).await)
    }

    /// Kills a process with everything in its session. One that has ended is no error.
    pub async fn kill_process(&self, pid: u32) -> Result<()> {
        let record = self.process(pid)?;
        if !record.runs() {
            return Ok(());
        }
        or_ended(record.vm.kill(pid).await)
    }

    /// The processes that were started by [`VmHandle::spawn`], by pid: those that run, and the latest that
    /// have ended. Boots nothing.
    pub fn list_processes(&self) -> Result<Vec<Spawned>> {
        self.open()?;
        Ok(self.machine.processes.list())
    }

    /// One of them.
    pub fn get_process(&self, pid: u32) -> Result<Spawned> {
        self.process(pid).map(|record| record.view())
    }

    /// Everything that runs in the VM, by pid.
    pub async fn all_processes(&self) -> Result<Vec<ProcessInfo>> {
        let (settings, _awake) = self.awake().await?;
        let list = |vm: DynVm| async move { vm.processes().await };
        let (_, processes) = self.machine.begin(settings, list).await?;
        Ok(processes)
    }

    /// Follows what processes write and how they end.
    pub fn subscribe_output(&self, interest: Interest) -> Result<OutputSubscription> {
        self.open()?;
        let subscription = self.machine.processes.outlet.subscribe();
        subscription.set_interest(interest);
        Ok(subscription)
    }

    fn process(&self, pid: u32) -> Result<Arc<Record>> {
        self.open()?;
        let records = self.machine.processes.records();
        records.by_pid.get(&pid).cloned().ok_or_else(|| {
            Error::new(
                Code::ProcessNotFound,
                format!(
                    "no process {pid} was started by spawn() in this VM, or it ended long ago: \
                     listProcesses() lists them"
                ),
            )
        })
    }
}

/// What the life of a process needs beside its pipes.
struct Attended {
    awake: Awake,
    stdin: Option<Vec<u8>>,
    timeout: Option<Duration>,
}

impl Processes {
    fn take(
        self: &Arc<Self>,
        vm: DynVm,
        command: Command,
        process: Process,
        limit: usize,
        attended: Attended,
    ) -> Result<u32> {
        let unusable = |error: std::io::Error| {
            let code = error.raw_os_error();
            let code = code.map_or(Code::Internal, Code::from_errno);
            Error::new(code, format!("a new process's pipe is unusable: {error}"))
        };
        let pid = process.pid;
        let opened = pipe::Sender::from_owned_fd(process.stdin).and_then(|stdin| {
            let stdout = pipe::Receiver::from_owned_fd(process.stdout)?;
            let stderr = pipe::Receiver::from_owned_fd(process.stderr)?;
            Ok((stdin, stdout, stderr))
        });
        let (stdin, stdout, stderr) = match opened {
            Ok(opened) => opened,
            Err(error) => {
                tokio::spawn(async move { vm.kill(pid).await });
                return Err(unusable(error));
            }
        };
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let Attended {
            awake,
            stdin: content,
            timeout,
        } = attended;
        let (stdin, fed) = match content {
            None => (Some(stdin), None),
            Some(content) => (None, Some((stdin, content))),
        };
        let record = Arc::new(Record {
            pid,
            channel: self.outlet.open(Source::Process(pid), limit),
            command,
            started_at: now.map_or(0, |now| u64::try_from(now.as_millis()).unwrap_or(0)),
            vm,
            stdin: Arc::new(AsyncMutex::new(stdin)),
            state: watch::Sender::new(State::Running),
            with_vm: AtomicBool::new(false),
        });
        self.insert(&record);
        let life = Life {
            processes: Arc::clone(self),
            record,
            stdout: Pipe::new(stdout, Stream::Stdout),
            stderr: Pipe::new(stderr, Stream::Stderr),
            exit: process.exit,
        };
        if let Some((stdin, content)) = fed {
            tokio::spawn(feed(Arc::clone(&life.record), stdin, content));
        }
        tokio::spawn(life.attend(awake, timeout));
        Ok(pid)
    }

    fn insert(&self, record: &Arc<Record>) {
        let mut records = self.records();
        if let Some(old) = records.by_pid.insert(record.pid, Arc::clone(record)) {
            records.ended.retain(|ended| !Arc::ptr_eq(ended, &old));
            self.outlet.forget(old.channel);
        }
    }

    fn ended(&self, record: &Arc<Record>) {
        let mut records = self.records();
        let known = records.by_pid.get(&record.pid);
        if !known.is_some_and(|known| Arc::ptr_eq(known, record)) {
            return; // another has its number already
        }
        records.ended.push_back(Arc::clone(record));
        if records.ended.len() > ENDED
            && let Some(oldest) = records.ended.pop_front()
        {
            records.by_pid.remove(&oldest.pid);
            self.outlet.forget(oldest.channel);
        }
    }

    fn list(&self) -> Vec<Spawned> {
        let records = self.records();
        let mut list: Vec<_> = records.by_pid.values().map(|own| own.view()).collect();
        list.sort_unstable_by_key(|process| process.pid);
        list
    }

    fn running(&self) -> Vec<Arc<Record>> {
        let records = self.records();
        let running = records.by_pid.values().filter(|record| record.runs());
        running.cloned().collect()
    }

    /// Ends those that run, as their VM is going to be ended: first they are asked to.
    pub(super) async fn end_all(&self) {
        let running = self.running();
        if running.is_empty() {
            return;
        }
        for record in &running {
            record.with_vm.store(true, Ordering::Relaxed);
        }
        let asked = async {
            for record in &running {
                // One that is stopped hears of it when it goes on.
                for signal in [libc::SIGTERM, libc::SIGCONT] {
                    if let Err(error) = record.vm.signal(record.pid, signal).await {
                        tracing::debug!(%error, pid = record.pid, "not asked to end");
                    }
                }
            }
            for record in &running {
                record.gone().await;
            }
        };
        if tokio::time::timeout(GRACE, asked).await.is_err() {
            tracing::debug!("processes that do not end on SIGTERM are killed with their VM");
        }
    }

    /// Resolves when listeners have been told of the end of every process that there is now: for who has
    /// ended the VM.
    pub(super) fn told(&self) -> impl Future<Output = ()> + use<> {
        let records: Vec<_> = self.records().by_pid.values().cloned().collect();
        async move {
            for record in records {
                let mut state = record.state.subscribe();
                // The sender is in `record`, which we hold.
                drop(
                    state
                        .wait_for(|state| matches!(state, State::Ended(_)))
                        .await,
                );
            }
        }
    }

    fn records(&self) -> MutexGuard<'_, Records> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Record {
    fn runs(&self) -> bool {
        *self.state.borrow() == State::Running
    }

    async fn gone(&self) {
        let mut state = self.state.subscribe();
        // The sender is in `self`.
        drop(state.wait_for(|state| *state != State::Running).await);
    }

    fn view(&self) -> Spawned {
        let state = *self.state.borrow();
        Spawned {
            pid: self.pid,
            argv: self.command.argv.clone(),
            cwd: self.command.cwd.clone(),
            user: self.command.user,
            started_at: self.started_at,
            end: match state {
                State::Ended(end) => Some(end),
                State::Running | State::Exited => None,
            },
        }
    }

    fn stdin_closed(&self) -> Error {
        Error::new(
            Code::Errno("EPIPE"),
            format!(
                "the stdin of process {} is closed: by closeProcessStdin, or because it does not read \
                 any more",
                self.pid
            ),
        )
    }
}

/// What was asked of a process: a VM that ends takes its processes with it.
fn or_ended(done: Result<(), VmError>) -> Result<()> {
    match done {
        Err(VmError::Ended(_) | VmError::NotSent(_)) => Ok(()),
        done => Ok(done?),
    }
}

/// A process from its start to its end.
struct Life {
    processes: Arc<Processes>,
    record: Arc<Record>,
    stdout: Pipe,
    stderr: Pipe,
    exit: watch::Receiver<Option<Exit>>,
}

impl Life {
    async fn attend(mut self, _awake: Awake, timeout: Option<Duration>) {
        let Self {
            processes,
            record,
            stdout,
            stderr,
            exit,
        } = &mut self;
        let (outlet, pid) = (&processes.outlet, record.pid);
        let mut timed_out = false;
        let exit = {
            let pumps = async {
                tokio::join!(
                    stdout.pump(outlet, record.channel),
                    stderr.pump(outlet, record.channel)
                )
            };
            let deadline = async {
                match timeout {
                    Some(limit) => tokio::time::sleep(limit).await,
                    None => std::future::pending().await,
                }
            };
            tokio::pin!(pumps, deadline);
            let mut is_read = false;
            loop {
                tokio::select! {
                    exit = exited(exit) => break exit,
                    _ = &mut pumps, if !is_read => is_read = true,
                    () = &mut deadline, if !timed_out => {
                        timed_out = true;
                        if let Err(error) = record.vm.kill(pid).await {
                            tracing::debug!(%error, pid, "not killed: its VM ends");
                        }
                    }
                }
            }
        };
        let with_vm = record.with_vm.load(Ordering::Relaxed) || exit.is_none();
        if exit.is_none() {
            // Its VM ends or has died, and kills whatever is in it: until then it may write.
            drop(record.vm.ended().wait_for(Option::is_some).await);
        }
        let exit = exit.unwrap_or(Exit::Signal(libc::SIGKILL));
        record.state.send_replace(State::Exited);
        // What was written before the exit is in the pipes by now.
        stdout.drain(outlet, record.channel).await;
        stderr.drain(outlet, record.channel).await;
        let end = End {
            exit,
            timed_out,
            with_vm,
        };
        outlet.exit(record.channel, end).handed().await;
        *record.stdin.lock().await = None;
        processes.ended(record);
        record.state.send_replace(State::Ended(end));
    }
}

/// A process that does not read its input closes the pipe: nothing is wrong with that.
async fn feed(record: Arc<Record>, mut stdin: pipe::Sender, content: Vec<u8>) {
    tokio::select! {
        written = stdin.write_all(&content) => drop(written),
        () = record.gone() => {}
    }
}

/// One output of a process.
struct Pipe {
    end: pipe::Receiver,
    stream: Stream,
    open: bool,
}

impl Pipe {
    const fn new(end: pipe::Receiver, stream: Stream) -> Self {
        Self {
            end,
            stream,
            open: true,
        }
    }

    /// Reads until the end, each chunk when the one before it has been handed over.
    async fn pump(&mut self, outlet: &Outlet, channel: Channel) {
        while self.open {
            if self.end.readable().await.is_err() {
                self.open = false;
                return;
            }
            // Memory for what is there, none while nothing is.
            let mut chunk = Vec::with_capacity(self.waiting().clamp(1, CHUNK));
            match self.end.try_read_buf(&mut chunk) {
                Ok(0) => self.open = false,
                Ok(_) => outlet.data(channel, self.stream, chunk).handed().await,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(_) => self.open = false,
            }
        }
    }

    /// Hands over what is in the pipe now. Not until it is empty: what the process left running may write
    /// faster than anybody reads.
    async fn drain(&mut self, outlet: &Outlet, channel: Channel) {
        let mut waiting = self.waiting();
        while self.open && waiting > 0 {
            let mut chunk = vec![0; waiting.min(CHUNK)];
            // The plain call: tokio's would ask its cache whether there is anything to read.
            match nix::unistd::read(&self.end, &mut chunk) {
                Ok(0) | Err(_) => self.open = false,
                Ok(length) => {
                    waiting -= length;
                    chunk.truncate(length);
                    outlet.data(channel, self.stream, chunk).handed().await;
                }
            }
        }
    }

    fn waiting(&self) -> usize {
        let mut waiting: libc::c_int = 0;
        // SAFETY: FIONREAD writes one int. It can't fail on a pipe; if it did, nothing would be there.
        unsafe { libc::ioctl(self.end.as_raw_fd(), libc::FIONREAD, &raw mut waiting) };
        usize::try_from(waiting).unwrap_or(0)
    }
}
