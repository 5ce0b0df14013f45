//! Running a shell command to its end.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::{Command, Exit, GuestPath, KILL_AGAIN, Process, Result, User, VmError, exited, limits};
use crate::pipe::{self, PipeEnd};
use crate::vm::environment;

const SHELL: &str = "/bin/sh";

/// How [`exec`] runs a command.
#[derive(Debug, Clone)]
pub struct ExecOptions {
    /// Over the VM's default environment.
    pub env: Vec<(String, String)>,
    pub cwd: GuestPath,
    pub user: User,
    pub stdin: Vec<u8>,
    /// The command is killed when it passes, with everything in its session ([`super::Vm::kill`]).
    pub timeout: Option<Duration>,
    /// Kept of stdout and of stderr each; the rest is read and dropped.
    pub max_output_bytes: usize,
}

impl Default for ExecOptions {
    fn default() -> Self {
        Self {
            env: Vec::new(),
            cwd: GuestPath::home(),
            user: User::User,
            stdin: Vec::new(),
            timeout: None,
            max_output_bytes: 16 << 20,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecOutput {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub exit: Exit,
    /// Output was dropped because of `max_output_bytes`.
    pub truncated: bool,
}

/// How an exec ended.
#[derive(Debug)]
pub enum ExecEnd {
    Exited(ExecOutput),
    /// The time limit passed; what it had written until then.
    TimedOut(ExecOutput),
}

/// Runs `sh -c command` and returns when the shell exits: what it left running in the background may
/// keep the pipes, not the call. Dropping the future kills the command as a time limit does.
pub async fn exec(vm: &super::DynVm, command: &str, options: ExecOptions) -> Result<ExecEnd> {
    let process = start(vm, command, &options).await?;
    attend(vm, process, options).await
}

/// The first part of [`exec`]: nothing has happened in the VM if it fails.
pub async fn start(vm: &super::DynVm, command: &str, options: &ExecOptions) -> Result<Process> {
    let env = environment::merge(options.user, options.env.clone());
    let shell = Command {
        argv: vec![SHELL.to_owned(), "-c".to_owned(), command.to_owned()],
        env,
        cwd: options.cwd.clone(),
        user: options.user,
    };
    match vm.spawn(&shell).await {
        Err(VmError::Spawn {
            errno: nix::errno::Errno::ENOENT,
            ..
        }) => Err(VmError::NoShell),
        started => started,
    }
}

/// The rest of [`exec`].
pub async fn attend(vm: &super::DynVm, process: Process, options: ExecOptions) -> Result<ExecEnd> {
    let pid = process.pid;
    let mut kill = KillOnDrop {
        vm: Some(vm.clone()),
        pid,
    };
    let limit = options.max_output_bytes;
    let (mut stdout, mut stderr) = (
        Output::new(process.stdout, limit)?,
        Output::new(process.stderr, limit)?,
    );
    let mut exit = process.exit;
    let mut feed = Box::pin(feed(process.stdin, options.stdin));
    let mut fed = false;
    let mut deadline = Box::pin(sleep(options.timeout.unwrap_or(Duration::MAX)));
    let mut timed_out = false;
    let exit = loop {
        tokio::select! {
            exit = exited(&mut exit) => break exit,
            () = &mut feed, if !fed => fed = true,
            () = stdout.read(), if stdout.open => {}
            () = stderr.read(), if stderr.open => {}
            () = &mut deadline => {
                timed_out = true;
                vm.kill(pid).await?;
                deadline.as_mut().reset(Instant::now() + KILL_AGAIN);
            }
        }
    };
    kill.vm = None;
    // What was written before the exit is in the pipes by now. Who writes at this moment may keep them locked.
    tokio::join!(stdout.drain(), stderr.drain());
    let output = ExecOutput {
        truncated: stdout.truncated || stderr.truncated,
        stdout: stdout.kept,
        stderr: stderr.kept,
        exit: exit.ok_or_else(|| VmError::Ended("a command was running".to_owned()))?,
    };
    // The command itself, or one that its shell has waited for.
    let killed = matches!(output.exit, Exit::Signal(libc::SIGKILL) | Exit::Code(137));
    if killed
        && !timed_out
        && let Some(error) = limits::killed(&**vm, "the command was killed", process.before)
    {
        return Err(error.with_output(output));
    }
    Ok(if timed_out {
        ExecEnd::TimedOut(output)
    } else {
        ExecEnd::Exited(output)
    })
}

async fn feed(stdin: PipeEnd, content: Vec<u8>) {
    if content.is_empty() {
        return;
    }
    if let Ok(mut pipe) = pipe::Writer::new(stdin) {
        // A command that does not read its input closes the pipe: not an error of the call.
        drop(pipe.write_all(&content).await);
    }
}

/// One output pipe: reads everything, keeps the first `limit` bytes.
struct Output {
    pipe: pipe::Reader,
    kept: Vec<u8>,
    limit: usize,
    truncated: bool,
    open: bool,
}

impl Output {
    fn new(end: PipeEnd, limit: usize) -> Result<Self> {
        let pipe = pipe::Reader::new(end)
            .map_err(|error| VmError::Ended(format!("its output pipe is unusable: {error}")))?;
        Ok(Self {
            pipe,
            kept: Vec::new(),
            limit,
            truncated: false,
            open: true,
        })
    }

    async fn read(&mut self) {
        let read = self.pipe.next().await.unwrap_or_default();
        self.open = !read.is_empty();
        self.keep(&read);
    }

    /// Reads what is in the pipe now.
    async fn drain(&mut self) {
        if self.open {
            let rest = tokio::time::timeout(pipe::DRAIN, self.pipe.rest()).await;
            self.truncated |= rest.is_err();
            self.keep(&rest.map_or_else(|_| Vec::new(), std::result::Result::unwrap_or_default));
        }
    }

    fn keep(&mut self, read: &[u8]) {
        let room = self.limit - self.kept.len();
        self.kept.extend_from_slice(&read[..read.len().min(room)]);
        self.truncated |= read.len() > room;
    }
}

/// A call that is given up must not leave its command running.
struct KillOnDrop {
    vm: Option<super::DynVm>,
    pid: u32,
}

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        if let (Some(vm), Ok(runtime)) = (self.vm.take(), tokio::runtime::Handle::try_current()) {
            let pid = self.pid;
            drop(runtime.spawn(async move { vm.kill(pid).await }));
        }
    }
}
