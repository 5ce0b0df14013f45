//! Shells on terminals that callers open: attended to their end, like processes.

use std::fmt;
use std::pin::pin;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::client::VmHandle;
use super::life::{GRACE, Life, Lives, Output, Started};
use super::outlet::{Channel, End, Outlet, Source, Stream};
use crate::error::{Code, Error, Result};
use crate::vm::{
    Command, DynVm, GuestPath, KILL_AGAIN, Size, TerminalEnd, TerminalInput, User, environment,
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
pub(super) struct Shells {
    opened: AtomicU64,
    pub(super) lives: Lives<ShellId, Shell>,
}

impl Default for Shells {
    fn default() -> Self {
        Self {
            opened: AtomicU64::new(0),
            lives: Lives::new(ENDED),
        }
    }
}

/// A terminal, and what was started on it.
pub(super) struct Shell {
    life: Life,
    input: TerminalInput,
}

impl AsRef<Life> for Shell {
    fn as_ref(&self) -> &Life {
        &self.life
    }
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
            opened = Some(result.map(|(vm, terminal)| (vm, terminal, command)));
            if !is_missing {
                break;
            }
        }
        // There is always a candidate.
        let (vm, terminal, command) = opened.ok_or_else(|| self.machine.was_ended())??;
        let (outlet, shells) = (
            Arc::clone(&self.machine.outlet),
            Arc::clone(&self.machine.shells),
        );
        let id = ShellId(shells.opened.fetch_add(1, Ordering::Relaxed) + 1);
        let channel = outlet.open(Source::Shell(id.0), KEPT);
        let (mut end, mut exit) = (terminal.end, terminal.exit);
        let shell = Arc::new(Shell {
            life: Life::new(vm, terminal.pid, command, channel),
            input: end.input.clone(),
        });
        shells.lives.insert(id, &shell, &outlet);
        tokio::spawn(async move {
            let attended = shell.life.attend(&outlet, &mut exit, &mut end, None);
            let over = attended.await;
            shells.lives.ended(id, &shell, over, &outlet);
            drop(awake);
        });
        Ok(id)
    }

    /// The shells that were opened by [`VmHandle::open_shell`], the oldest first: those that run, and the
    /// latest that have ended. Boots nothing.
    pub fn list_shells(&self) -> Result<Vec<(ShellId, Started)>> {
        self.open()?;
        let all = self.machine.shells.lives.all();
        let view = |(id, shell): &(ShellId, Arc<Shell>)| (*id, shell.life.view());
        Ok(all.iter().map(view).collect())
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
        let mut told = pin!(self.told(&record.life));
        if tokio::time::timeout(GRACE, record.hang_up()).await.is_err() {
            loop {
                record.life.kill().await?;
                // Its processes may make others meanwhile, and listeners may take their time.
                if let Ok(told) = tokio::time::timeout(KILL_AGAIN, &mut told).await {
                    return told.map(drop);
                }
            }
        }
        told.await.map(drop)
    }

    /// Waits until a shell has ended and listeners have been told so.
    pub async fn wait_shell(&self, shell: ShellId) -> Result<End> {
        let record = self.shell(shell)?;
        self.told(&record.life).await
    }

    fn shell(&self, shell: ShellId) -> Result<Arc<Shell>> {
        self.open()?;
        self.machine.shells.lives.get(shell).ok_or_else(|| {
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
    /// Hangs up all of them, as their VM is going to be ended.
    pub(super) async fn end_all(&self) {
        let running = self.lives.running();
        for shell in &running {
            shell.life.ends_with_vm();
        }
        let hung_up = async {
            let hanging = running
                .into_iter()
                .map(|shell| async move { shell.hang_up().await });
            let mut hanging: tokio::task::JoinSet<()> = hanging.collect();
            while hanging.join_next().await.is_some() {}
        };
        if tokio::time::timeout(GRACE, hung_up).await.is_err() {
            tracing::debug!(
                "shells that do not end when they are hung up are killed with their VM"
            );
        }
    }
}

impl Shell {
    /// Resolves when the shell has exited.
    async fn hang_up(&self) {
        // The kernel does the same when the terminal's end is closed, but a PID 1 that is not ours any more
        // can keep it open; and who hears of it first ends as he likes, not as who reads a terminal that is
        // gone.
        self.life.ask_to_end(libc::SIGHUP).await;
        self.input.finish();
        self.life.gone().await;
    }
}

impl Output for TerminalEnd {
    async fn pump(&mut self, outlet: &Outlet, channel: Channel) {
        while let Some(chunk) = self.next().await {
            outlet.data(channel, Stream::Stdout, chunk).handed().await;
        }
    }

    /// What it has shown before the exit, and no more: what it left running may keep the terminal.
    async fn drain(&mut self, outlet: &Outlet, channel: Channel) {
        self.input.finish();
        self.pump(outlet, channel).await;
    }
}
