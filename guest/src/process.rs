//! Starting a program.
//!
//! The child is a copy of this small process, not one that shares its memory (vfork): then PID 1 would have
//! to sleep until it has exec'ed, and whoever has its user id can stop it before that, for ever.

use std::ffi::{CString, c_char};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::ptr;

use agentvm_guest::protocol::{Account, Bytes, FailedAt, USER_ID};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::setid;

/// How often it is looked whether somebody has stopped a child that has not exec'ed yet.
const LOOK_MS: u16 = 50;

/// A program to start; everything is laid out before the child exists, which must not allocate.
pub(crate) struct Launch {
    /// Where the program may be, in the order of PATH.
    candidates: Vec<CString>,
    argv: Vec<CString>,
    env: Vec<CString>,
    cwd: CString,
    user: Account,
    stdio: [OwnedFd; 3],
    /// Its stdin is the terminal that controls its session.
    has_terminal: bool,
}

#[derive(Debug)]
pub(crate) struct SpawnError {
    pub(crate) errno: Errno,
    pub(crate) at: FailedAt,
}

impl From<Errno> for SpawnError {
    fn from(errno: Errno) -> Self {
        Self {
            errno,
            at: FailedAt::Operation,
        }
    }
}

impl Launch {
    pub(crate) fn new(
        argv: Vec<Bytes>,
        env: Vec<Bytes>,
        cwd: Bytes,
        user: Account,
        stdio: [OwnedFd; 3],
    ) -> Result<Self, SpawnError> {
        let program = argv.first().ok_or(Errno::EINVAL)?;
        let candidates = strings(candidates(program, &env))?;
        Ok(Self {
            candidates,
            argv: strings(argv)?,
            env: strings(env)?,
            cwd: CString::new(cwd).map_err(|_| Errno::EINVAL)?,
            user,
            stdio,
            has_terminal: false,
        })
    }

    /// Makes its stdin, a terminal, the one that controls its session.
    pub(crate) const fn control_terminal(&mut self) {
        self.has_terminal = true;
    }

    /// Starts it as leader of a session and process group of its own.
    pub(crate) fn start(&self) -> Result<i32, SpawnError> {
        let argv = pointers(&self.argv);
        let env = pointers(&self.env);
        let child = Child {
            launch: self,
            argv: argv.as_ptr(),
            env: env.as_ptr(),
            stdio: [0, 1, 2].map(|i: usize| self.stdio[i].as_raw_fd()),
            id: nix::unistd::geteuid().is_root().then_some(match self.user {
                Account::User => USER_ID,
                Account::Root => 0,
            }),
        };
        // Closed by a successful exec.
        let (failure, report) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
        // SAFETY: this process has one thread, and the child only makes system calls.
        match Errno::result(unsafe { libc::fork() })? {
            0 => {
                // SAFETY: all pointers are of `child`.
                let (errno, at) = unsafe { become_program(&child) };
                let text = [errno, i32::from(at == FailedAt::Cwd)].map(i32::to_ne_bytes);
                let _ = nix::unistd::write(&report, text.as_flattened());
                // SAFETY: no handler of this process runs.
                unsafe { libc::_exit(127) }
            }
            pid => {
                drop(report);
                let started = begun(pid, &failure);
                if started.is_err() {
                    // It never became a program: nobody else must hear of it.
                    let _ = nix::sys::wait::waitpid(Pid::from_raw(pid), None);
                }
                started.map(|()| pid)
            }
        }
    }
}

/// Waits until a child has exec'ed, and kills one that somebody has stopped before.
fn begun(pid: i32, failure: &OwnedFd) -> Result<(), SpawnError> {
    loop {
        let mut polled = [PollFd::new(failure.as_fd(), PollFlags::POLLIN)];
        match poll(&mut polled, LOOK_MS) {
            Ok(0) if is_stopped(pid) => {
                kill(Pid::from_raw(pid), Signal::SIGKILL)?;
                return Err(Errno::EINTR.into());
            }
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => break,
            Err(errno) => return Err(errno.into()),
        }
    }
    let mut text = [[0; 4]; 2];
    match nix::unistd::read(failure, text.as_flattened_mut())? {
        8 => {
            let [errno, at_cwd] = text.map(i32::from_ne_bytes);
            Err(SpawnError {
                errno: Errno::from_raw(errno),
                at: if at_cwd == 0 {
                    FailedAt::Operation
                } else {
                    FailedAt::Cwd
                },
            })
        }
        _ => Ok(()),
    }
}

fn is_stopped(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit_once(") ").map_or("", |(_, after)| after);
    state.starts_with(['T', 't'])
}

struct Child<'a> {
    launch: &'a Launch,
    argv: *const *const c_char,
    env: *const *const c_char,
    stdio: [RawFd; 3],
    /// Whose program it is, where PID 1 may decide.
    id: Option<u32>,
}

/// Returns only if it failed.
///
/// # Safety
/// `child.argv` and `child.env` are null-terminated arrays of C strings.
unsafe fn become_program(child: &Child<'_>) -> (i32, FailedAt) {
    let failed = |at| (Errno::last_raw(), at);
    // SAFETY: system calls on integers and on strings of `child`, in a process of our own.
    unsafe {
        libc::setsid();
        for (target, &source) in (0..).zip(&child.stdio) {
            if libc::dup2(source, target) < 0 {
                return failed(FailedAt::Operation);
            }
        }
        if child.launch.has_terminal && libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
            return failed(FailedAt::Operation);
        }
        // This process blocks what it reads from its signalfd.
        let mut none = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, ptr::null_mut());
        // PID 1's real uid is not root's either.
        if let Some(id) = child.id
            && (libc::setgroups(0, ptr::null()) < 0
                || libc::setresgid(id, id, id) < 0
                || libc::setresuid(id, id, id) < 0)
        {
            return failed(FailedAt::Operation);
        }
        if child.id.is_some() && libc::prctl(libc::PR_SET_DUMPABLE, 0) < 0 {
            // That is a copy of PID 1's memory, and not its user's to read.
            return failed(FailedAt::Operation);
        }
        crate::limits::restrict_child();
        if setid::apply().is_err() {
            return failed(FailedAt::Operation);
        }
        if libc::chdir(child.launch.cwd.as_ptr()) < 0 {
            return failed(FailedAt::Cwd);
        }
        // As a shell does: go on past what is not there; remember a program that may not be run.
        let mut result = libc::ENOENT;
        for candidate in &child.launch.candidates {
            libc::execve(candidate.as_ptr(), child.argv, child.env);
            match Errno::last_raw() {
                libc::ENOENT | libc::ENOTDIR => {}
                libc::EACCES => result = libc::EACCES,
                errno => return (errno, FailedAt::Operation),
            }
        }
        (result, FailedAt::Operation)
    }
}

/// A name without a slash is looked up in the PATH that the program will have.
fn candidates(program: &[u8], env: &[Bytes]) -> Vec<Bytes> {
    if program.contains(&b'/') {
        return vec![program.to_vec()];
    }
    let path = env
        .iter()
        .find_map(|variable| variable.strip_prefix(b"PATH="))
        .unwrap_or(b"/usr/local/bin:/usr/bin:/bin");
    path.split(|byte| *byte == b':')
        .filter(|directory| !directory.is_empty())
        .map(|directory| [directory, b"/", program].concat())
        .collect()
}

fn strings(bytes: Vec<Bytes>) -> nix::Result<Vec<CString>> {
    bytes
        .into_iter()
        .map(|bytes| CString::new(bytes).map_err(|_| Errno::EINVAL))
        .collect()
}

fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings
        .iter()
        .map(|string| string.as_ptr())
        .chain([ptr::null()])
        .collect()
}
