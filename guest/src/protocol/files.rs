//! File operations, and the records that long ones send through a pipe.

use serde::{Deserialize, Serialize};

use super::{Bytes, decode, encode};

/// What [`super::Request::File`] asks for. Symlinks on the way to a path are followed inside the VM's
/// root; magic links never are.
#[derive(Debug, Serialize, Deserialize)]
pub enum FileOp {
    Stat {
        path: Bytes,
        /// Of what a symlink at the end leads to.
        follow: bool,
    },
    MakeDir {
        path: Bytes,
        mode: u32,
        /// With missing parents; a directory that exists is fine.
        parents: bool,
    },
    Rename {
        from: Bytes,
        to: Bytes,
        /// Otherwise `EEXIST` if there is something at `to`.
        replace: bool,
    },
    /// A file, a symlink, or an empty directory.
    Remove {
        path: Bytes,
    },
    SetMode {
        path: Bytes,
        mode: u32,
    },
    /// Descriptor: the file. Whoever may change what is at its path changes nothing else.
    SetModeOf {
        mode: u32,
    },
    /// Gives a file its mode, and another path in place of what is there. Descriptor: the file, which has
    /// to be at `from` (otherwise `ESTALE`).
    PutInPlace {
        from: Bytes,
        to: Bytes,
        mode: Option<u32>,
    },
    SetOwner {
        path: Bytes,
        uid: Option<u32>,
        gid: Option<u32>,
        follow: bool,
    },
    /// `None` leaves a time as it is.
    SetTimes {
        path: Bytes,
        accessed: Option<Time>,
        modified: Option<Time>,
        follow: bool,
    },
    Symlink {
        target: Bytes,
        path: Bytes,
    },
    ReadLink {
        path: Bytes,
    },
    RealPath {
        path: Bytes,
    },
    /// Descriptor: a pipe for [`Record::Entry`]s.
    List {
        path: Bytes,
        recursive: bool,
        /// Directories below that can't be read are told, and no failure.
        skip_unreadable: bool,
    },
    /// A path with everything below it. Descriptor: a pipe for its end.
    RemoveTree {
        path: Bytes,
    },
    /// Descriptor: a pipe for its end.
    Copy {
        from: Bytes,
        to: Bytes,
        recursive: bool,
        /// Otherwise `EEXIST` if there is something, other than a directory for a directory.
        replace: bool,
    },
    /// Descriptor: a pipe for [`Record::Event`]s. Goes on until its other end closes.
    Watch {
        path: Bytes,
        recursive: bool,
    },
}

/// What a short operation found. One that finds nothing is [`super::Reply::Done`].
#[derive(Debug, Serialize, Deserialize)]
pub enum FileAnswer {
    Stat(Stat),
    Path(Bytes),
}

/// `struct stat`, with the ids of the VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stat {
    /// `st_mode`, with the type.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub size: u64,
    /// Of 512 bytes.
    pub blocks: u64,
    pub links: u64,
    pub device: u64,
    pub inode: u64,
    pub accessed: Time,
    pub modified: Time,
    pub changed: Time,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Time {
    pub seconds: i64,
    pub nanoseconds: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileKind {
    File,
    Directory,
    Symlink,
    Fifo,
    Socket,
    CharacterDevice,
    BlockDevice,
    /// The file system does not say.
    Unknown,
}

/// One message of a long operation. Paths are relative to the path of the operation; empty: itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Record {
    Entry {
        path: Bytes,
        kind: FileKind,
    },
    /// A watch is in force.
    Watching,
    Event(Event),
    /// The last record of an operation that failed.
    Failed {
        path: Bytes,
        errno: i32,
        /// What is there, if it failed for that.
        found: Option<FileKind>,
    },
    /// The last record of one that did not.
    Done,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    Created {
        path: Bytes,
        directory: bool,
    },
    Modified {
        path: Bytes,
    },
    /// Mode, owner, times or links.
    Attributes {
        path: Bytes,
        directory: bool,
    },
    Deleted {
        path: Bytes,
        directory: bool,
    },
    /// Within what is watched; what comes from outside, or goes there, is created or deleted.
    Moved {
        from: Bytes,
        path: Bytes,
        directory: bool,
    },
    /// Events were lost: there were more than the kernel keeps.
    Overflow,
}

/// Largest record: two paths (`PATH_MAX` each) and a few numbers.
pub const MAX_RECORD: usize = 2 * 4096 + 64;

/// A record as it goes through the pipe: its length in two bytes (little-endian), then itself. `None`:
/// it is too long.
#[must_use]
pub fn framed(record: &Record) -> Option<Vec<u8>> {
    let body = encode(record)?;
    if body.len() > MAX_RECORD {
        return None;
    }
    let length = u16::try_from(body.len()).ok()?;
    Some([&length.to_le_bytes()[..], &body].concat())
}

/// Puts records together from what comes out of a pipe. Holds less than one record and the last chunk.
#[derive(Debug, Default)]
pub struct Records {
    buffer: Vec<u8>,
    read: usize,
}

/// The bytes are no records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Malformed;

impl Records {
    /// Adds what was read. To be called when [`Records::next`] has none left.
    pub fn add(&mut self, chunk: &[u8]) {
        self.buffer.drain(..self.read);
        self.read = 0;
        self.buffer.extend_from_slice(chunk);
    }

    /// The next whole record.
    ///
    /// # Errors
    /// What follows is no record, and nothing after it can be one.
    #[expect(clippy::should_implement_trait, reason = "`None` is not the end")]
    pub fn next(&mut self) -> Result<Option<Record>, Malformed> {
        let Some((length, rest)) = self.buffer[self.read..].split_first_chunk::<2>() else {
            return Ok(None);
        };
        let length = usize::from(u16::from_le_bytes(*length));
        if length > MAX_RECORD {
            return Err(Malformed);
        }
        let Some(body) = rest.get(..length) else {
            return Ok(None);
        };
        let record = decode(body).ok_or(Malformed)?;
        self.read += 2 + length;
        Ok(Some(record))
    }

    /// Whether nothing of a record is left over.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.read == self.buffer.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &str) -> Record {
        Record::Entry {
            path: name.into(),
            kind: FileKind::File,
        }
    }

    #[test]
    fn records_come_out_as_they_went_in_however_they_are_cut() {
        let sent = [entry("a"), entry(&"b".repeat(4096)), Record::Done];
        let bytes: Vec<u8> = sent
            .iter()
            .flat_map(|r| framed(r).expect("short"))
            .collect();
        for size in [1, 2, 3, 1000, bytes.len()] {
            let mut records = Records::default();
            let mut came = Vec::new();
            for chunk in bytes.chunks(size) {
                records.add(chunk);
                while let Some(record) = records.next().expect("records") {
                    came.push(record);
                }
            }
            assert_eq!(came, sent);
            assert!(records.is_empty());
        }
    }

    #[test]
    fn a_length_over_the_limit_is_malformed_at_once() {
        let mut records = Records::default();
        records.add(&u16::MAX.to_le_bytes());
        assert_eq!(records.next(), Err(Malformed));
    }
}
