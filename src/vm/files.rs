//! The files of a VM. Every path is resolved by the guest, in its own root and as the user who asks.

use std::fs::File;

use agentvm_guest::protocol::files::Records;
pub use agentvm_guest::protocol::files::{Event, FileKind, Record, Stat, Time};
use async_trait::async_trait;
use nix::errno::Errno;
use tokio::sync::OwnedSemaphorePermit;

use super::file::Transfers;
use super::{GuestPath, Result, User, VmError};
use crate::pipe::{self, PipeEnd};

/// How to open a file for writing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Write {
    /// Make it, or empty it.
    Replace,
    /// Make it, or write behind what it holds.
    Append,
    /// Make it; `EEXIST` if there is something.
    New,
}

/// Mode of a file that is made, before the umask (022).
pub const FILE_MODE: u32 = 0o666;
/// The same of a directory.
pub const DIRECTORY_MODE: u32 = 0o777;

/// What changes files and finds nothing.
#[derive(Debug, Clone)]
pub enum Change {
    MakeDirectory {
        path: GuestPath,
        mode: u32,
        /// With missing parents; a directory that exists is fine.
        parents: bool,
    },
    Move {
        from: GuestPath,
        to: GuestPath,
        /// Otherwise `EEXIST` if there is something.
        replace: bool,
    },
    /// A file, a symlink, or an empty directory.
    Remove(GuestPath),
    SetMode {
        path: GuestPath,
        mode: u32,
    },
    /// Ids of the VM; `None` leaves one as it is.
    SetOwner {
        path: GuestPath,
        uid: Option<u32>,
        gid: Option<u32>,
        follow: bool,
    },
    /// `None` leaves one as it is.
    SetTimes {
        path: GuestPath,
        accessed: Option<Time>,
        modified: Option<Time>,
        follow: bool,
    },
    Symlink {
        /// As it is to be read, not resolved now.
        target: Vec<u8>,
        path: GuestPath,
    },
}

/// What goes on for as long as its [`Answers`] are read.
#[derive(Debug, Clone)]
pub enum Task {
    /// Tells a [`Record::Entry`] for each entry of a directory, and with `recursive` for those below.
    List {
        path: GuestPath,
        recursive: bool,
        /// Of directories below that can't be read, tells them alone, and does not fail.
        skip_unreadable: bool,
        /// Who reads it takes all the time that they want, and may wait for another task meanwhile.
        at_leisure: bool,
    },
    /// Removes a path with everything below it.
    RemoveTree(GuestPath),
    /// Copies a path: a symlink as one, with `recursive` a directory with everything in it. What is in the
    /// way is replaced, but directories, if that is wanted; otherwise `EEXIST`.
    Copy {
        from: GuestPath,
        to: GuestPath,
        recursive: bool,
        replace: bool,
    },
    /// Tells [`Record::Watching`], then every [`Record::Event`] from then on.
    Watch { path: GuestPath, recursive: bool },
}

impl Task {
    pub(super) const fn op(&self) -> &'static str {
        match self {
            Self::List { .. } => "can't list",
            Self::RemoveTree(_) => "can't delete",
            Self::Copy { .. } => "can't copy",
            Self::Watch { .. } => "can't watch",
        }
    }

    pub(super) const fn path(&self) -> &GuestPath {
        match self {
            Self::List { path, .. }
            | Self::RemoveTree(path)
            | Self::Copy { from: path, .. }
            | Self::Watch { path, .. } => path,
        }
    }
}

/// File operations of a running VM. Short ones are done one after the other.
#[async_trait]
pub trait Files: Send + Sync {
    /// Of what a symlink at `path` leads to, with `follow`.
    async fn stat(&self, path: &GuestPath, follow: bool, user: User) -> Result<Stat>;

    async fn change(&self, change: &Change, user: User) -> Result<()>;

    /// What a symlink holds.
    async fn read_link(&self, path: &GuestPath, user: User) -> Result<Vec<u8>>;

    /// The path without symlinks, `.` and `..` in it.
    async fn real_path(&self, path: &GuestPath, user: User) -> Result<Vec<u8>>;

    /// Opens a file for writing. The descriptor is checked to be a regular file.
    async fn open_to_write(
        &self,
        path: &GuestPath,
        how: Write,
        mode: u32,
        user: User,
    ) -> Result<File>;

    /// Sets the mode of a file that was opened at `path`, whatever is there by now.
    async fn set_mode_of(&self, file: &File, path: &GuestPath, mode: u32, user: User)
    -> Result<()>;

    /// Moves a file that was made at `from` to `to`, over what is there, with `mode` if it is given.
    /// `ESTALE` if something else is at `from` by now.
    async fn put_in_place(
        &self,
        file: &File,
        from: &GuestPath,
        to: &GuestPath,
        mode: Option<u32>,
        user: User,
    ) -> Result<()>;

    /// What there may be at a time of what reads and writes its files.
    fn transfers(&self) -> &Transfers;

    /// Begins a task beside everything else. 16 of those that end by themselves are under way at a time, and
    /// others wait; of those that last as long as their reader likes, 64 watches and 256 lists: one more is
    /// `EMFILE`. Dropping what this returns ends the task.
    async fn begin(&self, task: Task, user: User) -> Result<Answers>;
}

/// What a [`Task`] tells. Its other end is written by a process that the host does not trust: it holds
/// one chunk, and nothing is read before it is asked for.
#[derive(Debug)]
pub struct Answers {
    pipe: pipe::Reader,
    records: Records,
    task: Task,
    ended: bool,
    _permit: OwnedSemaphorePermit,
}

impl Answers {
    pub(super) fn new(
        pipe: PipeEnd,
        task: Task,
        permit: OwnedSemaphorePermit,
    ) -> std::io::Result<Self> {
        Ok(Self {
            pipe: pipe::Reader::new(pipe)?,
            records: Records::default(),
            task,
            ended: false,
            _permit: permit,
        })
    }

    /// The next record but the last; `None` at the end. Dropping the future loses nothing.
    pub async fn next(&mut self) -> Result<Option<Record>> {
        loop {
            if let Some(record) = self.ready()? {
                return Ok(Some(record));
            }
            if self.ended {
                return Ok(None);
            }
            let chunk = self.pipe.next().await.map_err(|error| {
                self.failed(
                    &[],
                    Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)),
                )
            })?;
            if chunk.is_empty() {
                // Its worker was killed, or the whole VM was.
                return Err(VmError::Interrupted {
                    op: self.task.op(),
                    path: self.task.path().as_str().to_owned(),
                });
            }
            self.records.add(&chunk);
        }
    }

    /// The next record that has been read already.
    pub fn ready(&mut self) -> Result<Option<Record>> {
        if self.ended {
            return Ok(None);
        }
        match self.records.next() {
            Ok(Some(Record::Done)) => {
                self.ended = true;
                Ok(None)
            }
            Ok(Some(Record::Failed { path, errno, found })) => {
                self.ended = true;
                Err(match found {
                    Some(found) => VmError::Uncopyable {
                        path: with(self.task.path(), &path),
                        found: name_of(found),
                    },
                    None => self.failed(&path, Errno::from_raw(errno)),
                })
            }
            Ok(record) if record.as_ref().is_none_or(leads_below) => Ok(record),
            Ok(_) | Err(_) => {
                self.ended = true;
                Err(VmError::Protocol("records that are none".to_owned()))
            }
        }
    }

    fn failed(&self, below: &[u8], errno: Errno) -> VmError {
        let op = self.task.op();
        let path = with(self.task.path(), below);
        match &self.task {
            Task::Watch { .. } => VmError::Watch { path, errno },
            Task::Copy { to, .. } => VmError::Relocate {
                op,
                from: path,
                to: with(to, below),
                errno,
            },
            Task::List { .. } | Task::RemoveTree(_) => VmError::File { op, path, errno },
        }
    }
}

/// A path with what is below it, for a message.
fn with(path: &GuestPath, below: &[u8]) -> String {
    let mut path = path.as_str().to_owned();
    if !below.is_empty() {
        path.push('/');
        path.push_str(&String::from_utf8_lossy(below));
    }
    path
}

/// For a message.
const fn name_of(kind: FileKind) -> &'static str {
    match kind {
        FileKind::Fifo => "a FIFO",
        FileKind::Socket => "a socket",
        FileKind::CharacterDevice | FileKind::BlockDevice => "a device",
        FileKind::File | FileKind::Directory | FileKind::Symlink | FileKind::Unknown => {
            "something else"
        }
    }
}

/// Whether paths lead to nothing but what is below the path that was asked for. Callers may put them
/// behind a directory of the host's.
fn leads_below(record: &Record) -> bool {
    let name = |name: &[u8]| !matches!(name, b"" | b"." | b"..") && !name.contains(&0);
    let below = |path: &[u8]| path.split(|byte| *byte == b'/').all(name);
    let here = |path: &[u8]| path.is_empty() || below(path);
    match record {
        Record::Entry { path, .. } => below(path),
        Record::Event(
            Event::Created { path, .. }
            | Event::Modified { path }
            | Event::Attributes { path, .. }
            | Event::Deleted { path, .. },
        ) => here(path),
        Record::Event(Event::Moved { from, path, .. }) => here(from) && here(path),
        Record::Event(Event::Overflow)
        | Record::Watching
        | Record::Failed { .. }
        | Record::Done => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_that_leads_elsewhere_is_none_of_a_listing() {
        let entry = |path: &[u8]| Record::Entry {
            path: path.to_vec(),
            kind: FileKind::File,
        };
        for path in [&b"a"[..], b"a/b", b"...", b"a\xff"] {
            assert!(leads_below(&entry(path)), "{path:?}");
        }
        for path in [
            &b""[..],
            b"/a",
            b"..",
            b"a/../../b",
            b"a//b",
            b"a/",
            b"./a",
            b"a\0b",
        ] {
            assert!(!leads_below(&entry(path)), "{path:?}");
        }
        let moved = Record::Event(Event::Moved {
            from: b"../a".to_vec(),
            path: Vec::new(),
            directory: false,
        });
        assert!(!leads_below(&moved));
    }
}
