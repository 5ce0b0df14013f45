//! Starting a program.
//!
//! The child is a copy of this small process, not one that shares its memory (vfork): then PID 1 would have
//! to sleep until it has exec'ed. That may take long: whoever has its user id can stop it before that, and
//! the start of a program waits for locks of the files that it maps.

use std::ffi::{CString, c_char};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::ptr;

use agentvm_guest::protocol::{Account, Bytes, FailedAt, USER_ID};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::setid;

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
    pub(crate) fn start(&self) -> Result<Starting, SpawnError> {
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
                let (errno, at) = unsafe { become_program(&child, report.as_raw_fd()) };
                let text = [errno, i32::from(at == FailedAt::Cwd)].map(i32::to_ne_bytes);
                let _ = nix::unistd::write(&report, text.as_flattened());
                // SAFETY: no handler of this process runs.
                unsafe { libc::_exit(127) }
            }
            pid => Ok(Starting { pid, failure }),
        }
    }
}

/// A child that may not have exec'ed yet.
pub(crate) struct Starting {
    pub(crate) pid: i32,
    failure: OwnedFd,
}

impl AsFd for Starting {
    /// Can be read when that is over.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.failure.as_fd()
    }
}

impl Starting {
    /// Whether it has exec'ed, or has failed, or is gone.
    pub(crate) fn is_over(&self) -> bool {
        let mut polled = [PollFd::new(self.as_fd(), PollFlags::POLLIN)];
        poll(&mut polled, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    /// Whether it has become the program. To be called when that is over. One that was killed before has.
    pub(crate) fn outcome(&self) -> Result<(), SpawnError> {
        let mut text = [[0; 4]; 2];
        match nix::unistd::read(&self.failure, text.as_flattened_mut())? {
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
unsafe fn become_program(child: &Child<'_>, report: RawFd) -> (i32, FailedAt) {
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
        // What PID 1 has open is not for a child that waits until it may exec: the terminals of others.
        let report = report.cast_unsigned();
        if report > 3 {
            libc::syscall(libc::SYS_close_range, 3, report - 1, 0);
        }
        libc::syscall(libc::SYS_close_range, report + 1, u32::MAX, 0);
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
