//! Copies of files and trees, by descriptors from top to bottom on both sides, as in [`tree`](crate::tree).
//!
//! What is at a place of the copy is replaced, never written through: a link that somebody has put there
//! leads nowhere.

use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use agentvm_guest::protocol::files::FileKind;
use nix::errno::Errno;
use nix::unistd::{Whence, ftruncate, lseek};

use crate::files::{
    PLACE, is_for_a_directory, make_directory, open_at, parent, place, read_link, stat, text,
    unlink,
};
use crate::tree::{Descent, Entry, identity, kind_of_mode, open_directory};
use crate::worker::{Failure, Outcome, Output};

/// Copied until it is looked whether anybody waits for it.
const CHUNK: usize = 8 << 20;

/// Copied of a file that says that it is empty.
const MOST_OF_EMPTY: i64 = 1 << 30;

/// Permissions, without the set-ID and sticky bits: those are not the copy's.
const PERMISSIONS: u32 = 0o777;

/// What a directory has until it is filled: whatever the one that is copied lets its owner do.
const FILLING: u32 = 0o700;

/// Copies what is at a path, with `recursive` a directory with everything in it.
pub(crate) fn copy(
    from: &[u8],
    to: &[u8],
    recursive: bool,
    replace: bool,
    output: &Output,
) -> Outcome {
    let for_a_directory = is_for_a_directory(to);
    // A copy is named: `/` has no name.
    let (to, to_name) = parent(to, Errno::EEXIST)?;
    let source = place(from, false)?;
    let mode = stat(source.as_fd())?.mode;
    if mode & libc::S_IFMT != libc::S_IFDIR {
        if for_a_directory {
            return Err(Errno::ENOTDIR.into());
        }
        let (from, name) = parent(from, Errno::EISDIR)?;
        let copy = Copy { replace, output };
        let copied = copy.entry((&from, &name), (&to, &to_name));
        return copied.map_err(|errno| of_kind(kind_of_mode(mode), errno.into()));
    }
    if !recursive {
        return Err(Errno::EISDIR.into());
    }
    let source = open_directory(&source, c".")?;
    if is_in(&to, &source)? {
        // It would never end.
        return Err(Errno::EINVAL.into());
    }
    let is_new = ensure_directory(&to, &to_name)?;
    let target = open_directory(&to, &to_name)?;
    let tree = Tree {
        from: Descent::new(source, false)?,
        to: Descent::new(target, false)?,
        new: vec![is_new],
        copy: Copy { replace, output },
    };
    tree.copy()
}

/// What is neither file, directory nor link fails for what it is.
fn of_kind(kind: FileKind, failure: Failure) -> Failure {
    let has_no_copy = matches!(
        kind,
        FileKind::Fifo | FileKind::Socket | FileKind::CharacterDevice | FileKind::BlockDevice
    );
    Failure {
        found: (has_no_copy && failure.errno == Errno::EINVAL).then_some(kind),
        ..failure
    }
}

/// Whether a directory is another, or is somewhere in it.
fn is_in(directory: &OwnedFd, other: &OwnedFd) -> nix::Result<bool> {
    let other = identity(&stat(other.as_fd())?);
    let mut at = open_at(Some(directory.as_fd()), c".", PLACE, 0)?;
    loop {
        let own = identity(&stat(at.as_fd())?);
        if own == other {
            return Ok(true);
        }
        at = open_at(Some(at.as_fd()), c"..", PLACE, 0)?;
        // The root is its own parent.
        if identity(&stat(at.as_fd())?) == own {
            return Ok(false);
        }
    }
}

/// `false`: there is one already.
fn ensure_directory(parent: &OwnedFd, name: &CStr) -> nix::Result<bool> {
    match make_directory(parent.as_fd(), name, FILLING) {
        Ok(()) => Ok(true),
        Err(Errno::EEXIST) => Ok(false),
        Err(errno) => Err(errno),
    }
}

/// A directory in a directory.
type At<'a> = (&'a OwnedFd, &'a CStr);

struct Tree<'a> {
    from: Descent,
    to: Descent,
    /// Of each level, whether it was made for the copy.
    new: Vec<bool>,
    copy: Copy<'a>,
}

impl Tree<'_> {
    fn copy(mut self) -> Outcome {
        loop {
            let next = self.from.next();
            match next.map_err(|errno| self.from.failed(c"", errno))? {
                Some(Entry { name, kind }) => {
                    let copied = self.entry(&name, kind);
                    copied.map_err(|errno| of_kind(kind, self.from.failed(&name, errno)))?;
                }
                None => {
                    if self.leave().map_err(|errno| self.from.failed(c"", errno))? {
                        return Ok(());
                    }
                }
            }
        }
    }

    fn entry(&mut self, name: &CStr, kind: FileKind) -> nix::Result<()> {
        self.copy.output.check();
        let may_be_directory = matches!(kind, FileKind::Directory | FileKind::Unknown);
        if may_be_directory && self.from.enter(name)? {
            let to = self.to.level()?.descriptor()?;
            let is_new = ensure_directory(to, name)?;
            if !self.to.enter(name)? {
                return Err(Errno::ENOTDIR);
            }
            self.new.push(is_new);
            return Ok(());
        }
        let from = self.from.level()?.descriptor()?;
        let to = self.to.level()?.descriptor()?;
        match self.copy.entry((from, name), (to, name)) {
            // It was removed meanwhile.
            Err(Errno::ENOENT) => Ok(()),
            copied => copied,
        }
    }

    /// Gives the present directory the permissions of the one that it is a copy of. `true`: it was the top.
    fn leave(&mut self) -> nix::Result<bool> {
        if self.new.pop() == Some(true) {
            let mode = stat(self.from.level()?.descriptor()?.as_fd())?.mode;
            set_permissions(self.to.level()?.descriptor()?.as_fd(), mode)?;
        }
        let left = self.from.leave()?.is_none();
        self.to.leave()?;
        Ok(left)
    }
}

struct Copy<'a> {
    replace: bool,
    output: &'a Output,
}

impl Copy<'_> {
    /// Copies what is no directory.
    fn entry(&self, (from, name): At<'_>, (to, to_name): At<'_>) -> nix::Result<()> {
        let found = open_at(Some(from.as_fd()), name, PLACE | libc::O_NOFOLLOW, 0)?;
        let mode = stat(found.as_fd())?.mode;
        match mode & libc::S_IFMT {
            libc::S_IFLNK => {
                // What it leads to would be lost, and the copy lead to itself.
                if let Ok(leads_to) = open_at(Some(from.as_fd()), name, PLACE, 0)
                    && is_at(&leads_to, (to, to_name))?
                {
                    return Err(Errno::EINVAL);
                }
                let target = text(&read_link(found.as_fd(), c"")?)?;
                self.make(to, to_name, || {
                    // SAFETY: descriptor and strings outlive the call.
                    let made = unsafe {
                        libc::symlinkat(target.as_ptr(), to.as_raw_fd(), to_name.as_ptr())
                    };
                    Errno::result(made).map(drop)
                })
            }
            libc::S_IFREG => {
                let flags = libc::O_RDONLY | libc::O_NOFOLLOW;
                let source = open_at(Some(from.as_fd()), name, flags, 0)?;
                // Before what is there is removed.
                if is_at(&source, (to, to_name))? {
                    return Err(Errno::EINVAL);
                }
                let flags = libc::O_WRONLY | libc::O_CREAT | libc::O_EXCL | libc::O_NOFOLLOW;
                // Nobody else's to read before it has its permissions.
                let made = self.make(to, to_name, || {
                    open_at(Some(to.as_fd()), to_name, flags, 0o600)
                })?;
                let filled = self.fill(&source, &made);
                filled.and_then(|()| set_permissions(made.as_fd(), mode))
            }
            // A copy of a FIFO, a socket or a device is another one.
            _ => Err(Errno::EINVAL),
        }
    }

    /// Makes something, after what has its place, if that may be, is gone.
    fn make<T>(
        &self,
        to: &OwnedFd,
        name: &CStr,
        make: impl Fn() -> nix::Result<T>,
    ) -> nix::Result<T> {
        match make() {
            Err(Errno::EEXIST) if self.replace => {
                unlink(to.as_fd(), name, 0)?;
                make()
            }
            made => made,
        }
    }

    /// Copies what a file holds now: what is appended meanwhile could have no end.
    fn fill(&self, from: &OwnedFd, to: &OwnedFd) -> nix::Result<()> {
        let size = i64::try_from(stat(from.as_fd())?.size).map_err(|_| Errno::EOVERFLOW)?;
        if size == 0 {
            // Files of /proc say so, whatever they hold.
            return self.fill_to(from, to, MOST_OF_EMPTY);
        }
        self.fill_up_to(from, to, size)
    }

    /// Copies so many bytes. Holes are holes of the copy.
    fn fill_up_to(&self, from: &OwnedFd, to: &OwnedFd, size: i64) -> nix::Result<()> {
        let mut end = 0;
        loop {
            let start = match lseek(from, end, Whence::SeekData) {
                Ok(start) if start < size => start,
                Ok(_) | Err(Errno::ENXIO) => return ftruncate(to, size),
                // A file system without holes.
                Err(Errno::EINVAL) => return self.fill_to(from, to, size),
                Err(errno) => return Err(errno),
            };
            end = lseek(from, start, Whence::SeekHole)?.min(size);
            lseek(from, start, Whence::SeekSet)?;
            lseek(to, start, Whence::SeekSet)?;
            self.fill_to(from, to, end - start)?;
        }
    }

    /// Copies so many bytes from where both are, fewer if there are no more.
    fn fill_to(&self, from: &OwnedFd, to: &OwnedFd, mut left: i64) -> nix::Result<()> {
        while left > 0 {
            self.output.check();
            let chunk = usize::try_from(left).map_or(CHUNK, |left| left.min(CHUNK));
            // SAFETY: offsets that are null are those of the descriptors.
            let copied = unsafe {
                libc::copy_file_range(
                    from.as_raw_fd(),
                    std::ptr::null_mut(),
                    to.as_raw_fd(),
                    std::ptr::null_mut(),
                    chunk,
                    0,
                )
            };
            match Errno::result(copied) {
                Ok(0) => return Ok(()),
                Ok(copied) => left -= i64::try_from(copied).map_err(|_| Errno::EIO)?,
                Err(Errno::EINTR) => {}
                // Between file systems that can't, or of files that say that they are empty.
                Err(Errno::EXDEV | Errno::EINVAL | Errno::EOPNOTSUPP | Errno::ENOSYS) => {
                    return self.fill_by_hand(from, to, left);
                }
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }

    fn fill_by_hand(&self, from: &OwnedFd, to: &OwnedFd, mut left: i64) -> nix::Result<()> {
        let mut chunk = vec![0; 1 << 20];
        while left > 0 {
            self.output.check();
            let most = usize::try_from(left).map_or(chunk.len(), |left| left.min(chunk.len()));
            let most = chunk.get_mut(..most).ok_or(Errno::EIO)?;
            let length = match nix::unistd::read(from, most) {
                Ok(0) => return Ok(()),
                Ok(length) => length,
                Err(Errno::EINTR) => continue,
                Err(errno) => return Err(errno),
            };
            left -= i64::try_from(length).map_err(|_| Errno::EIO)?;
            let mut rest = chunk.get(..length).ok_or(Errno::EIO)?;
            while !rest.is_empty() {
                match nix::unistd::write(to, rest) {
                    Ok(written) => rest = rest.get(written..).unwrap_or_default(),
                    Err(Errno::EINTR) => {}
                    Err(errno) => return Err(errno),
                }
            }
        }
        Ok(())
    }
}

/// Whether what is open is also at a place.
fn is_at(open: &OwnedFd, (directory, name): At<'_>) -> nix::Result<bool> {
    match open_at(Some(directory.as_fd()), name, PLACE | libc::O_NOFOLLOW, 0) {
        Ok(there) => Ok(identity(&stat(there.as_fd())?) == identity(&stat(open.as_fd())?)),
        Err(Errno::ENOENT) => Ok(false),
        Err(errno) => Err(errno),
    }
}

fn set_permissions(file: BorrowedFd<'_>, mode: u32) -> nix::Result<()> {
    // SAFETY: integers.
    Errno::result(unsafe { libc::fchmod(file.as_raw_fd(), mode & PERMISSIONS) }).map(drop)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::fd::OwnedFd;

    use super::*;

    #[test]
    fn what_is_appended_to_a_file_while_it_is_copied_is_not_copied() {
        let name = |what| {
            let own = format!("agentvm-copy-{what}-{}", std::process::id());
            std::env::temp_dir().join(own)
        };
        let (from, to) = (name("from"), name("to"));
        fs::write(&from, "before, after").expect("written");
        let (_reader, pipe) = nix::unistd::pipe().expect("a pipe");
        let copy = Copy {
            replace: false,
            output: &Output::new(pipe),
        };
        let source: OwnedFd = fs::File::open(&from).expect("a file").into();
        let made: OwnedFd = fs::File::create(&to).expect("a file").into();
        copy.fill_up_to(&source, &made, 6).expect("copied");
        let copied = fs::read(&to).expect("a copy");
        for path in [from, to] {
            fs::remove_file(path).expect("removed");
        }
        assert_eq!(copied, b"before");
    }
}
