//! A VM on an image: one overlay of its whole root, and in it what is the VM's own.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use agentvm_guest::protocol::{Node, Source};
use nix::errno::Errno;
use nix::unistd::geteuid;

use super::base;
use super::directory::{Directory, HostLock, host, make_layers, write_atomically};
use super::ids::IdMap;
use super::layout::{Layout, Table, host_path};
use super::removal::remove_tree;
use super::trees::{clone_real, clone_tree};
use super::unsupported;
use crate::host_path;
use crate::vm::{Image, MadeWith, Result, VmError};

/// Builds the table of the root.
///
/// All of the image is copy-on-write in one persistent layer, its `/var`, `/root` and `/etc` too: a
/// package manager's data belongs to the files that it tells of. `/home/user` and the state of agents are
/// plain directories as on the host's programs, for their syncs to count.
pub(super) fn layout(
    ids: IdMap,
    vm: &Path,
    image: &Image,
    agents: Option<&Path>,
    namespace: Option<&OwnedFd>,
    memory: Option<u64>,
) -> Result<Layout> {
    let mut table = Table::new(ids, namespace);
    let layer = vm.join("layers");
    let (lower, layer) = if ids.root_mapped() {
        let cloned = |path: &Path, tree: nix::Result<OwnedFd>| {
            tree.map_err(|errno| unsupported::clone_tree(path, errno))
        };
        let rootfs = cloned(&image.rootfs, clone_real(&image.rootfs, namespace))?;
        let layer = cloned(&layer, clone_tree(&layer, None))?;
        (table.push(rootfs), table.push(layer))
    } else {
        let rootfs = image.rootfs.as_os_str().as_bytes().to_vec();
        (Source::RealPath(rootfs), host_path(&layer))
    };
    table.nodes.push(Node::Overlay {
        path: "/".to_owned(),
        lowers: vec![lower],
        layer,
    });

    for path in [
        "/etc",
        "/etc/agentvm",
        "/home",
        "/opt",
        "/opt/agentvm",
        "/root",
        "/sys",
        "/var",
    ] {
        table.dir(path, 0o755);
    }
    for (name, content) in base::files_for_an_image() {
        table.nodes.push(Node::File {
            path: format!("/etc/{name}"),
            content: content.into_bytes(),
        });
    }
    for (name, lines) in base::accounts() {
        table.nodes.push(Node::Accounts {
            path: format!("/etc/{name}"),
            lines,
        });
    }
    table.agents(agents)?;
    table.dir("/home/user", 0o755);
    table.durable("/home/user", &vm.join("home"))?;
    for path in ["/var/lib", "/var/cache", "/var/tmp"] {
        table.dir(path, if path == "/var/tmp" { 0o1777 } else { 0o755 });
    }
    for path in ["var/lib/agentvm", "var/cache/agentvm"] {
        table.dir(&format!("/{path}"), 0o755);
        table.durable(&format!("/{path}"), &vm.join(path))?;
    }
    table.volatile(memory);
    Ok(table.layout())
}

/// Refuses a root file system that would show a VM what no VM may see, or all of the host.
pub fn check_root(root: &Path, private: &[PathBuf]) -> Result<()> {
    let failed = |error| host("can't look for what no VM may see", root, error);
    let table = host_path::Table::read().map_err(failed)?;
    let place = |path: &Path| {
        let found = host_path::resolve(path).map_err(failed)?;
        table
            .place(&found.descriptor)
            .map_err(failed)?
            .ok_or_else(|| failed(io::Error::from_raw_os_error(libc::ESTALE)))
    };
    let refused = |problem: String| {
        Err(VmError::Root {
            path: root.to_owned(),
            problem,
        })
    };
    let at = place(root)?;
    if at == place(Path::new("/"))? {
        let problem = "is the root of this host: without the option a VM has the host's programs";
        return refused(problem.to_owned());
    }
    for secret in private {
        // One that does not exist yet lies where its nearest parent does.
        let Some(existing) = secret.ancestors().find(|path| path.exists()) else {
            continue;
        };
        let existing_place = place(existing)?;
        let is_there = existing == secret;
        let relation = if is_there && at == existing_place {
            "is"
        } else if at.holds(&existing_place) {
            "holds"
        } else if is_there && existing_place.holds(&at) {
            "is in"
        } else {
            continue;
        };
        return refused(format!(
            "{relation} agentvm's own directory {}, which no VM may see: copy the root file system to another place",
            secret.display()
        ));
    }
    Ok(())
}

/// What is a directory in every VM, if it is there at all.
const OWN_PLACES: [&str; 13] = [
    "etc",
    "home",
    "opt",
    "root",
    "sys",
    "var",
    "var/lib",
    "var/cache",
    "proc",
    "dev",
    "tmp",
    "run",
    "usr",
];

/// Looks for what the boot would stumble over, and says it in words of images. `is_new`: to this VM.
fn check(image: &Image, ids: IdMap, is_new: bool) -> Result<()> {
    let unusable = |problem| {
        Err(VmError::UnusableImage {
            image: image.id.clone(),
            problem,
        })
    };
    let root = &image.rootfs;
    for place in std::iter::once("").chain(OWN_PLACES) {
        // What it lies in was looked at before. No link is followed.
        let data = match fs::symlink_metadata(root.join(place)) {
            Ok(data) => data,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(host("can't look at", &root.join(place), error)),
        };
        if !data.is_dir() {
            let found = if data.is_symlink() {
                "a symbolic link"
            } else {
                "a file"
            };
            return unusable(format!(
                "its /{place} is {found}, where a VM needs a directory"
            ));
        }
        let user = geteuid().as_raw();
        if !ids.root_mapped() && data.uid() != user {
            return unusable(format!(
                "its /{place} belongs to uid {} of this host, and a VM of an ordinary user can change only files of uid {user}: give it them (chown -R {user} {root}), or use a copy (cp -r {root} …)",
                data.uid(),
                root = root.display()
            ));
        }
    }
    let Ok(entries) = fs::read_dir(root) else {
        return Ok(());
    };
    let entries: Vec<_> = entries.flatten().collect();
    if entries.is_empty() {
        return unusable("it is empty".to_owned());
    }
    if is_new && image.is_directory && !entries.iter().any(may_be_program) {
        return unusable("it has no programs: no /bin, /sbin or /usr, nor a file".to_owned());
    }
    Ok(())
}

/// Not so where somebody has named the directory that a root file system is in.
fn may_be_program(entry: &fs::DirEntry) -> bool {
    let name = entry.file_name();
    ["bin", "sbin", "usr"].iter().any(|place| name == *place)
        || entry.file_type().is_ok_and(|kind| kind.is_file())
}

/// A step of the boot that failed for what the VM has written over its image.
pub(super) fn explain(image: &Image, error: VmError) -> VmError {
    let VmError::Boot { step, errno } = &error else {
        return error;
    };
    let Some(path) = step.strip_prefix("mount /") else {
        return error;
    };
    let found = match errno {
        Errno::ELOOP => "there is a symbolic link on the way",
        Errno::ENOTDIR | Errno::EEXIST => "there is something else than a directory",
        Errno::EINVAL | Errno::EISDIR => "there is something else than a file",
        Errno::EFBIG => "the file is too large",
        _ => return error,
    };
    VmError::UnusableImage {
        image: image.id.clone(),
        problem: format!("at its /{path}, where the VM has files of its own, {found}"),
    }
}

/// The image that the VM in `dir` was made with.
pub fn made_with(dir: &Path) -> Result<Option<MadeWith>> {
    let path = record(dir);
    match fs::read(&path) {
        Ok(text) => {
            let made_with = serde_json::from_slice(&text);
            made_with.map_err(|error| host("can't read", &path, error.into()))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(host("can't read", &path, error)),
    }
}

/// Whether the VM in `dir` was made without an image.
#[must_use]
pub fn made_without(dir: &Path) -> bool {
    !record(dir).exists() && dir.join("boot").exists()
}

fn record(dir: &Path) -> PathBuf {
    dir.join("image")
}

/// A VM's first boot on an image, until it has succeeded.
#[derive(Clone)]
pub(super) struct FirstBoot {
    dir: PathBuf,
    ids: IdMap,
    _lock: HostLock,
}

impl FirstBoot {
    /// A VM that has never run is free to be made with something else.
    pub(super) fn forget(self) -> Result<()> {
        let failed = |path: &Path, error| host("can't remove", path, error);
        // The layer may have files that were made for this image.
        let layers = self.dir.join("layers");
        remove_tree(&layers).map_err(|error| failed(&layers, error))?;
        if self.ids.root_mapped() {
            make_layers(&self.dir, self.ids)?;
        }
        // Without both it is a VM that has not booted yet, without the second alone one of the host's
        // programs.
        for path in [self.dir.join("boot"), record(&self.dir)] {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(failed(&path, error));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// Makes sure that a VM boots on what it was made with; at its first boot, that is `image`.
pub(super) fn remember(
    directory: &Directory,
    ids: IdMap,
    key: &str,
    image: Option<&Image>,
) -> Result<Option<FirstBoot>> {
    let dir = directory.path();
    let has = made_with(dir)?.map(|made_with| made_with.id);
    if let Some(image) = image {
        check(image, ids, has.is_none())?;
    }
    match image {
        image if image.map(|image| &image.id) == has.as_ref() => Ok(None),
        Some(image) if has.is_none() && !made_without(dir) => {
            let made_with = MadeWith {
                id: image.id.clone(),
                source: image.source.clone(),
            };
            let path = record(dir);
            let text = serde_json::to_vec(&made_with).map_err(io::Error::from);
            text.and_then(|text| write_atomically(&path, &text))
                .map_err(|error| host("can't write", &path, error))?;
            Ok(Some(FirstBoot {
                dir: dir.to_owned(),
                ids,
                _lock: directory.host_lock(),
            }))
        }
        _ => Err(VmError::OtherImage {
            key: key.to_owned(),
            has,
            wanted: image.map(|image| image.id.clone()),
        }),
    }
}
