//! Opening and making files with the VM's own root and the caller's credentials.

use std::ffi::CString;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use agentvm_guest::protocol::{Account, USER_ID};
use nix::errno::Errno;

use crate::boot::{become_undumpable, errno_of};

/// Magic links (`/proc/*/fd/*`) would reach this process's own descriptors, the VM's lock among
/// them: a symlink that a program plants must not lead there.
pub(crate) fn open(path: &[u8], flags: i32, mode: u32, user: Account) -> nix::Result<OwnedFd> {
    let path = CString::new(path).map_err(|_| Errno::EINVAL)?;
    let always = libc::O_CLOEXEC | libc::O_NONBLOCK | libc::O_NOCTTY;
    // SAFETY: open_how is plain data, and all zero is its documented default.
    let mut how: libc::open_how = unsafe { std::mem::zeroed() };
    how.flags = u64::try_from(flags | always).map_err(|_| Errno::EINVAL)?;
    how.mode = if flags & libc::O_CREAT == 0 {
        0
    } else {
        u64::from(mode)
    };
    how.resolve = libc::RESOLVE_NO_MAGICLINKS;
    acting_as(user, || {
        // SAFETY: path and struct outlive the call, whose size is given.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_openat2,
                libc::AT_FDCWD,
                path.as_ptr(),
                &raw const how,
                size_of::<libc::open_how>(),
            )
        };
        let fd = RawFd::try_from(Errno::result(fd)?).map_err(|_| Errno::EBADF)?;
        // SAFETY: the kernel has just returned this descriptor.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    })
}

pub(crate) fn make_dirs(path: &[u8], user: Account) -> nix::Result<()> {
    let path = Path::new(std::ffi::OsStr::from_bytes(path));
    acting_as(user, || {
        std::fs::create_dir_all(path).map_err(|error| errno_of(&error))
    })
}

/// Runs a file operation as `user`. Changing the file-system uid also drops and restores the
/// capabilities that override file permissions (capabilities(7)).
fn acting_as<T>(user: Account, run: impl FnOnce() -> nix::Result<T>) -> nix::Result<T> {
    if user == Account::Root || !nix::unistd::geteuid().is_root() {
        return run();
    }
    set_fs_ids(USER_ID);
    let result = run();
    set_fs_ids(0);
    become_undumpable()?;
    result
}

fn set_fs_ids(id: u32) {
    // SAFETY: integers; both calls report the old id, never an error.
    unsafe {
        libc::setfsgid(id);
        libc::setfsuid(id);
    }
}
