//! Starting PID 1 in fresh namespaces, without ever copying this process's memory.

use std::ffi::{CStr, c_int, c_void};
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::PermissionsExt;
use std::sync::{OnceLock, mpsc};
use std::{io, ptr, thread};

use agentvm_guest::protocol::CONTROL_FD;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{SigSet, SigmaskHow, pthread_sigmask};
use tokio::sync::oneshot;

/// The static PID 1, built by `build.rs`.
static GUEST: &[u8] = include_bytes!(env!("AGENTVM_GUEST"));

const STACK_SIZE: usize = 64 * 1024;

/// Every namespace at once: the user namespace, made first by the kernel, owns all others.
const NAMESPACES: c_int = libc::CLONE_NEWUSER
    | libc::CLONE_NEWNS
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWCGROUP;

/// PID 1 of a VM, waiting for its id maps and its boot message. Dropped, it exits and is reaped.
pub(super) struct Started {
    /// Its pid in this process's namespace, valid as long as it is not reaped.
    pub(super) pid: i32,
    /// A pidfd of it, and this side of the control socket, non-blocking. `None`: taken.
    descriptors: Option<(OwnedFd, OwnedFd)>,
}

impl Started {
    /// The pidfd and the control socket, for somebody who reaps.
    pub(super) fn take(&mut self) -> Option<(OwnedFd, OwnedFd)> {
        self.descriptors.take()
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        if let Some((pidfd, control)) = self.descriptors.take() {
            // It waits for this socket, and exits at once when that closes.
            drop(control);
            reap(&pidfd);
        }
    }
}

/// What the kernel refused: the namespaces, or running the guest in them.
#[derive(Debug)]
pub(super) struct StartError {
    pub(super) step: &'static str,
    pub(super) errno: Errno,
}

/// Starts a guest. PID 1 learns of this process's death also through its control socket; the parent
/// death signal follows the *thread* that started it, hence one thread for the life of the process.
pub(super) async fn start() -> Result<Started, StartError> {
    start_in(NAMESPACES).await
}

/// Starts one that is only to hold a user namespace open, until it is dropped.
pub(super) async fn start_holder() -> Result<Started, StartError> {
    start_in(libc::CLONE_NEWUSER).await
}

async fn start_in(namespaces: c_int) -> Result<Started, StartError> {
    static THREAD: OnceLock<Option<mpsc::Sender<Job>>> = OnceLock::new();
    let sender = THREAD.get_or_init(|| {
        let (sender, jobs) = mpsc::channel::<Job>();
        thread::Builder::new()
            .name("agentvm-starter".to_owned())
            .spawn(move || {
                for (namespaces, reply) in jobs {
                    // A caller that has gone away leaves it to be dropped.
                    drop(reply.send(start_here(namespaces)));
                }
            })
            .ok()
            .map(|_| sender)
    });
    let (reply, started) = oneshot::channel();
    let no_thread = StartError {
        step: "start a thread",
        errno: Errno::EAGAIN,
    };
    match sender {
        Some(sender) if sender.send((namespaces, reply)).is_ok() => {
            started.await.unwrap_or(Err(no_thread))
        }
        _ => Err(no_thread),
    }
}

type Job = (c_int, oneshot::Sender<Result<Started, StartError>>);

fn start_here(namespaces: c_int) -> Result<Started, StartError> {
    let at = |step| move |errno| StartError { step, errno };
    let guest = guest_executable().map_err(|error| StartError {
        step: "make the guest's memfd",
        errno: Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)),
    })?;
    let (control, theirs) = nix::sys::socket::socketpair(
        nix::sys::socket::AddressFamily::Unix,
        nix::sys::socket::SockType::SeqPacket,
        None,
        nix::sys::socket::SockFlag::SOCK_CLOEXEC,
    )
    .map_err(at("socketpair"))?;
    fcntl(&control, FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK)).map_err(at("fcntl"))?;
    let null = File::options()
        .read(true)
        .write(true)
        .open("/dev/null")
        .map_err(|error| StartError {
            step: "open /dev/null",
            errno: Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)),
        })?;
    let mut child = Child {
        guest: guest.as_raw_fd(),
        control: theirs.as_raw_fd(),
        null: null.as_raw_fd(),
        failed: None,
    };
    let mut stack = vec![0_u8; STACK_SIZE];
    let mut pidfd: RawFd = -1;
    // A signal handler of this process must not run in the child, which shares its memory.
    let mut old = SigSet::empty();
    pthread_sigmask(
        SigmaskHow::SIG_SETMASK,
        Some(&SigSet::all()),
        Some(&mut old),
    )
    .map_err(at("sigprocmask"))?;
    // No exit signal: SIGCHLD handlers of the host program (libuv's) are not bothered.
    // SAFETY: with CLONE_VFORK this thread sleeps until the child has exec'ed or exited, so that the
    // stack and `child` outlive its use of them; the child only makes system calls.
    let pid = unsafe {
        libc::clone(
            run_child,
            stack.as_mut_ptr().add(STACK_SIZE).cast(),
            namespaces | libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PIDFD,
            (&raw mut child).cast(),
            &raw mut pidfd,
        )
    };
    let pid = Errno::result(pid);
    let restored = pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&old), None);
    let pid = pid.map_err(at("clone with new namespaces"))?;
    // SAFETY: the kernel has just returned this descriptor.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    restored.map_err(at("sigprocmask"))?;
    match child.failed {
        None => Ok(Started {
            pid,
            descriptors: Some((pidfd, control)),
        }),
        Some((step, errno)) => {
            reap(&pidfd);
            Err(StartError {
                step,
                errno: Errno::from_raw(errno),
            })
        }
    }
}

/// Collects a guest that has exited. `__WALL`: it has no exit signal.
pub(super) fn reap(pidfd: &OwnedFd) {
    // SAFETY: waitid writes nothing with a null info pointer.
    unsafe {
        libc::waitid(
            libc::P_PIDFD,
            pidfd.as_raw_fd().cast_unsigned(),
            ptr::null_mut(),
            libc::WEXITED | libc::__WALL,
        );
    }
}

/// A sealed memfd: nothing in a VM, nor a mistake in this process, can change what PID 1 runs.
fn guest_executable() -> io::Result<&'static OwnedFd> {
    static EXECUTABLE: OnceLock<OwnedFd> = OnceLock::new();
    if let Some(executable) = EXECUTABLE.get() {
        return Ok(executable);
    }
    let mut file = File::from(memfd_create(
        c"agentvm-guest",
        MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING,
    )?);
    file.write_all(GUEST)?;
    file.set_permissions(std::fs::Permissions::from_mode(0o555))?;
    let seals = SealFlag::F_SEAL_WRITE
        | SealFlag::F_SEAL_GROW
        | SealFlag::F_SEAL_SHRINK
        | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(EXECUTABLE.get_or_init(|| file.into()))
}

struct Child {
    guest: RawFd,
    control: RawFd,
    null: RawFd,
    failed: Option<(&'static str, i32)>,
}

/// Runs in the child, on this process's memory: system calls only, no allocation, no panic.
extern "C" fn run_child(argument: *mut c_void) -> c_int {
    // SAFETY: `start_here` passes a Child that lives until we exec or exit.
    let child = unsafe { &mut *argument.cast::<Child>() };
    // SAFETY: see above.
    child.failed = Some(unsafe { become_guest(child) });
    127
}

#[repr(C)]
struct CapabilityHeader {
    version: u32,
    pid: i32,
}

/// Returns only if it failed.
///
/// # Safety
/// To be called in a child that may exec.
unsafe fn become_guest(child: &Child) -> (&'static str, i32) {
    const VERSION_3: u32 = 0x2008_0522;
    let failed = |step| (step, Errno::last_raw());
    let none: *const libc::c_char = ptr::null();
    let (argv, env) = ([c"agentvm-guest".as_ptr(), none], [none]);
    // SAFETY: system calls on integers and on locals of this function.
    unsafe {
        // The id maps do not exist yet (whoever writes them is asleep until we exec), and exec as an
        // unmapped id would lose all capabilities: ambient ones stay.
        let header = CapabilityHeader {
            version: VERSION_3,
            pid: 0,
        };
        let mut sets = [[0_u32; 3]; 2];
        if libc::syscall(libc::SYS_capget, &raw const header, sets.as_mut_ptr()) < 0 {
            return failed("capget");
        }
        for [_, permitted, inheritable] in &mut sets {
            *inheritable = *permitted;
        }
        if libc::syscall(libc::SYS_capset, &raw const header, sets.as_ptr()) < 0 {
            return failed("capset");
        }
        for capability in 0..64_u32 {
            if sets[(capability / 32) as usize][1] & (1 << (capability % 32)) != 0
                && libc::prctl(
                    libc::PR_CAP_AMBIENT,
                    libc::PR_CAP_AMBIENT_RAISE,
                    capability,
                    0,
                    0,
                ) < 0
            {
                return failed("raise ambient capabilities");
            }
        }
        for target in 0..=2 {
            if libc::dup2(child.null, target) < 0 {
                return failed("dup2");
            }
        }
        // Everything of the host process closes at exec, whatever flags its libraries chose; only
        // the control socket stays. (memfd, control and null are above 2: those are open already.)
        if libc::syscall(
            libc::SYS_close_range,
            3,
            u32::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        ) < 0
        {
            return failed("close_range");
        }
        let mut guest = child.guest;
        if guest == CONTROL_FD {
            guest = libc::fcntl(guest, libc::F_DUPFD_CLOEXEC, CONTROL_FD + 1);
        }
        if child.control == CONTROL_FD {
            if libc::fcntl(CONTROL_FD, libc::F_SETFD, 0) < 0 {
                return failed("fcntl");
            }
        } else if libc::dup2(child.control, CONTROL_FD) < 0 {
            return failed("dup2");
        }
        let empty: &CStr = c"";
        libc::syscall(
            libc::SYS_execveat,
            guest,
            empty.as_ptr(),
            argv.as_ptr(),
            env.as_ptr(),
            libc::AT_EMPTY_PATH,
        );
        failed("exec the guest")
    }
}
