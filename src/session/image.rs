//! The image that a VM has instead of the host's programs, and whether agents run on it.

use std::collections::HashSet;
use std::sync::{LazyLock, Mutex, PoisonError};

use super::client::Settings;
use super::emission::Notice;
use super::machine::Machine;
use crate::agents::{Installed, Launch};
use crate::error::{Code, Error, Result};
use crate::images::{self, Images, Ownership};
use crate::vm::exec::{ExecEnd, ExecOptions, attend};
use crate::vm::{Command, DynVm, Exit, GuestPath, Image, User, VmError, namespace};

/// An image that a VM can be booted with.
pub(super) struct Found {
    pub(super) image: Image,
    /// To be held until the VM has ended.
    pub(super) lease: images::Image,
}

impl Settings {
    fn images(&self) -> Result<Images> {
        let ownership = if namespace::maps_a_range()? {
            Ownership::AsInImage
        } else {
            Ownership::Caller
        };
        Ok(Images::new(
            self.images.clone(),
            ownership,
            images::Limits::default(),
        ))
    }
}

impl Machine {
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
            (None, None) => return Ok(None),
            (Some(wanted), _) => wanted.clone(),
            (None, Some(made_with)) => {
                serde_json::from_str(&made_with.source).map_err(|error| {
                    let problem =
                        format!("VM {} has an image that can't be read: {error}", self.key);
                    Error::new(Code::StoreCorrupt, problem)
                })?
            }
        };
        let text = serde_json::to_string(&source).unwrap_or_default();
        if made_with.is_none() && namespace::made_without(&self.dir) {
            // Nothing is unpacked in vain.
            return Err(Error::from(VmError::OtherImage {
                key: self.key.to_string(),
                has: None,
                wanted: Some(source.to_string()),
            }));
        }
        // Under the name that it was made with, the VM has what was there then.
        let id = made_with.filter(|made_with| made_with.source == text);
        let tell = |progress| self.emission.notify(&Notice::ImageProgress(progress));
        let id = id.map(|made_with| made_with.id);
        // It has what a download needs: too much for every future that may boot a VM.
        let image = Box::pin(settings.images()?.open(source, id, &tell)).await?;
        Ok(Some(Found {
            image: Image {
                id: image.id.clone(),
                source: text,
                rootfs: image.rootfs.clone(),
                env: image.execution.environment(),
            },
            lease: image,
        }))
    }
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
            let said = said.lines().next().unwrap_or_default();
            Err(unsupported(&format!("{node} --version failed: {said}")))
        }
    }
}
