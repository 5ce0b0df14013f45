//! What is told of files, as JSON.
//!
//! A name that is not UTF-8 is there twice: as text, with replacement characters, and as a text of one
//! character for each byte (Latin-1), which `lib/files.ts` turns into bytes.

use std::borrow::Cow;

use serde::Serialize;

use super::record::text;
use crate::vm::files::{Event, FileKind, Record, Stat, Time};

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct StatJson {
    r#type: &'static str,
    size: u64,
    mode: u32,
    uid: u32,
    gid: u32,
    nlink: u64,
    blocks: u64,
    atime_ms: f64,
    mtime_ms: f64,
    ctime_ms: f64,
}

pub(super) fn stat(stat: &Stat) -> String {
    text(&StatJson {
        r#type: type_of(stat.mode),
        size: stat.size,
        mode: stat.mode & 0o7777,
        uid: stat.uid,
        gid: stat.gid,
        nlink: stat.links,
        blocks: stat.blocks,
        atime_ms: milliseconds(stat.accessed),
        mtime_ms: milliseconds(stat.modified),
        ctime_ms: milliseconds(stat.changed),
    })
}

#[expect(
    clippy::cast_precision_loss,
    reason = "JavaScript's numbers: exact to a microsecond for some centuries"
)]
fn milliseconds(time: Time) -> f64 {
    (time.seconds as f64).mul_add(1000.0, f64::from(time.nanoseconds) / 1_000_000.0)
}

const fn type_of(mode: u32) -> &'static str {
    name(match mode & libc::S_IFMT {
        libc::S_IFREG => FileKind::File,
        libc::S_IFDIR => FileKind::Directory,
        libc::S_IFLNK => FileKind::Symlink,
        libc::S_IFIFO => FileKind::Fifo,
        libc::S_IFSOCK => FileKind::Socket,
        libc::S_IFCHR => FileKind::CharacterDevice,
        libc::S_IFBLK => FileKind::BlockDevice,
        _ => FileKind::Unknown,
    })
}

const fn name(kind: FileKind) -> &'static str {
    match kind {
        FileKind::File => "file",
        FileKind::Directory => "directory",
        FileKind::Symlink => "symlink",
        FileKind::Fifo => "fifo",
        FileKind::Socket => "socket",
        FileKind::CharacterDevice => "characterDevice",
        FileKind::BlockDevice => "blockDevice",
        FileKind::Unknown => "unknown",
    }
}

#[derive(Default, Serialize)]
#[serde(rename_all = "camelCase")]
struct RecordJson<'a> {
    r#type: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    path: Option<Cow<'a, str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    raw_path: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    from: Option<Cow<'a, str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    raw_from: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    directory: Option<bool>,
}

impl<'a> RecordJson<'a> {
    fn of(r#type: &'static str, path: &'a [u8]) -> Self {
        let (path, raw_path) = both(path);
        Self {
            r#type,
            path: Some(path),
            raw_path,
            ..Self::default()
        }
    }

    fn event(r#type: &'static str, path: &'a [u8], directory: bool) -> Self {
        Self {
            directory: Some(directory),
            ..Self::of(r#type, path)
        }
    }
}

fn both(bytes: &[u8]) -> (Cow<'_, str>, Option<String>) {
    let shown = String::from_utf8_lossy(bytes);
    let raw = std::str::from_utf8(bytes).is_err();
    let raw = raw.then(|| bytes.iter().copied().map(char::from).collect());
    (shown, raw)
}

/// An array of entries, or events.
pub(super) fn records(records: &[Record]) -> String {
    let json: Vec<_> = records.iter().filter_map(record).collect();
    text(&json)
}

/// `None`: of those that are told in another way.
fn record(record: &Record) -> Option<RecordJson<'_>> {
    Some(match record {
        Record::Entry { path, kind } => RecordJson::of(name(*kind), path),
        Record::Event(Event::Created { path, directory }) => {
            RecordJson::event("created", path, *directory)
        }
        Record::Event(Event::Modified { path }) => RecordJson::event("modified", path, false),
        Record::Event(Event::Attributes { path, directory }) => {
            RecordJson::event("attributes", path, *directory)
        }
        Record::Event(Event::Deleted { path, directory }) => {
            RecordJson::event("deleted", path, *directory)
        }
        Record::Event(Event::Moved {
            from,
            path,
            directory,
        }) => {
            let (from, raw_from) = both(from);
            RecordJson {
                from: Some(from),
                raw_from,
                ..RecordJson::event("moved", path, *directory)
            }
        }
        Record::Event(Event::Overflow) => RecordJson {
            r#type: "overflow",
            ..RecordJson::default()
        },
        Record::Watching | Record::Failed { .. } | Record::Done => return None,
    })
}
