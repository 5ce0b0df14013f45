//! A VM on an image: one overlay of its whole root, and in it what is the VM's own.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use agentvm_guest::protocol::Node;

use super::base;
use super::directory::{host, write_atomically};
use super::ids::IdMap;
use super::layout::{Layout, Table, host_path};
use super::trees::clone_tree;
use super::unsupported;
use crate::vm::{Image, Result, VmError};

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
) -> Result<Layout> {
    let mut table = Table::new(ids, namespace);
    let layer = vm.join("layers");
    let (lower, layer) = if ids.root_mapped() {
        let tree = |path: &Path, map| {
            clone_tree(path, map).map_err(|errno| unsupported::clone_tree(path, errno))
        };
        let lower = tree(&image.rootfs, namespace)?;
        let layer = tree(&layer, None)?;
        (table.push(lower), table.push(layer))
    } else {
        (host_path(&image.rootfs), host_path(&layer))
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
    table.volatile();
    Ok(table.layout())
}

/// The [`Image::id`] of the image that the VM in `dir` was made with.
pub fn remembered(dir: &Path) -> Result<Option<String>> {
    let path = record(dir);
    match fs::read_to_string(&path) {
        Ok(id) => Ok(Some(id)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(host("can't read", &path, error)),
    }
}

fn record(dir: &Path) -> PathBuf {
    dir.join("image")
}

/// Makes sure that a VM boots on what it was made with; at its first boot, that is `image`.
pub(super) fn remember(dir: &Path, key: &str, image: Option<&Image>) -> Result<()> {
    let has = remembered(dir)?;
    let wanted = image.map(|image| &*image.id);
    if has.as_deref() == wanted {
        return Ok(());
    }
    let booted = dir.join("boot").exists();
    if let (None, Some(id), false) = (&has, wanted, booted) {
        let path = record(dir);
        return write_atomically(&path, id.as_bytes())
            .map_err(|error| host("can't write", &path, error));
    }
    let named = |id: Option<&str>| id.map_or("the host's programs", |id| id).to_owned();
    Err(VmError::OtherImage {
        key: key.to_owned(),
        has: named(has.as_deref()),
        wanted: named(wanted),
    })
}
