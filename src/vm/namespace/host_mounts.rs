//! What the VM's owner mounts of the host: found, checked and opened here, mounted by the guest
//! (`guest/src/host_mounts.rs`).
//!
//! Two places are the same if they are the same path of the same file system, whatever path of the
//! host they were reached by: that is how a directory that a VM must not see is found below what it
//! is to see.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use agentvm_guest::protocol::{HostMount as Spec, HostSource, Node, USER_ID};
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};

use super::BootOptions;
use super::directory::blocking;
use super::ids::{self, IdMap};
use super::preparation::BootMessage;
use super::{seccomp, starter, trees, unsupported};
use crate::host_path::{self, Exposure, Place, Refused, Spot, Table};
use crate::vm::mount::HostMount;
use crate::vm::{Result, VmError};

/// File systems that are windows on the kernel, and on all processes of the host.
const KERNEL_FILE_SYSTEMS: [&str; 22] = [
    "autofs",
    "binfmt_misc",
    "bpf",
    "cgroup",
    "cgroup2",
    "configfs",
    "debugfs",
    "devpts",
    "devtmpfs",
    "efivarfs",
    "fusectl",
    "hugetlbfs",
    "mqueue",
    "nfsd",
    "nsfs",
    "proc",
    "pstore",
    "resctrl",
    "rpc_pipefs",
    "securityfs",
    "sysfs",
    "tracefs",
];

/// Adds the mounts of `options` to what PID 1 is told.
pub(super) async fn add(
    message: &mut BootMessage,
    ids: IdMap,
    options: &BootOptions,
) -> Result<()> {
    if options.mounts.is_empty() {
        return Ok(());
    }
    if options.mounts.iter().any(|mount| !mount.read_only()) {
        message.spec.program_seccomp = seccomp::no_setid();
    }
    let mut found = {
        let options = options.clone();
        blocking(move || find_all(&options, ids)).await?
    };
    // What lies below another mount goes on top of it.
    found.sort_by_key(|found| found.mount.path().split('/').count());
    for found in found {
        let (source, tree) = match ids {
            IdMap::Range { base } => {
                let map = namespace_of_owner(base, found.owner).await?;
                let index = u32::try_from(message.trees.len()).unwrap_or(u32::MAX);
                (HostSource::Descriptor(index), Some(found.clone_for(&map)?))
            }
            IdMap::Caller { .. } => {
                let source = HostSource::Path {
                    path: found.source.real_path.as_os_str().as_bytes().to_vec(),
                    dev: found.identity.0,
                    ino: found.identity.1,
                };
                (source, None)
            }
        };
        message.trees.extend(tree);
        let bytes = |paths: &[PathBuf]| {
            let paths = paths.iter();
            paths
                .map(|path| path.as_os_str().as_bytes().to_vec())
                .collect()
        };
        message.spec.root.push(Node::HostMount(Spec {
            path: found.mount.path().to_owned(),
            source,
            directory: found.is_directory,
            read_only: found.mount.read_only(),
            hidden: bytes(&found.hidden),
            submounts: bytes(&found.submounts),
        }));
    }
    Ok(())
}

/// What a boot step that failed means, if it was one of these mounts.
pub(super) fn explain(mounts: &[HostMount], step: &str, errno: Errno) -> Option<VmError> {
    let (path, attaching) = match step.strip_prefix("mount point ") {
        Some(path) => (path, false),
        None => (step.strip_prefix("mount ")?, true),
    };
    let mount = mounts.iter().find(|mount| mount.path() == path)?;
    let remedy = match errno {
        Errno::ENOSPC if attaching => {
            return Some(VmError::Unsupported {
                feature: format!("a mount of {}", mount.host_path().display()),
                detail: "the kernel lets a VM have no more mounts".to_owned(),
                remedy: "Mount a directory with fewer file systems mounted below it, or raise \
                         fs.mount-max (sysctl)"
                    .to_owned(),
            });
        }
        Errno::EPERM if attaching => {
            "Something is mounted below a directory that its owner can't search and may open later: \
             chmod u+x that directory, or mount another"
        }
        Errno::ELOOP => {
            "There is a symlink on the way: remove it in the VM, or choose another path"
        }
        Errno::ENOTDIR | Errno::EISDIR => {
            "A directory needs a directory, a file a file: remove what is there in the VM, or choose \
             another path"
        }
        Errno::EROFS => "It lies in a read-only mount: make the mount point on the host",
        Errno::ESTALE | Errno::ENOENT => {
            "The directory of the host was exchanged meanwhile: try again"
        }
        Errno::EBUSY => "The mounts of the host below it change all the time: try again",
        Errno::EACCES | Errno::EOVERFLOW => {
            "It lies in a mount that the VM's first process can't write to: make the mount point on \
             the host"
        }
        Errno::ENOSPC | Errno::EDQUOT => "Free space in the data directory",
        _ => return None,
    };
    Some(VmError::MountPoint {
        path: path.to_owned(),
        errno,
        remedy,
    })
}

/// A mount whose source has been opened.
struct Found {
    index: usize,
    mount: HostMount,
    source: host_path::Found,
    at: Place,
    identity: (u64, u64),
    owner: (u32, u32),
    is_directory: bool,
    /// Below it, what the VM must not see.
    hidden: Vec<PathBuf>,
    /// Below it, what the VM must not unmount or move on the host.
    submounts: Vec<PathBuf>,
}

impl Found {
    /// Notes what of `private` lies below it, and refuses to be in one of them.
    fn hide(&mut self, private: &[Place], ids: IdMap) -> Result<()> {
        let mut hidden = Vec::new();
        for secret in private {
            if secret.holds(&self.at) {
                return Err(VmError::Mount {
                    index: self.index,
                    field: "hostPath",
                    problem: format!(
                        "\"{}\" is in agentvm's own data directory or agent store, which no VM may see",
                        self.mount.host_path().display()
                    ),
                });
            }
            if self.at.holds(secret)
                && let Ok(below) = secret.path.strip_prefix(&self.at.path)
                && (ids.root_mapped() || !crosses_mount(&self.source.descriptor, below))
            {
                hidden.push(below.to_owned());
            }
        }
        self.hidden = outermost(hidden);
        Ok(())
    }

    /// Notes what is mounted below it: a VM that could remove or rename the mount point would unmount
    /// that on the host, or move it. PID 1 of an ordinary user finds these itself.
    fn find_submounts(&mut self, table: &Table, ids: IdMap) -> Result<()> {
        if self.mount.read_only() || !self.is_directory || !ids.root_mapped() {
            return Ok(());
        }
        let below = table.below(&self.source.real_path);
        // Others are of a mount that this one lies over.
        let below = below.filter(|below| crosses_mount(&self.source.descriptor, below));
        self.submounts = outermost(below.map(Path::to_owned).collect());
        if self.submounts.len() <= MAX_SUBMOUNTS {
            return Ok(());
        }
        Err(VmError::Mount {
            index: self.index,
            field: "hostPath",
            problem: format!(
                "more than {MAX_SUBMOUNTS} file systems are mounted below \"{}\": mount a directory that \
                 has fewer, or set readOnly",
                self.mount.host_path().display()
            ),
        })
    }

    fn refusal(&self, refused: Refused) -> VmError {
        let index = self.index;
        match refused {
            Refused::Link { .. } => VmError::Mount {
                index,
                field: "hostPath",
                problem: refused.to_string(),
            },
            Refused::Io(error) => VmError::MountSource {
                index,
                path: self.mount.host_path().to_owned(),
                errno: errno_of(&error),
            },
            Refused::Record { path, source } => {
                super::directory::host("can't use what VMs could write to, noted in", &path, source)
            }
        }
    }

    /// Its files as the VM is to own them.
    fn clone_for(&self, map: &OwnedFd) -> Result<OwnedFd> {
        let (path, place) = (&self.source.real_path, &self.source.descriptor);
        match trees::clone_mount(place, Some(map)) {
            Err(Errno::EINVAL | Errno::EPERM | Errno::EOPNOTSUPP) if self.mount.read_only() => {
                trees::clone_mount(place, None)
                    .map_err(|errno| unsupported::clone_tree(path, errno))
            }
            Err(Errno::EINVAL | Errno::EOPNOTSUPP) => Err(VmError::Unsupported {
                feature: format!("a writable mount of {}", path.display()),
                detail: "ids can't be mapped on its file system".to_owned(),
                remedy: format!(
                    "Set mounts[{}].readOnly (what everyone may read is shown), or run as the \
                     user who owns the directory instead of root",
                    self.index
                ),
            }),
            result => result.map_err(|errno| unsupported::clone_tree(path, errno)),
        }
    }
}

/// As many as a boot message has room for.
const MAX_SUBMOUNTS: usize = 512;

/// One cover is enough for what lies below another.
fn outermost(mut paths: Vec<PathBuf>) -> Vec<PathBuf> {
    // What lies below another sorts after it.
    paths.sort();
    paths.dedup_by(|path, before| path.starts_with(before));
    paths
}

fn find_all(options: &BootOptions, ids: IdMap) -> Result<Vec<Found>> {
    let table = Table::read().map_err(|error| {
        super::directory::host("can't look at the mounts of", Path::new("this host"), error)
    })?;
    let mounts = options.mounts.iter().enumerate();
    let mut found: Vec<Found> = mounts
        .map(|(index, mount)| find(index, mount, &table))
        .collect::<Result<_>>()?;
    let private: Vec<Place> = options
        .private
        .iter()
        .filter_map(|path| private_place(path, &found, &table).transpose())
        .collect::<Result<_>>()?;
    for found in &mut found {
        found.hide(&private, ids)?;
        found.find_submounts(&table, ids)?;
    }
    check_ways(&found, &options.exposure(), &table)?;
    Ok(found)
}

/// A symlink that a VM could have made must not decide what is shown. Nor may those that this one is
/// going to make, which is noted before it runs.
fn check_ways(found: &[Found], exposure: &Exposure, table: &Table) -> Result<()> {
    let mut writable = Vec::new();
    for found in found {
        // What is mounted as a file can be filled, not be made a symlink.
        if found.is_directory && !found.mount.read_only() {
            let spot = Spot::of(&found.source.descriptor, table);
            writable.push(spot.map_err(|error| found.refusal(error.into()))?);
        }
    }
    for found in found {
        exposure
            .check(&found.source, &writable)
            .map_err(|refused| found.refusal(refused))?;
    }
    let Some(first) = found.first().filter(|_| !writable.is_empty()) else {
        return Ok(());
    };
    exposure
        .add(writable)
        .map_err(|refused| first.refusal(refused))
}

/// Where a directory is that no VM may see. One that does not exist can't be shown; but if a VM is shown
/// where it belongs, it is made, since the VM could make it first, or is there when somebody else does.
fn private_place(path: &Path, found: &[Found], table: &Table) -> Result<Option<Place>> {
    let host = |error| super::directory::host("can't look for what no VM may see", path, error);
    let place = |path: &Path| {
        let place = table.place(&host_path::resolve(path)?.descriptor);
        place?.ok_or_else(|| std::io::Error::from_raw_os_error(libc::ESTALE))
    };
    match place(path) {
        Ok(place) => return Ok(Some(place)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(host(error)),
    }
    let Some(existing) = path.ancestors().skip(1).find(|above| above.exists()) else {
        return Ok(None);
    };
    let existing = place(existing).map_err(host)?;
    if !found.iter().any(|found| found.at.holds(&existing)) {
        return Ok(None);
    }
    if let Some(above) = path.parent() {
        fs::create_dir_all(above).map_err(host)?;
    }
    // Who uses it sets the mode that it needs.
    match fs::DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => Err(host(error)),
        _ => place(path).map(Some).map_err(host),
    }
}

fn find(index: usize, mount: &HostMount, table: &Table) -> Result<Found> {
    let shown = || mount.host_path().display();
    let unusable = |errno| VmError::MountSource {
        index,
        path: mount.host_path().to_owned(),
        errno,
    };
    let refused = |problem: String| VmError::Mount {
        index,
        field: "hostPath",
        problem,
    };
    let failed = |error: std::io::Error| unusable(errno_of(&error));
    // From here on it is the same directory, wherever its path leads.
    let source = host_path::resolve(mount.host_path()).map_err(failed)?;
    let metadata = source.descriptor.metadata().map_err(failed)?;
    if !metadata.is_dir() && !metadata.is_file() {
        let problem = format!("\"{}\" is neither a directory nor a file", shown());
        return Err(refused(problem));
    }
    let at = table
        .place(&source.descriptor)
        .map_err(failed)?
        .ok_or_else(|| unusable(Errno::ESTALE))?;
    if KERNEL_FILE_SYSTEMS.contains(&at.file_system.as_str()) {
        return Err(refused(format!(
            "\"{}\" is part of the kernel's own {}: it would show all of the host",
            shown(),
            at.file_system
        )));
    }
    Ok(Found {
        index,
        mount: mount.clone(),
        identity: (metadata.dev(), metadata.ino()),
        owner: (metadata.uid(), metadata.gid()),
        is_directory: metadata.is_dir(),
        source,
        at,
        hidden: Vec::new(),
        submounts: Vec::new(),
    })
}

/// Whether another file system is mounted on the way, whose place the guest covers.
fn crosses_mount(place: &File, below: &Path) -> bool {
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_XDEV);
    openat2(place, below, how).is_err_and(|errno| errno == Errno::EXDEV)
}

/// How many owners' namespaces are kept: each is a few kilobytes of the kernel's memory.
const KEPT: usize = 16;

type Kept = ((u32, (u32, u32)), Arc<OwnedFd>);

/// A user namespace for idmapped mounts in which the VM's `user` is the owner of a directory of the
/// host, and every other id of the VM is itself: what the VM's root writes there is nobody's on the
/// host. Ids of the host beside the owner's are nobody's in the VM.
async fn namespace_of_owner(base: u32, owner: (u32, u32)) -> Result<Arc<OwnedFd>> {
    static NAMESPACES: Mutex<Vec<Kept>> = Mutex::new(Vec::new());
    let locked = || NAMESPACES.lock().unwrap_or_else(PoisonError::into_inner);
    let key = (base, owner);
    let kept = locked().iter().find(|(of, _)| *of == key).cloned();
    if let Some((_, namespace)) = kept {
        return Ok(namespace);
    }
    let holder = starter::start_holder()
        .await
        .map_err(|error| unsupported::namespaces(error.step, error.errno))?;
    let namespace = blocking(move || {
        for (file, owner) in [("uid_map", owner.0), ("gid_map", owner.1)] {
            fs::write(
                format!("/proc/{}/{file}", holder.pid),
                owner_map(base, owner),
            )
            .map_err(|error| unsupported::id_map(file, errno_of(&error)))?;
        }
        let path = PathBuf::from(format!("/proc/{}/ns/user", holder.pid));
        let file = File::open(&path)
            .map_err(|error| super::directory::host("can't open the namespace", &path, error))?;
        // The descriptor holds it from now on.
        drop(holder);
        Ok(Arc::new(OwnedFd::from(file)))
    })
    .await?;
    let mut kept = locked();
    if kept.len() == KEPT {
        kept.remove(0);
    }
    kept.push((key, Arc::clone(&namespace)));
    drop(kept);
    Ok(namespace)
}

/// Lines of an id map: the id on the disk, the id that is seen, how many.
fn owner_map(base: u32, owner: u32) -> String {
    let user = base + USER_ID;
    if (base..base + ids::RANGE).contains(&owner) {
        // Of a VM already.
        return format!("{base} {base} {}\n", ids::RANGE);
    }
    let after = user + 1;
    let rest = ids::RANGE - USER_ID - 1;
    format!("{owner} {user} 1\n{base} {base} {USER_ID}\n{after} {after} {rest}\n")
}

fn errno_of(error: &std::io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_with_no_room_for_mounts_is_told_from_a_full_disk() {
        let mount = HostMount::new("/work", Path::new("/host"), false).expect("a mount");
        let explained = |step: &str| {
            let error = explain(std::slice::from_ref(&mount), step, Errno::ENOSPC);
            crate::error::Error::from(error.expect("an explanation"))
        };
        let mounts = explained("mount /work");
        assert_eq!(mounts.code.as_str(), "VM_UNSUPPORTED");
        assert!(mounts.message.contains("fs.mount-max"), "{mounts}");
        assert_eq!(explained("mount point /work").code.as_str(), "STORE_FULL");
    }

    #[test]
    fn outer_directories_stand_for_what_is_below_them() {
        let paths = ["b/c", "a", "b", "a/x", "bc"].map(PathBuf::from);
        assert_eq!(
            outermost(paths.to_vec()),
            ["a", "b", "bc"].map(PathBuf::from)
        );
    }

    #[test]
    fn the_owner_is_the_vms_user_and_no_other_id_of_the_host_is_in_the_map() {
        assert_eq!(
            owner_map(2_000_000, 1001),
            "1001 2001000 1\n2000000 2000000 1000\n2001001 2001001 64535\n"
        );
    }
}
