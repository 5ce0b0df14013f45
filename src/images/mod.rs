//! Images: from an OCI image layout on disk to a verified root file system.
//!
//! What an image holds is anybody's bytes: every size is bounded, every digest is checked, and no name
//! in it leads out of the directory that it is unpacked to.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use uuid::Uuid;

pub use digest::Digest;
pub use error::ImageError;
pub use manifest::{Config, Platform};
pub use unpack::{Limits, Ownership};

use digest::Verifying;
use manifest::{Compression, Descriptor, Document, Index};

mod digest;
mod error;
mod manifest;
mod unpack;

pub type Result<T, E = ImageError> = std::result::Result<T, E>;

/// Manifests and configurations are small; a larger one is not read.
const MAX_DOCUMENT: u64 = 4 << 20;

/// An index may lead to an index, for the platforms of one tag. No real one goes deeper.
const MAX_NESTING: u32 = 3;

/// Unpacked images, shared by VMs. Each is made once and never changed.
#[derive(Debug, Clone)]
pub struct Images {
    root: PathBuf,
    ownership: Ownership,
    limits: Limits,
}

/// An image that is ready to be used.
#[derive(Debug)]
pub struct Image {
    /// Of its manifest: what was asked for may have other images for other platforms.
    pub digest: Digest,
    pub rootfs: PathBuf,
    pub config: Config,
    /// Keeps it from being removed, by whatever process.
    _lease: Flock<File>,
}

impl Images {
    /// `root` is made when something is put there, readable by this user only: files of an image that
    /// belong to root must not be reached by other users of the host.
    #[must_use]
    pub fn new(root: PathBuf, ownership: Ownership, limits: Limits) -> Self {
        Self {
            root,
            ownership,
            limits,
        }
    }

    /// The image of `layout`, an OCI image layout directory, for this machine's platform; unpacked if it
    /// was not yet. Without a `tag` the layout must hold one image. Blocks: for a thread that may.
    pub fn import(&self, layout: &Path, tag: Option<&str>) -> Result<Image> {
        let layout = Layout::open(layout)?;
        let descriptor = layout.find(tag)?;
        let manifest = layout.manifest(descriptor)?;
        let digest = manifest.digest.clone();
        let config: Config = layout.document(&manifest.config)?;
        let wanted = Platform::of_this_machine();
        if !config.platform().is(&wanted) {
            return Err(ImageError::Platform {
                wanted: wanted.to_string(),
                found: config.platform().to_string(),
            });
        }
        if config.rootfs.diff_ids.len() != manifest.layers.len() {
            return Err(ImageError::Invalid(format!(
                "image {digest} has {} layers, but its configuration names {}",
                manifest.layers.len(),
                config.rootfs.diff_ids.len()
            )));
        }

        let rootfs = self.root.join(self.name(&digest));
        let lease = self.lock(&digest)?;
        let relock = |kind| {
            lease
                .relock(kind)
                .map_err(|errno| ImageError::host("can't lock", &rootfs, errno.into()))
        };
        // A user holds the lock shared, a maker and a remover alone. The kernel changes it by letting go
        // of it first (flock(2)): a remover may come between.
        while !rootfs.is_dir() {
            relock(FlockArg::LockExclusive)?;
            if !rootfs.is_dir() {
                self.make(&layout, &manifest, &config, &rootfs)?;
            }
            relock(FlockArg::LockShared)?;
        }
        Ok(Image {
            digest,
            rootfs,
            config,
            _lease: lease,
        })
    }

    /// Unpacked with the owners of its files it is another directory than without.
    fn name(&self, digest: &Digest) -> String {
        let kind = match self.ownership {
            Ownership::AsInImage => "owned",
            Ownership::Caller => "plain",
        };
        format!("{kind}-{}", digest.hex())
    }

    /// Holds what this image is, or will be, unpacked to. Waits while another process makes it.
    fn lock(&self, digest: &Digest) -> Result<Flock<File>> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.root)
            .map_err(|error| ImageError::host("can't make", &self.root, error))?;
        let path = self.root.join(format!("{}.lock", self.name(digest)));
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(|error| ImageError::host("can't open", &path, error))?;
        Flock::lock(file, FlockArg::LockShared)
            .map_err(|(_, errno)| ImageError::host("can't lock", &path, errno.into()))
    }

    /// With the image's lock held alone. It appears by one rename of a complete, verified directory.
    fn make(
        &self,
        layout: &Layout,
        manifest: &Manifest,
        config: &Config,
        rootfs: &Path,
    ) -> Result<()> {
        let prefix = format!("partial-{}-", self.name(&manifest.digest));
        self.sweep(&prefix);
        let partial = self.root.join(format!("{prefix}{}", Uuid::now_v7()));
        let unpacked = (|| {
            let mut unpacking = unpack::Unpacking::begin(&partial, self.ownership, self.limits)?;
            for (layer, diff_id) in manifest.layers.iter().zip(&config.rootfs.diff_ids) {
                layout.unpack(layer, diff_id, &mut unpacking)?;
            }
            fs::rename(&partial, rootfs)
                .map_err(|error| ImageError::host("can't rename", &partial, error))
        })();
        if unpacked.is_err() {
            self.sweep(&prefix);
        }
        unpacked
    }

    /// Removes what a maker of the same image, killed or failed, has left.
    fn sweep(&self, prefix: &str) {
        let Ok(entries) = fs::read_dir(&self.root) else {
            return;
        };
        for entry in entries.flatten() {
            if entry.file_name().to_string_lossy().starts_with(prefix)
                && let Err(error) = fs::remove_dir_all(entry.path())
            {
                tracing::warn!(%error, path = %entry.path().display(), "left for the next sweep");
            }
        }
    }
}

/// A manifest with its own digest.
struct Manifest {
    digest: Digest,
    config: Descriptor,
    layers: Vec<Descriptor>,
}

/// An OCI image layout directory (image-layout.md of the specification).
struct Layout {
    path: PathBuf,
}

impl Layout {
    fn open(path: &Path) -> Result<Self> {
        let marker = path.join("oci-layout");
        if !marker.is_file() {
            return Err(ImageError::NotFound(format!(
                "{} is no OCI image layout: it has no file \"oci-layout\" (skopeo copy … oci:<dir> makes one)",
                path.display()
            )));
        }
        Ok(Self {
            path: path.to_owned(),
        })
    }

    /// What the layout's index has under `tag`, or the one thing that it has.
    fn find(&self, tag: Option<&str>) -> Result<Descriptor> {
        let path = self.path.join("index.json");
        let file =
            File::open(&path).map_err(|error| ImageError::host("can't open", &path, error))?;
        let mut text = Vec::new();
        file.take(MAX_DOCUMENT + 1)
            .read_to_end(&mut text)
            .map_err(|error| ImageError::host("can't read", &path, error))?;
        if text.len() as u64 > MAX_DOCUMENT {
            return Err(ImageError::TooLarge(format!(
                "{} has more than {MAX_DOCUMENT} bytes",
                path.display()
            )));
        }
        let index: Index = serde_json::from_slice(&text)
            .map_err(|error| ImageError::Invalid(format!("{}: {error}", path.display())))?;
        let tags: Vec<_> = index.manifests.iter().filter_map(Descriptor::tag).collect();
        let known = || format!("it has {}", tags.join(", "));
        match tag {
            Some(tag) => index
                .manifests
                .iter()
                .find(|manifest| manifest.tag() == Some(tag))
                .cloned()
                .ok_or_else(|| {
                    ImageError::NotFound(format!(
                        "no tag {tag:?} in the layout {}: {}",
                        self.path.display(),
                        known()
                    ))
                }),
            None => match &index.manifests[..] {
                [one] => Ok(one.clone()),
                [] => Err(ImageError::NotFound(format!(
                    "the layout {} is empty",
                    self.path.display()
                ))),
                _ => Err(ImageError::NotFound(format!(
                    "the layout {} holds several images: say which tag; {}",
                    self.path.display(),
                    known()
                ))),
            },
        }
    }

    /// Follows indices to the manifest of this machine's platform.
    fn manifest(&self, mut descriptor: Descriptor) -> Result<Manifest> {
        for _ in 0..MAX_NESTING {
            match self.document::<Document>(&descriptor)? {
                Document {
                    config: Some(config),
                    layers,
                    ..
                } => {
                    return Ok(Manifest {
                        digest: descriptor.digest,
                        config,
                        layers,
                    });
                }
                Document { manifests, .. } => {
                    descriptor = Index { manifests }.choose(&Platform::of_this_machine())?;
                }
            }
        }
        Err(ImageError::Invalid(format!(
            "{}: indices nested more than {MAX_NESTING} deep",
            descriptor.digest
        )))
    }

    /// A blob as JSON, its digest checked.
    fn document<T: serde::de::DeserializeOwned>(&self, descriptor: &Descriptor) -> Result<T> {
        if descriptor.size > MAX_DOCUMENT {
            return Err(ImageError::TooLarge(format!(
                "{} says that it has {} bytes: the limit for JSON is {MAX_DOCUMENT}",
                descriptor.digest, descriptor.size
            )));
        }
        let mut blob = self.blob(descriptor)?;
        let mut text = Vec::new();
        blob.read_to_end(&mut text)
            .map_err(|error| ImageError::reading(&descriptor.digest, error))?;
        blob.finish()?;
        serde_json::from_slice(&text)
            .map_err(|error| ImageError::Invalid(format!("{}: {error}", descriptor.digest)))
    }

    fn blob(&self, descriptor: &Descriptor) -> Result<Verifying<io::Take<File>>> {
        // A digest is hexadecimal: it names nothing outside of the directory.
        let path = self.path.join("blobs/sha256").join(descriptor.digest.hex());
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&path)
            .map_err(|error| match error.kind() {
                io::ErrorKind::NotFound => ImageError::Invalid(format!(
                    "the layout {} lacks the blob {}",
                    self.path.display(),
                    descriptor.digest
                )),
                _ => ImageError::host("can't open", &path, error),
            })?;
        let data = file
            .metadata()
            .map_err(|error| ImageError::host("can't look at", &path, error))?;
        if !data.is_file() || data.len() != descriptor.size {
            return Err(ImageError::Invalid(format!(
                "the blob {} has {} bytes instead of {}: it is truncated or not the one that was meant",
                descriptor.digest,
                data.len(),
                descriptor.size
            )));
        }
        Ok(Verifying::new(
            file.take(descriptor.size),
            descriptor.digest.clone(),
        ))
    }

    /// Unpacks a layer over what there is. Both digests are checked while it streams: that of the blob,
    /// and that of the archive in it.
    fn unpack(
        &self,
        layer: &Descriptor,
        diff_id: &Digest,
        unpacking: &mut unpack::Unpacking,
    ) -> Result<()> {
        let blob = self.blob(layer)?;
        let failed = |error| ImageError::reading(&layer.digest, error);
        let blob = match layer.compression()? {
            Compression::None => {
                let mut archive = Verifying::new(blob, diff_id.clone());
                unpacking.layer(&mut archive)?;
                archive.finish()?
            }
            Compression::Gzip => {
                let decoder = flate2::read::MultiGzDecoder::new(blob);
                let mut archive = Verifying::new(decoder, diff_id.clone());
                unpacking.layer(&mut archive)?;
                archive.finish()?.into_inner()
            }
            Compression::Zstd => {
                let mut decoder = zstd::stream::read::Decoder::new(blob).map_err(failed)?;
                // What a decoder must take by the format (RFC 8878, 3.1.1.1.2), and no more.
                decoder.window_log_max(27).map_err(failed)?;
                let mut archive = Verifying::new(decoder, diff_id.clone());
                unpacking.layer(&mut archive)?;
                archive.finish()?.finish().into_inner()
            }
        };
        blob.finish().map(drop)
    }
}

#[cfg(test)]
mod tests;
