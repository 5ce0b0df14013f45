//! Ends processes that belong together: what a turn has in the foreground
//! ([`agentvm_guest::foreground`]), or the session of a command.
//!
//! Killed one by one, processes that keep starting others would leave some: the children of a killed
//! parent are PID 1's from then on, as background processes are. So all are stopped first, which
//! keeps every one in its place, until none is left that could start another.
//!
//! PID 1 does nothing else meanwhile, so all of it is bounded: by [`LONGEST`] to find and stop them, and as
//! long again to kill them. What there is no time left for is not looked at.

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::iter;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant as Time};

use agentvm_guest::foreground::{Process, foreground, tick};
use agentvm_guest::protocol::{Instance, MAX_SEEN, Turn};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat};
use nix::sys::stat::Mode;

use crate::limits;
use crate::spared::{Spared, runs_one_of};

/// Usually it takes a few milliseconds, and longer only where processes go on starting others on a busy
/// machine. When it takes so long, what is known by then is killed.
const LONGEST: Duration = Duration::from_secs(1);

/// Between two looks for something that takes effect at once on an idle machine.
const PAUSE: Duration = Duration::from_micros(200);

/// How long what looks alive may take to stop, if that is not seen at once.
const LOOKS_ALIVE: Duration = Duration::from_millis(50);

/// Of one `/proc/<pid>/status`, which has all groups of a process before its session.
const MAX_STATUS: u64 = 1 << 20;

/// What is in the foreground now, parents first. `None`: `agent` has exited.
pub(crate) fn look(agent: i32, turn: &Turn) -> nix::Result<Option<(Instance, Vec<Instance>)>> {
    let deadline = Time::now() + LONGEST;
    let processes = processes(agent, deadline)?;
    let Some(agent) = processes.iter().find(|p| p.instance.pid == agent) else {
        return Ok(None);
    };
    let is_named = |pid| runs_one_of(&turn.spare, pid);
    let mut spared = spared(turn, &is_named, deadline);
    let found = in_foreground(&processes, agent.instance, turn, &mut spared);
    let seen = found.iter().map(|p| p.instance).take(MAX_SEEN).collect();
    Ok(Some((agent.instance, seen)))
}

/// Kills the foreground, what of `seen` still runs, and on demand `agent` with its group. Returns how
/// many of the first two there were, when they have ended or [`LONGEST`] has passed.
pub(crate) fn end_foreground(
    agent: Instance,
    turn: &Turn,
    seen: Vec<Instance>,
    agent_too: bool,
) -> nix::Result<u32> {
    let deadline = Time::now() + LONGEST;
    // The number of a child of ours is nobody else's before we reap it.
    let group = process(agent.pid)
        .filter(|process| process.instance == agent && agent_too)
        .map(|process| process.instance.pid);
    signal_group(group, libc::SIGSTOP);
    let mut doomed = Doomed::default();
    for instance in seen.into_iter().take_while(|_| Time::now() < deadline) {
        doomed.stop(instance);
    }
    let is_named = |pid| runs_one_of(&turn.spare, pid);
    let mut spared = spared(turn, &is_named, deadline);
    let stopped = stop_all(&mut doomed, group, deadline, || {
        let processes = processes(agent.pid, deadline)?;
        let found = in_foreground(&processes, agent, turn, &mut spared);
        Ok((processes, found))
    });
    drop(spared);
    let killed = doomed.kill(Time::now() + LONGEST);
    signal_group(group, libc::SIGKILL);
    stopped?;
    doomed.wait(deadline);
    Ok(killed)
}

/// Kills every process in this session, whatever its group. Looks at nothing that a process could keep it
/// waiting for: this is what ends a fork bomb.
pub(crate) fn end_session(session: i32) -> nix::Result<()> {
    let deadline = Time::now() + LONGEST;
    // Of those that do not look stopped when they are: a parent that waits for what it has vforked, which is
    // stopped; and what has threads and no first one any more.
    let patience = Time::now() + LOOKS_ALIVE;
    // Whether nobody could have started a process since the last look.
    let mut were_still = false;
    loop {
        let mut are_still = true;
        for member in members(session, deadline)? {
            if member.stopped == Stopped::No {
                are_still = false;
            }
            if member.stopped == Stopped::Unknown && Time::now() < patience {
                are_still = false;
            }
            if member.stopped != Stopped::Yes {
                member.signal(libc::SIGSTOP);
            }
        }
        if (are_still && were_still) || Time::now() >= deadline {
            break;
        }
        if !are_still {
            std::thread::sleep(PAUSE);
        }
        were_still = are_still;
    }
    let deadline = Time::now() + LONGEST; // However long it took to stop them.
    // Once more for those that the end of others lets go on.
    for _ in 0..2 {
        for member in members(session, deadline)? {
            member.signal(libc::SIGKILL);
        }
    }
    for pid in limits::pids()?.take_while(|_| Time::now() < deadline) {
        kill_who_keeps(pid, session);
    }
    Ok(())
}

/// A dead process of a session that another one traces is the tracer's to bury first, which may never.
fn kill_who_keeps(pid: i32, session: i32) {
    let tracer = || {
        let status = Status::read(File::open(format!("/proc/{pid}/status")).ok()?)?;
        (status.session == session && status.is_dead()).then_some(status.tracer)
    };
    let Some(found) = tracer().filter(|tracer| *tracer > 1) else {
        return;
    };
    let flags = OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    if let Ok(directory) = open(format!("/proc/{found}").as_str(), flags, Mode::empty())
        // It still was when this was opened, and so what is open is it.
        && tracer() == Some(found)
    {
        let _ = send(&directory, libc::SIGKILL);
    }
}

/// A process of a session, by its directory in /proc, which stays its own.
struct Member {
    directory: OwnedFd,
    stopped: Stopped,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stopped {
    Yes,
    No,
    Unknown,
}

impl Member {
    fn find(pid: i32, session: i32) -> Option<Self> {
        let flags = OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let directory = open(format!("/proc/{pid}").as_str(), flags, Mode::empty()).ok()?;
        let status = openat(&directory, "status", OFlag::O_CLOEXEC, Mode::empty()).ok()?;
        let status = Status::read(File::from(status))?;
        // A dead one starts nothing, and is its parent's to bury.
        (status.session == session && !status.is_dead()).then_some(Self {
            directory,
            stopped: match status.state {
                b'T' | b't' => Stopped::Yes,
                b'D' | b'Z' => Stopped::Unknown,
                _ => Stopped::No,
            },
        })
    }

    fn signal(&self, signal: i32) {
        // One that has ended needs none.
        let _ = send(&self.directory, signal);
    }
}

/// Children before their parents, as a rule: see [`Doomed::kill`]. Each is looked at when its turn comes, if
/// there is time for it.
fn members(session: i32, deadline: Time) -> nix::Result<impl Iterator<Item = Member>> {
    let mut pids: Vec<i32> = limits::pids()?.collect();
    pids.sort_unstable_by(|one, other| other.cmp(one));
    Ok(pids
        .into_iter()
        .take_while(move |_| Time::now() < deadline)
        .filter_map(move |pid| Member::find(pid, session)))
}

/// Of `proc_pid_status(5)`.
struct Status {
    session: i32,
    /// Who traces it; 0: nobody.
    tracer: i32,
    /// That of the first thread.
    state: u8,
    threads: u32,
}

impl Status {
    fn read(status: impl Read) -> Option<Self> {
        let (mut session, mut state, mut tracer) = (None, None, None);
        for line in BufReader::new(status.take(MAX_STATUS)).split(b'\n') {
            let line = line.ok()?;
            let number = |value: &[u8]| str::from_utf8(value).ok()?.trim().parse::<i32>().ok();
            if let Some(value) = line.strip_prefix(b"State:") {
                state = value.trim_ascii().first().copied();
            } else if let Some(value) = line.strip_prefix(b"TracerPid:") {
                tracer = number(value);
            } else if let Some(value) = line.strip_prefix(b"NSsid:") {
                session = number(value);
            } else if let Some(value) = line.strip_prefix(b"Threads:") {
                let threads = number(value)?.try_into().ok()?;
                let (session, state) = (session?, state?);
                return Some(Self {
                    session,
                    tracer: tracer?,
                    state,
                    threads,
                });
            }
        }
        None
    }

    fn is_dead(&self) -> bool {
        matches!(self.state, b'Z' | b'X') && self.threads <= 1
    }
}

/// Stops what `find` finds among all processes, until it finds no more. `group` was stopped before.
fn stop_all(
    doomed: &mut Doomed,
    group: Option<i32>,
    deadline: Time,
    mut find: impl FnMut() -> nix::Result<(Vec<Process>, Vec<Process>)>,
) -> nix::Result<()> {
    // Whether nobody could have started a process since the last look.
    let mut were_still = false;
    loop {
        let (processes, found) = find()?;
        let mut grown = false;
        for process in found.into_iter().take_while(|_| Time::now() < deadline) {
            grown |= doomed.stop(process.instance);
        }
        let nothing = doomed.in_order.is_empty() && group.is_none();
        if nothing || (were_still && !grown) || Time::now() >= deadline {
            return Ok(());
        }
        let are_still = processes
            .iter()
            .filter(|p| doomed.all.contains(&p.instance) || Some(p.group) == group)
            .all(Process::is_still);
        were_still = are_still && !grown;
        if !were_still {
            std::thread::sleep(PAUSE);
        }
    }
}

/// What is going to be killed.
#[derive(Default)]
struct Doomed {
    all: HashSet<Instance>,
    /// The same, each after its parent.
    in_order: Vec<Instance>,
}

impl Doomed {
    /// `true`: it was not stopped before.
    fn stop(&mut self, instance: Instance) -> bool {
        if self.all.contains(&instance) || signal(instance, libc::SIGSTOP).is_err() {
            return false;
        }
        self.all.insert(instance);
        self.in_order.push(instance);
        true
    }

    /// Returns how many there were left to kill.
    fn kill(&self, deadline: Time) -> u32 {
        let mut killed = 0;
        // Children first: the kernel continues a stopped process group, and hangs up on it, when its
        // last parent outside of it dies.
        let doomed = self.in_order.iter().rev();
        for instance in doomed.take_while(|_| Time::now() < deadline) {
            if signal(*instance, libc::SIGKILL).is_ok() {
                killed += 1;
            }
        }
        killed
    }

    fn wait(&self, deadline: Time) {
        for instance in &self.in_order {
            while Time::now() < deadline && lives(*instance) {
                std::thread::sleep(PAUSE);
            }
        }
    }
}

fn spared<'a>(turn: &Turn, is_named: &'a dyn Fn(i32) -> bool, deadline: Time) -> Spared<'a> {
    Spared::new((!turn.spare.is_empty()).then_some(is_named), deadline)
}

fn in_foreground(
    processes: &[Process],
    agent: Instance,
    turn: &Turn,
    spared: &mut Spared<'_>,
) -> Vec<Process> {
    let mut is_spared = |process: &Process| spared.contains(process.instance);
    foreground(processes, agent, tick(turn.since), &mut is_spared)
}

/// Every process of the VM that there is time for, and before all others `agent`. One that comes or goes
/// meanwhile may or may not be there.
fn processes(agent: i32, deadline: Time) -> nix::Result<Vec<Process>> {
    let others = limits::pids()?
        .filter(|pid| *pid != agent)
        .take_while(|_| Time::now() < deadline);
    let pids = iter::once(agent).chain(others);
    Ok(pids.filter_map(process).collect())
}

fn process(pid: i32) -> Option<Process> {
    read_stat(File::open(format!("/proc/{pid}/stat")).ok()?)
}

fn read_stat(mut file: File) -> Option<Process> {
    // All fields that we look at are in the first kilobyte. procfs writes it in one go.
    let mut stat = [0; 1024];
    let length = file.read(&mut stat).ok()?;
    Process::parse(&stat[..length])
}

/// The process's directory in /proc, if it still is that process; the directory stays its own.
fn find(instance: Instance) -> nix::Result<OwnedFd> {
    let flags = OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let path = format!("/proc/{}", instance.pid);
    let directory = open(path.as_str(), flags, Mode::empty())?;
    let stat = openat(&directory, "stat", OFlag::O_CLOEXEC, Mode::empty())?;
    match read_stat(File::from(stat)) {
        Some(process) if process.instance == instance && !process.is_dead() => Ok(directory),
        _ => Err(Errno::ESRCH),
    }
}

fn lives(instance: Instance) -> bool {
    find(instance).is_ok()
}

/// Signals exactly this process: never another one that has got its number.
fn signal(instance: Instance, signal: i32) -> nix::Result<()> {
    send(&find(instance)?, signal)
}

fn send(directory: &OwnedFd, signal: i32) -> nix::Result<()> {
    // SAFETY: integers, and no siginfo. A directory in /proc serves as pidfd (pidfd_send_signal(2)).
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            directory.as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    Errno::result(result).map(drop)
}

fn signal_group(group: Option<i32>, signal: i32) {
    if let Some(group) = group {
        // SAFETY: integers; a group that is gone is no failure.
        unsafe { libc::kill(-group, signal) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(state: char, threads: u32) -> Status {
        let text = format!(
            "Name:\tState: x\nState:\t{state} (what it is)\nPid:\t7\nTracerPid:\t0\nNSsid:\t6\nVmRSS:\t1 kB\nThreads:\t{threads}\n"
        );
        Status::read(text.as_bytes()).expect("valid")
    }

    #[test]
    fn when_there_is_no_time_left_nobody_but_the_agent_is_looked_at() {
        let own = std::process::id().cast_signed();
        let pids = |deadline| {
            let found = processes(own, deadline).expect("processes");
            found.iter().map(|p| p.instance.pid).collect::<Vec<_>>()
        };
        assert_eq!(pids(Time::now()), [own]);
        assert!(pids(Time::now() + Duration::from_hours(1)).len() > 1);
        // SAFETY: an integer.
        let session = unsafe { libc::getsid(0) };
        let count = |deadline| members(session, deadline).expect("processes").count();
        assert_eq!(count(Time::now()), 0);
        assert_ne!(count(Time::now() + Duration::from_hours(1)), 0);
    }

    #[test]
    fn what_has_lost_its_first_thread_alone_is_alive() {
        assert_eq!(status('S', 3).session, 6);
        assert!(!status('Z', 3).is_dead());
        assert!(status('Z', 1).is_dead());
        assert!(!status('D', 1).is_dead());
    }
}
