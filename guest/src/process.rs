//! Starting a program: a vfork-style child that shares our memory until it execs.

use std::ffi::{CString, c_char, c_int, c_void};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::ptr;

use agentvm_guest::protocol::{Account, Bytes, FailedAt, USER_ID};
use nix::errno::Errno;

use crate::setid;

const STACK_SIZE: usize = 64 * 1024;

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
        let mut child = Child {
            launch: self,
            argv: argv.as_ptr(),
            env: env.as_ptr(),
            stdio: [0, 1, 2].map(|i: usize| self.stdio[i].as_raw_fd()),
            change_ids: self.user == Account::User && nix::unistd::geteuid().is_root(),
            failed: None,
        };
        let mut stack = vec![0_u8; STACK_SIZE];
        // SAFETY: with CLONE_VFORK this thread sleeps until the child has exec'ed or exited, so that
        // the stack, `child` and all it points to outlive the child's use of them; the child only
        // makes system calls.
        let pid = unsafe {
            libc::clone(
                run_child,
                stack.as_mut_ptr().add(STACK_SIZE).cast(),
                libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD,
                (&raw mut child).cast(),
            )
        };
        let pid = Errno::result(pid)?;
        if child.change_ids {
            // The child changed its credentials on our memory, to which 'dumpable' belongs.
            nix::sys::prctl::set_dumpable(false)?;
        }
        match child.failed.take() {
            None => Ok(pid),
            Some((errno, at)) => {
                // It never became a program: nobody else must hear of it.
                let _ = nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(pid), None);
                Err(SpawnError {
                    errno: Errno::from_raw(errno),
                    at,
                })
            }
        }
    }
}

struct Child<'a> {
    launch: &'a Launch,
    argv: *const *const c_char,
    env: *const *const c_char,
    stdio: [RawFd; 3],
    change_ids: bool,
    failed: Option<(i32, FailedAt)>,
}

/// Runs in the child, on our memory: system calls only, no allocation, no panic.
extern "C" fn run_child(argument: *mut c_void) -> c_int {
    // SAFETY: `start` passes a Child that lives until we exec or exit.
    let child = unsafe { &mut *argument.cast::<Child<'_>>() };
    // SAFETY: see the comment of this function; all pointers are of `child`.
    child.failed = Some(unsafe { become_program(child) });
    127
}

/// Returns only if it failed.
///
/// # Safety
/// `child.argv` and `child.env` are null-terminated arrays of C strings.
unsafe fn become_program(child: &Child<'_>) -> (i32, FailedAt) {
    let failed = |at| (Errno::last_raw(), at);
    // SAFETY: system calls on integers and on strings of `child`, in a process of our own; signal
    // dispositions are not shared (no CLONE_SIGHAND).
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
        if child.change_ids
            && (libc::setgroups(0, ptr::null()) < 0
                || libc::setresgid(USER_ID, USER_ID, USER_ID) < 0
                || libc::setresuid(USER_ID, USER_ID, USER_ID) < 0)
        {
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
