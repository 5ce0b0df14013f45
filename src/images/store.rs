//! Unpacked images, shared by VMs. Each is made once and never changed.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::layout::{Layout, Manifest};
use super::manifest::{Config, Descriptor, Execution};
use super::unpack::Unpacking;
use super::{Digest, ImageError, Limits, Ownership, Platform, Progress, Result, Source, pull};

/// In an image's directory: its files, and what is known of it.
const ROOTFS: &str = "rootfs";
const RECORD: &str = "image.json";

/// The store at one place.
#[derive(Debug, Clone)]
pub struct Images {
    root: PathBuf,
    ownership: Ownership,
    limits: Limits,
}

/// An image that is ready to be used.
#[derive(Debug)]
pub struct Image {
    /// Names what it holds: the digest of its manifest (what was asked for may have other images for
    /// other platforms), or the path of its directory.
    pub id: String,
    pub rootfs: PathBuf,
    pub execution: Execution,
    /// Keeps it from being removed, by whatever process.
    _lease: Option<Flock<File>>,
}

/// What the store knows of an image without looking into its files.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Record {
    execution: Execution,
}

impl Images {
    /// `root` is made when something is put there, readable by this user only: files of an image that
    /// belong to root must not be reached by other users of the host.
    #[must_use]
    pub const fn new(root: PathBuf, ownership: Ownership, limits: Limits) -> Self {
        Self {
            root,
            ownership,
            limits,
        }
    }

    /// The image of `source` for this machine's platform, fetched and unpacked if it was not yet. With
    /// `id`, which a VM was made with, it is that one, without asking anybody if it is unpacked: the
    /// source may have another by now.
    ///
    /// Dropping the future ends a download, which the next one goes on from. An unpacking that has begun
    /// is brought to its end.
    pub async fn open(
        &self,
        source: Source,
        id: Option<String>,
        tell: &(dyn Fn(Progress) + Send + Sync),
    ) -> Result<Image> {
        let digest = id.and_then(|id| Digest::try_from(id).ok());
        let known = digest.clone();
        let (images, of) = (self.clone(), source.clone());
        let found = blocking(move || images.at_hand(&of, known.as_ref())).await?;
        if let Some(image) = found {
            return Ok(image);
        }
        let Source::Registry { reference } = source else {
            return Err(ImageError::NotFound(format!("there is no {source}")));
        };
        let pulled = pull::pull(
            &self.root,
            self.limits,
            &reference,
            digest.as_ref(),
            |digest| self.directory(digest).is_dir(),
            tell,
        )
        .await?;
        let images = self.clone();
        blocking(move || {
            let layout = Layout::of_store(images.root.clone());
            let image = match images.unpacked(&pulled.descriptor.digest)? {
                Some(image) => image,
                None => images.import_from(&layout, pulled.descriptor.clone())?,
            };
            drop(pulled);
            pull::sweep(&images.root);
            Ok(image)
        })
        .await
    }

    /// What needs no registry.
    fn at_hand(&self, source: &Source, known: Option<&Digest>) -> Result<Option<Image>> {
        if let Source::Rootfs { path } = source {
            return rootfs(path).map(Some);
        }
        if let Some(digest) = known
            && let Some(image) = self.unpacked(digest)?
        {
            return Ok(Some(image));
        }
        match source {
            Source::OciLayout { path, tag } => self.import(path, tag.as_deref()).map(Some),
            Source::Registry { .. } | Source::Rootfs { .. } => Ok(None),
        }
    }

    /// The image of `layout`, an OCI image layout directory.
    pub(super) fn import(&self, layout: &Path, tag: Option<&str>) -> Result<Image> {
        let layout = Layout::open(layout)?;
        let descriptor = layout.find(tag)?;
        self.import_from(&layout, descriptor)
    }

    fn import_from(&self, layout: &Layout, descriptor: Descriptor) -> Result<Image> {
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

        let directory = self.directory(&digest);
        let lease = self.lock(&digest)?;
        let relock = |kind| {
            lease
                .relock(kind)
                .map_err(|errno| ImageError::host("can't lock", &directory, errno.into()))
        };
        // A user holds the lock shared, a maker and a remover alone. The kernel changes it by letting go
        // of it first (flock(2)): a remover may come between.
        while !directory.is_dir() {
            relock(FlockArg::LockExclusive)?;
            if !directory.is_dir() {
                self.make(layout, &manifest, &config, &directory)?;
            }
            relock(FlockArg::LockShared)?;
        }
        self.leased(&digest, lease)
    }

    /// One that is in the store.
    fn unpacked(&self, digest: &Digest) -> Result<Option<Image>> {
        if !self.directory(digest).is_dir() {
            return Ok(None);
        }
        let lease = self.lock(digest)?;
        // It may have been removed before it was locked.
        if self.directory(digest).is_dir() {
            self.leased(digest, lease).map(Some)
        } else {
            Ok(None)
        }
    }

    fn leased(&self, digest: &Digest, lease: Flock<File>) -> Result<Image> {
        let directory = self.directory(digest);
        let path = directory.join(RECORD);
        let text = fs::read(&path).map_err(|error| ImageError::host("can't read", &path, error))?;
        let record: Record = serde_json::from_slice(&text)
            .map_err(|error| ImageError::host("can't read", &path, error.into()))?;
        Ok(Image {
            id: digest.to_string(),
            rootfs: directory.join(ROOTFS),
            execution: record.execution,
            _lease: Some(lease),
        })
    }

    fn directory(&self, digest: &Digest) -> PathBuf {
        self.root.join(self.name(digest))
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
        directory: &Path,
    ) -> Result<()> {
        let prefix = format!("partial-{}-", self.name(&manifest.digest));
        self.sweep(&prefix);
        let partial = self.root.join(format!("{prefix}{}", Uuid::now_v7()));
        let made = (|| {
            DirBuilder::new()
                .mode(0o700)
                .create(&partial)
                .map_err(|error| ImageError::host("can't make", &partial, error))?;
            let rootfs = partial.join(ROOTFS);
            let mut unpacking = Unpacking::begin(&rootfs, self.ownership, self.limits)?;
            for (layer, diff_id) in manifest.layers.iter().zip(&config.rootfs.diff_ids) {
                layout.unpack(layer, diff_id, &mut unpacking)?;
            }
            let record = Record {
                execution: config.execution.clone(),
            };
            let path = partial.join(RECORD);
            let text = serde_json::to_vec(&record).unwrap_or_default();
            fs::write(&path, text)
                .map_err(|error| ImageError::host("can't write", &path, error))?;
            fs::rename(&partial, directory)
                .map_err(|error| ImageError::host("can't rename", &partial, error))
        })();
        if made.is_err() {
            self.sweep(&prefix);
        }
        made
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

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| {
        let problem = std::io::Error::other(error);
        Err(ImageError::host(
            "can't finish the work on",
            Path::new("an image"),
            problem,
        ))
    })
}

/// A directory that is an image as it is.
fn rootfs(path: &Path) -> Result<Image> {
    let canonical = fs::canonicalize(path).and_then(|path| {
        if path.is_dir() {
            Ok(path)
        } else {
            Err(std::io::Error::from_raw_os_error(libc::ENOTDIR))
        }
    });
    let rootfs = canonical.map_err(|error| match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENOTDIR) => ImageError::NotFound(format!(
            "the root file system {} is no directory",
            path.display()
        )),
        _ => ImageError::host("can't open", path, error),
    })?;
    Ok(Image {
        id: format!("the root file system {}", rootfs.display()),
        rootfs,
        execution: Execution::default(),
        _lease: None,
    })
}
