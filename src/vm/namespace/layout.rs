//! What a VM's root is made of: one table, for both kinds of host.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use agentvm_guest::protocol::{Account, Node, Source};

use super::base::{self, BESIDE_USR, Base, HOST_DIRS};
use super::directory::host;
use super::ids::IdMap;
use super::packages;
use super::trees::clone_tree;
use super::unsupported;
use crate::vm::VmError;

/// Where the agent store is inside every VM.
pub const AGENTS: &str = "/opt/agentvm/agents";

/// A default tmpfs may take half of the host's memory; these are what builds and browsers get by with.
const TMP_SIZE: u64 = 4 << 30;
const RUN_SIZE: u64 = 64 << 20;
const SHM_SIZE: u64 = 1 << 30;
/// What our own files in `/run` need, too.
const LEAST_SIZE: u64 = 1 << 20;
const TMPFS_INODES: u64 = 1 << 20;

/// The nodes of a VM's root, and the mount trees that they refer to.
pub(super) struct Layout {
    pub(super) nodes: Vec<Node>,
    pub(super) trees: Vec<OwnedFd>,
}

/// Where things are on the host.
pub(super) struct Places<'a> {
    pub(super) vm: &'a Path,
    pub(super) base: &'a Base,
    /// The agent store, if there is one.
    pub(super) agents: Option<&'a Path>,
}

/// Builds the table. `namespace` is the VM's user namespace, for idmapped mounts; `memory` its limit.
pub(super) fn layout(
    ids: IdMap,
    places: &Places<'_>,
    namespace: Option<&OwnedFd>,
    memory: Option<u64>,
) -> Result<Layout, VmError> {
    let mut table = Table::new(ids, namespace);
    for path in HOST_DIRS {
        table.host_dir(path, places)?;
    }
    table.dir("/etc", 0o755);
    if table.writable_base {
        table.bind("/etc", &format!("/usr/{}", base::ETC));
    } else {
        table.read_only("/etc", &places.base.usr.join(base::ETC))?;
    }

    for path in ["/home", "/media", "/mnt", "/opt", "/srv", "/sys"] {
        table.dir(path, 0o755);
    }
    if table.writable_base {
        table.beside_usr();
    }
    table.dir("/opt/agentvm", 0o755);
    if table.writable_base {
        // What lies in it is for no root of a VM to move away: a mount point can't be renamed.
        table.bind("/opt/agentvm", "/opt/agentvm");
    }
    table.processors()?;
    table.packages(places)?;
    table.agents(places.agents)?;
    table.dir("/home/user", 0o755);
    table.durable("/home/user", &places.vm.join("home"))?;
    table.dir("/root", 0o700);
    if ids.root_mapped() {
        table.durable("/root", &places.vm.join("root"))?;
    }
    table.dir("/var", 0o755);
    table.durable("/var", &places.vm.join("var"))?;

    table.volatile(memory);
    Ok(table.layout())
}

pub(super) struct Table<'a> {
    ids: IdMap,
    namespace: Option<&'a OwnedFd>,
    /// `/usr` is copy-on-write.
    writable_base: bool,
    pub(super) nodes: Vec<Node>,
    trees: Vec<OwnedFd>,
}

/// Of a file system in memory: `size`, and so many parts of the VM's memory at most.
fn share(memory: Option<u64>, size: u64, part: u64) -> u64 {
    memory.map_or(size, |memory| size.min((memory / part).max(LEAST_SIZE)))
}

/// How much of `memory` is for memory that is shared by name.
pub(super) fn shm_size(memory: Option<u64>) -> u64 {
    share(memory, SHM_SIZE, 4)
}

impl<'a> Table<'a> {
    pub(super) fn new(ids: IdMap, namespace: Option<&'a OwnedFd>) -> Self {
        Self {
            ids,
            namespace,
            writable_base: false,
            nodes: Vec::new(),
            trees: Vec::new(),
        }
    }

    pub(super) fn layout(self) -> Layout {
        Layout {
            nodes: self.nodes,
            trees: self.trees,
        }
    }

    /// The agent store, if there is one.
    pub(super) fn agents(&mut self, agents: Option<&Path>) -> Result<(), VmError> {
        self.dir(AGENTS, 0o755);
        agents.map_or(Ok(()), |agents| self.read_only(AGENTS, agents))
    }

    /// What no boot keeps, and the kernel's own. `memory`: the VM's limit, of which its files may not take
    /// all: no killed process frees them.
    pub(super) fn volatile(&mut self, memory: Option<u64>) {
        let share = |size, part| share(memory, size, part);
        self.dir("/tmp", 0o1777);
        self.tmpfs("/tmp", 0o1777, share(TMP_SIZE, 2));
        self.dir("/run", 0o755);
        self.tmpfs("/run", 0o755, share(RUN_SIZE, 8));
        self.dir("/run/lock", 0o1777);
        self.nodes.push(Node::Dir {
            path: "/run/user".to_owned(),
            mode: 0o755,
            owner: Account::Root,
        });
        self.nodes.push(Node::Dir {
            path: "/run/user/1000".to_owned(),
            mode: 0o700,
            owner: Account::User,
        });
        self.dir("/dev", 0o755);
        self.nodes.push(Node::Dev {
            path: "/dev".to_owned(),
            shm_size: shm_size(memory),
        });
        self.dir("/proc", 0o555);
        self.nodes.push(Node::Proc {
            path: "/proc".to_owned(),
        });
    }

    pub(super) fn dir(&mut self, path: &str, mode: u32) {
        self.nodes.push(Node::Dir {
            path: path.to_owned(),
            mode,
            owner: Account::Root,
        });
    }

    fn tmpfs(&mut self, path: &str, mode: u32, size: u64) {
        self.nodes.push(Node::Tmpfs {
            path: path.to_owned(),
            mode,
            size,
            inodes: TMPFS_INODES,
        });
    }

    /// A top-level directory of the host as the host has it.
    fn host_dir(&mut self, path: &str, places: &Places<'_>) -> Result<(), VmError> {
        let on_host = Path::new(path);
        let Ok(data) = fs::symlink_metadata(on_host) else {
            return Ok(());
        };
        if data.is_symlink() {
            let target = fs::read_link(on_host)
                .map_err(|error| host("can't read the link", on_host, error))?;
            self.nodes.push(Node::Symlink {
                path: path.to_owned(),
                target: target.to_string_lossy().into_owned(),
            });
            return Ok(());
        }
        self.dir(path, 0o755);
        if path == "/usr" && self.copy_on_write_usr(places)? {
            return Ok(());
        }
        self.read_only(path, on_host)
    }

    /// `/usr` with a writable layer, where this host can give the VM's root the files of the base.
    ///
    /// `/etc` lies in the same overlay, merged in from the base's own directory: each overlay costs
    /// several metadata writes on the host's disk at every boot.
    fn copy_on_write_usr(&mut self, places: &Places<'_>) -> Result<bool, VmError> {
        let (IdMap::Range { .. }, Some(namespace)) = (self.ids, self.namespace) else {
            return Ok(false);
        };
        // A file system that can't be idmapped (overlayfs below a container, some network ones) is
        // shown read-only: then no file of it could be copied up rightly.
        let (Ok(usr), Ok(own)) = (
            clone_tree(Path::new("/usr"), Some(namespace)),
            clone_tree(&places.base.usr, Some(namespace)),
        ) else {
            return Ok(false);
        };
        let layer = places.vm.join("layers");
        let layer_tree =
            clone_tree(&layer, None).map_err(|errno| unsupported::clone_tree(&layer, errno))?;
        let node = Node::Overlay {
            path: "/usr".to_owned(),
            lowers: vec![self.push(own), self.push(usr)],
            layer: self.push(layer_tree),
        };
        self.nodes.push(node);
        self.writable_base = true;
        Ok(true)
    }

    /// Directories that the VM's root can write to beside `/usr`.
    fn beside_usr(&mut self) {
        for (path, in_usr, _) in BESIDE_USR {
            self.bind(path, &format!("/usr/{in_usr}"));
        }
    }

    /// Shows at `path` what the VM has at `from`.
    fn bind(&mut self, path: &str, from: &str) {
        self.nodes.push(Node::Bind {
            path: path.to_owned(),
            from: from.to_owned(),
        });
    }

    /// The part of sysfs that `/proc/cpuinfo` leaves out: how many processors there are and how they
    /// share caches, which `lscpu` and runtimes of numerical programs ask for.
    fn processors(&mut self) -> Result<(), VmError> {
        const PROCESSORS: &str = "/sys/devices/system/cpu";
        if !Path::new(PROCESSORS).is_dir() {
            return Ok(());
        }
        for path in ["/sys/devices", "/sys/devices/system", PROCESSORS] {
            self.dir(path, 0o755);
        }
        self.read_only(PROCESSORS, Path::new(PROCESSORS))
    }

    /// dpkg's database, if the base has one: in the layer of `/usr`, or the host's read-only.
    fn packages(&mut self, places: &Places<'_>) -> Result<(), VmError> {
        let snapshot = places.base.usr.join(packages::IN_USR);
        let database = if self.ids.root_mapped() {
            &*snapshot
        } else {
            Path::new(packages::DATABASE)
        };
        if !database.is_dir() {
            return Ok(());
        }
        self.dir(packages::SHOWN, 0o755);
        if !self.writable_base {
            return self.read_only(packages::SHOWN, database);
        }
        self.bind(packages::SHOWN, &format!("/usr/{}", packages::IN_USR));
        Ok(())
    }

    /// Something of the host that is not the VM's own. Files keep owners that the VM shows as its
    /// root's where they can be idmapped, as nobody's elsewhere; either way they are not writable.
    fn read_only(&mut self, path: &str, source: &Path) -> Result<(), VmError> {
        let source = match (self.ids, self.namespace) {
            (IdMap::Range { .. }, Some(namespace)) => {
                let tree = clone_tree(source, Some(namespace))
                    .or_else(|_| clone_tree(source, None))
                    .map_err(|errno| unsupported::clone_tree(source, errno))?;
                self.push(tree)
            }
            _ => host_path(source),
        };
        self.nodes.push(Node::Tree {
            path: path.to_owned(),
            source,
            read_only: true,
            no_exec: false,
        });
        Ok(())
    }

    /// A plain directory of the VM: what is synced there is on the disk.
    pub(super) fn durable(&mut self, path: &str, directory: &Path) -> Result<(), VmError> {
        let source = if self.ids.root_mapped() {
            let tree = clone_tree(directory, None)
                .map_err(|errno| unsupported::clone_tree(directory, errno))?;
            self.push(tree)
        } else {
            host_path(directory)
        };
        self.nodes.push(Node::Tree {
            path: path.to_owned(),
            source,
            read_only: false,
            no_exec: false,
        });
        Ok(())
    }

    pub(super) fn push(&mut self, tree: OwnedFd) -> Source {
        self.trees.push(tree);
        Source::Descriptor(u32::try_from(self.trees.len() - 1).unwrap_or(u32::MAX))
    }
}

pub(super) fn host_path(path: &Path) -> Source {
    // The guest starts with this process's root but not its working directory.
    let absolute = std::path::absolute(path).unwrap_or_else(|_| PathBuf::from(path));
    Source::HostPath(absolute.as_os_str().as_bytes().to_vec())
}
