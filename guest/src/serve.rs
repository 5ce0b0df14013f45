//! The life of PID 1 after boot: requests, dead children, the end.

use std::collections::{HashMap, HashSet};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use agentvm_guest::protocol::{
    FailedAt, Instance, LimitOp, ProcessOp, Reply, Request, RequestId, TerminalSpec, Turn,
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
use crate::process::{Launch, SpawnError};
use crate::processes::{self, Commands};
use crate::terminal;
use crate::worker;

/// How many dead children are reaped before the host is listened to again: a fork bomb leaves orphans as
/// fast as they can be reaped.
const REAPED_AT_ONCE: usize = 64;

/// Serves the host until it hangs up, then ends every process of the VM.
pub(crate) fn serve(control: &Control) {
    let mut guest = Guest {
        control,
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

fn signals() -> Option<SignalFd> {
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGCHLD);
    mask.add(Signal::SIGTERM);
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&mask), None).ok()?;
    SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK).ok()
}

struct Guest<'a> {
    control: &'a Control,
    /// Started for the host and not reaped yet; other children are orphans that we inherited.
    spawned: HashSet<i32>,
    /// Processes of our own, with what is to be answered if one can't.
    workers: HashMap<i32, Option<(RequestId, ProcessOp)>>,
    /// Children may have died that no signal will tell of again.
    more_to_reap: bool,
    orphans: Orphans,
}

impl Guest<'_> {
    /// Waits for something to do and does it. `false`: the VM ends.
    fn turn(&mut self, signals: &SignalFd) -> bool {
        let mut ready = [
            PollFd::new(self.control.as_fd(), PollFlags::POLLIN),
            PollFd::new(signals.as_fd(), PollFlags::POLLIN),
        ];
        let wait = if self.more_to_reap {
            PollTimeout::ZERO
        } else {
            PollTimeout::NONE
        };
        match poll(&mut ready, wait) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(_) => return false,
        }
        let [control, signal] = ready.map(|fd| fd.any().unwrap_or(true));
        if signal {
            // One a turn, as who sends them may be faster.
            if let Ok(Some(info)) = signals.read_signal() {
                // From outside the VM only: a process inside has no say in this. Its pid is not 0,
                // unless it makes one up, which the kernel lets it do only under another code.
                if info.ssi_signo == Signal::SIGTERM as u32
                    && info.ssi_code == libc::SI_USER
                    && info.ssi_pid == 0
                {
                    return false;
                }
            }
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
                if self.workers.contains_key(&pid) {
                    let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
                }
                continue;
            }
            if self.spawned.remove(&pid) {
                self.control.send(&Reply::Exited { pid, status });
            } else if let Some(unanswered) = self.workers.remove(&pid) {
                if let Some((id, op)) = unanswered.filter(|_| status != 0) {
                    self.list_processes_here(id, op);
                }
            } else if self.orphans.reaped(Instant::now()) {
                self.end_fork_bomb();
            }
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
                match started {
                    Ok(pid) => {
                        self.spawned.insert(pid);
                        self.control.send(&Reply::Spawned { id, pid });
                    }
                    Err(SpawnError { errno, at }) => self.fail(id, errno, at),
                }
            }
            Request::Terminal { id, spec } => self.start_on_terminal(id, *spec),
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
            Request::Process { id, op } => self.list_processes(id, op),
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

    fn start_on_terminal(&mut self, id: RequestId, spec: TerminalSpec) {
        let (pid, terminal) = match terminal::start(spec) {
            Ok(started) => started,
            Err(SpawnError { errno, at }) => return self.fail(id, errno, at),
        };
        self.spawned.insert(pid);
        let reply = Reply::Spawned { id, pid };
        if let Err(errno) = self.control.hand_out(&reply, &[terminal]) {
            // Nobody will ever hear of it.
            let _ = ending::end_session(pid);
            self.fail(id, errno, FailedAt::Operation);
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

    fn list_processes(&mut self, id: RequestId, op: ProcessOp) {
        let started = worker::start_with(self.control.as_fd(), &|| {
            let reply = processes::answer(id, op, Commands::Read)?;
            self.control.hand_out(&reply, &[])
        });
        match started {
            Ok(worker) => {
                self.workers.insert(worker, Some((id, op)));
            }
            // There are as many processes as there may be.
            Err(_) => self.list_processes_here(id, op),
        }
    }

    fn list_processes_here(&self, id: RequestId, op: ProcessOp) {
        match processes::answer(id, op, Commands::Leave) {
            Ok(reply) => self.control.send(&reply),
            Err(errno) => self.fail(id, errno, FailedAt::Operation),
        }
    }

    fn apply(&self, id: RequestId, op: LimitOp) {
        let done = match op {
            LimitOp::Usage => match limits::usage() {
                Ok(usage) => return self.control.send(&Reply::Usage { id, usage }),
                Err(errno) => Err(errno),
            },
            LimitOp::Kill => limits::kill_all(),
        };
        match done {
            Ok(()) => self.done(id),
            Err(errno) => self.fail(id, errno, FailedAt::Operation),
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
