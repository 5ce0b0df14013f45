//! Tries system calls in children in fresh namespaces.
//!
//! A child runs on this process's memory while its parent thread sleeps (`CLONE_VM | CLONE_VFORK`): it
//! makes system calls, writes down how they ended, and exits.

use std::ffi::{CStr, CString, c_int, c_long, c_void};
use std::ptr;

use nix::errno::Errno;
use nix::sys::signal::{SigSet, SigmaskHow, pthread_sigmask};
use nix::unistd::{getegid, geteuid};

const STACK_SIZE: usize = 64 * 1024;

/// The kinds of namespaces that a VM has beside its user namespace.
pub(super) const KINDS: [(&str, c_int); 6] = [
    ("mnt", libc::CLONE_NEWNS),
    ("pid", libc::CLONE_NEWPID),
    ("ipc", libc::CLONE_NEWIPC),
    ("uts", libc::CLONE_NEWUTS),
    ("net", libc::CLONE_NEWNET),
    ("cgroup", libc::CLONE_NEWCGROUP),
];

/// What a child tries, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    IdMap,
    PrivateMounts,
    Proc,
    Tmpfs,
    Overlay,
    CloneTree,
    MountAttributes,
    MoveMount,
    PivotRoot,
    Seccomp,
}

const STEPS: usize = Step::Seccomp as usize + 1;

/// How a step ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Attempt {
    Done,
    Failed(Errno),
    /// Something before it has failed.
    Untried,
    /// The child was killed in it, as some filters of containers do.
    Killed,
}

/// What was found.
#[derive(Debug)]
pub(super) struct Outcome {
    /// A user namespace.
    pub(super) user: Result<(), Errno>,
    /// One each of [`KINDS`], in a user namespace.
    pub(super) kinds: [Result<(), Errno>; KINDS.len()],
    steps: [Attempt; STEPS],
}

impl Outcome {
    pub(super) const fn step(&self, step: Step) -> Attempt {
        self.steps[step as usize]
    }
}

/// Blocks for about as long as a boot takes.
pub(super) fn run() -> Outcome {
    let user = child(0, nothing, ptr::null_mut()).map(drop);
    let kinds = KINDS.map(|(_, flag)| child(flag, nothing, ptr::null_mut()).map(drop));
    let (uid, gid) = (geteuid(), getegid());
    let mut sandbox = Sandbox {
        uid_map: map(uid.as_raw()),
        gid_map: map(gid.as_raw()),
        ended: [UNTRIED; STEPS],
    };
    let flags = libc::CLONE_NEWNS | libc::CLONE_NEWPID;
    let started = child(flags, try_all, (&raw mut sandbox).cast());
    let steps = sandbox.ended.map(|ended| match ended {
        UNTRIED => Attempt::Untried,
        BEGUN => Attempt::Killed,
        0 => Attempt::Done,
        errno => Attempt::Failed(Errno::from_raw(errno)),
    });
    if started.is_err() {
        tracing::debug!(?started, "no namespaces to try mounts in");
    }
    Outcome { user, kinds, steps }
}

/// The id itself, as nobody needs privileges for (`user_namespaces(7)`).
fn map(id: u32) -> CString {
    CString::new(format!("1000 {id} 1\n")).unwrap_or_default()
}

const UNTRIED: i32 = -1;
const BEGUN: i32 = -2;

struct Sandbox {
    uid_map: CString,
    gid_map: CString,
    ended: [i32; STEPS],
}

type Body = extern "C" fn(*mut c_void) -> c_int;

extern "C" fn nothing(_: *mut c_void) -> c_int {
    0
}

/// Runs `body` in a child in a user namespace and the namespaces of `flags`, to its end.
fn child(flags: c_int, body: Body, argument: *mut c_void) -> Result<c_int, Errno> {
    let mut stack = vec![0_u8; STACK_SIZE];
    // A signal handler of this process must not run in the child, which shares its memory.
    let mut old = SigSet::empty();
    pthread_sigmask(
        SigmaskHow::SIG_SETMASK,
        Some(&SigSet::all()),
        Some(&mut old),
    )?;
    let flags = libc::CLONE_NEWUSER | libc::CLONE_VM | libc::CLONE_VFORK | flags;
    // SAFETY: with CLONE_VFORK this thread sleeps until the child has exited, so that the stack and the
    // argument outlive its use of them; the child only makes system calls.
    let pid = unsafe {
        libc::clone(
            body,
            stack.as_mut_ptr().add(STACK_SIZE).cast(),
            flags,
            argument,
        )
    };
    let pid = Errno::result(pid);
    pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&old), None)?;
    let mut status = 0;
    // SAFETY: waitpid writes the status. __WALL: the child has no exit signal.
    Errno::result(unsafe { libc::waitpid(pid?, &raw mut status, libc::__WALL) })?;
    Ok(status)
}

/// Where the child mounts: directories that every host has, and that it sees alone.
const PROC: &CStr = c"/proc";
const TMP: &CStr = c"/tmp";

/// Runs in the child, on this process's memory: system calls only, no allocation, no panic.
extern "C" fn try_all(argument: *mut c_void) -> c_int {
    // SAFETY: `run` passes a Sandbox that lives until the child has exited.
    let sandbox = unsafe { &mut *argument.cast::<Sandbox>() };
    let mut attempt = |step: Step, run: &dyn Fn() -> c_long| {
        let Some(ended) = sandbox.ended.get_mut(step as usize) else {
            return false;
        };
        // Read by the parent if a filter kills the child here.
        // SAFETY: a valid reference; volatile because the compiler sees nobody who reads it.
        unsafe { ptr::write_volatile(ended, BEGUN) };
        *ended = if run() < 0 { Errno::last_raw() } else { 0 };
        *ended == 0
    };
    let (uid_map, gid_map) = (&sandbox.uid_map, &sandbox.gid_map);
    // SAFETY: system calls on constants and on what `sandbox` owns.
    let write = |path: &CStr, text: &CStr| unsafe {
        let file = libc::open(path.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        if file < 0 {
            return -1;
        }
        let written = libc::write(file, text.as_ptr().cast(), text.count_bytes());
        // The error of the write counts; closing this file has none.
        let errno = Errno::last_raw();
        libc::close(file);
        Errno::set_raw(errno);
        written as c_long
    };
    let none = ptr::null::<libc::c_char>();
    let mapped = attempt(Step::IdMap, &|| {
        if write(c"/proc/self/setgroups", c"deny") < 0 || write(c"/proc/self/uid_map", uid_map) < 0
        {
            return -1;
        }
        write(c"/proc/self/gid_map", gid_map)
    });
    let mount = |source: &CStr, target: &CStr, kind: &CStr, flags, data: *const libc::c_char| {
        // SAFETY: strings that outlive the call, or null.
        c_long::from(unsafe {
            libc::mount(
                source.as_ptr(),
                target.as_ptr(),
                kind.as_ptr(),
                flags,
                data.cast(),
            )
        })
    };
    let private = mapped
        && attempt(Step::PrivateMounts, &|| {
            mount(c"none", c"/", c"", libc::MS_REC | libc::MS_PRIVATE, none)
        });
    if private {
        attempt(Step::Proc, &|| {
            let flags = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
            mount(c"proc", PROC, c"proc", flags, none)
        });
        let tmpfs = attempt(Step::Tmpfs, &|| {
            mount(
                c"tmpfs",
                TMP,
                c"tmpfs",
                libc::MS_NOSUID | libc::MS_NODEV,
                none,
            )
        });
        if tmpfs {
            // SAFETY: constants.
            unsafe {
                for directory in [c"/tmp/upper", c"/tmp/work", c"/tmp/merged", c"/tmp/old"] {
                    libc::mkdir(directory.as_ptr(), 0o700);
                }
            }
            attempt(Step::Overlay, &|| {
                let data = c"lowerdir=/usr,upperdir=/tmp/upper,workdir=/tmp/work,userxattr";
                mount(c"overlay", c"/tmp/merged", c"overlay", 0, data.as_ptr())
            });
        }
        try_mount_api(&mut attempt);
        if tmpfs {
            // SAFETY: constants.
            attempt(Step::PivotRoot, &|| unsafe {
                libc::syscall(libc::SYS_pivot_root, TMP.as_ptr(), c"/tmp/old".as_ptr())
            });
        }
    }
    // Last: nothing of it could be undone. A program of one instruction, which allows everything.
    attempt(Step::Seccomp, &allow_everything);
    0
}

fn allow_everything() -> c_long {
    const ALLOW: u32 = 0x7fff_0000;
    const RETURN: u16 = 0x06;
    let mut instruction = libc::sock_filter {
        code: RETURN,
        jt: 0,
        jf: 0,
        k: ALLOW,
    };
    let program = libc::sock_fprog {
        len: 1,
        filter: &raw mut instruction,
    };
    // SAFETY: the kernel copies the program, which outlives the call.
    unsafe {
        if libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0 {
            return -1;
        }
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            0,
            &raw const program,
        )
    }
}

fn try_mount_api(attempt: &mut impl FnMut(Step, &dyn Fn() -> c_long) -> bool) {
    let tree = std::cell::Cell::new(-1);
    // SAFETY: constants.
    let cloned = attempt(Step::CloneTree, &|| unsafe {
        let flags =
            libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | libc::AT_RECURSIVE.cast_unsigned();
        let fd = libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, c"/usr".as_ptr(), flags);
        tree.set(fd);
        fd
    });
    if !cloned {
        return;
    }
    // SAFETY: a descriptor, constants, and a struct whose size is given.
    let changed = attempt(Step::MountAttributes, &|| unsafe {
        let attributes = libc::mount_attr {
            attr_set: libc::MOUNT_ATTR_RDONLY,
            attr_clr: 0,
            propagation: libc::MS_PRIVATE,
            userns_fd: 0,
        };
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.get(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | libc::AT_RECURSIVE,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    });
    if changed {
        // SAFETY: a descriptor and constants.
        attempt(Step::MoveMount, &|| unsafe {
            let flags = libc::MOVE_MOUNT_F_EMPTY_PATH;
            let empty = c"".as_ptr();
            let here = libc::AT_FDCWD;
            libc::syscall(
                libc::SYS_move_mount,
                tree.get(),
                empty,
                here,
                PROC.as_ptr(),
                flags,
            )
        });
    }
    // SAFETY: the descriptor that was opened above. (Without CLONE_FILES it is the child's own.)
    unsafe { libc::syscall(libc::SYS_close, tree.get()) };
}
