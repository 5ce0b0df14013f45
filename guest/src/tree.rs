//! Directory trees: listed, and removed. By descriptors from top to bottom, never by a path: whoever
//! swaps a directory for a symlink meanwhile leads nobody out of the tree.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use agentvm_guest::protocol::files::{FileKind, Record};
use agentvm_guest::protocol::{Bytes, files::Stat};
use nix::errno::Errno;

use crate::files::{DIRECTORY, is_for_a_directory, open_at, parent, place, stat, text, unlink};
use crate::worker::{Failure, Outcome, Output};

/// Read at once.
const BUFFER: usize = 32 * 1024;

/// Levels of a tree that are held open. What is deeper than that closes the level so far above it, to be
/// found again by `..`.
const MAX_OPEN: usize = 64;

/// How often something that others put into a directory while it is being removed is removed, too.
const MAX_PASSES: u32 = 8;

/// Entries that are removed or copied at most: who puts others into a directory as fast has it read without
/// end. Of a tree that has more, another call removes the rest.
const MAX_ENTRIES: u32 = 1 << 24;

/// Entries after which a worker looks whether anybody waits for it.
const CHECK_AFTER: u32 = 512;

/// A directory that is read.
pub(crate) struct Level {
    /// In its parent.
    name: CString,
    directory: Option<OwnedFd>,
    id: (u64, u64),
    buffer: Vec<u8>,
    position: usize,
    /// Where to go on reading.
    offset: i64,
    passes: u32,
}

/// What a directory says of an entry.
pub(crate) struct Entry {
    pub(crate) name: CString,
    pub(crate) kind: FileKind,
}

impl Level {
    fn new(name: CString, directory: OwnedFd) -> nix::Result<Self> {
        let id = identity(&stat(directory.as_fd())?);
        Ok(Self {
            name,
            directory: Some(directory),
            id,
            buffer: Vec::new(),
            position: 0,
            offset: 0,
            passes: 0,
        })
    }

    pub(crate) fn descriptor(&self) -> nix::Result<&OwnedFd> {
        self.directory.as_ref().ok_or(Errno::EBADF)
    }

    /// The next entry but `.` and `..`.
    pub(crate) fn next(&mut self) -> nix::Result<Option<Entry>> {
        loop {
            if self.position >= self.buffer.len() && !self.read()? {
                return Ok(None);
            }
            // struct linux_dirent64: inode (8), offset (8), length (2), type (1), name and NUL.
            let rest = self.buffer.get(self.position..).ok_or(Errno::EIO)?;
            let (head, names) = rest.split_first_chunk::<19>().ok_or(Errno::EIO)?;
            let [.., low, high, kind] = *head;
            let length = usize::from(u16::from_ne_bytes([low, high]));
            if length < head.len() {
                return Err(Errno::EIO);
            }
            let offset = head[8..16].try_into().map_err(|_| Errno::EIO)?;
            self.offset = i64::from_ne_bytes(offset);
            self.position += length;
            let name = CStr::from_bytes_until_nul(names).map_err(|_| Errno::EIO)?;
            if !matches!(name.to_bytes(), b"." | b"..") {
                return Ok(Some(Entry {
                    name: name.to_owned(),
                    kind: kind_of(kind),
                }));
            }
        }
    }

    /// `false`: there is no more.
    fn read(&mut self) -> nix::Result<bool> {
        self.buffer.resize(BUFFER, 0);
        self.position = 0;
        let directory = self.directory.as_ref().ok_or(Errno::EBADF)?.as_raw_fd();
        // SAFETY: the kernel writes at most as many bytes as the buffer has.
        let read = unsafe {
            let buffer = self.buffer.as_mut_ptr();
            libc::syscall(libc::SYS_getdents64, directory, buffer, BUFFER)
        };
        let read = match Errno::result(read) {
            // It was removed meanwhile.
            Err(Errno::ENOENT) => 0,
            read => usize::try_from(read?).unwrap_or(0),
        };
        self.buffer.truncate(read);
        Ok(read > 0)
    }

    /// Goes to where the last entry was, or to the start.
    fn seek(&mut self, offset: i64) -> nix::Result<()> {
        self.buffer.clear();
        self.position = 0;
        self.offset = offset;
        // SAFETY: lseek on a descriptor of this level.
        let sought = unsafe { libc::lseek(self.descriptor()?.as_raw_fd(), offset, libc::SEEK_SET) };
        Errno::result(sought).map(drop)
    }
}

pub(crate) fn identity(stat: &Stat) -> (u64, u64) {
    (stat.device, stat.inode)
}

fn kind_of(kind: u8) -> FileKind {
    match kind {
        libc::DT_REG => FileKind::File,
        libc::DT_DIR => FileKind::Directory,
        libc::DT_LNK => FileKind::Symlink,
        libc::DT_FIFO => FileKind::Fifo,
        libc::DT_SOCK => FileKind::Socket,
        libc::DT_CHR => FileKind::CharacterDevice,
        libc::DT_BLK => FileKind::BlockDevice,
        _ => FileKind::Unknown,
    }
}

/// The same of a mode.
pub(crate) fn kind_of_mode(mode: u32) -> FileKind {
    // IFTODT of <dirent.h>.
    u8::try_from((mode & libc::S_IFMT) >> 12).map_or(FileKind::Unknown, kind_of)
}

/// A way down a tree. The first level is its top.
pub(crate) struct Descent {
    levels: Vec<Level>,
    /// Where removed entries are not met again, reading anew from the start skips nothing.
    removing: bool,
    /// Entries that [`Descent::next`] still gives.
    left: u32,
}

impl Descent {
    pub(crate) fn new(top: OwnedFd, removing: bool) -> nix::Result<Self> {
        let levels = vec![Level::new(CString::default(), top)?];
        Ok(Self {
            levels,
            removing,
            left: MAX_ENTRIES,
        })
    }

    /// The next entry of the present level, of all that are looked at.
    pub(crate) fn next(&mut self) -> nix::Result<Option<Entry>> {
        let next = self.level()?.next()?;
        if next.is_some() {
            self.left = self.left.checked_sub(1).ok_or(Errno::E2BIG)?;
        }
        Ok(next)
    }

    pub(crate) fn level(&mut self) -> nix::Result<&mut Level> {
        self.levels.last_mut().ok_or(Errno::EIO)
    }

    /// Into a directory of the present level. `false`: it is none any more.
    pub(crate) fn enter(&mut self, name: &CStr) -> nix::Result<bool> {
        let parent = self.level()?.descriptor()?;
        let directory = match open_directory(parent, name) {
            Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => return Ok(false),
            opened => opened?,
        };
        self.levels.push(Level::new(name.to_owned(), directory)?);
        if let Some(far) = self.levels.len().checked_sub(MAX_OPEN + 1) {
            let far = &mut self.levels[far];
            far.directory = None;
            far.buffer = Vec::new();
            far.position = 0;
        }
        Ok(true)
    }

    /// Back to the parent. `None`: that was the top.
    pub(crate) fn leave(&mut self) -> nix::Result<Option<Level>> {
        let left = self.levels.pop().ok_or(Errno::EIO)?;
        let removing = self.removing;
        let Some(parent) = self.levels.last_mut() else {
            return Ok(None);
        };
        if parent.directory.is_none() {
            let found = open_directory(left.descriptor()?, c"..")?;
            // Somebody has moved it meanwhile: this is not the tree any more.
            if identity(&stat(found.as_fd())?) != parent.id {
                return Err(Errno::ESTALE);
            }
            parent.directory = Some(found);
            parent.seek(if removing { 0 } else { parent.offset })?;
        }
        Ok(Some(left))
    }

    /// The path of the present level with an entry of it.
    fn path(&self, name: &[u8]) -> Bytes {
        let mut path = Bytes::new();
        for level in self.levels.iter().skip(1) {
            path.extend_from_slice(level.name.to_bytes());
            path.push(b'/');
        }
        path.extend_from_slice(name);
        path
    }

    pub(crate) fn failed(&self, name: &CStr, errno: Errno) -> Failure {
        Failure {
            path: self.path(name.to_bytes()),
            errno,
            found: None,
        }
    }
}

pub(crate) fn open_directory(at: &OwnedFd, name: &CStr) -> nix::Result<OwnedFd> {
    let flags = libc::O_RDONLY | libc::O_DIRECTORY | libc::O_NOFOLLOW;
    open_at(Some(at.as_fd()), name, flags, 0)
}

/// Tells every entry of a directory, and with `recursive` of those in it, parents first. With
/// `skip_unreadable`, what is below and can't be read, or has a path that is too long, ends nothing.
pub(crate) fn list(
    path: &[u8],
    recursive: bool,
    skip_unreadable: bool,
    output: &mut Output,
) -> Outcome {
    let top = open_at(None, &text(path)?, libc::O_RDONLY | libc::O_DIRECTORY, 0)?;
    let mut descent = Descent::new(top, false)?;
    loop {
        let prefix = descent.path(b"");
        let failed = |errno| Failure {
            path: prefix.clone(),
            errno,
            found: None,
        };
        let skips = |errno| skip_unreadable && is_of_what_is_read(errno);
        let is_below = !prefix.is_empty();
        let next = match descent.level()?.next() {
            Err(errno) if is_below && skips(errno) => None,
            next => next.map_err(failed)?,
        };
        let Some(Entry { name, kind }) = next else {
            if descent.leave().map_err(failed)?.is_none() {
                return Ok(());
            }
            continue;
        };
        let path = [&prefix, name.to_bytes()].concat();
        if path.len() >= libc::PATH_MAX as usize {
            if skip_unreadable {
                continue;
            }
            return Err(failed(Errno::ENAMETOOLONG));
        }
        output.say(&Record::Entry { path, kind })?;
        if recursive && matches!(kind, FileKind::Directory | FileKind::Unknown) {
            match descent.enter(&name) {
                Err(errno) if skips(errno) => {}
                entered => drop(entered.map_err(|errno| descent.failed(&name, errno))?),
            }
        }
    }
}

/// Whether a failure says something of what was to be read, and not of who reads.
const fn is_of_what_is_read(errno: Errno) -> bool {
    !matches!(errno, Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM)
}

/// Removes what is at a path, with everything below it.
pub(crate) fn remove(path: &[u8], output: &Output) -> Outcome {
    let (parent, name) = parent(path, Errno::EBUSY)?;
    if is_for_a_directory(path) {
        open_at(Some(parent.as_fd()), &name, DIRECTORY | libc::O_NOFOLLOW, 0)?;
    } else if try_unlink(&parent, &name)? {
        return Ok(());
    }
    for _ in 0..MAX_PASSES {
        let emptied = match open_directory(&parent, &name) {
            Ok(top) => empty(Descent::new(top, true)?, output).map(|()| true)?,
            Err(Errno::ENOTDIR | Errno::ELOOP) => false,
            Err(errno) => return Err(errno.into()),
        };
        let flags = if emptied { libc::AT_REMOVEDIR } else { 0 };
        match unlink(parent.as_fd(), &name, flags) {
            // Something was added meanwhile, or put in its place.
            Err(Errno::ENOTEMPTY | Errno::ENOTDIR | Errno::EISDIR) => {}
            removed => return Ok(removed?),
        }
    }
    Err(Errno::ENOTEMPTY.into())
}

/// Removes everything in a directory.
fn empty(mut descent: Descent, output: &Output) -> Outcome {
    let mut count = 0_u32;
    loop {
        count = count.wrapping_add(1);
        if count.is_multiple_of(CHECK_AFTER) {
            output.check();
        }
        let next = descent.next();
        if let Some(Entry { name, kind }) = next.map_err(|errno| descent.failed(c"", errno))? {
            let removed = remove_entry(&mut descent, &name, kind);
            removed.map_err(|errno| descent.failed(&name, errno))?;
        } else if let Some(left) = descent.leave()? {
            let name = left.name.clone();
            let removed = remove_emptied(&mut descent, left);
            removed.map_err(|errno| descent.failed(&name, errno))?;
        } else {
            return Ok(());
        }
    }
}

/// Removes an entry of the present level, or goes into it.
fn remove_entry(descent: &mut Descent, name: &CStr, kind: FileKind) -> nix::Result<()> {
    let level = descent.level()?;
    let removed = kind != FileKind::Directory && unlink_if_there(level.descriptor()?, name)?;
    if !removed && !descent.enter(name)? {
        // It was a directory, and is something else by now, or nothing.
        let level = descent.level()?;
        unlink_if_there(level.descriptor()?, name)?;
    }
    Ok(())
}

fn remove_emptied(descent: &mut Descent, mut left: Level) -> nix::Result<()> {
    let parent = descent.level()?.descriptor()?;
    match unlink(parent.as_fd(), &left.name, libc::AT_REMOVEDIR) {
        // Something was added meanwhile.
        Err(Errno::ENOTEMPTY) if left.passes < MAX_PASSES => {
            left.passes += 1;
            left.seek(0)?;
            descent.levels.push(left);
            Ok(())
        }
        Err(Errno::ENOENT) => Ok(()),
        // Something else was put in its place.
        Err(Errno::ENOTDIR) => unlink_if_there(parent, &left.name).map(drop),
        removed => removed,
    }
}

/// Removes what is no directory; `false` if it is one.
fn try_unlink(parent: &OwnedFd, name: &CStr) -> nix::Result<bool> {
    match unlink(parent.as_fd(), name, 0) {
        Ok(()) => Ok(true),
        Err(Errno::EISDIR) => Ok(false),
        Err(errno) => Err(errno),
    }
}

/// The same of an entry that others may have removed meanwhile.
fn unlink_if_there(parent: &OwnedFd, name: &CStr) -> nix::Result<bool> {
    match try_unlink(parent, name) {
        Err(Errno::ENOENT) => Ok(true),
        result => result,
    }
}

/// What is met in a tree.
pub(crate) enum Found<'a> {
    /// Before anything in it is.
    Directory(&'a OwnedFd),
    Other,
}

/// Tells what is in a tree, with its path in it: its top first, parents before children, without following
/// links out of it.
pub(crate) fn visit(path: &[u8], found: &mut dyn FnMut(Found<'_>, Bytes) -> Outcome) -> Outcome {
    let top = place(path, true)?;
    found(Found::Directory(&top), Bytes::new())?;
    let top = open_directory(&top, c".")?;
    let mut descent = Descent::new(top, false)?;
    loop {
        match descent.level()?.next()? {
            Some(Entry { name, kind }) => {
                let path = descent.path(name.to_bytes());
                let may_be_directory = matches!(kind, FileKind::Directory | FileKind::Unknown);
                if may_be_directory
                    && descent
                        .enter(&name)
                        .map_err(|errno| descent.failed(&name, errno))?
                {
                    found(Found::Directory(descent.level()?.descriptor()?), path)?;
                } else if kind != FileKind::Directory {
                    found(Found::Other, path)?;
                }
            }
            None => {
                if descent.leave()?.is_none() {
                    return Ok(());
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_directory_that_others_fill_is_not_emptied_without_end() {
        let name = format!("agentvm-tree-{}", std::process::id());
        let directory = std::env::temp_dir().join(name);
        fs::create_dir(&directory).expect("made");
        for name in 0..5 {
            fs::write(directory.join(name.to_string()), "").expect("written");
        }
        let (_reader, pipe) = nix::unistd::pipe().expect("a pipe");
        let output = Output::new(pipe);
        let descent = |left| {
            let top = fs::File::open(&directory).expect("a directory");
            let descent = Descent::new(top.into(), true).expect("a descent");
            Descent { left, ..descent }
        };
        let failure = empty(descent(3), &output).expect_err("there are more");
        let left = fs::read_dir(&directory).expect("a directory").count();
        let rest = empty(descent(3), &output);
        fs::remove_dir(&directory).expect("empty");
        assert_eq!((failure.errno, left), (Errno::E2BIG, 2));
        assert!(rest.is_ok());
    }
}
