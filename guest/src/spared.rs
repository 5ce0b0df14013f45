//! Which processes run a command that the host has named, by their command lines.
//!
//! PID 1 does not read those itself: that waits for a lock of the memory that a process has, and one that
//! maps and unmaps in a loop has it most of the time. A process of its own reads, and of whoever keeps that
//! one waiting it is not known that it is to be spared.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant as Time};

use agentvm_guest::foreground::runs;
use agentvm_guest::protocol::{Bytes, Instance};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};
use nix::unistd::Pid;

use crate::processes::PATIENCE;
use crate::worker;

/// For one command line.
const FOR_ONE: Duration = Duration::from_millis(250);

/// Of a command line; one that is longer is none that the host has named.
const MAX_CMDLINE: u64 = 128 * 1024;

/// The processes that are to be spared.
pub(crate) struct Spared<'a> {
    /// Whether a process is one of them: asked in the reader. `None`: there are none.
    is_named: Option<&'a dyn Fn(i32) -> bool>,
    deadline: Time,
    known: HashMap<Instance, bool>,
    reader: Option<Reader>,
}

/// Whether a process runs one of these.
pub(crate) fn runs_one_of(commands: &[Vec<Bytes>], pid: i32) -> bool {
    let cmdline = cmdline(pid);
    commands.iter().any(|argv| runs(&cmdline, argv))
}

fn cmdline(pid: i32) -> Vec<u8> {
    let mut cmdline = Vec::new();
    if let Ok(file) = File::open(format!("/proc/{pid}/cmdline"))
        && file.take(MAX_CMDLINE).read_to_end(&mut cmdline).is_err()
    {
        cmdline.clear();
    }
    cmdline
}

impl<'a> Spared<'a> {
    pub(crate) fn new(is_named: Option<&'a dyn Fn(i32) -> bool>, deadline: Time) -> Self {
        Self {
            is_named,
            deadline,
            known: HashMap::new(),
            reader: None,
        }
    }

    pub(crate) fn contains(&mut self, process: Instance) -> bool {
        let Some(is_named) = self.is_named else {
            return false;
        };
        if let Some(known) = self.known.get(&process) {
            return *known;
        }
        let answer = self.ask(is_named, process.pid);
        if answer.is_err() {
            // It may still answer this question when it is asked the next one.
            self.reader = None;
        }
        let is_spared = answer.unwrap_or(false);
        self.known.insert(process, is_spared);
        is_spared
    }

    fn ask(&mut self, is_named: &dyn Fn(i32) -> bool, pid: i32) -> nix::Result<bool> {
        let left = self.deadline.saturating_duration_since(Time::now());
        if left.is_zero() {
            return Err(Errno::ETIMEDOUT);
        }
        if self.reader.is_none() {
            self.reader = Some(Reader::start(is_named)?);
        }
        let reader = self.reader.as_ref().ok_or(Errno::ESRCH)?;
        reader.ask(pid, left.min(FOR_ONE))
    }
}

/// A process that reads, until it is let go.
struct Reader {
    pid: i32,
    socket: OwnedFd,
}

impl Reader {
    fn start(is_named: &dyn Fn(i32) -> bool) -> nix::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let (socket, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
        let pid = worker::start_with(theirs.as_fd(), PATIENCE, &|| {
            let mut pid = [0; 4];
            while recv(theirs.as_raw_fd(), &mut pid, MsgFlags::empty())? == pid.len() {
                let answer = [u8::from(is_named(i32::from_ne_bytes(pid)))];
                send(theirs.as_raw_fd(), &answer, MsgFlags::MSG_NOSIGNAL)?;
            }
            Ok(())
        })?;
        Ok(Self { pid, socket })
    }

    fn ask(&self, pid: i32, patience: Duration) -> nix::Result<bool> {
        let socket = self.socket.as_raw_fd();
        send(socket, &pid.to_ne_bytes(), MsgFlags::MSG_NOSIGNAL)?;
        let mut ready = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
        let patience = PollTimeout::try_from(patience).map_err(|_| Errno::EINVAL)?;
        if poll(&mut ready, patience)? == 0 {
            return Err(Errno::ETIMEDOUT);
        }
        let mut answer = [0];
        match recv(socket, &mut answer, MsgFlags::MSG_DONTWAIT)? {
            1 => Ok(answer == [1]),
            _ => Err(Errno::ESRCH),
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        // A child that PID 1 has not reaped, and will like any other.
        let _ = kill(Pid::from_raw(self.pid), Signal::SIGKILL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(pid: i32) -> Instance {
        Instance { pid, started: 0 }
    }

    fn later() -> Time {
        Time::now() + Duration::from_hours(1)
    }

    #[test]
    fn who_keeps_its_reader_waiting_is_not_spared_and_the_next_one_is_looked_at() {
        let is_named = |pid| {
            if pid == 7 {
                // SAFETY: waits for a signal, which is the end of the reader.
                unsafe { libc::pause() };
            }
            pid != 8
        };
        let mut spared = Spared::new(Some(&is_named), later());
        assert!(!spared.contains(process(7)));
        assert!(!spared.contains(process(8)));
        assert!(spared.contains(process(9)));
    }

    #[test]
    fn a_process_is_told_by_its_command_line() {
        let own = std::process::id().cast_signed();
        let command: Vec<Bytes> = std::env::args().map(String::into_bytes).collect();
        for (commands, expected) in [
            (vec![command], true),
            (vec![vec![b"another".to_vec()]], false),
        ] {
            let is_named = |pid| runs_one_of(&commands, pid);
            let mut spared = Spared::new(Some(&is_named), later());
            assert_eq!(spared.contains(process(own)), expected);
        }
    }

    #[test]
    fn when_there_is_no_time_left_nobody_is_spared() {
        let mut spared = Spared::new(Some(&|_| true), Time::now());
        assert!(!spared.contains(process(7)));
    }
}
