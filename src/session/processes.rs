//! Processes that callers start: each is attended to its end, and keeps its VM awake until then.

use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard, watch};

use super::client::VmHandle;
use super::life::{GRACE, Life, Lives, Output, Started};
use super::outlet::{Channel, End, Interest, Outlet, OutputSubscription, Source, Stream};
use crate::error::{Code, Error, Result};
use crate::pipe;
use crate::vm::{Command, DynVm, Exit, GuestPath, Process, ProcessInfo, User, environment};

/// Processes that have ended and are still known: the latest.
pub(super) const ENDED: usize = 128;

/// Most that is handed over at once.
const CHUNK: usize = 64 * 1024;

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
pub(super) struct Spawned {
    life: Life,
    stdin: Stdin,
}

/// Taken by one write after the other. `None`: closed.
type Stdin = Arc<AsyncMutex<Option<pipe::Writer>>>;

/// Those of one VM, by pid.
pub(super) type Processes = Lives<u32, Spawned>;

impl AsRef<Life> for Spawned {
    fn as_ref(&self) -> &Life {
        &self.life
    }
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
        let pid = process.pid;
        let unusable = |error: std::io::Error| {
            let code = error.raw_os_error();
            let code = code.map_or(Code::Internal, Code::from_errno);
            Error::new(code, format!("a new process's pipe is unusable: {error}"))
        };
        let pipes = match pipes(process) {
            Ok(pipes) => pipes,
            Err(error) => {
                tokio::spawn(async move { vm.kill(pid).await });
                return Err(unusable(error));
            }
        };
        let Pipes {
            stdin,
            mut output,
            mut exit,
        } = pipes;
        let outlet = Arc::clone(&self.machine.outlet);
        let channel = outlet.open(Source::Process(pid), options.max_output_bytes);
        let (stdin, fed) = match options.stdin {
            None => (Some(stdin), None),
            Some(content) => (None, Some((stdin, content))),
        };
        let spawned = Arc::new(Spawned {
            life: Life::new(vm, pid, command, channel),
            stdin: Arc::new(AsyncMutex::new(stdin)),
        });
        let processes = Arc::clone(&self.machine.processes);
        processes.insert(pid, &spawned, &outlet);
        if let Some((stdin, content)) = fed {
            tokio::spawn(feed(spawned.life.gone(), stdin, content));
        }
        tokio::spawn(async move {
            let attended = &spawned.life;
            let attended = attended.attend(&outlet, &mut exit, &mut output, options.timeout);
            let end = attended.await;
            *spawned.stdin.lock().await = None;
            processes.ended(pid, &spawned, end, &outlet);
            drop(awake);
        });
        Ok(pid)
    }

    /// Writes to a process's stdin: what is written first arrives first. Resolves when the pipe has taken
    /// all of it.
    pub fn write_process_stdin(
        &self,
        pid: u32,
        data: Vec<u8>,
    ) -> impl Future<Output = Result<()>> + use<> {
        let queued = self.process(pid).map(|process| (process.stdin(), process));
        async move {
            let (stdin, process) = queued?;
            let mut stdin = stdin.await;
            let pipe = stdin.as_mut().ok_or_else(|| process.stdin_closed())?;
            let written = tokio::select! {
                written = pipe.write_all(&data) => written,
                // A pipe may outlive the process that it is for.
                () = process.life.gone() => return Err(process.stdin_closed()),
            };
            written.map_err(|error| match error.kind() {
                std::io::ErrorKind::BrokenPipe => process.stdin_closed(),
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
        let queued = self.process(pid).map(|process| process.stdin());
        async move {
            *queued?.await = None;
            Ok(())
        }
    }

    /// Waits until a process has ended and listeners have been told so.
    pub async fn wait_process(&self, pid: u32) -> Result<End> {
        let process = self.process(pid)?;
        self.told(&process.life).await
    }

    /// Signals a process with its process group. One that has ended is no error.
    pub async fn signal_process(&self, pid: u32, signal: i32) -> Result<()> {
        self.process(pid)?.life.signal(signal).await
    }

    /// Kills a process with everything in its session. One that has ended is no error.
    pub async fn kill_process(&self, pid: u32) -> Result<()> {
        self.process(pid)?.life.kill().await
    }

    /// The processes that were started by [`VmHandle::spawn`], by pid: those that run, and the latest that
    /// have ended. Boots nothing.
    pub fn list_processes(&self) -> Result<Vec<Started>> {
        self.open()?;
        let all = self.machine.processes.all();
        Ok(all.iter().map(|(_, process)| process.life.view()).collect())
    }

    /// One of them.
    pub fn get_process(&self, pid: u32) -> Result<Started> {
        self.process(pid).map(|process| process.life.view())
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
        let subscription = self.machine.outlet.subscribe();
        subscription.set_interest(interest);
        Ok(subscription)
    }

    fn process(&self, pid: u32) -> Result<Arc<Spawned>> {
        self.open()?;
        self.machine.processes.get(pid).ok_or_else(|| {
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

impl Processes {
    /// Ends those that run, as their VM is going to be ended: first they are asked to.
    pub(super) async fn end_all(&self) {
        let running = self.running();
        let asked = async {
            for process in &running {
                process.life.ends_with_vm();
            }
            for process in &running {
                process.life.ask_to_end(libc::SIGTERM).await;
            }
            for process in &running {
                process.life.gone().await;
            }
        };
        if tokio::time::timeout(GRACE, asked).await.is_err() {
            tracing::debug!("processes that do not end on SIGTERM are killed with their VM");
        }
    }
}

impl Spawned {
    /// Its stdin, when it is this call's turn.
    fn stdin(&self) -> impl Future<Output = OwnedMutexGuard<Option<pipe::Writer>>> + Send + use<> {
        let mut turn = Box::pin(Arc::clone(&self.stdin).lock_owned());
        // Its place in the order is that of this call.
        let place = turn.as_mut().poll(&mut Context::from_waker(Waker::noop()));
        async move {
            match place {
                Poll::Ready(stdin) => stdin,
                Poll::Pending => turn.await,
            }
        }
    }

    fn stdin_closed(&self) -> Error {
        Error::new(
            Code::Errno("EPIPE"),
            format!(
                "the stdin of process {} is closed: by closeProcessStdin, or because it does not read \
                 any more",
                self.life.pid
            ),
        )
    }
}

/// A process that does not read its input closes the pipe: nothing is wrong with that.
async fn feed(gone: impl Future<Output = ()>, mut stdin: pipe::Writer, content: Vec<u8>) {
    tokio::select! {
        written = stdin.write_all(&content) => drop(written),
        () = gone => {}
    }
}

/// What the host has of a new process.
struct Pipes {
    stdin: pipe::Writer,
    output: Outputs,
    exit: watch::Receiver<Option<Exit>>,
}

fn pipes(process: Process) -> std::io::Result<Pipes> {
    Ok(Pipes {
        stdin: pipe::Writer::new(process.stdin)?,
        output: Outputs {
            stdout: Pipe::new(pipe::Reader::new(process.stdout)?, Stream::Stdout),
            stderr: Pipe::new(pipe::Reader::new(process.stderr)?, Stream::Stderr),
        },
        exit: process.exit,
    })
}

struct Outputs {
    stdout: Pipe,
    stderr: Pipe,
}

impl Output for Outputs {
    async fn pump(&mut self, outlet: &Outlet, channel: Channel) {
        let Self { stdout, stderr } = self;
        tokio::join!(stdout.pump(outlet, channel), stderr.pump(outlet, channel));
    }

    async fn drain(&mut self, outlet: &Outlet, channel: Channel) {
        self.stdout.drain(outlet, channel).await;
        self.stderr.drain(outlet, channel).await;
    }
}

/// One output of a process.
struct Pipe {
    end: pipe::Reader,
    stream: Stream,
    open: bool,
}

impl Pipe {
    const fn new(end: pipe::Reader, stream: Stream) -> Self {
        Self {
            end,
            stream,
            open: true,
        }
    }

    /// Reads until the end, each chunk when the one before it has been handed over.
    async fn pump(&mut self, outlet: &Outlet, channel: Channel) {
        while self.open {
            let chunk = self.end.next().await.unwrap_or_default();
            self.open = !chunk.is_empty();
            if self.open {
                outlet.data(channel, self.stream, chunk).handed().await;
            }
        }
    }

    /// Hands over what is in the pipe now.
    async fn drain(&mut self, outlet: &Outlet, channel: Channel) {
        if !self.open {
            return;
        }
        let rest = tokio::time::timeout(pipe::DRAIN, self.end.rest()).await;
        let rest = rest.map_or_else(|_| Vec::new(), Result::unwrap_or_default);
        for chunk in rest.chunks(CHUNK) {
            outlet
                .data(channel, self.stream, chunk.to_vec())
                .handed()
                .await;
        }
    }
}
