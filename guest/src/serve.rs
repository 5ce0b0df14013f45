//! The life of PID 1 after boot: requests, dead children, the end.

use std::collections::{HashMap, HashSet};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use agentvm_guest::protocol::{
    FailedAt, Instance, LimitOp, ProcessOp, Reply, Request, RequestId, Turn,
};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, kill, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;

use crate::control::Control;
use crate::ending;
use crate::files::{self, Operated};
use crate::fork_bomb::{self, Orphans};
use crate::limits;
use crate::ports;
use crate::process::{Launch, SpawnError, Starting};
use crate::processes;
use crate::terminal;
use crate::worker;

/// How many dead children are reaped before the host is listened to again: a fork bomb leaves orphans as
/// fast as they can be reaped.
const REAPED_AT_ONCE: usize = 64;

/// Serves the host until it hangs up, then ends every process of the VM.
pub(crate) fn serve(control: &Control) {
    let mut guest = Guest {
        control,
        starting: Vec::new(),
        spawned: HashSet::new(),
        workers: HashMap::new(),
        more_to_reap: false,
        orphans: Orphans::new(Instant::now()),
    };
    if let Some(signals) = signals() {
        while guest.turn(&signals) {}
    }
    end();
}

/// That children died, and nothing else. A signal that ended PID 1 would be the VM's to send: the kernel
/// says that one comes from outside also where it had no room for its sender.
fn signals() -> Option<SignalFd> {
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGCHLD);
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&mask), None).ok()?;
    SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK).ok()
}

struct Guest<'a> {
    control: &'a Control,
    /// Of which the host has not heard yet.
    starting: Vec<Start>,
    /// Started for the host and not reaped yet; other children are orphans that we inherited.
    spawned: HashSet<i32>,
    /// Processes of our own, with what is to be answered if one can't.
    workers: HashMap<i32, Option<Question>>,
    /// Children may have died that no signal will tell of again.
    more_to_reap: bool,
    orphans: Orphans,
}

/// What a worker is to answer to the host.
#[derive(Clone, Copy)]
enum Question {
    Processes(RequestId, ProcessOp),
    Usage(RequestId),
}

impl Question {
    fn answer(self) -> nix::Result<Reply> {
        match self {
            Self::Processes(id, op) => processes::answer(id, op),
            Self::Usage(id) => limits::usage().map(|usage| Reply::Usage { id, usage }),
        }
    }

    /// What can be told without waiting for any process.
    fn answer_now(self) -> nix::Result<Reply> {
        match self {
            Self::Processes(id, op) => processes::answer_now(id, op),
            Self::Usage(id) => limits::usage_now().map(|usage| Reply::Usage { id, usage }),
        }
    }

    const fn id(self) -> RequestId {
        match self {
            Self::Processes(id, _) | Self::Usage(id) => id,
        }
    }
}

/// A program that the host wants.
struct Start {
    id: RequestId,
    starting: Starting,
    /// The other end of the terminal that it is on.
    terminal: Option<OwnedFd>,
    /// A program of the VM has stopped it before it was one itself.
    stopped: bool,
}

impl Guest<'_> {
    /// Waits for something to do and does it. `false`: the VM ends.
    fn turn(&mut self, signals: &SignalFd) -> bool {
        let mut ready = vec![
            PollFd::new(self.control.as_fd(), PollFlags::POLLIN),
            PollFd::new(signals.as_fd(), PollFlags::POLLIN),
        ];
        let starting = self.starting.iter();
        ready.extend(starting.map(|start| PollFd::new(start.starting.as_fd(), PollFlags::POLLIN)));
        let wait = if self.more_to_reap {
            PollTimeout::ZERO
        } else {
            PollTimeout::NONE
        };
        match poll(&mut ready, wait) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(_) => return false,
        }
        let ready: Vec<bool> = ready.iter().map(|fd| fd.any().unwrap_or(true)).collect();
        let &[control, signal, ref begun @ ..] = &ready[..] else {
            return false;
        };
        // From the end, as each is taken out.
        for (at, _) in begun.iter().enumerate().rev().filter(|(_, begun)| **begun) {
            self.begun(at);
        }
        if signal {
            // One a turn, as who sends them may be faster.
            let _ = signals.read_signal();
            self.more_to_reap = true;
        }
        if self.more_to_reap {
            self.reap();
        }
        if control {
            let Some((request, descriptors)) = self.control.receive() else {
                return false;
            };
            self.answer(request, descriptors);
        }
        true
    }

    fn reap(&mut self) {
        let mut status = 0;
        for _ in 0..REAPED_AT_ONCE {
            let options = libc::WNOHANG | libc::WUNTRACED;
            // SAFETY: waitpid writes the status. The raw call: nix has no variant for real-time signals.
            let pid = unsafe { libc::waitpid(-1, &raw mut status, options) };
            if pid <= 0 {
                self.more_to_reap = false;
                return;
            }
            if libc::WIFSTOPPED(status) {
                // A program may stop what it has the uid of. Nobody would make it go on.
                let mut starting = self.starting.iter_mut();
                let start = starting.find(|start| start.starting.pid == pid);
                let is_ours = match start {
                    Some(start) => {
                        start.stopped = !start.starting.is_over();
                        start.stopped
                    }
                    None => self.workers.contains_key(&pid),
                };
                if is_ours {
                    let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
                }
                continue;
            }
            let mut starting = self.starting.iter();
            if let Some(at) = starting.position(|start| start.starting.pid == pid) {
                self.begun(at);
            }
            if self.spawned.remove(&pid) {
                self.control.send(&Reply::Exited { pid, status });
            } else if let Some(unanswered) = self.workers.remove(&pid) {
                if let Some(question) = unanswered.filter(|_| status != 0) {
                    self.answer_now(question);
                }
            } else if self.orphans.reaped(Instant::now()) {
                self.end_fork_bomb();
            }
        }
    }

    /// Tells the host of a program that is one now, or will never be.
    fn begun(&mut self, at: usize) {
        let Start {
            id,
            starting,
            terminal,
            stopped,
        } = self.starting.remove(at);
        let pid = starting.pid;
        let outcome = match starting.outcome() {
            Ok(()) if stopped => Err(Errno::EINTR.into()),
            outcome => outcome,
        };
        if let Err(SpawnError { errno, at }) = outcome {
            // What is left of it is a process of our own.
            self.workers.insert(pid, None);
            return self.fail(id, errno, at);
        }
        self.spawned.insert(pid);
        let reply = Reply::Spawned { id, pid };
        if let Err(errno) = self.control.hand_out(&reply, terminal.as_slice()) {
            // Nobody will ever hear of it.
            let _ = ending::end_session(pid);
            self.fail(id, errno, FailedAt::Operation);
        }
    }

    fn end_fork_bomb(&self) {
        if fork_bomb::are_many().unwrap_or(false) {
            // First, so that who sees the end of a process finds why.
            self.control.send(&Reply::ForkBomb);
            let _ = limits::kill_all();
        }
    }

    fn answer(&mut self, request: Request, descriptors: Vec<OwnedFd>) {
        match request {
            // One boot a life.
            Request::Boot(_) => {}
            Request::Spawn {
                id,
                argv,
                env,
                cwd,
                user,
            } => {
                let started = <[OwnedFd; 3]>::try_from(descriptors)
                    .map_err(|_| SpawnError::from(Errno::EBADF))
                    .and_then(|stdio| Launch::new(argv, env, cwd, user, stdio))
                    .and_then(|launch| launch.start());
                self.start(id, started.map(|starting| (starting, None)));
            }
            Request::Terminal { id, spec } => {
                let started = terminal::start(*spec);
                self.start(id, started.map(|(starting, other)| (starting, Some(other))));
            }
            Request::Signal { id, pid, signal } => {
                // A group outlives its leader, and the kernel does not reuse its number meanwhile.
                // Group 1 and 'all' (0, -1) are not the host's to signal.
                let result = if pid > 1 {
                    // SAFETY: integers; a bad signal number is EINVAL.
                    Errno::result(unsafe { libc::kill(-pid, signal) })
                } else {
                    Err(Errno::EINVAL)
                };
                match result {
                    Ok(_) | Err(Errno::ESRCH) => self.done(id),
                    Err(errno) => self.fail(id, errno, FailedAt::Operation),
                }
            }
            Request::Foreground { id, agent, turn } => match self.look(agent, &turn) {
                Ok((agent, seen)) => {
                    let reply = Reply::Foreground { id, agent, seen };
                    self.control.send(&reply);
                }
                Err(errno) => self.fail(id, errno, FailedAt::Operation),
            },
            Request::EndForeground {
                id,
                agent,
                turn,
                seen,
                agent_too,
            } => match ending::end_foreground(agent, &turn, seen, agent_too) {
                Ok(killed) => {
                    let reply = Reply::ForegroundEnded { id, killed };
                    self.control.send(&reply);
                }
                Err(errno) => self.fail(id, errno, FailedAt::Operation),
            },
            Request::EndSession { id, leader } => {
                let ended = if self.spawned.contains(&leader) {
                    ending::end_session(leader)
                } else {
                    Ok(())
                };
                match ended {
                    Ok(()) => self.done(id),
                    Err(errno) => self.fail(id, errno, FailedAt::Operation),
                }
            }
            Request::Limits { id, op } => self.apply(id, op),
            Request::Open {
                id,
                path,
                flags,
                mode,
                user,
            } => match files::open(&path, flags, mode, user) {
                Ok(file) => self.hand_out(id, &Reply::Opened { id }, &[file]),
                Err(errno) => self.fail(id, errno, FailedAt::Operation),
            },
            Request::Port { id, op } => match ports::answer(id, op) {
                Ok((reply, descriptors)) => self.hand_out(id, &reply, &descriptors),
                Err(errno) => self.fail(id, errno, FailedAt::Operation),
            },
            Request::Process { id, op } => {
                let ProcessOp::List { commands, .. } = op;
                let question = Question::Processes(id, op);
                if commands {
                    self.ask_a_worker(question);
                } else {
                    self.answer_now(question);
                }
            }
            Request::MakeDirs { id, path, user } => match files::make_dirs(&path, user) {
                Ok(()) => self.done(id),
                Err(errno) => self.fail(id, errno, FailedAt::Operation),
            },
            Request::File { id, user, op } => match files::operate(op, user, descriptors) {
                Ok(operated) => self.operated(id, operated),
                Err(errno) => self.fail(id, errno, FailedAt::Operation),
            },
        }
    }

    fn start(&mut self, id: RequestId, started: Result<(Starting, Option<OwnedFd>), SpawnError>) {
        match started {
            Ok((starting, terminal)) => self.starting.push(Start {
                id,
                starting,
                terminal,
                stopped: false,
            }),
            Err(SpawnError { errno, at }) => self.fail(id, errno, at),
        }
    }

    fn operated(&mut self, id: RequestId, operated: Operated) {
        match operated {
            Operated::Done(None) => self.done(id),
            Operated::Done(Some(answer)) => {
                self.control.send(&Reply::File { id, answer });
            }
            Operated::Begun(worker) => {
                self.workers.insert(worker, None);
                self.done(id);
            }
        }
    }

    fn ask_a_worker(&mut self, question: Question) {
        let started = worker::start_with(self.control.as_fd(), processes::PATIENCE, &|| {
            let reply = question.answer()?;
            self.control.hand_out(&reply, &[])
        });
        match started {
            Ok(worker) => {
                self.workers.insert(worker, Some(question));
            }
            // There are as many processes as there may be.
            Err(_) => self.answer_now(question),
        }
    }

    fn answer_now(&self, question: Question) {
        match question.answer_now() {
            Ok(reply) => self.control.send(&reply),
            Err(errno) => self.fail(question.id(), errno, FailedAt::Operation),
        }
    }

    fn apply(&mut self, id: RequestId, op: LimitOp) {
        match op {
            LimitOp::Usage => self.ask_a_worker(Question::Usage(id)),
            LimitOp::Kill => match limits::kill_all() {
                Ok(()) => self.done(id),
                Err(errno) => self.fail(id, errno, FailedAt::Operation),
            },
        }
    }

    /// The foreground of a process that the host has started; of any other there is none.
    fn look(&self, agent: i32, turn: &Turn) -> nix::Result<(Option<Instance>, Vec<Instance>)> {
        let found = if self.spawned.contains(&agent) {
            ending::look(agent, turn)?
        } else {
            None
        };
        Ok(found.map_or_else(Default::default, |(agent, seen)| (Some(agent), seen)))
    }

    /// Or says why it can't.
    fn hand_out(&self, id: RequestId, reply: &Reply, descriptors: &[OwnedFd]) {
        if let Err(errno) = self.control.hand_out(reply, descriptors) {
            self.fail(id, errno, FailedAt::Operation);
        }
    }

    fn done(&self, id: RequestId) {
        self.control.send(&Reply::Done { id });
    }

    fn fail(&self, id: RequestId, errno: Errno, at: FailedAt) {
        let errno = errno as i32;
        self.control.send(&Reply::Failed { id, errno, at });
    }
}

/// Kills everything in the VM and waits until it is gone.
fn end() {
    // PID 1 itself is exempt; everyone else gets it at once, also those that fork right now.
    let _ = kill(Pid::from_raw(-1), Signal::SIGKILL);
    loop {
        match waitpid(Pid::from_raw(-1), None) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(_) => return,
        }
    }
}
