//! What `client.images` does: the store of images, and which VMs they are kept for.

use std::io;
use std::path::{Path, PathBuf};

use super::client::Client;
use super::image::locate;
use crate::error::{Code, Error, Result};
use crate::host_path::Exposure;
use crate::images::{self, Files, ImageError, Progress, Source, Stored, Vms, Wanted};
use crate::vm::namespace::{self, Pruned};

/// An image of the store.
#[derive(Debug, Clone)]
pub struct KnownImage {
    pub stored: Stored,
    pub vms: Vec<VmOfImage>,
}

/// A VM that was made with an image.
#[derive(Debug, Clone)]
pub struct VmOfImage {
    pub data_dir: PathBuf,
    /// `None`: it can't be read, because its disk is not mounted or it is another user's.
    pub key: Option<Vec<String>>,
}

/// What was removed, and what was not.
#[derive(Debug)]
pub struct ImageRemoval {
    pub removed: Vec<KnownImage>,
    /// VMs have them.
    pub kept: Vec<KnownImage>,
    /// Names that lead to no image any more.
    pub untagged: Vec<String>,
    /// What pulls had left of images.
    pub layers: Files,
    /// Of earlier states of the host.
    pub bases: Pruned,
}

impl From<Stored> for KnownImage {
    fn from(stored: Stored) -> Self {
        let vms = stored.vms.iter().map(|directory| VmOfImage {
            // <dataDir>/vms/<id>
            data_dir: directory.ancestors().nth(2).unwrap_or(directory).to_owned(),
            key: namespace::made(directory).map(|vm| vm.key),
        });
        Self {
            vms: vms.collect(),
            stored,
        }
    }
}

impl From<images::Removal> for ImageRemoval {
    fn from(removal: images::Removal) -> Self {
        let known = |images: Vec<Stored>| images.into_iter().map(KnownImage::from).collect();
        Self {
            removed: known(removal.removed),
            kept: known(removal.kept),
            untagged: removal.untagged,
            layers: removal.layers,
            bases: Pruned::default(),
        }
    }
}

impl Client {
    /// The images of the store, the newest first.
    pub async fn images(&self) -> Result<Vec<KnownImage>> {
        let images = self.settings()?.images()?;
        on_a_thread(move || {
            let stored = images.list(&vms())?;
            Ok(stored.into_iter().map(KnownImage::from).collect())
        })
        .await
    }

    /// Brings what a name stands for by now into the store, if it is not there yet.
    pub async fn pull_image(
        &self,
        source: Source,
        tell: &(dyn Fn(Progress) + Send + Sync),
    ) -> Result<KnownImage> {
        if let Source::Rootfs { .. } = source {
            let problem = "a root file system is used where it is: there is nothing to pull";
            return Err(Error::invalid_argument("image", problem));
        }
        let settings = self.settings()?;
        let exposure = Exposure::new(self.data_dir()?, settings.private_directories());
        let images = settings.images()?;
        let (source, found) = locate(source, exposure).await?;
        // It has what a download needs: much for a future.
        let image = Box::pin(images.open(source, found, None, tell)).await?;
        on_a_thread(move || {
            let id = image.id.clone();
            // Who asks whether it is in use must not find this call.
            drop(image);
            let stored = images.find(&id, &vms())?;
            stored.map(KnownImage::from).ok_or_else(|| {
                ImageError::NotFound(format!(
                    "the image {id} was removed just after it was pulled"
                ))
            })
        })
        .await
    }

    /// Removes an image by its name or digest; by a name that is not its only one, only that.
    pub async fn remove_image(&self, image: &str) -> Result<ImageRemoval> {
        let images = self.settings()?.images()?;
        let wanted = Wanted::parse(image).map_err(|p| Error::invalid_argument("image", p))?;
        let removed = tokio::task::spawn_blocking(move || {
            let removed = images.remove(&wanted, &vms());
            removed
                .map(ImageRemoval::from)
                .map_err(|error| match error {
                    ImageError::InUse(stored) => in_use(&(*stored).into()),
                    error => error.into(),
                })
        });
        removed.await.unwrap_or_else(|error| Err(cut_short(&error)))
    }

    /// Removes the images that no VM has, what pulls have left, and bases of earlier states of the host in
    /// this data directory. `pretend`: only looks.
    pub async fn prune_images(&self, pretend: bool) -> Result<ImageRemoval> {
        let images = self.settings()?.images()?;
        let bases = self.data_dir()?.join("base");
        let removal = on_a_thread(move || images.prune(&vms(), pretend)).await?;
        Ok(ImageRemoval {
            bases: namespace::prune_bases(&bases, pretend).await?,
            ..removal.into()
        })
    }
}

/// What the store has to know of VMs.
fn vms() -> Vms {
    Vms {
        made_with: |directory: &Path| {
            let made_with = namespace::made_with(directory).map_err(io::Error::other)?;
            Ok(made_with.map(|made_with| made_with.id))
        },
        known: Client::vm_directories(),
    }
}

fn in_use(image: &KnownImage) -> Error {
    let digest = &image.stored.digest;
    let name = image.stored.names.first();
    let name = name.map_or_else(|| digest.to_string(), |name| format!("{name} ({digest})"));
    let vms: Vec<_> = image.vms.iter().map(VmOfImage::to_string).collect();
    let message = if vms.is_empty() {
        format!(
            "the image {name} is just being used, by a VM that boots on it or a pull: try again later"
        )
    } else {
        format!(
            "the image {name} is needed by {}: destroy() what you do not need any more",
            vms.join(", ")
        )
    };
    Error::new(Code::ImageInUse, message)
}

impl std::fmt::Display for VmOfImage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.key {
            Some(key) => write!(
                f,
                "VM {} in {}",
                serde_json::json!(key),
                self.data_dir.display()
            ),
            None => write!(f, "a VM that can't be read in {}", self.data_dir.display()),
        }
    }
}

fn cut_short(error: &tokio::task::JoinError) -> Error {
    let problem = format!("work on the store of images was cut short: {error}");
    Error::new(Code::Internal, problem)
}

pub(super) async fn on_a_thread<T: Send + 'static>(
    work: impl FnOnce() -> images::Result<T> + Send + 'static,
) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => Ok(done?),
        Err(error) => Err(cut_short(&error)),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::agents::AgentStore;
    use crate::session::{ClientOptions, Settings};

    #[tokio::test]
    async fn a_link_where_vms_can_write_decides_no_pull() {
        let directory = tempfile::tempdir().expect("a directory");
        let at = |path: &str| directory.path().join(path);
        fs::create_dir_all(at("data")).expect("mkdir");
        fs::create_dir(at("layout")).expect("mkdir");
        fs::write(at("layout/oci-layout"), "{}").expect("write");
        fs::write(at("layout/index.json"), r#"{"manifests":[]}"#).expect("write");
        symlink(at("layout"), at("data/link")).expect("symlink");
        symlink(at("layout"), at("link")).expect("symlink");
        let store = AgentStore::new(at("agents"), at("package"), at("node"));
        let client = Client::new(ClientOptions {
            data_dir: at("data"),
            settings: Settings::new(store),
        });
        for (path, code, problem) in [
            ("data/link", Code::InvalidArgument, "a VM could have made"),
            ("link", Code::ImageNotFound, "is empty"),
            ("none", Code::ImageNotFound, "is no OCI image layout"),
        ] {
            let layout = Source::oci_layout(&at(path), None);
            let error = client.pull_image(layout, &|_| {}).await;
            let error = error.expect_err("refused");
            assert_eq!(error.code, code, "{path}: {error}");
            assert!(error.to_string().contains(problem), "{path}: {error}");
        }
    }
}
