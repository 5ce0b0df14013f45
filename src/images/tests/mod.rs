//! Layouts made by hand, and what becomes of them.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tempfile::TempDir;

use super::*;

mod bounds;
mod layout;
mod store;
mod unpack;

/// An archive, entry by entry, with names that the tar crate would refuse to write.
#[derive(Default)]
struct Tar(Vec<u8>);

impl Tar {
    fn entry(mut self, kind: u8, name: &str, link: &str, mode: u32, content: &[u8]) -> Self {
        let mut header = tar::Header::new_gnu();
        let fields = header.as_old_mut();
        fields.name[..name.len()].copy_from_slice(name.as_bytes());
        fields.linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_entry_type(tar::EntryType::new(kind));
        header.set_mode(mode);
        header.set_uid(7);
        header.set_gid(8);
        header.set_mtime(1_000_000);
        header.set_size(content.len() as u64);
        header.set_cksum();
        self.0.extend_from_slice(header.as_bytes());
        self.0.extend_from_slice(content);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    fn file(self, name: &str, content: &str) -> Self {
        self.entry(b'0', name, "", 0o644, content.as_bytes())
    }

    fn dir(self, name: &str) -> Self {
        self.entry(b'5', name, "", 0o755, b"")
    }

    fn symlink(self, name: &str, target: &str) -> Self {
        self.entry(b'2', name, target, 0o777, b"")
    }

    fn hard_link(self, name: &str, target: &str) -> Self {
        self.entry(b'1', name, target, 0o644, b"")
    }

    fn end(mut self) -> Vec<u8> {
        self.0.extend([0; 1024]);
        self.0
    }
}

/// Layouts and the images of them, in one directory.
struct World {
    directory: TempDir,
    limits: Limits,
}

impl World {
    fn new() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let layout = directory.path().join("layout");
        fs::create_dir_all(layout.join("blobs/sha256")).expect("mkdir");
        fs::write(
            layout.join("oci-layout"),
            r#"{"imageLayoutVersion":"1.0.0"}"#,
        )
        .expect("write");
        Self {
            directory,
            limits: Limits::default(),
        }
    }

    fn layout(&self) -> PathBuf {
        self.directory.path().join("layout")
    }

    fn blob(&self, kind: &str, content: &[u8]) -> Value {
        let hex = hex(content);
        fs::write(self.layout().join("blobs/sha256").join(&hex), content).expect("write");
        json!({ "mediaType": kind, "digest": format!("sha256:{hex}"), "size": content.len() })
    }

    fn json(&self, kind: &str, content: &Value) -> Value {
        self.blob(kind, content.to_string().as_bytes())
    }

    /// The manifest of an image for `architecture`, of layers that are not packed.
    fn image(&self, architecture: &str, layers: &[Vec<u8>]) -> Value {
        let blobs: Vec<_> = layers.iter().map(|layer| self.blob(TAR, layer)).collect();
        self.image_of(architecture, layers, &blobs)
    }

    fn image_of(&self, architecture: &str, layers: &[Vec<u8>], blobs: &[Value]) -> Value {
        let ids: Vec<_> = layers
            .iter()
            .map(|l| format!("sha256:{}", hex(l)))
            .collect();
        let config = json!({
            "os": "linux", "architecture": architecture,
            "config": { "Env": ["PATH=/bin", "A=1"], "WorkingDir": "/srv", "User": "7" },
            "rootfs": { "type": "layers", "diff_ids": ids },
        });
        let config = self.json("application/vnd.oci.image.config.v1+json", &config);
        self.json(MANIFEST, &json!({ "config": config, "layers": blobs }))
    }

    fn index(&self, manifests: &[Value]) {
        let index = json!({ "schemaVersion": 2, "manifests": manifests });
        fs::write(self.layout().join("index.json"), index.to_string()).expect("write");
    }

    fn images(&self) -> Images {
        let ownership = if nix::unistd::geteuid().is_root() {
            Ownership::AsInImage
        } else {
            Ownership::Caller
        };
        Images::new(self.directory.path().join("images"), ownership, self.limits)
    }

    fn import(&self, tag: Option<&str>) -> Result<Image> {
        let layout = self.layout();
        self.images()
            .import(&layout, found(&layout), tag, &Arc::default())
    }

    fn import_layers(&self, layers: &[Vec<u8>]) -> Result<Image> {
        self.index(&[self.image(&architecture(), layers)]);
        self.import(None)
    }

    /// Directories that a failed import has left.
    fn left(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.directory.path().join("images")) else {
            return Vec::new();
        };
        entries
            .flatten()
            .filter(|entry| entry.path().is_dir() && entry.file_name() != "names")
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect()
    }
}

/// What is at a path, whatever leads there.
fn found(path: &Path) -> File {
    OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH)
        .open(path)
        .expect("there")
}

const TAR: &str = "application/vnd.oci.image.layer.v1.tar";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

fn architecture() -> String {
    let platform = Platform::of_this_machine().to_string();
    platform.trim_start_matches("linux/").to_owned()
}

fn hex(content: &[u8]) -> String {
    use std::fmt::Write as _;
    let mut hex = String::new();
    for byte in Sha256::digest(content) {
        let _ = write!(hex, "{byte:02x}");
    }
    hex
}

fn tagged(mut descriptor: Value, tag: &str) -> Value {
    descriptor["annotations"] = json!({ "org.opencontainers.image.ref.name": tag });
    descriptor
}

fn code(error: ImageError) -> String {
    crate::error::Error::from(error).code.as_str().to_owned()
}

fn read(image: &Image, path: &str) -> String {
    fs::read_to_string(image.rootfs.join(path)).expect(path)
}

fn names(path: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(path)
        .expect("a directory")
        .map(|entry| {
            entry
                .expect("an entry")
                .file_name()
                .to_string_lossy()
                .into_owned()
        })
        .collect();
    names.sort();
    names
}
