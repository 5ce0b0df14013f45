//! What an image may take of the host while it is fetched and unpacked.

use std::cell::Cell;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

use nix::sys::statvfs::statvfs;

use super::work::Work;
use super::{ImageError, Result};

/// Bounds of one image.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes of archives, packed and unpacked, and of the files that they hold; all layers together.
    pub bytes: u64,
    /// Entries of archives and directories that they imply, all layers together.
    pub entries: u64,
    /// Bytes that stay free on the store's file system.
    pub min_free: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            bytes: 64 << 30,
            entries: 2_000_000,
            min_free: 0,
        }
    }
}

impl Limits {
    /// Whether layers of so many bytes, packed, are few enough.
    pub(super) fn packed(&self, total: u64) -> Result<()> {
        if total > self.bytes {
            return Err(ImageError::TooLarge(format!(
                "its layers have {total} bytes: the limit is {}",
                self.bytes
            )));
        }
        Ok(())
    }
}

/// What an archive may have between two files: headers, and names and attributes that do not fit them.
const MAX_HEADERS: u64 = 1 << 20;

/// What is written between two looks at the disk.
const LOOK: u64 = 16 << 20;

/// What a file takes of the disk besides its content, roughly.
const OF_AN_ENTRY: u64 = 4096;

/// Bytes for each file that ext4 is made for, unless told otherwise: a file system may be full of files
/// before it is full of bytes.
pub(super) const PER_FILE: u64 = 16 << 10;

/// What is left of a file system, to an ordinary user.
#[derive(Debug, Clone, Copy)]
pub(super) struct Free {
    pub(super) bytes: u64,
    pub(super) files: u64,
}

/// Looks at the disk every so many bytes.
pub(super) struct Space {
    path: PathBuf,
    min_free: u64,
    /// The file system says how many files it has room for.
    pub(super) counts_files: bool,
    written: u64,
}

impl Space {
    /// `path` has just been made.
    pub(super) fn new(path: &Path, min_free: u64) -> Self {
        Self {
            path: path.to_owned(),
            min_free,
            counts_files: statvfs(path).is_ok_and(|disk| disk.files_available() > 0),
            written: 0,
        }
    }

    /// Fails if `bytes` more would leave too little.
    pub(super) fn check(&self, bytes: u64) -> Result<()> {
        let disk = statvfs(&self.path).map_err(|errno| {
            ImageError::host("can't look at the disk of", &self.path, errno.into())
        })?;
        let free = Free {
            bytes: disk.blocks_available().saturating_mul(disk.fragment_size()),
            files: disk.files_available(),
        };
        self.leaves(free, bytes)
    }

    pub(super) fn leaves(&self, free: Free, bytes: u64) -> Result<()> {
        if free.bytes < self.min_free.saturating_add(bytes) {
            return Err(ImageError::DiskFull {
                path: self.path.clone(),
                free: free.bytes,
                min_free: self.min_free,
            });
        }
        let min_free = self.min_free / PER_FILE;
        if self.counts_files && free.files < min_free {
            return Err(ImageError::DiskFullOfFiles {
                path: self.path.clone(),
                free: free.files,
                min_free,
            });
        }
        Ok(())
    }

    pub(super) fn wrote(&mut self, bytes: u64) -> Result<()> {
        self.written += bytes;
        if self.written < LOOK {
            return Ok(());
        }
        self.written = 0;
        self.check(0)
    }
}

/// What an unpacking has used, over all layers.
pub(super) struct Bounds {
    limits: Limits,
    entries: u64,
    /// Content of files, which may be more than the archives have: of a sparse file they name the holes.
    content: u64,
    space: Space,
    stream: Rc<Stream>,
}

/// What has been read of archives.
struct Stream {
    bytes: Cell<u64>,
    limit: u64,
    /// Of headers. `None`: no bound of their own, for the content of files.
    headers: Cell<Option<u64>>,
    work: Arc<Work>,
}

impl Bounds {
    /// For what is unpacked to `path`.
    pub(super) fn new(limits: Limits, path: &Path, work: &Arc<Work>) -> Self {
        Self {
            limits,
            entries: 0,
            content: 0,
            space: Space::new(path, limits.min_free),
            stream: Rc::new(Stream {
                bytes: Cell::new(0),
                limit: limits.bytes,
                headers: Cell::new(None),
                work: Arc::clone(work),
            }),
        }
    }

    pub(super) fn work(&self) -> &Arc<Work> {
        &self.stream.work
    }

    /// What is read of an archive is counted.
    pub(super) fn archive<R>(&self, inner: R) -> Bounded<R> {
        Bounded {
            inner,
            stream: Rc::clone(&self.stream),
        }
    }

    /// What follows is held in memory.
    pub(super) fn headers_follow(&self) {
        self.stream.headers.set(Some(MAX_HEADERS));
    }

    /// What follows is as long as it is.
    pub(super) fn content_follows(&self) {
        self.stream.headers.set(None);
    }

    pub(super) fn entry(&mut self) -> Result<()> {
        self.work().check()?;
        self.entries += 1;
        if self.entries > self.limits.entries {
            return Err(ImageError::TooLarge(format!(
                "it has more than {} files",
                self.limits.entries
            )));
        }
        self.space.wrote(OF_AN_ENTRY)
    }

    /// Content of a file, whether it is of use or not.
    pub(super) fn content(&mut self, bytes: usize) -> Result<()> {
        // The holes of a sparse file are read without reading the archive.
        self.work().check()?;
        self.content += bytes as u64;
        if self.content > self.limits.bytes {
            return Err(ImageError::TooLarge(format!(
                "its files have more than {} bytes",
                self.limits.bytes
            )));
        }
        Ok(())
    }

    pub(super) fn wrote(&mut self, bytes: usize) -> Result<()> {
        self.space.wrote(bytes as u64)
    }
}

/// Bounds what is read, and what of it the archive's reader takes into memory: names and attributes of
/// any length that come before a file.
pub(super) struct Bounded<R> {
    inner: R,
    stream: Rc<Stream>,
}

impl<R: Read> Read for Bounded<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let Stream {
            bytes,
            limit,
            headers,
            work,
        } = &*self.stream;
        work.check().map_err(io::Error::other)?;
        let n = self.inner.read(buffer)?;
        bytes.set(bytes.get() + n as u64);
        if bytes.get() > *limit {
            let problem = format!("its layers unpack to more than {limit} bytes");
            return Err(io::Error::other(ImageError::TooLarge(problem)));
        }
        if let Some(left) = headers.get() {
            let left = left.checked_sub(n as u64).ok_or_else(|| {
                io::Error::other(ImageError::TooLarge(format!(
                    "a name or an attribute has more than {MAX_HEADERS} bytes"
                )))
            })?;
            headers.set(Some(left));
        }
        Ok(n)
    }
}
