//! Shells on terminals that callers open: attended to their end, like processes.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use super::awake::Awake;
use super::client::{VmHandle, closed_error};
use super::outlet::{Channel, End, Outlet, Source, Stream};
use super::processes::GRACE;
use crate::error::{Code, Error, Result};
use crate::vm::{
    Command, DynVm, Exit, GuestPath, Size, Terminal, TerminalEnd, TerminalInput, User, VmError,
    environment, exited,
};

/// Shells that have ended and are still known: the latest.
const ENDED: usize = 32;

/// Kept of what a terminal shows while nobody listens.
const KEPT: usize = 256 << 10;

/// Names a shell in its VM: never given again while the client's process lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ShellId(pub(crate) u64);

impl fmt::Display for ShellId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "shell-{}", self.0)
    }
}

impl FromStr for ShellId {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let number = text.strip_prefix("shell-").ok_or(())?;
        number.parse().map(Self).map_err(|_| ())
    }
}

/// What [`VmHandle::open_shell`] opens.
#[derive(Debug, Clone)]
pub struct ShellOptions {
    /// Program and arguments. Empty: a login shell, bash or else sh.
    pub argv: Vec<String>,
    /// Over the VM's default environment, to which `TERM=xterm-256color` belongs here.
    pub env: Vec<(String, String)>,
    pub cwd: GuestPath,
    pub user: User,
    pub size: Size,
}

impl Default for ShellOptions {
    fn default() -> Self {
        Self {
            argv: Vec::new(),
            env: Vec::new(),
            cwd: GuestPath::home(),
            user: User::User,
            size: Size { cols: 80, rows: 24 },
        }
    }
}

/// Those of one VM.
#[derive(Default)]
pub(super) struct Shells {
    opened: AtomicU64,
    records: Mutex<Records>,
}

#[derive(Default)]
struct Records {
    all: BTreeMap<ShellId, Arc<Record>>,
    /// The oldest first.
    ended: VecDeque<Arc<Record>>,
}

struct Record {
    id: ShellId,
    pid: u32,
    channel: Channel,
    vm: DynVm,
    input: TerminalInput,
    state: watch::Sender<State>,
    /// Its VM is being ended.
    with_vm: AtomicBool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Running,
    /// What it has shown is yet to be handed over.
    Exited,
    /// Listeners have been told everything.
    Ended(End),
}

impl VmHandle {
    /// Opens a terminal with a shell, or another program, on it.
    pub async fn open_shell(&self, options: ShellOptions) -> Result<ShellId> {
        let (settings, awake) = self.awake().await?;
        let mut opened = None;
        for argv in candidates(&options) {
            let command = command(&options, argv);
            let open = |vm: DynVm| {
                let command = &command;
                async move { vm.spawn_on_terminal(command, options.size).await }
            };
            let result = self.machine.begin(settings, open).await;
            let is_missing = matches!(&result, Err(error) if error.code == Code::Errno("ENOENT"));
            opened = Some(result);
            if !is_missing {
                break;
            }
        }
        // There is always a candidate.
        let (vm, terminal) = opened.ok_or_else(|| self.machine.was_ended())??;
        let outlet = Arc::clone(&self.machine.processes.outlet);
        Ok(self.machine.shells.take(vm, terminal, outlet, awake))
    }

    /// Types into a shell, in the order of the calls. Resolves when the terminal has taken all of it.
    pub fn write_shell(
        &self,
        shell: ShellId,
        data: Vec<u8>,
    ) -> impl Future<Output = Result<()>> + use<> {
        let written = self.shell(shell).map(|record| record.input.write(data));
        async move {
            written?.await.map_err(|_| {
                Error::new(
                    Code::Errno("EPIPE"),
                    format!("{shell} has ended, or hung up"),
                )
            })
        }
    }

    /// The programs on the terminal hear of it by SIGWINCH. A shell that has ended is no error.
    pub fn resize_shell(&self, shell: ShellId, size: Size) -> Result<()> {
        self.shell(shell)?.input.resize(size);
        Ok(())
    }

    /// Hangs up, as closing a terminal's window does, and waits for the shell to end: what has not a second
    /// later is killed. One that has ended is no error.
    pub async fn close_shell(&self, shell: ShellId) -> Result<()> {
        let record = self.shell(shell)?;
        if tokio::time::timeout(GRACE, record.hang_up()).await.is_err() {
            match record.vm.kill(record.pid).await {
                Ok(()) | Err(VmError::Ended(_) | VmError::NotSent(_)) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.wait_shell(shell).await.map(drop)
    }

    /// Waits until a shell has ended and listeners have been told so.
    pub async fn wait_shell(&self, shell: ShellId) -> Result<End> {
        let record = self.shell(shell)?;
        let mut state = record.state.subscribe();
        let mut closed = self.client.closed();
        tokio::select! {
            biased;
            ended = state.wait_for(|state| matches!(state, State::Ended(_))) => {
                match ended.as_deref() {
                    Ok(State::Ended(end)) => Ok(*end),
                    // The sender is in `record`, which we hold.
                    _ => Err(self.machine.was_ended()),
                }
            }
            _ = closed.wait_for(|closed| *closed) => Err(closed_error()),
        }
    }

    fn shell(&self, shell: ShellId) -> Result<Arc<Record>> {
        self.open()?;
        let records = self.machine.shells.records();
        records.all.get(&shell).cloned().ok_or_else(|| {
            Error::new(
                Code::ShellNotFound,
                format!("no {shell} was opened by openShell() in this VM, or it ended long ago"),
            )
        })
    }
}

/// Programs to try, the first that is there.
fn candidates(options: &ShellOptions) -> Vec<Vec<String>> {
    if options.argv.is_empty() {
        ["/bin/bash", "/bin/sh"]
            .map(|shell| vec![shell.to_owned(), "-l".to_owned()])
            .to_vec()
    } else {
        vec![options.argv.clone()]
    }
}

fn command(options: &ShellOptions, argv: Vec<String>) -> Command {
    let mut own = options.env.clone();
    let mut default = |name: &str, value: &str| {
        if !own.iter().any(|(own, _)| own == name) {
            own.push((name.to_owned(), value.to_owned()));
        }
    };
    default("TERM", "xterm-256color");
    if options.argv.is_empty() {
        default("SHELL", &argv[0]);
        if argv[0].ends_with("bash") {
            // What /etc/profile says comes after it.
            default("PS1", r"\u@\h:\w\$ ");
        }
    }
    Command {
        argv,
        env: environment::merge(options.user, own),
        cwd: options.cwd.clone(),
        user: options.user,
    }
}

impl Shells {
    fn take(
        self: &Arc<Self>,
        vm: DynVm,
        terminal: Terminal,
        outlet: Arc<Outlet>,
        awake: Awake,
    ) -> ShellId {
        let id = ShellId(self.opened.fetch_add(1, Ordering::Relaxed) + 1);
        let record = Arc::new(Record {
            id,
            pid: terminal.pid,
            channel: outlet.open(Source::Shell(id.0), KEPT),
            vm,
            input: terminal.end.input.clone(),
            state: watch::Sender::new(State::Running),
            with_vm: AtomicBool::new(false),
        });
        self.records().all.insert(id, Arc::clone(&record));
        let life = Life {
            shells: Arc::clone(self),
            outlet,
            record,
            end: terminal.end,
            exit: terminal.exit,
        };
        tokio::spawn(life.attend(awake));
        id
    }

    fn ended(&self, record: &Arc<Record>, outlet: &Outlet) {
        let mut records = self.records();
        records.ended.push_back(Arc::clone(record));
        if records.ended.len() > ENDED
            && let Some(oldest) = records.ended.pop_front()
        {
            records.all.remove(&oldest.id);
            outlet.forget(oldest.channel);
        }
    }

    /// Hangs up all of them, as their VM is going to be ended.
    pub(super) async fn end_all(&self) {
        let all: Vec<_> = self.records().all.values().cloned().collect();
        let hung_up = async {
            for record in all.iter().filter(|record| record.runs()) {
                record.with_vm.store(true, Ordering::Relaxed);
            }
            let hanging = all.iter().map(|record| {
                let record = Arc::clone(record);
                async move { record.hang_up().await }
            });
            let mut hanging: tokio::task::JoinSet<()> = hanging.collect();
            while hanging.join_next().await.is_some() {}
        };
        if tokio::time::timeout(GRACE, hung_up).await.is_err() {
            tracing::debug!(
                "shells that do not end when they are hung up are killed with their VM"
            );
        }
    }

    /// Resolves when listeners have been told of the end of every shell that there is now.
    pub(super) fn told(&self) -> impl Future<Output = ()> + use<> {
        let all: Vec<_> = self.records().all.values().cloned().collect();
        async move {
            for record in all {
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

    /// Resolves when the shell has exited.
    async fn hang_up(&self) {
        if self.runs() {
            // The kernel does the same when the terminal's end is closed, but a PID 1 that is not ours any
            // more can keep it open; and who hears of it first ends as he likes, not as who reads a
            // terminal that is gone.
            for signal in [libc::SIGHUP, libc::SIGCONT] {
                if let Err(error) = self.vm.signal(self.pid, signal).await {
                    tracing::debug!(%error, pid = self.pid, "not hung up on");
                }
            }
        }
        self.input.finish();
        let mut state = self.state.subscribe();
        // The sender is in `self`.
        drop(state.wait_for(|state| *state != State::Running).await);
    }
}

/// A shell from its start to its end.
struct Life {
    shells: Arc<Shells>,
    outlet: Arc<Outlet>,
    record: Arc<Record>,
    end: TerminalEnd,
    exit: watch::Receiver<Option<Exit>>,
}

impl Life {
    async fn attend(mut self, _awake: Awake) {
        let Self {
            shells,
            outlet,
            record,
            end,
            exit,
        } = &mut self;
        let exit = {
            let pump = pump(end, outlet, record.channel);
            tokio::pin!(pump);
            let mut is_read = false;
            loop {
                tokio::select! {
                    exit = exited(exit) => break exit,
                    () = &mut pump, if !is_read => is_read = true,
                }
            }
        };
        if exit.is_none() {
            // Its VM ends or has died, and kills whatever is in it.
            drop(record.vm.ended().wait_for(Option::is_some).await);
        }
        let over = End {
            exit: exit.unwrap_or(Exit::Signal(libc::SIGKILL)),
            timed_out: false,
            with_vm: record.with_vm.load(Ordering::Relaxed) || exit.is_none(),
        };
        record.state.send_replace(State::Exited);
        // What it has shown before the exit, and no more: what it left running may keep the terminal.
        end.input.finish();
        pump(end, outlet, record.channel).await;
        outlet.exit(record.channel, over).handed().await;
        shells.ended(record, outlet);
        record.state.send_replace(State::Ended(over));
    }
}

async fn pump(end: &mut TerminalEnd, outlet: &Outlet, channel: Channel) {
    while let Some(chunk) = end.next().await {
        outlet.data(channel, Stream::Stdout, chunk).handed().await;
    }
}
