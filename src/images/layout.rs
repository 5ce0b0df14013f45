//! An OCI image layout directory: documents and layers by their digests, each checked.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};

use super::digest::Verifying;
use super::manifest::{Compression, Descriptor, Document, Index, Platform};
use super::work::Counting;
use super::{Digest, ImageError, MAX_DOCUMENT, MAX_NESTING, Result, unpack};

/// A manifest with its own digest.
pub(super) struct Manifest {
    pub(super) digest: Digest,
    pub(super) config: Descriptor,
    pub(super) layers: Vec<Descriptor>,
}

/// An OCI image layout directory (image-layout.md of the specification).
pub(super) struct Layout {
    /// For errors: what is at it may be exchanged at any time.
    path: PathBuf,
    /// What everything is opened below.
    directory: File,
}

impl Layout {
    /// The blobs of the store, which are there as in a layout.
    pub(super) fn of_store(path: PathBuf) -> Result<Self> {
        let directory = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
            .open(&path)
            .map_err(|error| ImageError::host("can't open", &path, error))?;
        Ok(Self { path, directory })
    }

    /// `found`: what lies at `path`.
    pub(super) fn open(path: &Path, found: File) -> Result<Self> {
        let layout = Self {
            path: path.to_owned(),
            directory: found,
        };
        match layout.file("oci-layout") {
            Err(ImageError::Host { source, .. }) if is_missing(&source) => Err(no_layout(path)),
            found => found.map(|_| layout),
        }
    }

    /// Opens a file of the layout: what lies there, never what a link leads to. Whoever made the layout has
    /// no say in which other files of this host are read.
    fn file(&self, name: &str) -> Result<(File, u64)> {
        let path = self.path.join(name);
        let failed = |error| ImageError::host("can't open", &path, error);
        let how = OpenHow::new()
            .flags(OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
        let file = match openat2(&self.directory, name, how) {
            Err(Errno::ELOOP) => {
                return Err(ImageError::Invalid(format!(
                    "{} is, or lies behind, a symbolic link, which is not followed in a layout (cp -rL copies one without links)",
                    path.display()
                )));
            }
            opened => File::from(opened.map_err(|errno| failed(errno.into()))?),
        };
        let data = file
            .metadata()
            .map_err(|error| ImageError::host("can't look at", &path, error))?;
        if !data.is_file() {
            return Err(ImageError::Invalid(format!(
                "{} is no regular file",
                path.display()
            )));
        }
        Ok((file, data.len()))
    }

    /// What the layout's index has under `tag`, or the one thing that it has.
    pub(super) fn find(&self, tag: Option<&str>) -> Result<Descriptor> {
        let path = self.path.join("index.json");
        let (file, _) = self.file("index.json")?;
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
    pub(super) fn manifest(&self, mut descriptor: Descriptor) -> Result<Manifest> {
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
    pub(super) fn document<T: serde::de::DeserializeOwned>(
        &self,
        descriptor: &Descriptor,
    ) -> Result<T> {
        descriptor.check_document()?;
        let mut blob = Verifying::new(self.blob(descriptor)?, descriptor.digest.clone());
        let mut text = Vec::new();
        blob.read_to_end(&mut text)
            .map_err(|error| ImageError::reading(&descriptor.digest, error))?;
        blob.finish()?;
        serde_json::from_slice(&text)
            .map_err(|error| ImageError::Invalid(format!("{}: {error}", descriptor.digest)))
    }

    fn blob(&self, descriptor: &Descriptor) -> Result<io::Take<File>> {
        // A digest is hexadecimal: it names nothing outside of the directory.
        let name = format!("blobs/sha256/{}", descriptor.digest.hex());
        let (file, length) = match self.file(&name) {
            Err(ImageError::Host { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return Err(ImageError::Invalid(format!(
                    "the layout {} lacks the blob {}",
                    self.path.display(),
                    descriptor.digest
                )));
            }
            opened => opened?,
        };
        if length != descriptor.size {
            return Err(ImageError::Invalid(format!(
                "the blob {} has {length} bytes instead of {}: it is truncated or not the one that was meant",
                descriptor.digest, descriptor.size
            )));
        }
        Ok(file.take(descriptor.size))
    }

    /// Unpacks a layer over what there is. Both digests are checked while it streams: that of the blob,
    /// and that of the archive in it.
    pub(super) fn unpack(
        &self,
        layer: &Descriptor,
        diff_id: &Digest,
        unpacking: &mut unpack::Unpacking,
    ) -> Result<()> {
        let blob = Counting::new(self.blob(layer)?, unpacking.work());
        if layer.compression()? == Compression::None {
            // The blob is the archive: hashed once.
            if layer.digest != *diff_id {
                return Err(ImageError::Digest {
                    wanted: diff_id.clone(),
                    found: layer.digest.hex().to_owned(),
                });
            }
            let mut archive = Verifying::new(blob, diff_id.clone());
            unpacking.layer(&mut archive)?;
            return archive.finish().map(drop);
        }
        let blob = Verifying::new(blob, layer.digest.clone());
        let failed = |error| ImageError::reading(&layer.digest, error);
        let blob = match layer.compression()? {
            Compression::None => blob,
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

pub(super) fn no_layout(path: &Path) -> ImageError {
    ImageError::NotFound(format!(
        "{} is no OCI image layout: it has no file \"oci-layout\" (skopeo copy … oci:<dir> makes one)",
        path.display()
    ))
}

fn is_missing(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
    )
}
