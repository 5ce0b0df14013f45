//! What the host does for a boot while the kernel makes the namespaces.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use agentvm_guest::protocol::BootSpec;

use super::BootOptions;
use super::base::{self, Base};
use super::directory::{self, Directory, LastBoot, blocking, host};
use super::ids::IdMap;
use super::image::{self, FirstBoot};
use super::layout::{self, Places};
use super::limits;
use super::npm_config;
use super::packages;
use super::seccomp;
use super::secrets;
use crate::net::secrets::Interceptor;
use crate::vm::{Image, Result};

/// A VM's directory, locked, and what PID 1 is to be told.
pub(super) struct Prepared {
    pub(super) ids: IdMap,
    pub(super) directory: Directory,
    pub(super) last: LastBoot,
    message: Message,
    /// Its first boot, on an image.
    first_boot: Option<FirstBoot>,
    /// Of a VM that has secrets.
    pub(super) secrets: Option<Arc<Interceptor>>,
}

impl Prepared {
    pub(super) fn of_a_new_image(&self) -> Option<FirstBoot> {
        self.first_boot.clone()
    }
}

/// The first message to PID 1.
pub(super) struct BootMessage {
    pub(super) spec: Box<BootSpec>,
    /// The mount trees that the spec refers to.
    pub(super) trees: Vec<OwnedFd>,
}

/// What is below a VM's own files.
enum Foundation {
    Host(Base),
    Image(Image),
}

impl Foundation {
    /// Names its state.
    fn fingerprint(&self) -> &str {
        match self {
            Self::Host(base) => &base.fingerprint,
            Self::Image(image) => &image.id,
        }
    }
}

enum Message {
    Ready(BootMessage),
    /// Mounts are to be idmapped, and the first user namespace with the map is still to come.
    NeedsNamespace(Foundation),
}

/// Everything that a boot needs on the host's disk. In one go where it can: each hand-over between
/// threads is a wake-up, which on a busy machine is what a boot waits for most.
pub(super) async fn prepare(options: &BootOptions) -> Result<Prepared> {
    let opened = {
        let options = options.clone();
        blocking(move || {
            let ids = IdMap::of_this_process()?;
            let directory = Directory::prepare(&options.dir, &options.key, ids)?;
            if directory.try_lock()? {
                finish(ids, directory, &options).map(Opened::Prepared)
            } else {
                Ok(Opened::InUse(ids, directory))
            }
        })
        .await?
    };
    match opened {
        Opened::Prepared(prepared) => Ok(prepared),
        Opened::InUse(ids, directory) => {
            directory.wait_for_lock().await?;
            let options = options.clone();
            blocking(move || finish(ids, directory, &options)).await
        }
    }
}

enum Opened {
    Prepared(Prepared),
    /// By the VM of a process that has died, which is still being torn down.
    InUse(IdMap, Directory),
}

/// With the VM's lock held: nothing of an earlier boot is left.
fn finish(ids: IdMap, directory: Directory, options: &BootOptions) -> Result<Prepared> {
    let first_boot = image::remember(&directory, ids, &options.key, options.image.as_ref())?;
    let undo = first_boot.clone();
    let prepared = prepare_boot(ids, directory, options, first_boot);
    if let (Err(_), Some(undo)) = (&prepared, undo)
        && let Err(error) = undo.forget()
    {
        tracing::warn!(%error, "a VM that was not prepared keeps its image");
    }
    prepared
}

fn prepare_boot(
    ids: IdMap,
    mut directory: Directory,
    options: &BootOptions,
    first_boot: Option<FirstBoot>,
) -> Result<Prepared> {
    let base = match &options.image {
        None => {
            let base = base::base(&options.base_cache, ids)?;
            directory.lies_on(base.lease.clone());
            Foundation::Host(base)
        }
        Some(image) => {
            directory::make_layers(directory.path(), ids)?;
            Foundation::Image(image.clone())
        }
    };
    if let Err(error) = directory::make_private_dir(&options.agents) {
        // A VM needs it for built-in agents only, and these could not be installed.
        tracing::warn!(%error, path = %options.agents.display(), "a VM without the agent store");
    }
    let last = directory::record_boot(directory.path(), base.fingerprint())?;
    if last.base_changed && matches!(base, Foundation::Host(_)) {
        // A VM may be older than what the base has to offer.
        packages::lead_to_database(directory.path(), ids).map_err(|error| {
            host(
                "can't link the package database into",
                directory.path(),
                error,
            )
        })?;
    }
    let secrets = secrets::prepare(&directory, &options.secrets)?;
    let authority = secrets.as_deref();
    let namespace = ids.root_mapped().then(|| idmap_namespace(ids));
    let message = match namespace {
        Some(None) => Message::NeedsNamespace(base),
        None => Message::Ready(message(ids, &directory, &base, options, None, authority)?),
        Some(Some(namespace)) => {
            let namespace = Some(&*namespace);
            Message::Ready(message(
                ids, &directory, &base, options, namespace, authority,
            )?)
        }
    };
    Ok(Prepared {
        ids,
        directory,
        last,
        message,
        first_boot,
        secrets,
    })
}

impl Prepared {
    /// `pid`: PID 1, whose id maps are written.
    pub(super) async fn message(
        self,
        pid: i32,
        options: &BootOptions,
    ) -> Result<(Directory, BootMessage)> {
        let (ids, directory, secrets) = (self.ids, self.directory, self.secrets);
        match self.message {
            Message::Ready(message) => Ok((directory, message)),
            Message::NeedsNamespace(base) => {
                let options = options.clone();
                blocking(move || {
                    let namespace = keep_idmap_namespace(ids, pid)?;
                    let message = message(
                        ids,
                        &directory,
                        &base,
                        &options,
                        Some(&namespace),
                        secrets.as_deref(),
                    )?;
                    Ok((directory, message))
                })
                .await
            }
        }
    }
}

/// A user namespace with the VMs' id map, for idmapped mounts. Any one will do, as the kernel takes
/// only the map from it: with that of an earlier VM the mounts are made while the next VM's
/// namespaces are.
static IDMAP_NAMESPACE: Mutex<Option<(IdMap, Arc<OwnedFd>)>> = Mutex::new(None);

fn idmap_namespace(ids: IdMap) -> Option<Arc<OwnedFd>> {
    let kept = IDMAP_NAMESPACE
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    kept.as_ref()
        .filter(|(of, _)| *of == ids)
        .map(|(_, namespace)| Arc::clone(namespace))
}

fn keep_idmap_namespace(ids: IdMap, pid: i32) -> Result<Arc<OwnedFd>> {
    let path = std::path::PathBuf::from(format!("/proc/{pid}/ns/user"));
    let file = File::open(&path).map_err(|error| host("can't open the namespace", &path, error))?;
    let namespace = Arc::new(OwnedFd::from(file));
    *IDMAP_NAMESPACE
        .lock()
        .unwrap_or_else(PoisonError::into_inner) = Some((ids, Arc::clone(&namespace)));
    Ok(namespace)
}

fn message(
    ids: IdMap,
    directory: &Directory,
    base: &Foundation,
    options: &BootOptions,
    namespace: Option<&OwnedFd>,
    secrets: Option<&Interceptor>,
) -> Result<BootMessage> {
    let (vm, agents) = (directory.path(), &*options.agents);
    let agents = agents.is_dir().then_some(agents);
    let memory = options.limits.memory_bytes;
    let mut layout = match base {
        Foundation::Host(base) => {
            layout::layout(ids, &Places { vm, base, agents }, namespace, memory)
        }
        Foundation::Image(image) => image::layout(ids, vm, image, agents, namespace, memory),
    }?;
    if let Some(secrets) = secrets {
        let npm = match base {
            Foundation::Host(_) => npm_config::authorities(),
            Foundation::Image(_) => None,
        };
        let nodes = secrets::nodes(secrets.authority(), npm);
        layout.nodes.extend(nodes);
    }
    let spec = Box::new(BootSpec {
        real_uid: ids.real_uid_of_pid_1(),
        hostname: base::HOSTNAME.as_bytes().to_vec(),
        root: layout.nodes,
        writable_root: matches!(base, Foundation::Image(_)),
        net: options.policy.guest_config(),
        seccomp: seccomp::filter(),
        limits: limits::spec(&options.limits, ids)?,
        program_seccomp: Vec::new(),
        #[cfg(feature = "weaken")]
        without: super::weaken::without(),
    });
    Ok(BootMessage {
        spec,
        trees: layout.trees,
    })
}
