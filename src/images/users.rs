//! Which VMs were made with an image of the store, in whatever data directory.
//!
//! The store keeps a record for each, because it is shared by data directories that know nothing of each
//! other. What counts is what the VM itself keeps: a record whose VM is gone, or has another image by now,
//! says nothing.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use super::store::make_private;
use super::{Digest, ImageError, Result};

/// What the store has to be told of VMs.
#[derive(Debug, Clone)]
pub struct Vms {
    /// [`super::Image::id`] of what the VM in this directory was made with. An error if it can't be told.
    pub made_with: fn(&Path) -> io::Result<Option<String>>,
    /// Directories of VMs that count whether or not the store has a record of them.
    pub known: Vec<PathBuf>,
}

/// A VM that an image is kept for.
#[derive(Debug, Serialize, Deserialize)]
struct User {
    directory: PathBuf,
    /// The devices that the directory, and each of those that it is in, were on: a path that leads nowhere
    /// means nothing if it begins on another file system than then.
    devices: Vec<u64>,
}

impl User {
    fn new(directory: &Path) -> io::Result<Self> {
        // It may be about to be made; what it lies in then says the same.
        let device = |path: &Path| match fs::metadata(path) {
            Ok(data) => Ok(Some(data.dev())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        };
        let mut devices = Vec::new();
        let mut outermost_first: Vec<_> = directory.ancestors().collect();
        outermost_first.reverse();
        for path in outermost_first {
            match device(path)?.or_else(|| devices.last().copied()) {
                Some(found) => devices.push(found),
                None => return Err(io::Error::from_raw_os_error(libc::ENOENT)),
            }
        }
        devices.reverse();
        Ok(Self {
            directory: directory.to_owned(),
            devices,
        })
    }

    /// Whether the VM may still have the image; `true` if that can't be told: a disk that is not mounted,
    /// or a container's directory.
    fn has(&self, image: &str, vms: &Vms) -> bool {
        match (vms.made_with)(&self.directory) {
            Ok(Some(id)) => id == image,
            Err(_) => true,
            Ok(None) => {
                let places = self.directory.ancestors().zip(&self.devices);
                for (path, device) in places {
                    match fs::metadata(path) {
                        Ok(data) => return data.dev() != *device,
                        Err(error)
                            if matches!(
                                error.raw_os_error(),
                                Some(libc::ENOENT | libc::ENOTDIR)
                            ) => {}
                        Err(_) => return true,
                    }
                }
                true
            }
        }
    }
}

fn records(root: &Path, image: &Digest) -> PathBuf {
    root.join("users").join(image.hex())
}

/// Remembers that the VM in `directory` is made with `image`, whose lease the caller has.
pub(super) fn note(root: &Path, image: &Digest, directory: &Path) -> Result<()> {
    let records = records(root, image);
    let name = Digest::of(Sha256::new_with_prefix(
        directory.as_os_str().as_encoded_bytes(),
    ));
    let path = records.join(name.hex());
    let failed = |error| ImageError::host("can't write", &path, error);
    let user = User::new(directory).map_err(failed)?;
    let text = serde_json::to_vec(&user).map_err(|error| failed(error.into()))?;
    if fs::read(&path).is_ok_and(|before| before == text) {
        return Ok(());
    }
    make_private(&records)?;
    write_durably(&path, &text).map_err(failed)
}

/// The directories of VMs that the image is kept for.
pub(super) fn of(root: &Path, image: &Digest, vms: &Vms) -> Result<Vec<PathBuf>> {
    let id = image.to_string();
    let records = records(root, image);
    let mut users = Vec::new();
    for path in super::store::entries(&records)? {
        let user = fs::read(&path)
            .ok()
            .and_then(|text| serde_json::from_slice::<User>(&text).ok());
        match user {
            Some(user) if user.has(&id, vms) => users.push(user.directory),
            Some(_) => {}
            // A name without an end is one that is just being written, by who has the image's lease.
            None if path.extension().is_some() => {}
            // Whose it is can't be told any more.
            None => users.push(path),
        }
    }
    for vm in &vms.known {
        if !users.contains(vm) && (vms.made_with)(vm).is_ok_and(|made| made.as_ref() == Some(&id)) {
            users.push(vm.clone());
        }
    }
    users.sort_unstable();
    Ok(users)
}

/// Of an image that is gone. Its lock is held alone.
pub(super) fn forget(root: &Path, image: &Digest) {
    let records = records(root, image);
    if let Err(error) = fs::remove_dir_all(&records)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(%error, path = %records.display(), "records of VMs stay");
    }
}

/// Replaces a small file, which is on the disk before it is seen.
pub(super) fn write_durably(path: &Path, content: &[u8]) -> io::Result<()> {
    let partial = path.with_extension(Uuid::now_v7().to_string());
    let written = (|| {
        let mut file = File::create(&partial)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&partial, path)
    })();
    if written.is_err() {
        drop(fs::remove_file(&partial));
    }
    written
}
