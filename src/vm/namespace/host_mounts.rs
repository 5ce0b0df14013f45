//! What the VM's owner mounts of the host: found, checked and opened here, mounted by the guest
//! (`guest/src/host_mounts.rs`).
//!
//! Two places are the same if they are the same path of the same file system, whatever path of the
//! host they were reached by: that is how a directory that a VM must not see is found below what it
//! is to see.

use std::fs::{self, File};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use agentvm_guest::mountinfo::unescape;
use agentvm_guest::protocol::{HostMount as Spec, HostSource, Node, USER_ID};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, openat2};

use super::BootOptions;
use super::directory::{blocking, host};
use super::ids::{self, IdMap};
use super::preparation::BootMessage;
use super::{seccomp, starter, trees, unsupported};
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
        message.spec.program_seccomp = seccomp::no_setid().map_err(VmError::Protocol)?;
    }
    let mut found = {
        let (mounts, private) = (options.mounts.clone(), options.private.clone());
        blocking(move || find_all(&mounts, &private, ids)).await?
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
                    path: found.real_path.as_os_str().as_bytes().to_vec(),
                    dev: found.identity.0,
                    ino: found.identity.1,
                };
                (source, None)
            }
        };
        message.trees.extend(tree);
        let hidden = found.hidden.iter();
        message.spec.root.push(Node::HostMount(Spec {
            path: found.mount.path().to_owned(),
            source,
            directory: found.is_directory,
            read_only: found.mount.read_only(),
            hidden: hidden
                .map(|path| path.as_os_str().as_bytes().to_vec())
                .collect(),
        }));
    }
    Ok(())
}

/// What a boot step that failed means, if it was one of these mounts.
pub(super) fn explain(mounts: &[HostMount], step: &str, errno: Errno) -> Option<VmError> {
    let path = step.strip_prefix("mount ")?;
    mounts.iter().find(|mount| mount.path() == path)?;
    let remedy = match errno {
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
    place: OwnedFd,
    at: Place,
    real_path: PathBuf,
    identity: (u64, u64),
    owner: (u32, u32),
    is_directory: bool,
    /// Below it, what the VM must not see.
    hidden: Vec<PathBuf>,
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
                && (ids.root_mapped() || !crosses_mount(&self.place, below))
            {
                hidden.push(below.to_owned());
            }
        }
        hidden.sort();
        // One cover is enough for what lies below another, which sorts before it.
        hidden.dedup_by(|path, before| path.starts_with(before));
        self.hidden = hidden;
        Ok(())
    }

    /// Its files as the VM is to own them.
    fn clone_for(&self, map: &OwnedFd) -> Result<OwnedFd> {
        let path = &self.real_path;
        match trees::clone_mount(&self.place, Some(map)) {
            Err(Errno::EINVAL | Errno::EPERM | Errno::EOPNOTSUPP) if self.mount.read_only() => {
                trees::clone_mount(&self.place, None)
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

fn find_all(mounts: &[HostMount], private: &[PathBuf], ids: IdMap) -> Result<Vec<Found>> {
    let table = Table::read()?;
    let mounts = mounts.iter().enumerate();
    let mut found: Vec<Found> = mounts
        .map(|(index, mount)| find(index, mount, &table))
        .collect::<Result<_>>()?;
    let private: Vec<Place> = private
        .iter()
        .filter_map(|path| private_place(path, &found, &table).transpose())
        .collect::<Result<_>>()?;
    for found in &mut found {
        found.hide(&private, ids)?;
    }
    for later in &found {
        check_way(later, &found)?;
    }
    Ok(found)
}

/// Where a directory is that no VM may see. One that does not exist can't be shown; but if a VM is shown
/// where it belongs, it is made, since the VM could make it first, or is there when somebody else does.
fn private_place(path: &Path, found: &[Found], table: &Table) -> Result<Option<Place>> {
    let host = |error| super::directory::host("can't look for what no VM may see", path, error);
    let place = |path: &Path| {
        let real = fs::canonicalize(path)?;
        let place = table.place(&open(&real)?);
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
    let real_path = fs::canonicalize(mount.host_path()).map_err(failed)?;
    // From here on it is the same directory, wherever its path leads.
    let place = open(&real_path).map_err(unusable)?;
    let metadata = File::from(place.try_clone().map_err(failed)?)
        .metadata()
        .map_err(failed)?;
    if !metadata.is_dir() && !metadata.is_file() {
        let problem = format!("\"{}\" is neither a directory nor a file", shown());
        return Err(refused(problem));
    }
    let at = table
        .place(&place)
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
        place,
        at,
        real_path,
        hidden: Vec::new(),
    })
}

/// A symlink in what this VM can write to must not decide what it is shown: the VM can have made it.
fn check_way(found: &Found, all: &[Found]) -> Result<()> {
    let given = found.mount.host_path();
    for other in all {
        if other.mount.read_only() || other.index == found.index {
            continue;
        }
        let roots = [other.mount.host_path(), &other.real_path];
        let Some(below) = roots.iter().find_map(|root| given.strip_prefix(root).ok()) else {
            continue;
        };
        if other.real_path.join(below) != found.real_path {
            return Err(VmError::Mount {
                index: found.index,
                field: "hostPath",
                problem: format!(
                    "\"{}\" leads through a symlink in mounts[{}], which the VM can change",
                    given.display(),
                    other.index
                ),
            });
        }
    }
    Ok(())
}

/// Opens a path without symlinks, whatever is there.
fn open(path: &Path) -> nix::Result<OwnedFd> {
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_NO_SYMLINKS);
    openat2(AT_FDCWD, path, how)
}

/// Whether another file system is mounted on the way, whose place the guest covers.
fn crosses_mount(place: &OwnedFd, below: &Path) -> bool {
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_XDEV);
    openat2(place, below, how).is_err_and(|errno| errno == Errno::EXDEV)
}

/// Where something is in its file system.
#[derive(Debug)]
struct Place {
    device: String,
    path: PathBuf,
    file_system: String,
}

impl Place {
    /// Whether `other` is the same place, or below it.
    fn holds(&self, other: &Self) -> bool {
        self.device == other.device && other.path.starts_with(&self.path)
    }
}

/// The mounts that this process sees (`proc_pid_mountinfo(5)`).
struct Table(Vec<Mounted>);

struct Mounted {
    id: String,
    device: String,
    root: PathBuf,
    point: PathBuf,
    file_system: String,
}

impl Table {
    fn read() -> Result<Self> {
        const PATH: &str = "/proc/self/mountinfo";
        let text = fs::read(PATH).map_err(|error| host("can't read", Path::new(PATH), error))?;
        Ok(Self(
            text.split(|byte| *byte == b'\n')
                .filter_map(parse)
                .collect(),
        ))
    }

    /// `None`: on no mount that this process sees.
    fn place(&self, of: &OwnedFd) -> std::io::Result<Option<Place>> {
        let fd = of.as_raw_fd();
        let path = fs::read_link(format!("/proc/self/fd/{fd}"))?;
        let info = fs::read_to_string(format!("/proc/self/fdinfo/{fd}"))?;
        Ok(self.place_of(&path, &info))
    }

    fn place_of(&self, path: &Path, info: &str) -> Option<Place> {
        let id = info.lines().find_map(|line| line.strip_prefix("mnt_id:"))?;
        let mounted = self.0.iter().find(|mounted| mounted.id == id.trim())?;
        let below = path.strip_prefix(&mounted.point).ok()?;
        // To join an empty path would add a slash.
        let path = if below.as_os_str().is_empty() {
            mounted.root.clone()
        } else {
            mounted.root.join(below)
        };
        Some(Place {
            device: mounted.device.clone(),
            path,
            file_system: mounted.file_system.clone(),
        })
    }
}

fn parse(line: &[u8]) -> Option<Mounted> {
    let text = |field: &[u8]| String::from_utf8_lossy(field).into_owned();
    let path = |field: &[u8]| PathBuf::from(std::ffi::OsString::from_vec(unescape(field)));
    let mut fields = line.split(|byte| *byte == b' ');
    let id = text(fields.next()?);
    let device = text(fields.nth(1)?);
    let (root, point) = (path(fields.next()?), path(fields.next()?));
    let file_system = text(fields.skip_while(|field| *field != b"-").nth(1)?);
    Some(Mounted {
        id,
        device,
        root,
        point,
        file_system,
    })
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
    fn a_line_of_the_mount_table_is_read() {
        let line = br"36 35 98:0 /mnt1 /a\040b rw,noatime master:1 - ext3 /dev/root rw";
        let mounted = parse(line).expect("a mount");
        assert_eq!(mounted.id, "36");
        assert_eq!(mounted.device, "98:0");
        assert_eq!(mounted.root, Path::new("/mnt1"));
        assert_eq!(mounted.point, Path::new("/a b"));
        assert_eq!(mounted.file_system, "ext3");
    }

    #[test]
    fn the_owner_is_the_vms_user_and_no_other_id_of_the_host_is_in_the_map() {
        assert_eq!(
            owner_map(2_000_000, 1001),
            "1001 2001000 1\n2000000 2000000 1000\n2001001 2001001 64535\n"
        );
    }
}
