//! From a registry to the blobs of an image on the disk.
//!
//! They lie in `blobs/` of the store as in an OCI image layout, until the image is unpacked. What has come
//! of a blob when a pull ends stays, and the next pull goes on from there.

use std::fs::{self, DirBuilder, File};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};
use reqwest::StatusCode;
use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncSeekExt, AsyncWriteExt};

use super::bounds::Space;
use super::layout::Layout;
use super::manifest::{Config, Descriptor, Document, Index, Platform};
use super::registry::Registry;
use super::store::open_or_make;
use super::work::BEAT;
use super::{Digest, Files, ImageError, Limits, MAX_NESTING, Reference, Result};

/// How far a pull is. A few a second.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    /// The image, in full.
    pub image: String,
    pub step: Step,
    /// Bytes of packed layers that have arrived or been unpacked, of `total`.
    pub bytes: u64,
    pub total: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Asking the registry what it is.
    Resolving,
    Downloading,
    Unpacking,
}

impl Step {
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Resolving => "resolving",
            Self::Downloading => "downloading",
            Self::Unpacking => "unpacking",
        }
    }
}

pub(super) type Tell<'a> = &'a (dyn Fn(Progress) + Send + Sync);

/// How often a lock is tried that somebody else has.
const POLL: Duration = Duration::from_millis(50);

/// How often a blob whose stream breaks off is asked for again without anything having come.
const ATTEMPTS: u32 = 3;

/// An image whose manifest is on the disk. Its blobs stay as long as this does.
pub(super) struct Pulled {
    pub(super) descriptor: Descriptor,
    /// Nothing was fetched.
    pub(super) was_unpacked: bool,
    _blobs: Flock<File>,
}

/// Finds the image and brings its blobs into the store at `root`, unless `is_unpacked`.
pub(super) async fn pull(
    root: &Path,
    limits: Limits,
    reference: &Reference,
    wanted: Option<&Digest>,
    is_unpacked: impl Fn(&Digest) -> bool + Send + Sync,
    tell: Tell<'_>,
) -> Result<Pulled> {
    let blobs = blobs(root);
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&blobs)
        .map_err(|error| ImageError::host("can't make", &blobs, error))?;
    let lock = lock(&root.join("blobs.lock"), FlockArg::LockSharedNonblock).await?;
    let registry = Registry::new(reference)?;
    let progress = |step, bytes, total| {
        tell(Progress {
            image: reference.to_string(),
            step,
            bytes,
            total,
        });
    };
    progress(Step::Resolving, 0, 0);
    let mut name = wanted.map_or_else(|| reference.wanted(), ToString::to_string);
    let mut expected = wanted.or(reference.digest.as_ref()).cloned();
    for _ in 0..MAX_NESTING {
        let text = registry.manifest(&name).await?;
        let digest = Digest::of(Sha256::new_with_prefix(&text));
        if let Some(wanted) = expected
            && wanted != digest
        {
            return Err(registry.sends_other(&wanted, &digest));
        }
        let document: Document = serde_json::from_slice(&text)
            .map_err(|error| ImageError::Invalid(format!("{digest}: {error}")))?;
        let Some(config) = document.config else {
            let index = Index {
                manifests: document.manifests,
            };
            let chosen = index.choose(&Platform::of_this_machine())?.digest;
            name = chosen.to_string();
            expected = Some(chosen);
            continue;
        };
        let descriptor = Descriptor::of(digest.clone(), text.len() as u64);
        let was_unpacked = is_unpacked(&digest);
        if !was_unpacked {
            config.check_document()?;
            let all = || std::iter::once(&config).chain(&document.layers);
            let total = all().fold(0_u64, |total, blob| total.saturating_add(blob.size));
            limits.packed(total)?;
            let mut space = Space::new(&blobs, limits.min_free);
            let there = all().filter(|blob| blobs.join(blob.digest.hex()).exists());
            let there = there.fold(0_u64, |there, blob| there.saturating_add(blob.size));
            space.check(total.saturating_sub(there))?;
            let moved = |bytes| progress(Step::Downloading, bytes, total);
            fetch(&registry, &blobs, &config, &mut space, &moved).await?;
            // It says whether the layers are of use here.
            let known: Config = Layout::of_store(root.to_owned())?.document(&config)?;
            known.check(&digest, document.layers.len())?;
            let mut before = config.size;
            for layer in &document.layers {
                let moved = |bytes| progress(Step::Downloading, before + bytes, total);
                fetch(&registry, &blobs, layer, &mut space, &moved).await?;
                before += layer.size;
            }
            let path = blobs.join(digest.hex());
            let partial = blobs.join(format!("{}.{}", digest.hex(), uuid::Uuid::now_v7()));
            fs::write(&partial, &text)
                .and_then(|()| fs::rename(&partial, &path))
                .map_err(|error| ImageError::host("can't write", &path, error))?;
        }
        return Ok(Pulled {
            descriptor,
            was_unpacked,
            _blobs: lock,
        });
    }
    Err(ImageError::Invalid(format!(
        "{reference}: indices nested more than {MAX_NESTING} deep"
    )))
}

/// Removes blobs of images that are unpacked, unless a pull is under way, of whatever process.
pub(super) fn sweep(root: &Path) {
    let Ok(file) = open_or_make(&root.join("blobs.lock")) else {
        return;
    };
    let Ok(_alone) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else {
        return;
    };
    let Ok(entries) = fs::read_dir(blobs(root)) else {
        return;
    };
    for entry in entries.flatten() {
        // Not what is half there, for the next pull of it.
        if entry.path().extension().is_none_or(|own| own != PARTIAL)
            && let Err(error) = fs::remove_file(entry.path())
        {
            tracing::warn!(%error, path = %entry.path().display(), "left for the next sweep");
        }
    }
}

/// Removes what pulls have fetched and not unpacked, unless one is under way. `pretend`: only looks.
pub(super) fn prune(root: &Path, pretend: bool) -> Result<Files> {
    let blobs = blobs(root);
    let mut pruned = Files::default();
    if !blobs.is_dir() {
        return Ok(pruned);
    }
    let path = root.join("blobs.lock");
    let _alone = match Flock::lock(open_or_make(&path)?, FlockArg::LockExclusiveNonblock) {
        Ok(alone) => alone,
        Err((_, nix::errno::Errno::EWOULDBLOCK | nix::errno::Errno::EINTR)) => return Ok(pruned),
        Err((_, errno)) => return Err(ImageError::host("can't lock", &path, errno.into())),
    };
    for path in super::store::entries(&blobs)? {
        let host = |error| ImageError::host("can't remove", &path, error);
        let bytes = fs::symlink_metadata(&path).map_err(host)?.len();
        if !pretend {
            fs::remove_file(&path).map_err(host)?;
        }
        pruned.count += 1;
        pruned.bytes += bytes;
    }
    Ok(pruned)
}

const PARTIAL: &str = "partial";

fn blobs(root: &Path) -> PathBuf {
    root.join("blobs/sha256")
}

/// One blob, by whoever comes first of those who pull from this repository. Who pulls from another neither
/// waits for it nor goes on from what it has sent.
async fn fetch(
    registry: &Registry<'_>,
    blobs: &Path,
    blob: &Descriptor,
    space: &mut Space,
    moved: &(dyn Fn(u64) + Send + Sync),
) -> Result<()> {
    let path = blobs.join(blob.digest.hex());
    let repository = Digest::of(Sha256::new_with_prefix(registry.repository()));
    let partial = path.with_extension(format!("{}.{PARTIAL}", repository.hex()));
    let file = loop {
        if path.exists() {
            return Ok(());
        }
        let file = lock(&partial, FlockArg::LockExclusiveNonblock).await?;
        // Whoever had it may have brought the blob to its end.
        let (ours, there) = (file.metadata(), fs::metadata(&partial));
        if matches!((ours, there), (Ok(ours), Ok(there)) if ours.ino() == there.ino()) {
            break file;
        }
    };
    let host = |error| ImageError::host("can't write", &partial, error);
    let (hash, have) = {
        let mut file = file.try_clone().map_err(host)?;
        let size = blob.size;
        tokio::task::spawn_blocking(move || begun(&mut file, size))
            .await
            .map_err(|error| host(error.into()))?
            .map_err(host)?
    };
    let mut arriving = Arriving {
        blob,
        output: tokio::fs::File::from_std(file.try_clone().map_err(host)?),
        partial: &partial,
        hash,
        have,
    };
    let mut goes_on = have > 0;
    loop {
        arriving.rest(registry, space, moved).await?;
        let found = Digest::of(arriving.hash.clone());
        if found == blob.digest {
            break;
        }
        if !goes_on {
            // Nothing that could be gone on from.
            drop(fs::remove_file(&partial));
            return Err(registry.sends_other(&blob.digest, &found));
        }
        // What an earlier pull has left may be what is wrong with it.
        arriving.begin_anew().await?;
        goes_on = false;
    }
    // Once it has its name, nobody looks whether a crash of the host has cut it short.
    arriving.output.sync_data().await.map_err(host)?;
    fs::rename(&partial, &path).map_err(host)
}

/// A blob of which some is there.
struct Arriving<'a> {
    blob: &'a Descriptor,
    output: tokio::fs::File,
    partial: &'a Path,
    hash: Sha256,
    have: u64,
}

impl Arriving<'_> {
    fn host(&self, error: std::io::Error) -> ImageError {
        ImageError::host("can't write", self.partial, error)
    }

    const fn is_whole(&self) -> bool {
        self.have >= self.blob.size
    }

    async fn begin_anew(&mut self) -> Result<()> {
        let emptied = self.output.set_len(0).await;
        emptied.map_err(|error| self.host(error))?;
        let rewound = self.output.rewind().await;
        rewound.map_err(|error| self.host(error))?;
        (self.hash, self.have) = (Sha256::new(), 0);
        Ok(())
    }

    /// Brings it to its length.
    async fn rest(
        &mut self,
        registry: &Registry<'_>,
        space: &mut Space,
        moved: &(dyn Fn(u64) + Send + Sync),
    ) -> Result<()> {
        let blob = self.blob;
        let mut told = Instant::now();
        let mut idle = 0;
        while !self.is_whole() {
            let before = self.have;
            let mut answer = registry.blob(&blob.digest.to_string(), before).await?;
            if before > 0 && answer.status() != StatusCode::PARTIAL_CONTENT {
                // It gives all of it, or nothing.
                self.begin_anew().await?;
            }
            let ended = loop {
                match answer.chunk().await {
                    Ok(None) => break None,
                    Err(error) => break Some(registry.failed(&error)),
                    Ok(Some(chunk)) => {
                        self.have += chunk.len() as u64;
                        if self.have > blob.size {
                            return Err(registry.sends_more(blob));
                        }
                        self.hash.update(&chunk);
                        let written = self.output.write_all(&chunk).await;
                        written.map_err(|error| self.host(error))?;
                        space.wrote(chunk.len() as u64)?;
                        if told.elapsed() > BEAT {
                            told = Instant::now();
                            moved(self.have);
                        }
                    }
                }
            };
            let flushed = self.output.flush().await;
            flushed.map_err(|error| self.host(error))?;
            idle = if self.have > before { 0 } else { idle + 1 };
            if idle >= ATTEMPTS && !self.is_whole() {
                return Err(ended.unwrap_or_else(|| registry.ends(blob, self.have)));
            }
        }
        Ok(())
    }
}

/// What an earlier pull has left of a blob: its hash and its length.
fn begun(file: &mut File, size: u64) -> std::io::Result<(Sha256, u64)> {
    if file.metadata()?.len() > size {
        file.set_len(0)?;
    }
    file.seek(SeekFrom::Start(0))?;
    let (mut hash, mut have) = (Sha256::new(), 0);
    let mut buffer = vec![0; 64 << 10];
    loop {
        let n = file.read(&mut buffer)?;
        if n == 0 {
            return Ok((hash, have));
        }
        hash.update(buffer.get(..n).unwrap_or_default());
        have += n as u64;
    }
}

async fn lock(path: &Path, how: FlockArg) -> Result<Flock<File>> {
    let mut file = open_or_make(path)?;
    loop {
        match Flock::lock(file, how) {
            Ok(lock) => return Ok(lock),
            Err((same, nix::errno::Errno::EWOULDBLOCK | nix::errno::Errno::EINTR)) => file = same,
            Err((_, errno)) => return Err(ImageError::host("can't lock", path, errno.into())),
        }
        tokio::time::sleep(POLL).await;
    }
}
