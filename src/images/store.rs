//! Unpacked images, shared by VMs. Each is made once and never changed.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::unistd::syncfs;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::inventory::on_disk;
use super::layout::{Layout, Manifest, no_layout};
use super::manifest::{Config, Descriptor, Execution};
use super::unpack::Unpacking;
use super::work::{Work, attended};
use super::{Digest, ImageError, Limits, Ownership, Progress, Result, Source, names, pull, users};

/// In an image's directory: its files, and what is known of it.
const ROOTFS: &str = "rootfs";
pub(super) const RECORD: &str = "image.json";

/// What the names of images' directories begin with: with the owners of their files, and without.
pub(super) const KINDS: [&str; 2] = ["owned", "plain"];

/// And those of images that are being made.
pub(super) const PARTIAL: &str = "partial-";

/// How often the lock of an image is tried that somebody else has.
const POLL: Duration = Duration::from_millis(20);

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
    lease: Option<Lease>,
}

#[derive(Debug)]
struct Lease {
    digest: Digest,
    _lock: Flock<File>,
}

/// What the store knows of an image without looking into its files.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Record {
    execution: Execution,
    /// Of the disk.
    #[serde(default)]
    pub(super) bytes: Option<u64>,
}

impl Record {
    /// Of the image in this directory of the store.
    pub(super) fn read(directory: &Path) -> Result<Self> {
        let path = directory.join(RECORD);
        let failed = |error| ImageError::host("can't read", &path, error);
        let text = fs::read(&path).map_err(failed)?;
        serde_json::from_slice(&text).map_err(|error| failed(error.into()))
    }
}

impl Image {
    /// Keeps it in the store as long as the VM in `directory` has it: to be called before the VM is made,
    /// whose lease on it ends when it sleeps.
    pub fn keep_for(&self, directory: &Path) -> Result<()> {
        match (&self.lease, self.rootfs.parent().and_then(Path::parent)) {
            (Some(lease), Some(root)) => users::note(root, &lease.digest, directory),
            // It is not the store's.
            _ => Ok(()),
        }
    }
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
    /// `found` is what lies at the path of a source that has one, and all that is used of a layout: whoever
    /// looked it up has seen which links led there. `None`: there is nothing.
    ///
    /// Dropping the future ends a download, which the next one goes on from, and an unpacking, which the
    /// next one begins again.
    pub async fn open(
        &self,
        source: Source,
        found: Option<File>,
        id: Option<String>,
        tell: &(dyn Fn(Progress) + Send + Sync),
    ) -> Result<Image> {
        let opened = self.open_unnamed(source.clone(), found, id, tell).await;
        opened.map_err(|error| error.of(&source))
    }

    async fn open_unnamed(
        &self,
        source: Source,
        found: Option<File>,
        id: Option<String>,
        tell: &(dyn Fn(Progress) + Send + Sync),
    ) -> Result<Image> {
        let digest = id.and_then(|id| Digest::try_from(id).ok());
        let known = digest.clone();
        let (images, of) = (self.clone(), source.clone());
        let at_hand = attended(&source.name(), tell, move |work| {
            images.at_hand(&of, found, known.as_ref(), work)
        })
        .await?;
        if let Some(image) = at_hand {
            return Ok(image);
        }
        let Source::Registry { reference } = source else {
            return Err(ImageError::NotFound(format!("there is no {source}")));
        };
        loop {
            let pulled = pull::pull(
                &self.root,
                self.limits,
                &reference,
                digest.as_ref(),
                |digest| self.directory(digest).is_dir(),
                tell,
            )
            .await?;
            // A VM's own may not be what its tag stands for by now.
            let name = digest.is_none().then(|| reference.to_string());
            let images = self.clone();
            let shown = reference.to_string();
            let image = attended(&shown, tell, move |work| {
                let layout = Layout::of_store(images.root.clone())?;
                let image = match images.unpacked(&pulled.descriptor.digest, work)? {
                    Some(image) => image,
                    None if pulled.was_unpacked => return Ok(None),
                    None => images.import_from(&layout, pulled.descriptor.clone(), work)?,
                };
                if let Some(name) = name {
                    names::give(&images.root, &name, &pulled.descriptor.digest)?;
                }
                drop(pulled);
                pull::sweep(&images.root);
                Ok(Some(image))
            });
            // `None`: it was removed since the pull found that there was nothing to fetch.
            if let Some(image) = image.await? {
                return Ok(image);
            }
        }
    }

    /// What needs no registry.
    fn at_hand(
        &self,
        source: &Source,
        found: Option<File>,
        known: Option<&Digest>,
        work: &Arc<Work>,
    ) -> Result<Option<Image>> {
        if let Source::Rootfs { path } = source {
            return match found {
                Some(_) => rootfs(path).map(Some),
                None => Err(nothing_at(path)),
            };
        }
        if let Some(digest) = known
            && let Some(image) = self.unpacked(digest, work)?
        {
            return Ok(Some(image));
        }
        match source {
            Source::OciLayout { path, tag } => {
                let found = found.ok_or_else(|| no_layout(path))?;
                self.import(path, found, tag.as_deref(), work).map(Some)
            }
            Source::Registry { .. } | Source::Rootfs { .. } => Ok(None),
        }
    }

    /// The image of `layout`, an OCI image layout directory that was `found` there.
    pub(super) fn import(
        &self,
        layout: &Path,
        found: File,
        tag: Option<&str>,
        work: &Arc<Work>,
    ) -> Result<Image> {
        let name = Source::OciLayout {
            path: layout.to_owned(),
            tag: tag.map(str::to_owned),
        };
        let layout = Layout::open(layout, found)?;
        let descriptor = layout.find(tag)?;
        let image = self.import_from(&layout, descriptor, work)?;
        if let Some(lease) = &image.lease {
            names::give(&self.root, &name.name(), &lease.digest)?;
        }
        Ok(image)
    }

    fn import_from(
        &self,
        layout: &Layout,
        descriptor: Descriptor,
        work: &Arc<Work>,
    ) -> Result<Image> {
        let manifest = layout.manifest(descriptor)?;
        let digest = manifest.digest.clone();
        let config: Config = layout.document(&manifest.config)?;
        config.check(&digest, manifest.layers.len())?;
        let directory = self.directory(&digest);
        loop {
            let lease = self.lock(&digest, FlockArg::LockSharedNonblock, work)?;
            if directory.is_dir() {
                return self.leased(&digest, lease);
            }
            drop(lease);
            // A user holds the lock shared, a maker and a remover alone. Between the two, when it is made
            // and nobody has it, a remover may come.
            let alone = self.lock(&digest, FlockArg::LockExclusiveNonblock, work)?;
            if !directory.is_dir()
                && let Err(error) = self.make(layout, &manifest, &config, &directory, work)
            {
                remove_lock(&directory, &alone);
                return Err(error);
            }
        }
    }

    /// One that is in the store.
    fn unpacked(&self, digest: &Digest, work: &Work) -> Result<Option<Image>> {
        if !self.directory(digest).is_dir() {
            return Ok(None);
        }
        let lease = self.lock(digest, FlockArg::LockSharedNonblock, work)?;
        // It may have been removed before it was locked.
        if self.directory(digest).is_dir() {
            self.leased(digest, lease).map(Some)
        } else {
            Ok(None)
        }
    }

    fn leased(&self, digest: &Digest, lease: Flock<File>) -> Result<Image> {
        let directory = self.directory(digest);
        let record = Record::read(&directory)?;
        Ok(Image {
            id: digest.to_string(),
            rootfs: directory.join(ROOTFS),
            execution: record.execution,
            lease: Some(Lease {
                digest: digest.clone(),
                _lock: lease,
            }),
        })
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    fn directory(&self, digest: &Digest) -> PathBuf {
        self.root.join(self.name(digest))
    }

    /// Unpacked with the owners of its files it is another directory than without.
    fn name(&self, digest: &Digest) -> String {
        let [owned, plain] = KINDS;
        let kind = match self.ownership {
            Ownership::AsInImage => owned,
            Ownership::Caller => plain,
        };
        format!("{kind}-{}", digest.hex())
    }

    /// Holds what this image is, or will be, unpacked to. Waits while another process makes it, as long as
    /// anybody waits for this one: a thread that the kernel makes wait could not be told.
    fn lock(&self, digest: &Digest, how: FlockArg, work: &Work) -> Result<Flock<File>> {
        make_private(&self.root)?;
        let path = lock_of(&self.directory(digest));
        loop {
            work.check()?;
            if let Some(lock) = lock(&path, how)? {
                return Ok(lock);
            }
            thread::sleep(POLL);
        }
    }

    /// With the image's lock held alone. It appears by one rename of a complete, verified directory that is
    /// on the disk: what a crash of the host would cut short is never looked at again.
    fn make(
        &self,
        layout: &Layout,
        manifest: &Manifest,
        config: &Config,
        directory: &Path,
        work: &Arc<Work>,
    ) -> Result<()> {
        let sizes = manifest.layers.iter().map(|layer| layer.size);
        let total = sizes.fold(0_u64, u64::saturating_add);
        self.limits.packed(total)?;
        work.begin(total);
        let prefix = format!("{PARTIAL}{}-", self.name(&manifest.digest));
        self.sweep(&prefix);
        let partial = self.root.join(format!("{prefix}{}", Uuid::now_v7()));
        let made = (|| {
            DirBuilder::new()
                .mode(0o700)
                .create(&partial)
                .map_err(|error| ImageError::host("can't make", &partial, error))?;
            let rootfs = partial.join(ROOTFS);
            let mut unpacking = Unpacking::begin(&rootfs, self.ownership, self.limits, work)?;
            for (layer, diff_id) in manifest.layers.iter().zip(&config.rootfs.diff_ids) {
                layout.unpack(layer, diff_id, &mut unpacking)?;
            }
            let record = Record {
                execution: config.execution.clone(),
                bytes: Some(on_disk(&partial, work)?),
            };
            let path = partial.join(RECORD);
            let text = serde_json::to_vec(&record).unwrap_or_default();
            fs::write(&path, text)
                .map_err(|error| ImageError::host("can't write", &path, error))?;
            sync_file_system(&partial)
                .map_err(|error| ImageError::host("can't sync", &partial, error))?;
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

/// One call for all files of an image.
fn sync_file_system(path: &Path) -> io::Result<()> {
    syncfs(File::open(path)?).map_err(io::Error::from)
}

pub(super) fn make_private(directory: &Path) -> Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .map_err(|error| ImageError::host("can't make", directory, error))
}

/// Opens a file of the store, a lock or what a pull has begun, that is made if it is not there.
pub(super) fn open_or_make(path: &Path) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(|error| ImageError::host("can't open", path, error))
}

/// Where the lock of an image is.
pub(super) fn lock_of(directory: &Path) -> PathBuf {
    directory.with_extension("lock")
}

/// Takes the lock at `path`, that is made if it is not there. `None`: somebody else has it, and `how` does
/// not wait.
pub(super) fn lock(path: &Path, how: FlockArg) -> Result<Option<Flock<File>>> {
    let failed = |error| ImageError::host("can't lock", path, error);
    loop {
        match Flock::lock(open_or_make(path)?, how) {
            // Whoever had it before may have removed it, and the next one has made another.
            Ok(lock) => match fs::metadata(path) {
                Ok(there) if is_same(&there, &lock.metadata().map_err(failed)?) => {
                    return Ok(Some(lock));
                }
                Err(error) if error.kind() != ErrorKind::NotFound => return Err(failed(error)),
                _ => {}
            },
            Err((_, Errno::EWOULDBLOCK)) => return Ok(None),
            Err((_, Errno::EINTR)) => {}
            Err((_, errno)) => return Err(failed(errno.into())),
        }
    }
}

fn is_same(one: &fs::Metadata, other: &fs::Metadata) -> bool {
    (one.dev(), one.ino()) == (other.dev(), other.ino())
}

/// Removes the lock of an image that is not there, which is held alone: who waits for it takes a new one.
pub(super) fn remove_lock(directory: &Path, _alone: &Flock<File>) {
    let path = lock_of(directory);
    if let Err(error) = fs::remove_file(&path) {
        tracing::warn!(%error, path = %path.display(), "left for the next pruning");
    }
}

/// What is in a directory, if it is there.
pub(super) fn entries(directory: &Path) -> Result<Vec<PathBuf>> {
    let failed = |error| ImageError::host("can't list", directory, error);
    match fs::read_dir(directory) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(failed(error)),
        Ok(entries) => entries
            .map(|entry| entry.map(|entry| entry.path()).map_err(failed))
            .collect(),
    }
}

fn no_rootfs(path: &Path, problem: &str) -> String {
    format!(
        "image.rootfs: \"{}\" {problem}. It is a directory that holds a root file system, as debootstrap makes one",
        path.display()
    )
}

fn nothing_at(path: &Path) -> ImageError {
    ImageError::NotFound(no_rootfs(path, "does not exist on this host"))
}

/// A directory that is an image as it is.
fn rootfs(path: &Path) -> Result<Image> {
    let canonical = fs::canonicalize(path).and_then(|path| {
        if path.is_dir() {
            Ok(path)
        } else {
            Err(io::Error::from_raw_os_error(libc::ENOTDIR))
        }
    });
    let rootfs = canonical.map_err(|error| match error.raw_os_error() {
        Some(libc::ENOENT) => nothing_at(path),
        Some(libc::ENOTDIR) => ImageError::NotFound(no_rootfs(path, "is no directory")),
        _ => ImageError::host("can't open", path, error),
    })?;
    Ok(Image {
        id: format!("the root file system {}", rootfs.display()),
        rootfs,
        execution: Execution::default(),
        lease: None,
    })
}
