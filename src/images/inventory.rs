//! What is in the store, and what nobody needs of it any more.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use nix::fcntl::{Flock, FlockArg};
use uuid::Uuid;

use super::names::{self, Name};
use super::store::{self, Images, Record, entries};
use super::work::Work;
use super::{Digest, ImageError, Result, Vms, Wanted, pull, users};

/// An image of the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    pub digest: Digest,
    /// What it was asked for as, if that leads to it still.
    pub names: Vec<String>,
    /// On the disk.
    pub bytes: u64,
    /// When it was unpacked, in milliseconds since the epoch.
    pub made_at: u64,
    /// Directories of the VMs that were made with it.
    pub vms: Vec<PathBuf>,
    /// Whether a VM, of whatever process, runs on it or is about to.
    pub is_running: bool,
}

impl Stored {
    fn is_needed(&self) -> bool {
        self.is_running || !self.vms.is_empty()
    }
}

/// What has become of what was to be removed.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Removal {
    pub removed: Vec<Stored>,
    /// A VM has them.
    pub kept: Vec<Stored>,
    /// Names that lead nowhere now, in the order of their images.
    pub untagged: Vec<String>,
    pub layers: Files,
}

/// Files that were removed.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Files {
    pub count: u64,
    pub bytes: u64,
}

/// What an image is unpacked to, with and without the owners of its files, as far as it is there.
struct Unpacked {
    directories: Vec<PathBuf>,
}

impl Images {
    /// The newest first.
    pub fn list(&self, vms: &Vms) -> Result<Vec<Stored>> {
        let names = names::all(self.root())?;
        let mut images = Vec::new();
        for (digest, unpacked) in self.all()? {
            images.push(self.stored(&digest, &unpacked, &names, vms)?);
        }
        images.sort_by_key(|image| std::cmp::Reverse(image.made_at));
        Ok(images)
    }

    /// The image of this [`id`](super::Image::id), whatever is wrong with others. `None`: it is not there.
    pub fn find(&self, id: &str, vms: &Vms) -> Result<Option<Stored>> {
        let Ok(digest) = Digest::try_from(id.to_owned()) else {
            return Ok(None);
        };
        let Some(unpacked) = self.all()?.remove(&digest) else {
            return Ok(None);
        };
        let names = names::all(self.root())?;
        self.stored(&digest, &unpacked, &names, vms).map(Some)
    }

    /// Takes its name from an image, and removes one that has no other; by digest, with all its names.
    pub fn remove(&self, wanted: &Wanted, vms: &Vms) -> Result<Removal> {
        let names = names::all(self.root())?;
        let is_wanted = |digest: &Digest| match wanted {
            Wanted::Name(wanted) => names
                .iter()
                .any(|name| name.name == *wanted && name.is_of(digest)),
            Wanted::Digest(prefix) => digest.to_string().starts_with(prefix),
        };
        let mut found = self.all()?;
        found.retain(|digest, _| is_wanted(digest));
        if found.len() > 1 {
            let found: Vec<_> = found.keys().map(ToString::to_string).collect();
            return Err(ImageError::Ambiguous(found.join(", ")));
        }
        let mut removal = Removal::default();
        let Some((digest, unpacked)) = found.pop_first() else {
            // A name that has outlived its image.
            if let Wanted::Name(name) = wanted {
                names::take(self.root(), name)?;
            }
            return Ok(removal);
        };
        if let Wanted::Name(wanted) = wanted
            && names
                .iter()
                .any(|name| name.is_of(&digest) && name.name != *wanted)
        {
            names::take(self.root(), wanted)?;
            removal.untagged.push(wanted.clone());
            return Ok(removal);
        }
        self.remove_unused(&digest, &unpacked, vms, false, &mut removal)?;
        match removal.kept.pop() {
            Some(image) => Err(ImageError::InUse(Box::new(image))),
            None => Ok(removal),
        }
    }

    /// Removes the images that no VM has, and what pulls have left. `pretend`: only looks.
    pub fn prune(&self, vms: &Vms, pretend: bool) -> Result<Removal> {
        let mut removal = Removal::default();
        for (digest, unpacked) in self.all()? {
            self.remove_unused(&digest, &unpacked, vms, pretend, &mut removal)?;
        }
        removal.layers = pull::prune(self.root(), pretend)?;
        if !pretend {
            self.sweep_all();
        }
        Ok(removal)
    }

    fn all(&self) -> Result<BTreeMap<Digest, Unpacked>> {
        let mut all = BTreeMap::new();
        for path in entries(self.root())? {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let digest = store::KINDS
                .into_iter()
                .find_map(|kind| name.strip_prefix(kind)?.strip_prefix('-'))
                .and_then(|hex| Digest::try_from(format!("sha256:{hex}")).ok());
            if let Some(digest) = digest
                && path.is_dir()
            {
                let unpacked = all.entry(digest).or_insert(Unpacked {
                    directories: Vec::new(),
                });
                unpacked.directories.push(path);
            }
        }
        Ok(all)
    }

    fn stored(
        &self,
        digest: &Digest,
        unpacked: &Unpacked,
        names: &[Name],
        vms: &Vms,
    ) -> Result<Stored> {
        let (mut bytes, mut made_at) = (0, 0);
        for directory in &unpacked.directories {
            bytes += match Record::read(directory) {
                Ok(record) => record
                    .bytes
                    .map_or_else(|| on_disk(directory, &Work::default()), Ok)?,
                Err(_) => 0,
            };
            made_at = made_at.max(made(directory));
        }
        let names = names.iter().filter(|name| name.is_of(digest));
        Ok(Stored {
            digest: digest.clone(),
            names: names.map(|name| name.name.clone()).collect(),
            bytes,
            made_at,
            vms: users::of(self.root(), digest, vms)?,
            is_running: unpacked.take_away()?.is_none(),
        })
    }

    /// Under the image's lock, so that nobody can come to need it meanwhile.
    fn remove_unused(
        &self,
        digest: &Digest,
        unpacked: &Unpacked,
        vms: &Vms,
        pretend: bool,
        removal: &mut Removal,
    ) -> Result<()> {
        let Some(alone) = unpacked.take_away()? else {
            let mut image = self.stored(digest, unpacked, &names::all(self.root())?, vms)?;
            image.is_running = true;
            removal.kept.push(image);
            return Ok(());
        };
        let names = names::all(self.root())?;
        // The lock that is held here is not that of a VM.
        let mut image = self.stored(digest, unpacked, &names, vms)?;
        image.is_running = false;
        if image.is_needed() {
            removal.kept.push(image);
            return Ok(());
        }
        if !pretend {
            let mut aside = Vec::new();
            for directory in &unpacked.directories {
                let gone = self.root().join(format!("{REMOVED}{}", Uuid::now_v7()));
                match fs::rename(directory, &gone) {
                    // By another process, which has had the lock before.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                    renamed => renamed
                        .map_err(|error| ImageError::host("can't remove", directory, error))?,
                }
                aside.push(gone);
            }
            for name in &image.names {
                names::take(self.root(), name)?;
            }
            users::forget(self.root(), digest);
            for (directory, lock) in unpacked.directories.iter().zip(&alone) {
                store::remove_lock(directory, lock);
            }
            // Whoever waits for it finds that it is not there.
            drop(alone);
            for gone in aside {
                clear(&gone);
            }
        }
        removal.untagged.extend(image.names.iter().cloned());
        removal.removed.push(image);
        Ok(())
    }

    /// What killed makers and removers have left.
    fn sweep_all(&self) {
        for path in entries(self.root()).unwrap_or_default() {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if name.starts_with(REMOVED) {
                clear(&path);
            } else if let Some((kind, rest)) = name
                .strip_prefix(store::PARTIAL)
                .and_then(|rest| rest.split_once('-'))
                && let Some((hex, _)) = rest.split_once('-')
            {
                Self::sweep_unmade(&self.root().join(format!("{kind}-{hex}")), Some(&path));
            } else if name.ends_with(".lock")
                && store::KINDS.iter().any(|kind| name.starts_with(kind))
            {
                Self::sweep_unmade(&path.with_extension(""), None);
            }
        }
    }

    /// Clears the lock of an image that is not there, and what there is of it, unless a maker is at work.
    fn sweep_unmade(directory: &Path, partial: Option<&Path>) {
        let Ok(Some(alone)) = lock_alone(&store::lock_of(directory)) else {
            return;
        };
        if let Some(partial) = partial {
            clear(partial);
        }
        if !directory.is_dir() {
            store::remove_lock(directory, &alone);
        }
    }
}

const REMOVED: &str = "removed-";

impl Unpacked {
    /// The right to remove it. `None`: somebody uses it at this moment.
    fn take_away(&self) -> Result<Option<Vec<Flock<fs::File>>>> {
        let mut locks = Vec::new();
        for directory in &self.directories {
            match lock_alone(&store::lock_of(directory))? {
                Some(lock) => locks.push(lock),
                None => return Ok(None),
            }
        }
        Ok(Some(locks))
    }
}

fn lock_alone(path: &Path) -> Result<Option<Flock<fs::File>>> {
    store::lock(path, FlockArg::LockExclusiveNonblock)
}

fn clear(tree: &Path) {
    if let Err(error) = fs::remove_dir_all(tree)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(%error, path = %tree.display(), "left for the next pruning");
    }
}

fn made(directory: &Path) -> u64 {
    let made = fs::metadata(directory.join(store::RECORD)).and_then(|data| data.modified());
    made.ok()
        .and_then(|made| made.duration_since(UNIX_EPOCH).ok())
        .map_or(0, |since| {
            u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
        })
}

/// What a tree takes of the disk; what can't be looked at counts as nothing.
pub(super) fn on_disk(tree: &Path, work: &Work) -> Result<u64> {
    let mut linked = HashSet::new();
    let mut bytes = 0_u64;
    let mut left = vec![tree.to_owned()];
    while let Some(path) = left.pop() {
        work.check()?;
        let Ok(data) = fs::symlink_metadata(&path) else {
            continue;
        };
        if data.is_dir() {
            left.extend(entries(&path).unwrap_or_default());
        } else if data.nlink() > 1 && !linked.insert(data.ino()) {
            continue;
        }
        bytes = bytes.saturating_add(data.blocks().saturating_mul(512));
    }
    Ok(bytes)
}
