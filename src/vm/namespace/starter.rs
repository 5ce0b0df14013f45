//! Starting PID 1 in fresh namespaces, without ever copying this process's memory.

use std::ffi::{CStr, c_int, c_void};
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::PermissionsExt;
use std::sync::{Once, OnceLock, mpsc};
use std::{io, ptr, thread};

use agentvm_guest::protocol::CONTROL_FD;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::Signal;
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::{ResUid, Uid, getresuid};
use tokio::sync::oneshot;

use super::ids::IdMap;

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

/// Starts a guest, in a thread for the life of the process: it has a keyring of its own, and is somebody
/// else for a moment each time. PID 1 learns of this process's death through its control socket.
pub(super) async fn start(ids: IdMap) -> Result<Started, StartError> {
    let namespaces = NAMESPACES;
    #[cfg(feature = "weaken")]
    let namespaces = super::weaken::namespaces(namespaces);
    start_in(namespaces, ids.namespace_owner()).await
}

/// Starts one that is only to hold a user namespace open, until it is dropped.
pub(super) async fn start_holder() -> Result<Started, StartError> {
    start_in(libc::CLONE_NEWUSER, None).await
}

async fn start_in(namespaces: c_int, owner: Option<u32>) -> Result<Started, StartError> {
    static THREAD: OnceLock<Option<mpsc::Sender<Job>>> = OnceLock::new();
    let sender = THREAD.get_or_init(|| {
        let (sender, jobs) = mpsc::channel::<Job>();
        thread::Builder::new()
            .name("agentvm-starter".to_owned())
            .spawn(move || {
                leave_session_keyring();
                for Job {
                    namespaces,
                    owner,
                    reply,
                } in jobs
                {
                    // A caller that has gone away leaves it to be dropped.
                    drop(reply.send(start_here(namespaces, owner)));
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
    let job = Job {
        namespaces,
        owner,
        reply,
    };
    match sender {
        Some(sender) if sender.send(job).is_ok() => started.await.unwrap_or(Err(no_thread)),
        _ => Err(no_thread),
    }
}

/// What this thread starts is not to have the keys of whoever started the host process: all VMs get one
/// new keyring, which stays empty, as nobody in a VM can use keys. (One for each VM would be taken from
/// the 200 that the kernel lets an ordinary user have, for logins too.)
fn leave_session_keyring() {
    const KEYCTL_JOIN_SESSION_KEYRING: c_int = 1;
    #[cfg(feature = "weaken")]
    if super::weaken::without()
        .iter()
        .any(|layer| layer == "keyring")
    {
        return;
    }
    let no_name = ptr::null::<libc::c_char>();
    // SAFETY: an integer, and a null pointer for a keyring that has no name.
    let joined = unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, no_name) };
    if let Err(errno) = Errno::result(joined) {
        // A kernel without keys, or a container that may not use them: there is nothing to leave.
        tracing::debug!(%errno, "VMs keep the session keyring");
    }
}

struct Job {
    namespaces: c_int,
    /// Who of the host is to own the user namespace. `None`: whoever this process is.
    owner: Option<u32>,
    reply: oneshot::Sender<Result<Started, StartError>>,
}

fn start_here(namespaces: c_int, owner: Option<u32>) -> Result<Started, StartError> {
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
    // A signal handler of this process must not run in the child, which shares its memory. Nor is what
    // the C library sends to all threads, when a program drops root, to meet a thread that is somebody
    // else for the moment.
    let signals = AllSignals::block().map_err(at("sigprocmask"))?;
    let acting = owner.and_then(ActingAs::owner);
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
    drop(acting);
    drop(signals);
    let pid = pid.map_err(at("clone with new namespaces"))?;
    // SAFETY: the kernel has just returned this descriptor.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
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

/// This thread handles no signal, not even those that the C library keeps for itself.
struct AllSignals {
    /// The kernel's `sigset_t`.
    before: u64,
}

impl AllSignals {
    fn block() -> Result<Self, Errno> {
        let mut before = 0_u64;
        Self::set(u64::MAX, &raw mut before)?;
        Ok(Self { before })
    }

    fn set(mask: u64, before: *mut u64) -> Result<(), Errno> {
        // SAFETY: two sets of the size that is passed, or a null pointer for the old one.
        let set = unsafe {
            libc::syscall(
                libc::SYS_rt_sigprocmask,
                libc::SIG_SETMASK,
                &raw const mask,
                before,
                size_of::<u64>(),
            )
        };
        Errno::result(set).map(drop)
    }
}

impl Drop for AllSignals {
    fn drop(&mut self) {
        // It worked with a valid set before.
        let _ = Self::set(self.before, ptr::null_mut());
    }
}

/// This thread as another user, with the capabilities of root. What a VM has of the kernel's things that
/// are counted for each user (inotify instances, for one) is counted for the owner of its user namespace,
/// too: as root, a VM could take all that the host's root may have.
struct ActingAs {
    before: ResUid,
    securebits: c_int,
    dumpable: c_int,
}

impl ActingAs {
    /// `None`: the kernel refused it, and what the VM has is counted for root, as `doctor` tells.
    fn owner(uid: u32) -> Option<Self> {
        #[cfg(feature = "weaken")]
        if super::weaken::without()
            .iter()
            .any(|layer| layer == "owner")
        {
            return None;
        }
        // SAFETY: integers only; all three concern this thread, or what it reads of the process.
        let (securebits, dumpable) = unsafe {
            (
                libc::prctl(libc::PR_GET_SECUREBITS),
                libc::prctl(libc::PR_GET_DUMPABLE),
            )
        };
        let before = getresuid().ok()?; // It can't fail.
        // From here on, whatever fails is undone.
        let acting = Self {
            before,
            securebits,
            dumpable,
        };
        let kept = Errno::result(securebits)
            .and_then(|bits| set_securebits(bits | libc::SECBIT_NO_SETUID_FIXUP))
            .and_then(|()| set_thread_uids([uid; 3]));
        match kept {
            Ok(()) => Some(acting),
            Err(errno) => {
                static TOLD: Once = Once::new();
                TOLD.call_once(|| tracing::warn!(%errno, "what VMs have is counted for root"));
                None
            }
        }
    }
}

impl Drop for ActingAs {
    fn drop(&mut self) {
        // Its capabilities allow it to become anyone.
        let ResUid {
            real,
            effective,
            saved,
        } = self.before;
        let back = set_thread_uids([real, effective, saved].map(Uid::as_raw))
            .and_then(|()| set_securebits(self.securebits));
        if let Err(errno) = back {
            tracing::error!(%errno, "the thread that starts VMs is not root any more");
        }
        // The kernel takes it from the whole process whenever a thread of it changes its user.
        if self.dumpable == 1 {
            // SAFETY: integers only.
            unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 1, 0, 0, 0) };
        }
    }
}

fn set_securebits(bits: c_int) -> Result<(), Errno> {
    // SAFETY: integers only.
    Errno::result(unsafe { libc::prctl(libc::PR_SET_SECUREBITS, bits, 0, 0, 0) }).map(drop)
}

/// Of this thread alone: the C library's function would change all.
fn set_thread_uids([real, effective, saved]: [u32; 3]) -> Result<(), Errno> {
    // SAFETY: integers only.
    Errno::result(unsafe { libc::syscall(libc::SYS_setresuid, real, effective, saved) }).map(drop)
}

/// Kills a guest, and with it everything in its VM.
pub(super) fn kill(pidfd: &OwnedFd) {
    // SAFETY: integers, and a null info pointer. One that has exited is no error that matters.
    unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            libc::SIGKILL,
            ptr::null::<libc::siginfo_t>(),
            0,
        );
    }
}

/// Collects a guest that has exited, and returns whether it was killed. `__WALL`: it has no exit signal.
pub(super) fn reap(pidfd: &OwnedFd) -> bool {
    let status = waitid(
        Id::PIDFd(pidfd.as_fd()),
        WaitPidFlag::WEXITED | WaitPidFlag::__WALL,
    );
    matches!(status, Ok(WaitStatus::Signaled(_, Signal::SIGKILL, _)))
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
