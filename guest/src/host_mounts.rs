//! Directories and files of the host in the VM's root.
//!
//! Both ends are hostile: the mount point may lie in a directory that the VM wrote to in an earlier
//! boot, the source in one that another VM can write to. So no symlink is followed, in neither.

use std::collections::BTreeSet;
use std::ffi::CString;
use std::fs::File;
use std::io::{Read, Seek};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use agentvm_guest::protocol::{Account, Bytes, HostMount, HostSource, USER_ID};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat, openat2};
use nix::sys::stat::{Mode, SFlag, fstat, mkdirat};
use nix::unistd::{Gid, Uid, fchownat, geteuid};

use crate::boot::{Failure, errno_of};
use crate::files::acting_as;
use crate::mounts::{NEW_ROOT, set_attributes};

/// How often the submounts of a source are looked through until all of them are covered. More is
/// needed only if the host moves directories meanwhile.
const ROUNDS: u32 = 16;

/// The mounts of this namespace, to be opened while `/proc` is still the host's.
pub(crate) fn mount_table() -> nix::Result<File> {
    File::open("/proc/self/mountinfo").map_err(|error| errno_of(&error))
}

pub(crate) fn make(mount: &HostMount, trees: &[OwnedFd], table: &mut File) -> Result<(), Failure> {
    let failed = |step: &'static str| {
        move |errno| Failure {
            step: format!("{step} {}", mount.path),
            errno,
        }
    };
    let point = mount_point(&mount.path, mount.directory).map_err(failed("mount point"))?;
    attach_at(&point, mount, trees, table).map_err(failed("mount"))
}

fn attach_at(
    point: &OwnedFd,
    mount: &HostMount,
    trees: &[OwnedFd],
    table: &mut File,
) -> nix::Result<()> {
    let cloned;
    let tree = match &mount.source {
        HostSource::Descriptor(index) => trees.get(*index as usize).ok_or(Errno::EBADF)?,
        HostSource::Path { path, dev, ino } => {
            cloned = clone_of_host(path, *dev, *ino)?;
            &cloned
        }
    };
    let read_only = if mount.read_only {
        libc::MOUNT_ATTR_RDONLY
    } else {
        0
    };
    let attributes = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | read_only;
    set_attributes(tree, attributes)?;
    attach(tree.as_fd(), point.as_fd())?;
    if !mount.directory {
        return Ok(());
    }
    let submounts = match &mount.source {
        HostSource::Path { .. } => cover_submounts(tree, &mount.path, table)?,
        HostSource::Descriptor(_) => mount.submounts.iter().cloned().collect(),
    };
    let mut pinned = parents(mount.hidden.iter());
    if !mount.read_only {
        pinned.extend(parents(submounts.iter()));
    }
    for path in &pinned {
        unless_unreachable(pin(tree, path))?;
    }
    for path in &mount.submounts {
        unless_unreachable(hide(tree, path))?;
    }
    mount.hidden.iter().try_for_each(|path| hide(tree, path))
}

/// What can't be reached, no program of the VM can. What is gone was moved by the host meanwhile, or lies
/// under a cover already.
fn unless_unreachable(result: nix::Result<()>) -> nix::Result<()> {
    match result {
        Err(Errno::ENOENT | Errno::EACCES) => Ok(()),
        result => result,
    }
}

/// Finds the place, or makes it: a directory belongs to who owns the one that it is made in.
fn mount_point(path: &str, directory: bool) -> nix::Result<OwnedFd> {
    let mut at = open_path(NEW_ROOT)?;
    let mut names = path.split('/').skip(1).peekable();
    while let Some(name) = names.next() {
        let directory = directory || names.peek().is_some();
        let found = match beneath(&at, name.as_bytes()) {
            Err(Errno::ENOENT) => {
                create(&at, name, directory)?;
                beneath(&at, name.as_bytes())?
            }
            found => found?,
        };
        match (is_directory(&found)?, directory) {
            (false, true) => return Err(Errno::ENOTDIR),
            (true, false) => return Err(Errno::EISDIR),
            _ => at = found,
        }
    }
    Ok(at)
}

fn open_path(path: &str) -> nix::Result<OwnedFd> {
    nix::fcntl::open(path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())
}

fn create(at: &OwnedFd, name: &str, directory: bool) -> nix::Result<()> {
    if directory {
        mkdirat(at, name, Mode::from_bits_truncate(0o755))?;
    } else {
        let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_WRONLY | OFlag::O_CLOEXEC;
        drop(openat(at, name, flags, Mode::from_bits_truncate(0o644))?);
    }
    let parent = fstat(at)?;
    if parent.st_uid == geteuid().as_raw() {
        return Ok(());
    }
    let (uid, gid) = (Uid::from_raw(parent.st_uid), Gid::from_raw(parent.st_gid));
    fchownat(at, name, Some(uid), Some(gid), AtFlags::AT_SYMLINK_NOFOLLOW)
}

fn is_directory(fd: &OwnedFd) -> nix::Result<bool> {
    let mode = SFlag::from_bits_truncate(fstat(fd)?.st_mode);
    Ok(mode & SFlag::S_IFMT == SFlag::S_IFDIR)
}

/// What is at `path`, relative, with no symlink on the way nor at its end.
fn beneath(directory: &OwnedFd, path: &[u8]) -> nix::Result<OwnedFd> {
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
    openat2(directory, path, how)
}

/// What is at `path`, where any program of the VM may get: `user` may where PID 1 may not, whose capabilities
/// do not count for what has an owner or a group that is in no map.
fn reachable(directory: &OwnedFd, path: &[u8]) -> nix::Result<OwnedFd> {
    match beneath(directory, path) {
        Err(Errno::EACCES) => {}
        found => return found,
    }
    let mut names = path.split(|byte| *byte == b'/');
    let start = directory.try_clone().map_err(|error| errno_of(&error))?;
    names.try_fold(start, |at, name| {
        match beneath(&at, name) {
            Err(Errno::EACCES) => {}
            found => return found,
        }
        match acting_as(Account::User, || beneath(&at, name)) {
            // Its owner may let itself in later.
            Err(Errno::EACCES) if fstat(&at)?.st_uid == USER_ID && geteuid().is_root() => {
                Err(Errno::EPERM)
            }
            found => found,
        }
    })
}

/// What is at a path of the host, with no symlink on the way nor at its end.
pub(crate) fn open_real(path: &Bytes) -> nix::Result<OwnedFd> {
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_NO_SYMLINKS);
    openat2(nix::fcntl::AT_FDCWD, path.as_slice(), how)
}

/// A clone, with all below it: the kernel lets an unprivileged process have no other.
fn clone_of_host(path: &Bytes, dev: u64, ino: u64) -> nix::Result<OwnedFd> {
    let source = open_real(path)?;
    let found = fstat(&source)?;
    if (found.st_dev, found.st_ino) != (dev, ino) {
        // Exchanged since the host looked at it.
        return Err(Errno::ESTALE);
    }
    clone_tree(&source)
}

/// Shows an empty directory in place of every mount below `tree`, which is attached at `path`. Returns
/// where they are.
fn cover_submounts(tree: &OwnedFd, path: &str, table: &mut File) -> nix::Result<BTreeSet<Bytes>> {
    let prefix = format!("{NEW_ROOT}{path}/").into_bytes();
    let mut covers = Vec::new();
    for _ in 0..ROUNDS {
        let mut uncovered = Vec::new();
        let points = outermost(&mount_points(table)?, &prefix);
        for relative in &points {
            match beneath(tree, relative) {
                Ok(place) if is_covered(&place, &covers)? => {}
                Ok(place) => uncovered.push(place),
                // Moved since, or where the caller can't go: the VM can do no more than the caller.
                Err(Errno::ENOENT | Errno::EACCES) => {}
                Err(errno) => return Err(errno),
            }
        }
        if uncovered.is_empty() {
            return Ok(points);
        }
        for place in uncovered {
            covers.extend(cover(&place)?);
        }
    }
    Err(Errno::EBUSY)
}

/// What is shown in place of a file that is a mount of its own.
const NULL: &str = "/dev/null";

fn is_covered(place: &OwnedFd, covers: &[u64]) -> nix::Result<bool> {
    let (found, null) = (fstat(place)?, nix::sys::stat::stat(NULL)?);
    let is_null = (found.st_dev, found.st_ino) == (null.st_dev, null.st_ino);
    Ok(is_null || covers.contains(&found.st_dev))
}

/// Puts an empty directory over one, and returns its device; over a file, [`NULL`].
fn cover(place: &OwnedFd) -> nix::Result<Option<u64>> {
    if !is_directory(place)? {
        let null = open_path(NULL)?;
        return attach(clone_tree(&null)?.as_fd(), place.as_fd()).map(|()| None);
    }
    let empty = empty_directory()?;
    let dev = fstat(&empty)?.st_dev;
    attach(empty.as_fd(), place.as_fd())?;
    Ok(Some(dev))
}

/// The mount points below `prefix` that lie below no other one, relative to it.
fn outermost(points: &[Bytes], prefix: &[u8]) -> BTreeSet<Bytes> {
    let below: BTreeSet<&[u8]> = points
        .iter()
        .filter_map(|point| point.strip_prefix(prefix))
        .collect();
    let parents = |path: &[u8]| {
        let slashes = path.iter().enumerate().filter(|(_, byte)| **byte == b'/');
        let ends: Vec<usize> = slashes.map(|(end, _)| end).collect();
        ends.iter().any(|end| below.contains(&path[..*end]))
    };
    let outermost = below.iter().filter(|path| !parents(path));
    outermost.map(|path| path.to_vec()).collect()
}

/// The mount points of this namespace (`proc_pid_mountinfo(5)`).
fn mount_points(table: &mut File) -> nix::Result<Vec<Bytes>> {
    let mut text = Vec::new();
    table
        .rewind()
        .and_then(|()| table.read_to_end(&mut text))
        .map_err(|error| errno_of(&error))?;
    let lines = text.split(|byte| *byte == b'\n');
    Ok(lines
        .filter_map(|line| line.split(|byte| *byte == b' ').nth(4))
        .map(agentvm_guest::mountinfo::unescape)
        .collect())
}

/// The directories that lead to `paths`, each once, outer ones first.
fn parents<'a>(paths: impl Iterator<Item = &'a Bytes>) -> BTreeSet<Bytes> {
    let parents = |path: &'a Bytes| {
        let ends = path.iter().enumerate().filter(|(_, byte)| **byte == b'/');
        ends.map(|(end, _)| path[..end].to_vec())
    };
    paths.flat_map(parents).collect()
}

/// Makes a directory a mount point of itself, which can't be renamed: otherwise the VM could move what
/// lies in it out from under its cover, or move what the host has mounted there.
fn pin(tree: &OwnedFd, relative: &[u8]) -> nix::Result<()> {
    let directory = reachable(tree, relative)?;
    attach(clone_tree(&directory)?.as_fd(), directory.as_fd())
}

/// Shows `relative` empty.
fn hide(tree: &OwnedFd, relative: &[u8]) -> nix::Result<()> {
    cover(&reachable(tree, relative)?).map(drop)
}

/// Empty, for nobody to write to, and a file system of its own.
fn empty_directory() -> nix::Result<OwnedFd> {
    // SAFETY: the strings outlive the calls.
    unsafe {
        let context = descriptor(libc::syscall(
            libc::SYS_fsopen,
            c"tmpfs".as_ptr(),
            FSOPEN_CLOEXEC,
        ))?;
        for (key, value) in [(c"mode", c"555"), (c"nr_inodes", c"1"), (c"size", c"4k")] {
            Errno::result(libc::syscall(
                libc::SYS_fsconfig,
                context.as_raw_fd(),
                FSCONFIG_SET_STRING,
                key.as_ptr(),
                value.as_ptr(),
                0,
            ))?;
        }
        let none: *const libc::c_char = std::ptr::null();
        Errno::result(libc::syscall(
            libc::SYS_fsconfig,
            context.as_raw_fd(),
            FSCONFIG_CMD_CREATE,
            none,
            none,
            0,
        ))?;
        descriptor(libc::syscall(
            libc::SYS_fsmount,
            context.as_raw_fd(),
            FSMOUNT_CLOEXEC,
            libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV,
        ))
    }
}

// Of linux/mount.h.
const FSOPEN_CLOEXEC: u32 = 1;
const FSMOUNT_CLOEXEC: u32 = 1;
const FSCONFIG_SET_STRING: u32 = 1;
const FSCONFIG_CMD_CREATE: u32 = 6;

pub(crate) fn clone_tree(of: &OwnedFd) -> nix::Result<OwnedFd> {
    let flags = libc::OPEN_TREE_CLONE
        | libc::OPEN_TREE_CLOEXEC
        | libc::AT_RECURSIVE.cast_unsigned()
        | libc::AT_EMPTY_PATH.cast_unsigned();
    // SAFETY: the empty path outlives the call, whose result is a new descriptor.
    unsafe {
        descriptor(libc::syscall(
            libc::SYS_open_tree,
            of.as_raw_fd(),
            c"".as_ptr(),
            flags,
        ))
    }
}

/// # Safety
/// `result` is that of a system call that returns a new descriptor, or -1.
unsafe fn descriptor(result: libc::c_long) -> nix::Result<OwnedFd> {
    let fd = RawFd::try_from(Errno::result(result)?).map_err(|_| Errno::EBADF)?;
    // SAFETY: the caller promises that it is new.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

pub(crate) fn attach(tree: BorrowedFd<'_>, place: BorrowedFd<'_>) -> nix::Result<()> {
    let empty = CString::default();
    // SAFETY: the empty path outlives the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree.as_raw_fd(),
            empty.as_ptr(),
            place.as_raw_fd(),
            empty.as_ptr(),
            libc::MOVE_MOUNT_F_EMPTY_PATH | libc::MOVE_MOUNT_T_EMPTY_PATH,
        )
    };
    Errno::result(result).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_that_leads_to_several_is_one() {
        let paths = ["a/b/c", "a/b/d", "a", "e/f"].map(|path| path.as_bytes().to_vec());
        let parents = parents(paths.iter());
        let expected = ["a", "a/b", "e"].map(|path| path.as_bytes().to_vec());
        assert_eq!(parents.into_iter().collect::<Vec<_>>(), expected);
    }
}
