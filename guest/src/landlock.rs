//! Landlock (`landlock(7)`), where the kernel has it: a second no, which neither capabilities nor what
//! seccomp lets through can change, to mounts of any kind, which nobody can make who is restricted in
//! anything about files.
//!
//! That is the move of a file to another directory, which is then allowed everywhere. Rules about opening
//! files would be asked at every `open`, and what may be read and written is what is mounted. Device
//! nodes the user namespace refuses, with the error that programs which unpack archives expect.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;

use crate::boot::errno_of;

// `linux/landlock.h`
const REFER: u64 = 1 << 13;
const SCOPE_ABSTRACT_UNIX_SOCKET: u64 = 1 << 0;
const SCOPE_SIGNAL: u64 = 1 << 1;
const CREATE_RULESET_VERSION: u32 = 1;
const RULE_PATH_BENEATH: u32 = 1;

/// Before it, whoever is restricted at all can't move a file to another directory.
const VERSION_WITH_REFER: i64 = 2;
const VERSION_WITH_SCOPES: i64 = 6;

#[repr(C)]
struct Ruleset {
    handled_fs: u64,
    handled_net: u64,
    scoped: u64,
}

#[repr(C, packed)]
struct PathBeneath {
    allowed: u64,
    parent: RawFd,
}

/// Restricts PID 1, and with it everything that it starts, to one domain.
pub(crate) fn restrict() -> nix::Result<()> {
    // SAFETY: a null pointer and integers, which ask for the version.
    let version = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<Ruleset>(),
            0_usize,
            CREATE_RULESET_VERSION,
        )
    };
    if version < VERSION_WITH_REFER {
        return Ok(()); // The kernel has none, or has it switched off: `doctor` says so.
    }
    let scoped = if version < VERSION_WITH_SCOPES {
        0
    } else {
        SCOPE_ABSTRACT_UNIX_SOCKET | SCOPE_SIGNAL
    };
    let ruleset = Ruleset {
        handled_fs: REFER,
        handled_net: 0,
        scoped,
    };
    // SAFETY: the struct outlives the call and its size is given. What an older kernel does not know
    // of it is zero.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            &raw const ruleset,
            size_of::<Ruleset>(),
            0,
        )
    };
    let fd = RawFd::try_from(Errno::result(fd)?).map_err(|_| Errno::EBADF)?;
    // SAFETY: the kernel has just returned this descriptor.
    let ruleset = unsafe { OwnedFd::from_raw_fd(fd) };
    let root = File::open("/").map_err(|error| errno_of(&error))?;
    let everywhere = PathBeneath {
        allowed: REFER,
        parent: root.as_raw_fd(),
    };
    // SAFETY: the struct outlives the call.
    let added = unsafe {
        libc::syscall(
            libc::SYS_landlock_add_rule,
            ruleset.as_raw_fd(),
            RULE_PATH_BENEATH,
            &raw const everywhere,
            0,
        )
    };
    Errno::result(added)?;
    // SAFETY: integers.
    let restricted =
        unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset.as_raw_fd(), 0) };
    Errno::result(restricted).map(drop)
}
