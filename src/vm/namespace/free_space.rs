//! Keeps space free on the file systems that VMs lie on, for their stores and for whoever else uses them:
//! when too little is left, what a VM runs that goes on growing is killed.
//!
//! A file system may be full of files before it is full of bytes: it has a fixed number of inodes. Then each
//! that is free counts as so many bytes ([`PER_FILE`]), and each that a VM takes, too.
//!
//! A VM can hide what it takes, from a walk over its files, for a while: by moving files about, or by
//! having very many. When half of the space is gone, too, and nobody is seen to grow, those that can't be
//! told are taken to be the ones.
//!
//! One task for each file system, as long as a VM runs there that is to leave space free.

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use nix::sys::statvfs::statvfs;
use tokio::task::{JoinHandle, JoinSet};

use super::control::Control;
use super::deleted;
use super::directory::{blocking, host};
use super::disk;
use super::limits::Limiter;
use crate::vm::Result;
use crate::vm::limits::Reached;

/// What is kept free unless told otherwise: this share of the file system, and this much at most.
const SHARE: u64 = 64;
const MOST: u64 = 512 << 20;

/// Bytes for each file that ext4 is made for, unless told otherwise.
const PER_FILE: u64 = 16 << 10;

/// Bytes a second that nothing writes faster than, page cache included, nor makes as many files as
/// stand for so many. Looking is due when it could have
/// used up what is free.
const FASTEST: u64 = 4 << 30;

/// Between two looks at the file system: one system call.
const SHORTEST: Duration = Duration::from_millis(25);
const LONGEST: Duration = Duration::from_secs(1);

/// Who has grown by more between two measurements, so far apart, is one that goes on growing.
const GROWTH: u64 = 64 << 10;
const APART: Duration = Duration::from_millis(50);

/// Who has grown by more than this part of the floor since it was reached goes on growing, too, if slowly.
const SLOW: u64 = 64;

/// One measurement of one VM's files takes no longer.
const LONG: Duration = Duration::from_millis(500);

/// Measuring takes at most one part in so many of a CPU's time.
const PART: u32 = 10;

/// Durable parts of a VM's directory: what its own programs can fill. The store beside them is the host's.
const PARTS: [&str; 4] = ["home", "var", "root", "layers"];

/// How much the file system of a directory, which need not exist yet, is to keep free.
#[must_use]
pub fn floor(wanted: Option<u64>, directory: &Path) -> u64 {
    wanted.unwrap_or_else(|| {
        let disk = directory.ancestors().find_map(|path| statvfs(path).ok());
        let total = disk.map_or(0, |disk| disk.blocks().saturating_mul(disk.fragment_size()));
        (total / SHARE).min(MOST)
    })
}

/// Watches over a VM until it ends.
pub(super) fn watch(
    directory: &Path,
    floor: u64,
    pid: i32,
    limiter: &Arc<Limiter>,
    control: &Arc<Control>,
) -> Result<()> {
    if floor == 0 {
        return Ok(());
    }
    let device = device(directory)?;
    // The VM has just made some.
    let counts_files = statvfs(directory).is_ok_and(|disk| disk.files_available() > 0);
    let mut disks = disks();
    let disk = disks.entry(device).or_default();
    disk.watched.retain(Watched::runs);
    disk.watched.push(Watched {
        directory: directory.to_owned(),
        floor,
        counts_files,
        pid,
        limiter: Arc::downgrade(limiter),
        control: Arc::downgrade(control),
    });
    // It ends with the runtime that it was started in, if not before.
    if disk.task.as_ref().is_none_or(JoinHandle::is_finished) {
        disk.task = Some(tokio::spawn(look_after(device)));
    }
    Ok(())
}

/// One file system.
#[derive(Default)]
struct Disk {
    watched: Vec<Watched>,
    task: Option<JoinHandle<()>>,
}

#[derive(Clone)]
struct Watched {
    directory: PathBuf,
    floor: u64,
    /// The file system says how many files it has room for.
    counts_files: bool,
    /// PID 1.
    pid: i32,
    limiter: Weak<Limiter>,
    control: Weak<Control>,
}

impl Watched {
    /// A VM that has ended may still be somebody's.
    fn runs(&self) -> bool {
        self.control
            .upgrade()
            .is_some_and(|control| control.is_connected())
    }
}

fn device(directory: &Path) -> Result<u64> {
    std::fs::metadata(directory)
        .map(|directory| directory.dev())
        .map_err(|error| host("can't look at the disk of", directory, error))
}

/// By device.
fn disks() -> MutexGuard<'static, HashMap<u64, Disk>> {
    static DISKS: LazyLock<Mutex<HashMap<u64, Disk>>> = LazyLock::new(Mutex::default);
    DISKS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// `None`: nobody any more.
fn watched(device: u64) -> Option<Vec<Watched>> {
    let mut disks = disks();
    let watched = &mut disks.get_mut(&device)?.watched;
    watched.retain(Watched::runs);
    if watched.is_empty() {
        disks.remove(&device);
        return None;
    }
    Some(watched.clone())
}

async fn look_after(device: u64) {
    let mut since = None;
    while let Some(watched) = watched(device) {
        let Some(free) = free(&watched).await else {
            // Their directories were removed under them.
            tokio::time::sleep(LONGEST).await;
            continue;
        };
        let (short, enough): (Vec<_>, Vec<_>) = watched
            .into_iter()
            .partition(|watched| watched.floor > free.bytes);
        let pause = if short.is_empty() {
            since = None;
            let floor = enough.iter().map(|watched| watched.floor).max();
            due(free.bytes - floor.unwrap_or(0))
        } else {
            let began = Instant::now();
            if since
                .as_ref()
                .is_none_or(|at: &AtFirst| at.per_file != free.per_file)
            {
                since = Some(AtFirst::new(free.per_file));
            }
            if let Some(at_first) = &mut since {
                stop_growing(short, at_first).await;
            }
            (began.elapsed().saturating_sub(APART) * PART).max(SHORTEST)
        };
        tokio::time::sleep(pause).await;
    }
}

/// When so many bytes could have been written.
fn due(bytes: u64) -> Duration {
    #[expect(clippy::cast_precision_loss, reason = "an estimate")]
    let seconds = bytes as f64 / FASTEST as f64;
    Duration::from_secs_f64(seconds).clamp(SHORTEST, LONGEST)
}

/// What is left of a file system, to an ordinary user.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Free {
    /// In bytes, or in files that stand for them if fewer of these are left.
    bytes: u64,
    /// What a file counts as: nothing, unless files are what it is short of.
    per_file: u64,
}

impl Free {
    /// `of_files`: how many there are, or 0: any number.
    fn new(bytes: u64, files: u64, of_files: u64) -> Self {
        let in_files = files.saturating_mul(PER_FILE);
        if of_files > 0 && in_files < bytes {
            Self {
                bytes: in_files,
                per_file: PER_FILE,
            }
        } else {
            Self { bytes, per_file: 0 }
        }
    }
}

async fn free(watched: &[Watched]) -> Option<Free> {
    let watched = watched.to_vec();
    let free = blocking(move || {
        Ok(watched.iter().find_map(|watched| {
            let disk = statvfs(&watched.directory).ok()?;
            let bytes = disk.blocks_available().saturating_mul(disk.fragment_size());
            let of_files = if watched.counts_files {
                disk.files()
            } else {
                0
            };
            Some(Free::new(bytes, disk.files_available(), of_files))
        }))
    });
    free.await.ok().flatten()
}

/// What was taken when too little had just become free.
struct AtFirst {
    /// What each file counts as.
    per_file: u64,
    /// By PID 1.
    vms: HashMap<i32, u64>,
    /// Of the file system.
    all: Option<u64>,
}

impl AtFirst {
    fn new(per_file: u64) -> Self {
        Self {
            per_file,
            vms: HashMap::new(),
            all: None,
        }
    }
}

/// Kills what runs in those that go on growing.
async fn stop_growing(watched: Vec<Watched>, at_first: &mut AtFirst) {
    let before = measure(watched.clone(), at_first.per_file).await;
    tokio::time::sleep(APART).await;
    let after = measure(watched.clone(), at_first.per_file).await;
    // Measuring may have taken longer than the lack lasted.
    let Some(free) = self::free(&watched).await else {
        return;
    };
    // All at once: who has to be ended for it takes some seconds.
    let mut kills = JoinSet::new();
    let mut hidden = Vec::new();
    let mut hidden_growth = false;
    for (watched, (before, after)) in watched.into_iter().zip(before.into_iter().zip(after)) {
        let (before, after) = match (before, after) {
            (Ok(before), Ok(after)) => (before, after),
            (Err(error), _) | (_, Err(error)) => {
                tracing::warn!(%error, "a VM's growth can't be told");
                continue;
            }
        };
        let slowly = watched.floor / SLOW;
        let first = *at_first.vms.entry(watched.pid).or_insert(before.bytes);
        if free.bytes >= watched.floor {
            continue;
        }
        if grown(before.bytes, after.bytes, first, slowly) {
            kills.spawn(kill(watched, |reached| reached.free_disk += 1));
        } else if !after.complete && free.bytes < watched.floor / 2 {
            let first = *at_first.all.get_or_insert(before.all);
            hidden_growth |= grown(before.all, after.all, first, slowly);
            hidden.push(watched);
        }
    }
    if hidden_growth && kills.is_empty() {
        at_first.all = None;
        for watched in hidden {
            kills.spawn(kill(watched, |reached| reached.free_disk_unseen += 1));
        }
    }
    drop(kills.join_all().await);
}

/// At once, or by little at a time.
fn grown(before: u64, after: u64, first: u64, slowly: u64) -> bool {
    after > before.saturating_add(GROWTH) || after > first.saturating_add(slowly)
}

async fn kill(watched: Watched, count: fn(&mut Reached)) {
    if let (Some(limiter), Some(control)) = (watched.limiter.upgrade(), watched.control.upgrade())
        && let Err(error) = limiter.kill_all(&control, count).await
    {
        tracing::debug!(%error, "a VM that fills the disk has just ended");
    }
}

/// What a VM takes, and what all of its file system is taken.
#[derive(Debug, Clone, Copy)]
struct Size {
    bytes: u64,
    /// Whether there can't be more than was seen.
    complete: bool,
    all: u64,
}

async fn measure(watched: Vec<Watched>, per_file: u64) -> Vec<Result<Size>> {
    let sizes = blocking(move || Ok(watched.iter().map(|of| size(of, per_file)).collect()));
    // It panicked, then; who waits for it is not to.
    sizes.await.unwrap_or_default()
}

fn size(watched: &Watched, per_file: u64) -> Result<Size> {
    let disk = statvfs(&watched.directory).map_err(|errno| {
        host(
            "can't look at the disk of",
            &watched.directory,
            errno.into(),
        )
    })?;
    let deadline = Instant::now() + LONG;
    let deleted = deleted::measure(watched.pid, device(&watched.directory)?, deadline);
    let all = disk.blocks().saturating_sub(disk.blocks_free()) * disk.fragment_size();
    let all_files = disk.files().saturating_sub(disk.files_free());
    let with_files = |bytes: u64, files: u64| bytes.saturating_add(files.saturating_mul(per_file));
    let mut size = Size {
        bytes: with_files(deleted.bytes, deleted.files),
        complete: deleted.complete,
        all: with_files(all, all_files),
    };
    let deadline = Instant::now() + LONG;
    for part in PARTS {
        // One that is closed to this process is the VM's own doing.
        match disk::measure(&watched.directory.join(part), Some(deadline)) {
            Ok(part) => {
                size.bytes = with_files(size.bytes.saturating_add(part.bytes), part.files);
                size.complete &= part.complete;
            }
            Err(error) => {
                tracing::debug!(%error, "a VM's growth is taken for that of its file system");
                size.complete = false;
            }
        }
    }
    Ok(size)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_disk_is_looked_at_before_it_can_be_full() {
        assert_eq!(due(0), SHORTEST);
        assert_eq!(due(FASTEST / 4), Duration::from_millis(250));
        assert_eq!(due(u64::MAX), LONGEST);
    }

    #[test]
    fn files_count_where_they_are_what_is_short() {
        let free = |bytes, files, of_files| {
            let free = Free::new(bytes, files, of_files);
            (free.bytes, free.per_file)
        };
        assert_eq!(free(PER_FILE * 9, 10, 100), (PER_FILE * 9, 0));
        assert_eq!(free(PER_FILE * 11, 10, 100), (PER_FILE * 10, PER_FILE));
        assert_eq!(free(PER_FILE * 11, 0, 100), (0, PER_FILE));
        // Any number.
        assert_eq!(free(PER_FILE * 11, 0, 0), (PER_FILE * 11, 0));
        assert_eq!(free(u64::MAX, u64::MAX, u64::MAX), (u64::MAX, 0));
    }

    #[test]
    fn growth_is_what_comes_at_once_or_adds_up() {
        let first = 1 << 30;
        assert!(!grown(first, first + GROWTH, first, 2 * GROWTH));
        assert!(grown(first, first + GROWTH + 1, first, 2 * GROWTH));
        let later = first + 2 * GROWTH;
        assert!(!grown(later, later, first, 2 * GROWTH));
        assert!(grown(later, later + 1, first, 2 * GROWTH));
        assert!(!grown(first, 0, first, 0));
    }

    #[test]
    fn a_small_share_is_kept_free_of_a_file_system_and_what_was_asked_for() {
        let directory = tempfile::tempdir().expect("a directory");
        let below = directory.path().join("not/yet/there");
        assert!((1..=MOST).contains(&floor(None, &below)));
        assert_eq!(floor(Some(7), &below), 7);
    }
}
