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

/// Makes sure that a VM boots on what it was made with; at its first boot, that is `image`.
pub(super) fn remember(dir: &Path, key: &str, image: Option<&Image>) -> Result<()> {
    let has = made_with(dir)?.map(|made_with| made_with.id);
    match image {
        image if image.map(|image| &image.id) == has.as_ref() => Ok(()),
        Some(image) if has.is_none() && !made_without(dir) => {
            let made_with = MadeWith {
                id: image.id.clone(),
                source: image.source.clone(),
            };
            let path = record(dir);
            let text = serde_json::to_vec(&made_with).map_err(io::Error::from);
            text.and_then(|text| write_atomically(&path, &text))
                .map_err(|error| host("can't write", &path, error))
        }
        _ => Err(VmError::OtherImage {
            key: key.to_owned(),
            has,
            wanted: image.map(|image| image.id.clone()),
        }),
    }
}
