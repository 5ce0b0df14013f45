//! VMs from Linux namespaces, with the static guest as PID 1. No root, no daemon, no setuid helper.

mod authorities;
mod base;
mod bases;
mod cgroup;
mod control;
mod deleted;
mod directory;
mod disk;
mod doctor;
mod files;
mod free_space;
mod guest;
mod host_mounts;
mod ids;
mod image;
mod inventory;
mod layout;
mod limits;
mod npm_config;
mod packages;
mod ports;
mod preparation;
mod processes;
mod removal;
mod running;
mod seccomp;
mod secrets;
mod starter;
mod terminals;
mod trees;
mod unsupported;
#[cfg(feature = "weaken")]
mod weaken;

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Once};

use agentvm_guest::net::NetSockets;
use agentvm_guest::protocol::{NetState, Reply, Request};
use nix::errno::Errno;
use tokio::sync::mpsc::UnboundedSender;

use self::control::{Control, Received};
use self::directory::{Directory, LastBoot};
use self::guest::Guest;
use self::ids::IdMap;
use self::limits::Limiter;
use self::preparation::{BootMessage, Prepared};
use self::starter::Started;
use super::mount::HostMount;
use super::{Image, Limits, Result, VmError};
use crate::host_path::Exposure;
use crate::net::secrets::{Interceptor, Secrets};
use crate::net::{Denial, Network, Policy};

pub use self::bases::{Pruned, prune as prune_bases};
pub use self::directory::{HostLock, check_not_elsewhere};
pub use self::disk::disk_usage;
pub use self::doctor::examine;
pub use self::free_space::floor as min_free_disk;
pub use self::ids::maps_a_range;
pub use self::image::{check_root, made_with, made_without};
pub use self::inventory::{Made, made};
pub use self::layout::AGENTS;
pub use self::running::NamespaceVm;

/// What a VM is booted from.
#[derive(Debug, Clone)]
pub struct BootOptions {
    /// `<dataDir>/vms/<id>`: made if missing.
    pub dir: PathBuf,
    /// The VM's key as JSON, kept in `vm.json` and named in errors.
    pub key: String,
    /// `<dataDir>/base`: what is derived from the host's `/etc`, shared by VMs.
    pub base_cache: PathBuf,
    /// The agent store, mounted read-only at [`AGENTS`].
    pub agents: PathBuf,
    pub policy: Arc<Policy>,
    /// Is told what the policy refuses.
    pub denials: Option<UnboundedSender<Denial>>,
    pub limits: Limits,
    /// What of the host the VM is shown beside its base.
    pub mounts: Vec<HostMount>,
    /// Directories of the host that no mount may show: data directories, the agent store.
    pub private: Vec<PathBuf>,
    /// Instead of the host's programs.
    pub image: Option<Image>,
    /// What the VM uses and does not get.
    pub secrets: Secrets,
}

impl BootOptions {
    /// What VMs of this data directory can write to.
    fn exposure(&self) -> Exposure {
        let data = self.base_cache.parent().unwrap_or(&self.base_cache);
        Exposure::new(data, self.private.clone())
    }
}

/// A VM that has just booted.
pub struct Booted {
    pub vm: Arc<NamespaceVm>,
    /// To be held until nothing writes to the VM's directory any more.
    pub lock: HostLock,
    /// The host's programs have changed since this VM last booted: its writable layers lie on
    /// another base now.
    pub base_changed: bool,
    /// The host crashed while this VM ran: what was written outside of the durable directories
    /// (`/home/user`, `/root`, `/var`) may be incomplete.
    pub layers_suspect: bool,
    /// Whether it has a network, or why not.
    pub net: NetState,
}

/// Boots a VM, or says what the host lacks for it. A failure leaves nothing behind but the VM's
/// directory.
pub async fn boot(options: BootOptions) -> Result<Booted> {
    // The kernel needs a millisecond for the namespaces, the disk as long for the directories: at
    // the same time.
    let ids = IdMap::of_this_process()?;
    let mut limiter = Limiter::prepare(&options.limits, ids, &options.dir).await?;
    let (started, prepared) =
        tokio::join!(start(&mut limiter, ids), preparation::prepare(&options));
    let first_boot = prepared.as_ref().ok().and_then(Prepared::of_a_new_image);
    let pid = started.as_ref().map_or(0, |started| started.pid);
    let (guest, control) = match started.and_then(Guest::adopt) {
        Ok(adopted) => adopted,
        Err(error) => {
            limiter.end().await;
            // What is wrong with the VM's directory comes first: that is the caller's own.
            let _locked = prepared?;
            forget(first_boot).await;
            return Err(error);
        }
    };
    match furnish(pid, &control, prepared, &options).await {
        Ok(Furnished {
            directory,
            ids,
            network,
            net,
            last,
            secrets,
        }) => Ok(Booted {
            lock: directory.host_lock(),
            vm: NamespaceVm::run(
                directory,
                control,
                guest,
                network,
                limiter,
                ids,
                options.image,
                secrets,
            ),
            base_changed: last.base_changed,
            layers_suspect: last.layers_suspect,
            net,
        }),
        Err(error) => {
            // PID 1 exits when its socket closes. The caller hears of the failure when nothing is
            // left of the attempt.
            drop(control);
            guest.gone().await;
            limiter.end().await;
            forget(first_boot).await;
            Err(match &options.image {
                Some(image) => image::explain(image, error),
                None => error,
            })
        }
    }
}

/// Undoes what a first boot has kept when it fails. Why it failed is what its caller is to hear.
async fn forget(first_boot: Option<image::FirstBoot>) {
    let Some(first_boot) = first_boot else {
        return;
    };
    if let Err(error) = directory::blocking(move || first_boot.forget()).await {
        tracing::warn!(%error, "a VM that did not boot keeps its image");
    }
}

/// PID 1, within the VM's limits before it has done anything.
async fn start(limiter: &mut Limiter, ids: IdMap) -> Result<Started> {
    let started = starter::start(ids)
        .await
        .map_err(|error| unsupported::namespaces(error.step, error.errno))?;
    limits::stop_core_dumps(started.pid);
    limits::be_killed_like_others(started.pid);
    limiter.enter(started.pid).await?;
    Ok(started)
}

/// What a guest has become a VM with.
struct Furnished {
    directory: Directory,
    ids: IdMap,
    network: Option<Network>,
    net: NetState,
    last: LastBoot,
    secrets: Option<Arc<Interceptor>>,
}

/// Turns a waiting guest into a VM in its directory.
async fn furnish(
    pid: i32,
    control: &Control,
    prepared: Result<Prepared>,
    options: &BootOptions,
) -> Result<Furnished> {
    let prepared = prepared?;
    let (ids, last, secrets) = (prepared.ids, prepared.last, prepared.secrets.clone());
    ids.write(pid).map_err(|(file, errno)| {
        // Of a process that is dying, these files are root's.
        if directory::is_exiting(pid) {
            VmError::Ended("PID 1 was killed at its start".to_owned())
        } else {
            unsupported::id_map(file, errno)
        }
    })?;
    let (directory, mut message) = prepared.message(pid, options).await?;
    host_mounts::add(&mut message, ids, options).await?;
    let (net, sockets) = first_reply(control, message, directory.lock(), &options.mounts).await?;
    let network = match &net {
        NetState::Up { v6, log } => {
            Some(start_network(sockets, *v6, *log, options, secrets.clone())?)
        }
        NetState::Down { step, errno } => {
            let step = String::from_utf8_lossy(step);
            tracing::warn!(%step, errno = %Errno::from_raw(*errno), "this VM has no network");
            None
        }
    };
    Ok(Furnished {
        directory,
        ids,
        network,
        net,
        last,
        secrets,
    })
}

/// Removes a VM's directory with everything in it. Waits for a VM that is still being torn down.
pub async fn delete(dir: &Path, key: &str) -> Result<()> {
    if !dir.exists() {
        return Ok(());
    }
    Directory::open(dir, key, IdMap::of_this_process()?)
        .await?
        .remove()
        .await
}

/// The VMs in `<dataDir>/vms`, by key. Boots nothing.
pub async fn list(vms: &Path) -> Result<Vec<Made>> {
    let vms = vms.to_owned();
    directory::blocking(move || inventory::list(&vms)).await
}

/// Fails where [`boot`] would, because other users can change the data directory that `dir` lies in, or
/// could exchange it: what is read there could be anybody's. A directory that does not exist is fine.
pub async fn check_owner(dir: &Path) -> Result<()> {
    let vms = dir.parent().unwrap_or(dir).to_owned();
    directory::blocking(move || directory::check_owner(&vms)).await
}

/// Clears what an interrupted [`delete`] has left in `<dataDir>/vms`.
pub fn sweep(vms: &Path) {
    directory::sweep(vms);
}

async fn first_reply(
    control: &Control,
    BootMessage { spec, trees }: BootMessage,
    lock: &File,
    mounts: &[HostMount],
) -> Result<(NetState, Vec<OwnedFd>)> {
    let mut descriptors = vec![lock.as_fd()];
    descriptors.extend(trees.iter().map(AsFd::as_fd));
    let sent = control.send(&Request::Boot(spec), &descriptors).await;
    // A guest that failed early has said why before it closed its end.
    let reply = control.receive().await.map_err(VmError::Protocol)?;
    match (reply, sent) {
        (Some((Reply::Ready { net }, sockets)), Ok(())) => {
            let sockets = sockets.all().map_err(|error| {
                directory::host("can't take the sockets of", Path::new("PID 1"), error)
            })?;
            // It has run nothing of the VM yet.
            Ok((net, sockets.into_iter().map(Received::take).collect()))
        }
        (Some((Reply::BootFailed { step, errno }, _)), _) => {
            let (step, errno) = (String::from_utf8_lossy(&step), Errno::from_raw(errno));
            Err(host_mounts::explain(mounts, &step, errno)
                .unwrap_or_else(|| unsupported::boot_step(step.into_owned(), errno)))
        }
        (Some(_), _) => Err(VmError::Protocol("another first message".to_owned())),
        (None, Err(error)) => Err(VmError::Ended(format!("PID 1 died at its start: {error}"))),
        (None, Ok(())) => Err(VmError::Ended("PID 1 died while it booted".to_owned())),
    }
}

fn start_network(
    sockets: Vec<OwnedFd>,
    v6: bool,
    log: bool,
    options: &BootOptions,
    secrets: Option<Arc<Interceptor>>,
) -> Result<Network> {
    static WITHOUT_LOG: Once = Once::new();
    if !log {
        WITHOUT_LOG.call_once(|| {
            tracing::warn!(
                "this kernel has no NFLOG: what is refused over UDP is not told, and TCP is refused later"
            );
        });
    }
    let missing = || VmError::Protocol("a boot report without its sockets".to_owned());
    let mut sockets = sockets.into_iter();
    let mut next = || sockets.next().ok_or_else(missing);
    let sockets = NetSockets {
        tcp4: next()?,
        dns_udp: next()?,
        dns_tcp: next()?,
        rules: next()?,
        tcp6: v6.then(&mut next).transpose()?,
        log: log.then(next).transpose()?,
    };
    Network::start(
        sockets,
        Arc::clone(&options.policy),
        options.denials.clone(),
        secrets,
    )
    .map_err(|error| VmError::Protocol(format!("unusable network sockets: {error}")))
}
