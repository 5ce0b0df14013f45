//! Detached mount trees, which a privileged host makes for a VM that could not reach the paths.

use std::ffi::{CStr, CString};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, openat2};

/// A detached clone of `path` and all mounted below it; with `map`, the ids of that user namespace
/// own its files (an idmapped mount).
pub(super) fn clone_tree(path: &Path, map: Option<&OwnedFd>) -> nix::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes()).map_err(|_| Errno::EINVAL)?;
    let recursive = libc::AT_RECURSIVE.cast_unsigned();
    let tree = open_tree(libc::AT_FDCWD, &path, recursive)?;
    make_own(&tree, map)?;
    Ok(tree)
}

/// The same of a path without symlinks: one that is there by now is `ELOOP`.
pub(super) fn clone_real(path: &Path, map: Option<&OwnedFd>) -> nix::Result<OwnedFd> {
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_NO_SYMLINKS);
    let place = openat2(AT_FDCWD, path, how)?;
    let flags = (libc::AT_RECURSIVE | libc::AT_EMPTY_PATH).cast_unsigned();
    let tree = open_tree(place.as_raw_fd(), c"", flags)?;
    make_own(&tree, map)?;
    Ok(tree)
}

/// The same of what is open as `place`, without what is mounted below it.
pub(super) fn clone_mount(place: &impl AsRawFd, map: Option<&OwnedFd>) -> nix::Result<OwnedFd> {
    let tree = open_tree(place.as_raw_fd(), c"", libc::AT_EMPTY_PATH.cast_unsigned())?;
    make_own(&tree, map)?;
    Ok(tree)
}

fn open_tree(at: RawFd, path: &CStr, flags: u32) -> nix::Result<OwnedFd> {
    // SAFETY: the path outlives the call.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_open_tree,
            at,
            path.as_ptr(),
            libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | flags,
        )
    };
    let fd = RawFd::try_from(Errno::result(fd)?).map_err(|_| Errno::EBADF)?;
    // SAFETY: the kernel has just returned this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn make_own(tree: &OwnedFd, map: Option<&OwnedFd>) -> nix::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: map.map_or(0, |_| libc::MOUNT_ATTR_IDMAP),
        attr_clr: 0,
        // A clone of a shared mount is in its peer group: what the host mounts below it later is
        // not for the VM.
        propagation: libc::MS_PRIVATE,
        userns_fd: map.map_or(0, |map| u64::from(map.as_raw_fd().cast_unsigned())),
    };
    // SAFETY: the struct outlives the call and its size is given.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | libc::AT_RECURSIVE,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    Errno::result(result).map(drop)
}
