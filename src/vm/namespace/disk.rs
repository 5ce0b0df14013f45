//! What a VM's directory takes of the disk, and a limit on that by looking at it.
//!
//! The walk goes by descriptors, never by path: what is below belongs to the VM, which may exchange a
//! directory for a symbolic link at any moment.

use std::collections::HashSet;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::dir::{Dir, OwningIter, Type};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, open, openat};
use nix::sys::stat::{FileStat, Mode, fstat, fstatat};
use nix::sys::statvfs::statvfs;

use super::directory::{blocking, host};
use crate::vm::Result;

/// Directories in each other, of each of which a descriptor is open. What lies deeper is not counted.
const MAX_DEPTH: usize = 128;

/// Files with several names that are known to be counted; of more, each name counts.
const MAX_LINKED: usize = 1 << 18;

/// How often the file system is asked how full it is: one system call.
const POLL: Duration = Duration::from_millis(250);

/// Without growth of the file system, the directory is looked at so often: others may have freed what it
/// took.
const REST: Duration = Duration::from_secs(30);

/// Walking takes at most one part in so many of a CPU's time.
const PART: u32 = 10;

/// Bytes that `directory` and all below it take. What does not exist takes none.
pub async fn disk_usage(directory: &Path) -> Result<u64> {
    let directory = directory.to_owned();
    blocking(move || {
        walk(&directory).map_err(|errno| host("can't measure", &directory, errno.into()))
    })
    .await
}

fn walk(directory: &Path) -> nix::Result<u64> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let top = match open(directory, flags, Mode::empty()) {
        Err(Errno::ENOENT) => return Ok(0),
        top => top?,
    };
    let stat = fstat(&top)?;
    let device = stat.st_dev;
    let mut total = bytes(&stat);
    let mut linked = HashSet::new();
    let mut stack = vec![Level::new(top)?];
    while let Some(level) = stack.last_mut() {
        let Some(entry) = level.entries.next() else {
            stack.pop();
            continue;
        };
        let Ok(entry) = entry else { continue };
        let name = entry.file_name();
        if [c".", c".."].contains(&name) {
            continue;
        }
        // What can't be looked at has just gone, or its directory is not for this process to enter.
        let Ok(stat) = fstatat(&level.directory, name, AtFlags::AT_SYMLINK_NOFOLLOW) else {
            continue;
        };
        if stat.st_dev != device {
            continue;
        }
        let is_directory = stat.st_mode & libc::S_IFMT == libc::S_IFDIR;
        if !is_directory && stat.st_nlink > 1 {
            if linked.contains(&stat.st_ino) {
                continue;
            }
            if linked.len() < MAX_LINKED {
                linked.insert(stat.st_ino);
            }
        }
        total = total.saturating_add(bytes(&stat));
        let may_be_directory = matches!(entry.file_type(), Some(Type::Directory) | None);
        if is_directory
            && may_be_directory
            && let Ok(below) = openat(&level.directory, name, flags, Mode::empty())
        {
            if stack.len() < MAX_DEPTH {
                stack.push(Level::new(below)?);
            } else {
                tracing::warn!("a VM's directory is nested too deeply to be measured");
            }
        }
    }
    Ok(total)
}

/// A directory that is being read.
struct Level {
    directory: OwnedFd,
    entries: OwningIter,
}

impl Level {
    fn new(directory: OwnedFd) -> nix::Result<Self> {
        let entries = Dir::from_fd(
            directory
                .as_fd()
                .try_clone_to_owned()
                .map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EMFILE)))?,
        )?
        .into_iter();
        Ok(Self { directory, entries })
    }
}

fn bytes(stat: &FileStat) -> u64 {
    u64::try_from(stat.st_blocks)
        .unwrap_or(0)
        .saturating_mul(512)
}

/// Bytes of the file system that are in use.
fn in_use(directory: &Path) -> nix::Result<u64> {
    let fs = statvfs(directory)?;
    let blocks = fs.blocks().saturating_sub(fs.blocks_free());
    Ok(blocks.saturating_mul(fs.fragment_size()))
}

/// Looks at a directory as often as it could have come over a limit.
pub(super) struct Watch {
    directory: PathBuf,
    limit: u64,
}

impl Watch {
    pub(super) const fn new(directory: PathBuf, limit: u64) -> Self {
        Self { directory, limit }
    }

    /// Waits until the directory takes more than its limit, and more than `before`. Returns how much.
    pub(super) async fn exceeded(&self, mut before: u64) -> Result<u64> {
        loop {
            let began = Instant::now();
            let full = self.in_use()?;
            let used = disk_usage(&self.directory).await?;
            if used > self.limit.max(before) {
                return Ok(used);
            }
            if used <= self.limit {
                before = 0;
            }
            let took = began.elapsed();
            let room = self.limit.max(before) - used;
            let rest = REST.max(took * PART);
            let at_least = took * PART;
            loop {
                tokio::time::sleep(POLL).await;
                let waited = began.elapsed();
                let grown = self.in_use()?.saturating_sub(full);
                if waited >= rest || (grown > room && waited >= at_least) {
                    break;
                }
            }
        }
    }

    fn in_use(&self) -> Result<u64> {
        in_use(&self.directory)
            .map_err(|errno| host("can't look at the disk of", &self.directory, errno.into()))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_directory_takes_what_its_files_do_each_once_and_links_lead_nowhere() {
        let directory = tempfile::tempdir().expect("a directory");
        let elsewhere = tempfile::tempdir().expect("a directory");
        fs::write(elsewhere.path().join("big"), vec![1; 1 << 20]).expect("written");
        let path = directory.path();
        let empty = walk(path).expect("walked");
        fs::create_dir_all(path.join("a/b")).expect("made");
        fs::write(path.join("a/b/file"), vec![1; 256 << 10]).expect("written");
        fs::hard_link(path.join("a/b/file"), path.join("again")).expect("linked");
        symlink(elsewhere.path(), path.join("link")).expect("linked");
        let grown = walk(path).expect("walked") - empty;
        assert!((256 << 10..400 << 10).contains(&grown), "{grown}");
    }

    #[test]
    fn what_does_not_exist_takes_nothing() {
        assert_eq!(walk(Path::new("/nonexistent/agentvm")), Ok(0));
    }
}
