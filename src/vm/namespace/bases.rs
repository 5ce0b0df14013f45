//! The bases of a data directory: which one a VM lies on, and the end of those that none does.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use uuid::Uuid;

use super::base;
use super::directory::{blocking, check_owner, host};
use super::removal::remove_tree;
use crate::vm::Result;

/// What the name of a base begins with that is being made or removed.
pub(super) const PARTIAL: &str = "partial-";

/// How long nobody takes to make a base.
const MAKING: Duration = Duration::from_hours(1);

/// Keeps a base from being removed, by whatever process.
#[derive(Debug, Clone)]
pub(super) struct Lease {
    /// On the base's directory itself, which no VM can open: it sees the base below a mount of its own.
    _lock: Arc<Flock<File>>,
}

impl Lease {
    /// `None`: there is no such base, or no longer.
    pub(super) fn take(base: &Path) -> io::Result<Option<Self>> {
        let directory = match File::open(base) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            directory => directory?,
        };
        let lock = Flock::lock(directory, FlockArg::LockShared).map_err(|(_, errno)| errno)?;
        // It may have been removed before it was locked.
        Ok(is_at(&lock, base)?.then(|| Self {
            _lock: Arc::new(lock),
        }))
    }
}

fn is_at(directory: &File, path: &Path) -> io::Result<bool> {
    let own = directory.metadata()?;
    match fs::symlink_metadata(path) {
        Ok(there) => Ok(own.dev() == there.dev() && own.ino() == there.ino()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// What was removed.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Pruned {
    pub count: u64,
    /// Of the disk, as far as nothing else has them.
    pub bytes: u64,
}

/// Removes the bases in `<dataDir>/base` of earlier states of the host that no running VM lies on: a VM
/// that sleeps is booted on the present one. `pretend`: only looks.
pub async fn prune(cache: &Path, pretend: bool) -> Result<Pruned> {
    let cache = cache.to_owned();
    blocking(move || {
        check_owner(&cache)?;
        prune_now(&cache, pretend).map_err(|error| host("can't remove old bases in", &cache, error))
    })
    .await
}

fn prune_now(cache: &Path, pretend: bool) -> io::Result<Pruned> {
    let mut pruned = Pruned::default();
    let entries = match fs::read_dir(cache) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(pruned),
        entries => entries?,
    };
    let present = base::fingerprint();
    for entry in entries {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name == present.as_str() || is_just_being_made(&path, &name) {
            continue;
        }
        let directory = match File::open(&path) {
            // By another process, which has pruned too.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            directory => directory?,
        };
        if !directory.metadata()?.is_dir() {
            continue;
        }
        let Ok(_alone) = Flock::lock(directory, FlockArg::LockExclusiveNonblock) else {
            continue;
        };
        pruned.count += 1;
        pruned.bytes += own_bytes(&path);
        if !pretend {
            // Out of sight at once: whoever waits for the lock finds that it is not there.
            let aside = cache.join(format!("{PARTIAL}{}", Uuid::now_v7()));
            match fs::rename(&path, &aside) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                renamed => {
                    renamed?;
                    remove_tree(&aside)?;
                }
            }
        }
    }
    Ok(pruned)
}

fn is_just_being_made(path: &Path, name: &str) -> bool {
    name.starts_with(PARTIAL)
        && fs::metadata(path)
            .and_then(|data| data.modified())
            .is_ok_and(|made| made.elapsed().unwrap_or_default() < MAKING)
}

/// Files that the host has too, linked, cost nothing.
fn own_bytes(tree: &Path) -> u64 {
    let Ok(data) = fs::symlink_metadata(tree) else {
        return 0;
    };
    let own = if data.is_dir() || data.nlink() == 1 {
        data.blocks().saturating_mul(512)
    } else {
        0
    };
    let below = data.is_dir().then(|| fs::read_dir(tree).ok()).flatten();
    let below = below.into_iter().flatten().flatten();
    below.fold(own, |sum, entry| {
        sum.saturating_add(own_bytes(&entry.path()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::namespace::ids::IdMap;

    /// A base of the present, and one of the past with a file.
    fn bases() -> (tempfile::TempDir, std::path::PathBuf, std::path::PathBuf) {
        let data = tempfile::tempdir().expect("a directory");
        let cache = data.path().join("base");
        let present = base::base(&cache, IdMap::of_this_process().expect("ids")).expect("a base");
        let old = cache.join(Uuid::new_v4().to_string());
        fs::create_dir(&old).expect("mkdir");
        fs::write(old.join("file"), "content").expect("write");
        (data, present.usr, old)
    }

    #[tokio::test]
    async fn a_base_of_the_past_goes_and_that_of_the_present_stays() {
        let (data, present, old) = bases();
        let cache = data.path().join("base");
        let pretended = prune(&cache, true).await.expect("pruned");
        assert_eq!(pretended.count, 1);
        assert!(pretended.bytes >= 4096, "{pretended:?}");
        assert!(old.exists());
        assert_eq!(prune(&cache, false).await.expect("pruned"), pretended);
        let left: Vec<_> = fs::read_dir(&cache).expect("bases").flatten().collect();
        assert_eq!(left.len(), 1);
        assert!(present.exists());
    }

    #[tokio::test]
    async fn a_base_that_a_vm_lies_on_stays_until_the_vm_has_ended() {
        let (data, _, old) = bases();
        let cache = data.path().join("base");
        let lease = Lease::take(&old).expect("a lease").expect("there");
        assert_eq!(
            prune(&cache, false).await.expect("pruned"),
            Pruned::default()
        );
        assert!(old.join("file").exists());
        drop(lease);
        assert_eq!(prune(&cache, false).await.expect("pruned").count, 1);
        assert!(Lease::take(&old).expect("looked").is_none());
    }

    #[tokio::test]
    async fn where_nothing_was_ever_booted_there_is_nothing_to_remove() {
        let data = tempfile::tempdir().expect("a directory");
        let pruned = prune(&data.path().join("base"), false).await;
        assert_eq!(pruned.expect("pruned"), Pruned::default());
    }
}
