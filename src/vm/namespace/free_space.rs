//! Keeps space free on the file systems that VMs lie on, for their stores and for whoever else uses them:
//! when too little is left, what a VM runs that goes on growing is killed.
//!
//! One task for each file system, as long as a VM runs there that is to leave space free.

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use nix::sys::statvfs::statvfs;
use tokio::task::JoinHandle;

use super::control::Control;
use super::directory::{blocking, host};
use super::disk::disk_usage;
use super::limits::Limiter;
use crate::vm::Result;

/// What is kept free unless told otherwise: this share of the file system, and this much at most.
const SHARE: u64 = 64;
const MOST: u64 = 512 << 20;

/// Bytes a second that nothing writes faster than, page cache included. Looking is due when it could have
/// used up what is free.
const FASTEST: u64 = 4 << 30;

/// Between two looks at the file system: one system call.
const SHORTEST: Duration = Duration::from_millis(25);
const LONGEST: Duration = Duration::from_secs(1);

/// Who has grown by more between two measurements, so far apart, is one that goes on growing.
const GROWTH: u64 = 64 << 10;
const APART: Duration = Duration::from_millis(50);

/// Measuring takes at most one part in so many of a CPU's time.
const PART: u32 = 10;

/// Durable parts of a VM's directory: what its own programs can fill. The store beside them is the host's.
const PARTS: [&str; 4] = ["home", "var", "root", "layers"];

/// How much the file system of a VM's directory, which need not exist yet, is to keep free.
pub(super) fn floor(wanted: Option<u64>, directory: &Path) -> u64 {
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
    limiter: &Arc<Limiter>,
    control: &Arc<Control>,
) -> Result<()> {
    if floor == 0 {
        return Ok(());
    }
    let device = std::fs::metadata(directory)
        .map_err(|error| host("can't look at the disk of", directory, error))?
        .dev();
    let mut disks = disks();
    let disk = disks.entry(device).or_default();
    disk.watched.retain(Watched::runs);
    disk.watched.push(Watched {
        directory: directory.to_owned(),
        floor,
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
    while let Some(watched) = watched(device) {
        let Some(free) = free(&watched).await else {
            // Their directories were removed under them.
            tokio::time::sleep(LONGEST).await;
            continue;
        };
        let (short, enough): (Vec<_>, Vec<_>) = watched
            .into_iter()
            .partition(|watched| watched.floor > free);
        let pause = if short.is_empty() {
            let floor = enough.iter().map(|watched| watched.floor).max();
            due(free - floor.unwrap_or(0))
        } else {
            let began = Instant::now();
            stop_growing(short).await;
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

/// Bytes that an ordinary user could still write.
async fn free(watched: &[Watched]) -> Option<u64> {
    let directories: Vec<_> = watched.iter().map(|of| of.directory.clone()).collect();
    let free = blocking(move || {
        Ok(directories.iter().find_map(|directory| {
            let disk = statvfs(directory).ok()?;
            Some(disk.blocks_available().saturating_mul(disk.fragment_size()))
        }))
    });
    free.await.ok().flatten()
}

/// Kills what runs in those that go on growing.
async fn stop_growing(watched: Vec<Watched>) {
    let mut before = Vec::new();
    for watched in &watched {
        before.push(size(&watched.directory).await);
    }
    tokio::time::sleep(APART).await;
    for (watched, before) in watched.into_iter().zip(before) {
        let grown = match (before, size(&watched.directory).await) {
            (Ok(before), Ok(now)) => now > before + GROWTH,
            (Err(error), _) | (_, Err(error)) => {
                tracing::warn!(%error, "a VM's growth can't be told");
                false
            }
        };
        if grown
            && let (Some(limiter), Some(control)) =
                (watched.limiter.upgrade(), watched.control.upgrade())
            && let Err(error) = limiter
                .kill_all(&control, |reached| reached.free_disk += 1)
                .await
        {
            tracing::debug!(%error, "a VM that fills the disk has just ended");
        }
    }
}

async fn size(directory: &Path) -> Result<u64> {
    let mut total = 0;
    for part in PARTS {
        total += disk_usage(&directory.join(part)).await?;
    }
    Ok(total)
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
    fn a_small_share_is_kept_free_of_a_file_system_and_what_was_asked_for() {
        let directory = tempfile::tempdir().expect("a directory");
        let below = directory.path().join("not/yet/there");
        assert!((1..=MOST).contains(&floor(None, &below)));
        assert_eq!(floor(Some(7), &below), 7);
    }
}
