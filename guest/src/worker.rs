//! Processes of PID 1's own that do what may take long: it never waits for a directory of 100,000 files.
//!
//! A worker has nothing but what it writes to, and PID 1's memory as it was. Its uid stays PID 1's, so
//! that no program of the VM can trace one that acts as `user`, and none can signal it where they have
//! other uids; its file system ids are the caller's. Where all have one uid, a program may stop a worker:
//! PID 1 kills one that is stopped, so that its caller hears of it. Of one that writes to a pipe, who reads
//! decides how fast it goes, and ends it by closing the other end.

use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use agentvm_guest::protocol::files::{FileKind, Record, framed};
use agentvm_guest::protocol::{Account, Bytes};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::files;

/// Where an operation failed, relative to its own path, and how.
pub(crate) struct Failure {
    pub(crate) path: Bytes,
    pub(crate) errno: Errno,
    /// What is there, if it failed for that.
    pub(crate) found: Option<FileKind>,
}

pub(crate) type Outcome = Result<(), Failure>;

impl From<Errno> for Failure {
    fn from(errno: Errno) -> Self {
        Self {
            path: Bytes::new(),
            errno,
            found: None,
        }
    }
}

/// What a worker has to tell.
pub(crate) struct Output {
    pipe: OwnedFd,
    waiting: Vec<u8>,
}

/// Written at once: as much as a pipe holds.
const CHUNK: usize = 64 * 1024;

impl Output {
    pub(crate) const fn new(pipe: OwnedFd) -> Self {
        Self {
            pipe,
            waiting: Vec::new(),
        }
    }

    /// Says it, by and by. Nobody is there to hear of a failure: the worker ends.
    pub(crate) fn say(&mut self, record: &Record) -> Outcome {
        let framed = framed(record).ok_or(Errno::ENAMETOOLONG)?;
        self.waiting.extend_from_slice(&framed);
        if self.waiting.len() >= CHUNK {
            self.flush();
        }
        Ok(())
    }

    pub(crate) fn flush(&mut self) {
        let mut rest = &self.waiting[..];
        while !rest.is_empty() {
            match nix::unistd::write(&self.pipe, rest) {
                Ok(length) => rest = rest.get(length..).unwrap_or_default(),
                Err(Errno::EINTR) => {}
                Err(_) => end(),
            }
        }
        self.waiting.clear();
    }

    /// Ends the worker if nobody waits for it any more.
    pub(crate) fn check(&self) {
        // A pipe without a reader is always reported.
        let mut pipe = [PollFd::new(self.pipe.as_fd(), PollFlags::empty())];
        if poll(&mut pipe, PollTimeout::ZERO).is_ok_and(|ready| ready > 0) {
            end();
        }
    }

    /// Waits until `input` can be read: `false` after so many milliseconds.
    pub(crate) fn wait_for(&self, input: &OwnedFd, timeout: PollTimeout) -> bool {
        let mut ready = [
            PollFd::new(input.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.pipe.as_fd(), PollFlags::empty()),
        ];
        loop {
            match poll(&mut ready, timeout) {
                Ok(0) => return false,
                Ok(_) if ready[1].any().unwrap_or(true) => end(),
                Ok(_) => return true,
                Err(Errno::EINTR) => {}
                Err(_) => end(),
            }
        }
    }
}

/// Starts a worker that tells of files in a pipe. Its pid.
pub(crate) fn start(
    pipe: OwnedFd,
    user: Account,
    run: &dyn Fn(&mut Output) -> Outcome,
) -> nix::Result<i32> {
    let Some(worker) = fork()? else {
        begin(c"agentvm-files", pipe.as_fd());
        work(pipe, user, run);
        end()
    };
    Ok(worker)
}

/// Starts one that writes to `kept` what it has to tell, if it can in so many seconds. Its pid.
pub(crate) fn start_with(
    kept: BorrowedFd,
    seconds: u32,
    run: &dyn Fn() -> nix::Result<()>,
) -> nix::Result<i32> {
    let Some(worker) = fork()? else {
        begin(c"agentvm-list", kept);
        // SAFETY: nothing handles SIGALRM, which ends this process.
        unsafe { libc::alarm(seconds) };
        if run().is_err() {
            fail()
        }
        end()
    };
    Ok(worker)
}

/// A child that PID 1 reaps like any other; `None` in the child itself.
fn fork() -> nix::Result<Option<i32>> {
    // SAFETY: PID 1 has one thread, so that the child may do whatever its parent may.
    let child = Errno::result(unsafe { libc::fork() })?;
    Ok((child != 0).then_some(child))
}

fn begin(name: &CStr, kept: BorrowedFd) {
    if keep_only(kept).is_err() || nix::sys::prctl::set_name(name).is_err() {
        fail()
    }
}

fn work(pipe: OwnedFd, user: Account, run: &dyn Fn(&mut Output) -> Outcome) {
    let mut output = Output::new(pipe);
    let outcome = files::act_as(user)
        .map_err(Failure::from)
        .and_then(|()| run(&mut output));
    let last = match outcome {
        Ok(()) => Record::Done,
        Err(Failure {
            mut path,
            errno,
            found,
        }) => {
            path.truncate(libc::PATH_MAX as usize);
            let errno = errno as i32;
            Record::Failed { path, errno, found }
        }
    };
    if output.say(&last).is_ok() {
        output.flush();
    }
}

/// The VM's lock among others is not for workers.
fn keep_only(kept: BorrowedFd) -> nix::Result<()> {
    let kept = kept.as_raw_fd().cast_unsigned();
    let close = |first: u32, last: u32| {
        if first > last {
            return Ok(());
        }
        // SAFETY: nothing of this process uses a descriptor that it inherited, but this one.
        let closed = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
        Errno::result(closed).map(drop)
    };
    if kept > 3 {
        // Standard streams, whatever they are, keep their numbers.
        close(3, kept - 1)?;
    }
    close(kept + 1, u32::MAX)
}

fn end() -> ! {
    // SAFETY: ends this process, and runs nothing of its parent's.
    unsafe { libc::_exit(0) }
}

fn fail() -> ! {
    // SAFETY: see above.
    unsafe { libc::_exit(1) }
}
