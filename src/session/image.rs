//! The image that a VM has instead of the host's programs, and whether agents run on it.

use std::collections::HashSet;
use std::fs::File;
use std::sync::{LazyLock, Mutex, PoisonError};

use nix::errno::Errno;

use super::client::Settings;
use super::emission::Notice;
use super::host_file;
use super::machine::Machine;
use crate::agents::{Installed, Launch};
use crate::error::{Code, Error, Result};
use crate::host_path::{Exposure, Refused};
use crate::images::{self, Images, Ownership, Source};
use crate::vm::exec::{ExecEnd, ExecOptions, attend};
use crate::vm::{Command, DynVm, Exit, GuestPath, Image, MadeWith, User, VmError, namespace};

/// An image that a VM can be booted with.
pub(super) struct Found {
    pub(super) image: Image,
    /// To be held until the VM has ended.
    pub(super) lease: images::Image,
}

impl Settings {
    pub(super) fn images(&self) -> Result<Images> {
        let ownership = if namespace::maps_a_range()? {
            Ownership::AsInImage
        } else {
            Ownership::Caller
        };
        let min_free = namespace::min_free_disk(self.vm.limits.min_free_disk_bytes, &self.images);
        let limits = images::Limits {
            min_free,
            ..images::Limits::default()
        };
        Ok(Images::new(self.images.clone(), ownership, limits))
    }
}

impl Machine {
    fn other_image(&self, has: Option<&MadeWith>, wanted: Option<&Source>) -> Error {
        Error::from(VmError::OtherImage {
            key: self.key.to_string(),
            has: has.map(|made_with| {
                let source = serde_json::from_str::<Source>(&made_with.source);
                source.map_or_else(
                    |_| made_with.id.clone(),
                    |source| match source {
                        Source::Rootfs { .. } => source.to_string(),
                        _ => format!("{source} ({})", made_with.id),
                    },
                )
            }),
            wanted: wanted.map(ToString::to_string),
        })
    }

    /// What the VM was made with, or is to be made with; `None`: the host's programs. Before the VM's
    /// lock is taken, because it may take as long as a download.
    pub(super) async fn find_image(&self, settings: &Settings) -> Result<Option<Found>> {
        let made_with = match namespace::made_with(&self.dir) {
            Ok(made_with) => made_with,
            Err(error) => {
                // Of another user's VM nothing can be read.
                namespace::check_owner(&self.dir).await?;
                return Err(error.into());
            }
        };
        let source = match (&settings.vm.image, &made_with) {
            (RootChoice::HostPrograms | RootChoice::AsMade, None) => return Ok(None),
            (RootChoice::HostPrograms, Some(made_with)) => {
                return Err(self.other_image(Some(made_with), None));
            }
            (RootChoice::Image(wanted), _) => wanted.clone(),
            (RootChoice::AsMade, Some(made_with)) => serde_json::from_str(&made_with.source)
                .map_err(|error| {
                    let problem =
                        format!("VM {} has an image that can't be read: {error}", self.key);
                    Error::new(Code::StoreCorrupt, problem)
                })?,
        };
        let text = serde_json::to_string(&source).unwrap_or_default();
        if made_with.is_none() && namespace::made_without(&self.dir) {
            // Nothing is unpacked in vain.
            return Err(self.other_image(None, Some(&source)));
        }
        // Under the name that it was made with, the VM has what was there then.
        let id = made_with
            .as_ref()
            .filter(|made_with| made_with.source == text)
            .map(|made_with| made_with.id.clone());
        let tell = |progress| self.emission.notify(&Notice::ImageProgress(progress));
        let (source, found) = locate(source, self.exposure(settings)).await?;
        if let (Source::Rootfs { path }, Some(_)) = (&source, &found) {
            let (path, private) = (path.clone(), settings.private_directories());
            let checked =
                tokio::task::spawn_blocking(move || namespace::check_root(&path, &private));
            checked.await.map_err(|error| {
                Error::new(Code::Internal, format!("can't check an image: {error}"))
            })??;
        }
        // It has what a download needs: too much for every future that may boot a VM.
        let images = settings.images()?;
        let image = Box::pin(images.open(source.clone(), found, id, &tell)).await?;
        if let Source::Rootfs { path } = &source
            && *path != image.rootfs
        {
            let shown = path.display();
            let problem = format!("image.rootfs: \"{shown}\" was exchanged meanwhile: try again");
            return Err(Error::new(Code::from(Errno::ESTALE), problem));
        }
        if let Some(made_with) = made_with.filter(|made_with| made_with.id != image.id) {
            return Err(self.other_image(Some(&made_with), Some(&source)));
        }
        // From here on it stays as long as the VM does, asleep too.
        let dir = self.dir.clone();
        let image = super::images::on_a_thread(move || {
            image.keep_for(&dir)?;
            Ok(image)
        })
        .await?;
        Ok(Some(Found {
            image: Image {
                id: image.id.clone(),
                source: text,
                rootfs: image.rootfs.clone(),
                is_directory: matches!(source, Source::Rootfs { .. }),
                env: image.execution.environment(),
            },
            lease: image,
        }))
    }
}

/// The source by its path without symlinks, and what lies there, unless a VM could have made a symlink that
/// decides where it is.
pub(super) async fn locate(source: Source, exposure: Exposure) -> Result<(Source, Option<File>)> {
    let (given, field) = match &source {
        Source::Registry { .. } => return Ok((source, None)),
        Source::OciLayout { path, .. } => (path.clone(), "image.ociLayout"),
        Source::Rootfs { path } => (path.clone(), "image.rootfs"),
    };
    let finding = host_file::on_a_thread({
        let given = given.clone();
        move || exposure.open(&given)
    });
    let found = match finding.await {
        Ok(found) => found,
        Err(Refused::Io(error))
            if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) =>
        {
            // It is not needed if its image is unpacked.
            return Ok((source, None));
        }
        Err(refused @ Refused::Link { .. }) => {
            return Err(Error::invalid_argument(field, refused));
        }
        Err(refused) => return Err(host_file::failed("use", &given, refused)),
    };
    let path = found.real_path;
    let source = match source {
        Source::OciLayout { tag, .. } => Source::OciLayout { path, tag },
        Source::Rootfs { .. } => Source::Rootfs { path },
        Source::Registry { .. } => source,
    };
    Ok((source, Some(found.descriptor)))
}

/// What a VM is to have below its own files.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum RootChoice {
    /// What it was made with; a new one has the host's programs.
    #[default]
    AsMade,
    HostPrograms,
    Image(Source),
}

/// Images on which a Node of the store was seen to run.
static RUNS: LazyLock<Mutex<HashSet<(String, String)>>> = LazyLock::new(Mutex::default);

/// Whether a built-in agent's Node runs on the VM's image. It is found out by running it, once for each
/// image: the store's programs are linked to the image's C library.
pub(super) async fn check_agent(
    vm: &DynVm,
    name: &str,
    installed: &Installed,
    launch: &Launch,
) -> Result<()> {
    let (Some(image), Installed::BuiltIn(_), Some(node)) =
        (vm.image(), installed, launch.argv.first())
    else {
        return Ok(());
    };
    let checked = (image.id.clone(), node.clone());
    let runs = || RUNS.lock().unwrap_or_else(PoisonError::into_inner);
    if runs().contains(&checked) {
        return Ok(());
    }
    let unsupported = |problem: &str| {
        let message = format!(
            "{name:?} can't run on {}: {problem}. Its Node needs glibc 2.28 or later and libstdc++, as images of Debian and Ubuntu have them",
            image.id
        );
        Error::new(Code::AgentUnsupported, message)
    };
    let version = Command {
        argv: vec![node.clone(), "--version".to_owned()],
        env: launch.env.clone(),
        cwd: GuestPath::home(),
        user: User::User,
    };
    let process = match vm.spawn(&version).await {
        Ok(process) => process,
        // The file is there: what is missing is the loader that it names.
        Err(VmError::Spawn {
            errno: nix::errno::Errno::ENOENT,
            ..
        }) => {
            return Err(unsupported(
                "the image has no glibc (it has musl, or no C library)",
            ));
        }
        Err(VmError::Spawn { errno, .. }) => return Err(unsupported(errno.desc())),
        Err(error) => return Err(error.into()),
    };
    match attend(vm, process, ExecOptions::default()).await? {
        ExecEnd::Exited(output) | ExecEnd::TimedOut(output) => {
            if output.exit == Exit::Code(0) {
                runs().insert(checked);
                return Ok(());
            }
            let said = String::from_utf8_lossy(&output.stderr);
            let said = images::shown(said.lines().next().unwrap_or_default());
            Err(unsupported(&format!("{node} --version failed: {said}")))
        }
    }
}
