//! What a VM's directory takes of the disk, and a limit on that by looking at it.
//!
//! The walk goes by descriptors, never by path: what is below belongs to the VM, which may exchange a
//! directory for a symbolic link at any moment.

use std::collections::HashSet;
use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::dir::{Dir, OwningIter};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, open, openat};
use nix::sys::stat::{FileStat, Mode, fstat, fstatat};
use nix::sys::statvfs::statvfs;
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime};

use super::deleted;
use super::directory::{blocking, host};
use crate::vm::Result;

/// Directories in each other, of each of which a descriptor is open.
const MAX_DEPTH: usize = 128;

/// Directories that lie deeper and wait, open, for their turn. Of more, what they hold is not counted.
const MAX_DEEP: usize = 128;

/// Files with several names that are known to be counted; of more, each name counts.
const MAX_LINKED: usize = 1 << 18;

/// How often the file system is asked how full it is: one system call.
const POLL: Duration = Duration::from_millis(250);

/// Without growth of the file system, the directory is looked at so often: others may have freed what it
/// took.
const REST: Duration = Duration::from_secs(30);

/// The same of a directory that is over its limit, from which something is to be deleted.
const OVER: Duration = Duration::from_secs(1);

/// Looking for deleted files that programs have takes no longer.
const LONG: Duration = Duration::from_secs(2);

/// Walking takes at most one part in so many of a CPU's time.
const PART: u32 = 10;

/// Bytes that `directory` and all below it take. What does not exist takes none.
pub async fn disk_usage(directory: &Path) -> Result<u64> {
    let directory = directory.to_owned();
    blocking(move || measure(&directory, None).map(|measured| measured.bytes)).await
}

/// The same, for a thread that may wait, and not for longer than until `deadline`.
pub(super) fn measure(directory: &Path, deadline: Option<Instant>) -> Result<Measured> {
    walk(directory, deadline).map_err(|errno| host("can't measure", directory, errno.into()))
}

/// What was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Measured {
    pub(super) bytes: u64,
    /// Files, directories and all else that has an inode.
    pub(super) files: u64,
    /// Whether all of it was: nothing was closed to this process, too deep, or moved about meanwhile, and
    /// the time sufficed.
    pub(super) complete: bool,
}

const DIRECTORY: OFlag = OFlag::O_RDONLY
    .union(OFlag::O_DIRECTORY)
    .union(OFlag::O_NOFOLLOW)
    .union(OFlag::O_CLOEXEC);

fn walk(directory: &Path, deadline: Option<Instant>) -> nix::Result<Measured> {
    let mut walk = Walk {
        measured: Measured {
            bytes: 0,
            files: 0,
            complete: true,
        },
        began: clock_gettime(ClockId::CLOCK_REALTIME_COARSE)?,
        deadline,
        device: 0,
        linked: HashSet::new(),
        deep: Vec::new(),
    };
    let top = match open(directory, DIRECTORY, Mode::empty()) {
        Err(Errno::ENOENT) => return Ok(walk.measured),
        top => top?,
    };
    let stat = fstat(&top)?;
    walk.device = stat.st_dev;
    walk.measured.bytes = bytes(&stat);
    walk.measured.files = 1;
    let mut next = Some(top);
    while let Some(top) = next
        && !walk.is_late()
    {
        walk.below(top)?;
        next = walk.deep.pop();
    }
    Ok(walk.measured)
}

struct Walk {
    measured: Measured,
    /// By the clock of the file system's times.
    began: TimeSpec,
    deadline: Option<Instant>,
    /// Other file systems that are mounted below are not counted.
    device: u64,
    linked: HashSet<u64>,
    deep: Vec<OwnedFd>,
}

impl Walk {
    fn below(&mut self, top: OwnedFd) -> nix::Result<()> {
        let mut stack = vec![Level::new(top)?];
        while let Some(level) = stack.last_mut()
            && !self.is_late()
        {
            let Some(entry) = level.entries.next() else {
                self.leave(&level.directory)?;
                stack.pop();
                continue;
            };
            let Ok(entry) = entry else {
                self.measured.complete = false;
                continue;
            };
            let name = entry.file_name();
            if [c".", c".."].contains(&name) {
                continue;
            }
            let Some(directory) = self.count(&level.directory, name) else {
                continue;
            };
            if stack.len() < MAX_DEPTH {
                stack.push(Level::new(directory)?);
            } else if self.deep.len() < MAX_DEEP {
                self.deep.push(directory);
            } else {
                self.measured.complete = false;
            }
        }
        Ok(())
    }

    /// What was taken out of a directory before it was read to its end, or put there, may have gone to
    /// where the walk had been.
    fn leave(&mut self, directory: &OwnedFd) -> nix::Result<()> {
        let stat = fstat(directory)?;
        let changed = TimeSpec::new(stat.st_ctime, stat.st_ctime_nsec);
        self.measured.complete &= changed < self.began;
        Ok(())
    }

    fn is_late(&mut self) -> bool {
        let late = self
            .deadline
            .is_some_and(|deadline| Instant::now() > deadline);
        self.measured.complete &= !late;
        late
    }

    /// Counts one name, and opens it if it is a directory.
    fn count(&mut self, parent: &OwnedFd, name: &CStr) -> Option<OwnedFd> {
        let stat = match fstatat(parent, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            // It has just gone.
            Err(Errno::ENOENT) => return None,
            Err(_) => {
                self.measured.complete = false;
                return None;
            }
            Ok(stat) => stat,
        };
        if stat.st_dev != self.device {
            return None;
        }
        let is_directory = stat.st_mode & libc::S_IFMT == libc::S_IFDIR;
        if !is_directory && stat.st_nlink > 1 {
            if self.linked.contains(&stat.st_ino) {
                return None;
            }
            if self.linked.len() < MAX_LINKED {
                self.linked.insert(stat.st_ino);
            }
        }
        self.measured.bytes = self.measured.bytes.saturating_add(bytes(&stat));
        self.measured.files += 1;
        if !is_directory {
            return None;
        }
        match openat(parent, name, DIRECTORY, Mode::empty()) {
            // It has just been replaced.
            Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => None,
            Err(_) => {
                self.measured.complete = false;
                None
            }
            Ok(directory) => Some(directory),
        }
    }
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
    /// PID 1.
    pid: i32,
}

impl Watch {
    pub(super) const fn new(directory: PathBuf, limit: u64, pid: i32) -> Self {
        Self {
            directory,
            limit,
            pid,
        }
    }

    /// Waits until the directory takes more than its limit, and more than `before`.
    pub(super) async fn exceeded(&self, mut before: u64) -> Result<()> {
        loop {
            let began = Instant::now();
            let full = self.in_use()?;
            let used = self.used().await?;
            if used > self.limit.max(before) {
                return Ok(());
            }
            // What is tolerated sinks with what is deleted.
            before = if used <= self.limit {
                0
            } else {
                before.min(used)
            };
            let took = began.elapsed();
            let room = self.limit.max(before) - used;
            let at_least = took * PART;
            let rest = at_least.max(if before > 0 { OVER } else { REST });
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

    /// What the directory takes now, with what only programs still have.
    pub(super) async fn used(&self) -> Result<u64> {
        let (directory, pid) = (self.directory.clone(), self.pid);
        blocking(move || {
            let bytes = measure(&directory, None)?.bytes;
            let device = std::fs::metadata(&directory).map_or(0, |directory| directory.dev());
            let deadline = Instant::now() + LONG;
            Ok(bytes.saturating_add(deleted::measure(pid, device, deadline).bytes))
        })
        .await
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

    use nix::sys::stat::mkdirat;

    use super::*;

    #[test]
    fn a_directory_takes_what_its_files_do_each_once_and_links_lead_nowhere() {
        let directory = tempfile::tempdir().expect("a directory");
        let elsewhere = tempfile::tempdir().expect("a directory");
        fs::write(elsewhere.path().join("big"), vec![1; 1 << 20]).expect("written");
        let path = directory.path();
        let empty = walk(path, None).expect("walked").bytes;
        fs::create_dir_all(path.join("a/b")).expect("made");
        fs::write(path.join("a/b/file"), vec![1; 256 << 10]).expect("written");
        fs::hard_link(path.join("a/b/file"), path.join("again")).expect("linked");
        symlink(elsewhere.path(), path.join("link")).expect("linked");
        settle();
        let grown = walk(path, None).expect("walked");
        assert!(grown.complete);
        // The top, two directories, a file with two names and a link.
        assert_eq!(grown.files, 5);
        let grown = grown.bytes - empty;
        assert!((256 << 10..400 << 10).contains(&grown), "{grown}");
    }

    #[test]
    fn what_lies_deeper_than_descriptors_would_do_is_counted() {
        let directory = tempfile::tempdir().expect("a directory");
        let top = directory.path();
        let mut at = open(top, DIRECTORY, Mode::empty()).expect("open");
        for _ in 0..2000 {
            mkdirat(&at, "d", Mode::S_IRWXU).expect("made");
            at = openat(&at, "d", DIRECTORY, Mode::empty()).expect("entered");
        }
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT;
        let file = openat(&at, "file", flags, Mode::S_IRWXU).expect("made");
        nix::unistd::write(&file, &vec![1; 1 << 20]).expect("written");
        settle();
        let measured = walk(top, None).expect("walked");
        assert!(measured.complete);
        assert!(measured.bytes >= 1 << 20, "{measured:?}");
        super::super::removal::remove_tree(top).expect("removed");
    }

    #[test]
    fn what_was_moved_while_the_walk_was_under_way_makes_it_incomplete() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path();
        for name in ["a", "b"] {
            fs::create_dir(path.join(name)).expect("made");
        }
        fs::write(path.join("a/file"), "moved").expect("written");
        settle();
        assert!(walk(path, None).expect("walked").complete);
        let (from, to) = (path.join("a/file"), path.join("b/file"));
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    fs::rename(&from, &to).expect("moved");
                    fs::rename(&to, &from).expect("moved back");
                }
            });
            let found = (0..10_000).any(|_| !walk(path, None).expect("walked").complete);
            done.store(true, std::sync::atomic::Ordering::Relaxed);
            assert!(found);
        });
    }

    #[test]
    fn a_walk_ends_when_its_time_has_passed() {
        let directory = tempfile::tempdir().expect("a directory");
        fs::write(directory.path().join("file"), vec![1; 1 << 20]).expect("written");
        settle();
        let measured = walk(directory.path(), Some(Instant::now())).expect("walked");
        assert!(!measured.complete);
        assert!(measured.bytes < 1 << 20, "{measured:?}");
    }

    /// The times of files advance by ticks of the kernel's clock.
    fn settle() {
        std::thread::sleep(Duration::from_millis(20));
    }

    #[test]
    fn what_does_not_exist_takes_nothing() {
        let nothing = walk(Path::new("/nonexistent/agentvm"), None);
        assert_eq!(nothing.map(|measured| measured.bytes), Ok(0));
    }
}
