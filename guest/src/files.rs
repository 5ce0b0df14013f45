//! File operations with the VM's own root and the caller's credentials.
//!
//! What is short is done here, by PID 1 itself; what may take long is done by a [`worker`](crate::worker).

use std::ffi::{CStr, CString};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use agentvm_guest::protocol::files::{FileAnswer, FileOp, Stat, Time};
use agentvm_guest::protocol::{Account, Bytes, USER_ID};
use nix::errno::Errno;

use crate::boot::become_undumpable;
use crate::{copy, setid, tree, watch, worker};

/// Nothing of what it leads to but its place.
pub(crate) const PLACE: i32 = libc::O_PATH;
pub(crate) const DIRECTORY: i32 = libc::O_PATH | libc::O_DIRECTORY;

/// Opens a file for a caller.
pub(crate) fn open(path: &[u8], flags: i32, mode: u32, user: Account) -> nix::Result<OwnedFd> {
    let path = text(path)?;
    if setid::forbids(mode) {
        return Err(Errno::EPERM);
    }
    acting_as(user, || open_at(None, &path, flags, mode))
}

pub(crate) fn make_dirs(path: &[u8], user: Account) -> nix::Result<()> {
    acting_as(user, || make_directories(path, 0o777))
}

/// What became of an operation.
pub(crate) enum Operated {
    Done(Option<FileAnswer>),
    /// By a worker.
    Begun(i32),
}

/// Does what is asked for, or sees to it that it is done: the answer of a long operation is in its pipe.
pub(crate) fn operate(
    op: FileOp,
    user: Account,
    descriptors: Vec<OwnedFd>,
) -> nix::Result<Operated> {
    let descriptor = descriptors.into_iter().next().ok_or(Errno::EBADF);
    let long = |pipe: nix::Result<OwnedFd>,
                run: &dyn Fn(&mut worker::Output) -> worker::Outcome| {
        worker::start(pipe?, user, run).map(Operated::Begun)
    };
    let done = |result: nix::Result<()>| result.map(|()| Operated::Done(None));
    match op {
        FileOp::List {
            path,
            recursive,
            skip_unreadable,
        } => long(descriptor, &|out| {
            tree::list(&path, recursive, skip_unreadable, out)
        }),
        FileOp::RemoveTree { path } => long(descriptor, &|out| tree::remove(&path, out)),
        FileOp::Watch { path, recursive } => {
            long(descriptor, &|out| watch::watch(&path, recursive, out))
        }
        FileOp::Copy {
            from,
            to,
            recursive,
            replace,
        } => long(descriptor, &|out| {
            copy::copy(&from, &to, recursive, replace, out)
        }),
        FileOp::SetModeOf { mode } => {
            let file = descriptor?;
            done(acting_as(user, || set_mode_of(file.as_fd(), mode)))
        }
        FileOp::PutInPlace { from, to, mode } => {
            let file = descriptor?;
            done(acting_as(user, || {
                put_in_place(file.as_fd(), &from, &to, mode)
            }))
        }
        short => acting_as(user, || operate_now(short)).map(Operated::Done),
    }
}

fn operate_now(op: FileOp) -> nix::Result<Option<FileAnswer>> {
    match op {
        FileOp::Stat { path, follow } => {
            let place = place(&path, follow)?;
            Ok(Some(FileAnswer::Stat(stat(place.as_fd())?)))
        }
        FileOp::MakeDir {
            path,
            mode,
            parents,
        } => {
            if parents {
                make_directories(&path, mode).map_err(|errno| match errno {
                    Errno::ENOTDIR | Errno::ENOENT if is_taken(&path) => Errno::EEXIST,
                    errno => errno,
                })?;
            } else {
                let (parent, name) = parent(&path, Errno::EEXIST)?;
                make_directory(parent.as_fd(), &name, mode)?;
            }
            Ok(None)
        }
        FileOp::Rename { from, to, replace } => {
            let from = entry(&from, Errno::EBUSY)?;
            rename(&from, &to, replace).map(|()| None)
        }
        FileOp::Remove { path } => {
            let (parent, name) = entry(&path, Errno::EBUSY)?;
            match unlink(parent.as_fd(), &name, 0) {
                Err(Errno::EISDIR) => unlink(parent.as_fd(), &name, libc::AT_REMOVEDIR),
                result => result,
            }?;
            Ok(None)
        }
        FileOp::SetMode { path, mode } => set_mode(&path, mode).map(|()| None),
        FileOp::SetOwner {
            path,
            uid,
            gid,
            follow,
        } => {
            let place = place(&path, follow)?;
            // (uid_t) -1 leaves an id as it is.
            let (uid, gid) = (uid.unwrap_or(u32::MAX), gid.unwrap_or(u32::MAX));
            let flags = libc::AT_EMPTY_PATH;
            // SAFETY: the descriptor and an empty string outlive the call.
            let owned = unsafe { libc::fchownat(place.as_raw_fd(), c"".as_ptr(), uid, gid, flags) };
            Errno::result(owned).map(|_| None)
        }
        FileOp::SetTimes {
            path,
            accessed,
            modified,
            follow,
        } => set_times(&path, accessed, modified, follow).map(|()| None),
        FileOp::Symlink { target, path } => {
            let target = text(&target)?;
            let (parent, name) = entry(&path, Errno::EEXIST)?;
            // SAFETY: descriptor and strings outlive the call.
            let linked =
                unsafe { libc::symlinkat(target.as_ptr(), parent.as_raw_fd(), name.as_ptr()) };
            Errno::result(linked).map(|_| None)
        }
        FileOp::ReadLink { path } => {
            let place = place(&path, false)?;
            // Of what is no symlink the kernel says ENOENT here.
            let target = read_link(place.as_fd(), c"").map_err(|errno| match errno {
                Errno::ENOENT => Errno::EINVAL,
                other => other,
            });
            Ok(Some(FileAnswer::Path(target?)))
        }
        FileOp::RealPath { path } => {
            let place = place(&path, true)?;
            let real = read_link(anywhere(), &own_path(place.as_fd())?)?;
            Ok(Some(FileAnswer::Path(real)))
        }
        FileOp::List { .. }
        | FileOp::RemoveTree { .. }
        | FileOp::Copy { .. }
        | FileOp::Watch { .. }
        | FileOp::SetModeOf { .. }
        | FileOp::PutInPlace { .. } => Err(Errno::EINVAL),
    }
}

fn rename((from, name): &(OwnedFd, CString), to: &[u8], replace: bool) -> nix::Result<()> {
    let (to, to_name) = entry(to, Errno::EBUSY)?;
    let flags = if replace { 0 } else { libc::RENAME_NOREPLACE };
    // SAFETY: descriptors and strings outlive the call.
    let renamed = unsafe {
        libc::syscall(
            libc::SYS_renameat2,
            from.as_raw_fd(),
            name.as_ptr(),
            to.as_raw_fd(),
            to_name.as_ptr(),
            flags,
        )
    };
    Errno::result(renamed).map(drop)
}

/// The VM's programs can put something else to where `file` was made. They may gain nothing by it: the
/// mode is that of the file itself, and nothing else is moved in its name.
fn put_in_place(
    file: BorrowedFd<'_>,
    from: &[u8],
    to: &[u8],
    mode: Option<u32>,
) -> nix::Result<()> {
    if let Some(mode) = mode {
        set_mode_of(file, mode)?;
    }
    let from = parent(from, Errno::EBUSY)?;
    let there = open_at(Some(from.0.as_fd()), &from.1, PLACE | libc::O_NOFOLLOW, 0)?;
    let (there, file) = (stat(there.as_fd())?, stat(file)?);
    if (there.device, there.inode) != (file.device, file.inode) {
        return Err(Errno::ESTALE);
    }
    rename(&from, to, true)
}

fn set_mode_of(file: BorrowedFd<'_>, mode: u32) -> nix::Result<()> {
    if setid::forbids(mode) {
        return Err(Errno::EPERM);
    }
    // SAFETY: integers.
    Errno::result(unsafe { libc::fchmod(file.as_raw_fd(), mode) }).map(drop)
}

/// For paths that are absolute.
fn anywhere() -> BorrowedFd<'static> {
    // SAFETY: AT_FDCWD is always there.
    unsafe { BorrowedFd::borrow_raw(libc::AT_FDCWD) }
}

pub(crate) fn text(path: &[u8]) -> nix::Result<CString> {
    CString::new(path).map_err(|_| Errno::EINVAL)
}

/// Magic links (`/proc/*/fd/*`) would reach this process's own descriptors, the VM's lock among
/// them: a symlink that a program plants must not lead there.
pub(crate) fn open_at(
    at: Option<BorrowedFd<'_>>,
    path: &CStr,
    flags: i32,
    mode: u32,
) -> nix::Result<OwnedFd> {
    let always = libc::O_CLOEXEC
        | if flags & libc::O_PATH == 0 {
            libc::O_NONBLOCK | libc::O_NOCTTY
        } else {
            0
        };
    // SAFETY: open_how is plain data, and all zero is its documented default.
    let mut how: libc::open_how = unsafe { std::mem::zeroed() };
    how.flags = u64::try_from(flags | always).map_err(|_| Errno::EINVAL)?;
    how.mode = if flags & libc::O_CREAT == 0 {
        0
    } else {
        u64::from(mode)
    };
    how.resolve = libc::RESOLVE_NO_MAGICLINKS;
    // SAFETY: path and struct outlive the call, whose size is given.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_openat2,
            at.map_or(libc::AT_FDCWD, |at| at.as_raw_fd()),
            path.as_ptr(),
            &raw const how,
            size_of::<libc::open_how>(),
        )
    };
    let fd = RawFd::try_from(Errno::result(fd)?).map_err(|_| Errno::EBADF)?;
    // SAFETY: the kernel has just returned this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

pub(crate) fn place(path: &[u8], follow: bool) -> nix::Result<OwnedFd> {
    let follow = if follow { 0 } else { libc::O_NOFOLLOW };
    open_at(None, &text(path)?, PLACE | follow, 0)
}

/// The directory that a path's last name is in, and the name. The calls that change a directory can't be
/// told to refuse magic links. `unnamed`: what a path is that ends in no name, as `/` does.
pub(crate) fn parent(path: &[u8], unnamed: Errno) -> nix::Result<(OwnedFd, CString)> {
    entry(without_slashes(path), unnamed)
}

/// The same, and the name has the slashes behind it: the calls that change a directory then refuse what
/// is no directory. Others would follow a link there.
pub(crate) fn entry(path: &[u8], unnamed: Errno) -> nix::Result<(OwnedFd, CString)> {
    let start = without_slashes(path)
        .iter()
        .rposition(|byte| *byte == b'/')
        .map_or(0, |slash| slash + 1);
    let (parent, name) = path.split_at(start);
    if matches!(without_slashes(name), b"" | b"." | b"..") {
        return Err(unnamed);
    }
    Ok((open_at(None, &text(parent)?, DIRECTORY, 0)?, text(name)?))
}

/// Without those at its end.
fn without_slashes(path: &[u8]) -> &[u8] {
    let end = path.iter().rposition(|byte| *byte != b'/');
    &path[..end.map_or(0, |end| end + 1)]
}

/// Whether a path is one for a directory, or for nothing yet.
pub(crate) fn is_for_a_directory(path: &[u8]) -> bool {
    path.ends_with(b"/")
}

/// Whether there is something at a path, be it a link that leads nowhere.
fn is_taken(path: &[u8]) -> bool {
    parent(path, Errno::EEXIST).is_ok_and(|(parent, name)| {
        open_at(Some(parent.as_fd()), &name, PLACE | libc::O_NOFOLLOW, 0).is_ok()
    })
}

pub(crate) fn make_directory(parent: BorrowedFd<'_>, name: &CStr, mode: u32) -> nix::Result<()> {
    // SAFETY: descriptor and string outlive the call.
    Errno::result(unsafe { libc::mkdirat(parent.as_raw_fd(), name.as_ptr(), mode) }).map(drop)
}

fn make_directories(path: &[u8], mode: u32) -> nix::Result<()> {
    let mut at = open_at(None, c"/", DIRECTORY, 0)?;
    for name in path.split(|byte| *byte == b'/') {
        if name.is_empty() || name == b"." {
            continue;
        }
        let name = text(name)?;
        at = match open_at(Some(at.as_fd()), &name, DIRECTORY, 0) {
            Err(Errno::ENOENT) => {
                match make_directory(at.as_fd(), &name, mode) {
                    // Somebody else was faster; or it is a link that leads nowhere.
                    Ok(()) | Err(Errno::EEXIST) => {}
                    Err(errno) => return Err(errno),
                }
                open_at(Some(at.as_fd()), &name, DIRECTORY, 0)?
            }
            opened => opened?,
        };
    }
    Ok(())
}

pub(crate) fn unlink(parent: BorrowedFd<'_>, name: &CStr, flags: i32) -> nix::Result<()> {
    // SAFETY: descriptor and string outlive the call.
    Errno::result(unsafe { libc::unlinkat(parent.as_raw_fd(), name.as_ptr(), flags) }).map(drop)
}

fn set_mode(path: &[u8], mode: u32) -> nix::Result<()> {
    if setid::forbids(mode) {
        return Err(Errno::EPERM);
    }
    let place = place(path, true)?;
    // fchmod(2) refuses a descriptor that is a place only, and fchmodat2(2) is new.
    let own = own_path(place.as_fd())?;
    // SAFETY: the string outlives the call.
    Errno::result(unsafe { libc::chmod(own.as_ptr(), mode) }).map(drop)
}

fn set_times(
    path: &[u8],
    accessed: Option<Time>,
    modified: Option<Time>,
    follow: bool,
) -> nix::Result<()> {
    let time = |time: Option<Time>| match time {
        None => libc::timespec {
            tv_sec: 0,
            tv_nsec: libc::UTIME_OMIT,
        },
        Some(Time {
            seconds,
            nanoseconds,
        }) => libc::timespec {
            tv_sec: seconds,
            tv_nsec: nanoseconds.into(),
        },
    };
    let times = [time(accessed), time(modified)];
    let place = place(path, follow)?;
    let flags = libc::AT_EMPTY_PATH;
    // SAFETY: the descriptor, an empty string and the array of two outlive the call.
    let set = unsafe { libc::utimensat(place.as_raw_fd(), c"".as_ptr(), times.as_ptr(), flags) };
    Errno::result(set).map(drop)
}

/// A path of this process's own descriptor: the one magic link that is followed.
pub(crate) fn own_path(descriptor: BorrowedFd<'_>) -> nix::Result<CString> {
    text(format!("/proc/self/fd/{}", descriptor.as_raw_fd()).as_bytes())
}

pub(crate) fn read_link(at: BorrowedFd<'_>, path: &CStr) -> nix::Result<Bytes> {
    let mut target = vec![0; libc::PATH_MAX as usize + 1];
    // SAFETY: the kernel writes at most as many bytes as the buffer has.
    let length = unsafe {
        libc::readlinkat(
            at.as_raw_fd(),
            path.as_ptr(),
            target.as_mut_ptr().cast(),
            target.len(),
        )
    };
    target.truncate(usize::try_from(Errno::result(length)?).unwrap_or(0));
    Ok(target)
}

pub(crate) fn stat(file: BorrowedFd<'_>) -> nix::Result<Stat> {
    let mut found = MaybeUninit::<libc::stat>::uninit();
    // SAFETY: fstat fills the struct if it succeeds.
    let found = unsafe {
        Errno::result(libc::fstat(file.as_raw_fd(), found.as_mut_ptr()))?;
        found.assume_init()
    };
    let time = |seconds, nanoseconds: i64| Time {
        seconds,
        nanoseconds: u32::try_from(nanoseconds).unwrap_or(0),
    };
    Ok(Stat {
        mode: found.st_mode,
        uid: found.st_uid,
        gid: found.st_gid,
        size: u64::try_from(found.st_size).unwrap_or(0),
        blocks: u64::try_from(found.st_blocks).unwrap_or(0),
        #[cfg_attr(
            target_arch = "x86_64",
            expect(clippy::useless_conversion, reason = "u32 on arm64")
        )]
        links: found.st_nlink.into(),
        device: found.st_dev,
        inode: found.st_ino,
        accessed: time(found.st_atime, found.st_atime_nsec),
        modified: time(found.st_mtime, found.st_mtime_nsec),
        changed: time(found.st_ctime, found.st_ctime_nsec),
    })
}

/// Runs a file operation as this account. Changing the file-system uid also drops and restores the
/// capabilities that override file permissions (capabilities(7)).
pub(crate) fn acting_as<T>(user: Account, run: impl FnOnce() -> nix::Result<T>) -> nix::Result<T> {
    if user == Account::Root || !nix::unistd::geteuid().is_root() {
        return run();
    }
    set_fs_ids(USER_ID);
    let result = run();
    set_fs_ids(0);
    become_undumpable()?;
    result
}

/// Acts as `user` from now on.
pub(crate) fn act_as(user: Account) -> nix::Result<()> {
    if user == Account::User && nix::unistd::geteuid().is_root() {
        set_fs_ids(USER_ID);
    }
    become_undumpable()
}

fn set_fs_ids(id: u32) {
    // SAFETY: integers; both calls report the old id, never an error.
    unsafe {
        libc::setfsgid(id);
        libc::setfsuid(id);
    }
}
