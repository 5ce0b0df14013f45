use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tempfile::TempDir;

use super::*;

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
        self.images().import(&self.layout(), tag)
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
            .filter(|entry| entry.path().is_dir())
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect()
    }
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

#[test]
fn layers_lie_over_each_other_and_the_configuration_is_read() {
    let world = World::new();
    let lower = Tar::default()
        .dir("etc/")
        .file("etc/a", "old")
        .file("etc/b", "b");
    let upper = Tar::default()
        .file("etc/a", "new")
        .file("made/parents/c", "c");
    let image = world
        .import_layers(&[lower.end(), upper.end()])
        .expect("an image");
    assert_eq!(read(&image, "etc/a"), "new");
    assert_eq!(read(&image, "etc/b"), "b");
    assert_eq!(read(&image, "made/parents/c"), "c");
    let execution = image.execution;
    assert_eq!(execution.env.expect("Env"), ["PATH=/bin", "A=1"]);
    assert_eq!(execution.working_dir.as_deref(), Some("/srv"));
    assert_eq!(execution.user.as_deref(), Some("7"));
}

#[test]
fn packed_layers_are_the_same_as_plain_ones() {
    let layer = Tar::default().file("a", "content").end();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&layer).expect("gzip");
    let packed = [
        (
            "application/vnd.oci.image.layer.v1.tar+gzip",
            gzip.finish().expect("gzip"),
        ),
        ("application/vnd.docker.image.rootfs.diff.tar.gzip", {
            let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
            gzip.write_all(&layer).expect("gzip");
            gzip.finish().expect("gzip")
        }),
        (
            "application/vnd.oci.image.layer.v1.tar+zstd",
            zstd::encode_all(&*layer, 1).expect("zstd"),
        ),
    ];
    for (kind, content) in packed {
        let world = World::new();
        let blobs = vec![world.blob(kind, &content)];
        world.index(&[world.image_of(&architecture(), std::slice::from_ref(&layer), &blobs)]);
        assert_eq!(read(&world.import(None).expect(kind), "a"), "content");
    }
}

#[test]
fn whiteouts_hide_what_lower_layers_have_and_nothing_of_their_own() {
    let world = World::new();
    let lower = Tar::default()
        .file("gone", "")
        .file("tree/a/b", "")
        .file("opaque/old", "")
        .file("opaque/sub/old", "")
        .file("stays", "");
    let upper = Tar::default()
        .file("opaque/sub/new", "")
        .entry(b'0', "opaque/.wh..wh..opq", "", 0o644, b"")
        .dir("opaque/sub/")
        .file("gone", "again")
        .entry(b'0', ".wh.gone", "", 0o644, b"")
        .entry(b'0', ".wh.tree", "", 0o644, b"")
        .entry(b'0', ".wh.never-was", "", 0o644, b"");
    let image = world
        .import_layers(&[lower.end(), upper.end()])
        .expect("an image");
    assert_eq!(names(&image.rootfs), ["gone", "opaque", "stays"]);
    assert_eq!(read(&image, "gone"), "again");
    assert_eq!(names(&image.rootfs.join("opaque/sub")), ["new"]);
}

#[test]
fn a_name_that_leads_out_of_the_image_is_refused() {
    for layer in [
        Tar::default().file("../out", "x"),
        Tar::default().file("a/../../out", "x"),
        Tar::default()
            .file("a", "")
            .hard_link("b", "../../layout/index.json"),
        Tar::default().entry(b'0', ".wh...", "", 0o644, b""),
        Tar::default().entry(b'0', "a/.wh..", "", 0o644, b""),
        Tar::default().entry(b'0', ".wh.", "", 0o644, b""),
    ] {
        let world = World::new();
        let outside = world.directory.path().join("images/out");
        let error = world.import_layers(&[layer.end()]).expect_err("refused");
        assert_eq!(code(error), "IMAGE_INVALID");
        assert!(!outside.exists());
        assert_eq!(world.left(), [] as [&str; 0]);
    }
}

#[test]
fn an_absolute_name_means_the_same_below_the_root() {
    let world = World::new();
    let layer = Tar::default().file("/agentvm-test-absolute", "x").end();
    let image = world.import_layers(&[layer]).expect("an image");
    assert_eq!(read(&image, "agentvm-test-absolute"), "x");
    assert!(!Path::new("/agentvm-test-absolute").exists());
}

#[test]
fn a_link_to_the_outside_leads_back_into_the_image() {
    let world = World::new();
    let victim = world.directory.path().join("victim");
    fs::create_dir(&victim).expect("mkdir");
    fs::write(victim.join("file"), "untouched").expect("write");
    let target = victim.to_str().expect("UTF-8");
    let layer = Tar::default()
        .symlink("absolute", target)
        .symlink("relative", "../../../../../../..")
        .symlink("file", &format!("{target}/file"))
        .file("relative/in-root", "x")
        .file("file", "replaced the link");
    let image = world.import_layers(&[layer.end()]).expect("an image");
    assert_eq!(read(&image, "in-root"), "x");
    assert_eq!(read(&image, "file"), "replaced the link");
    assert_eq!(
        fs::read_to_string(victim.join("file")).expect("file"),
        "untouched"
    );

    // Through a link whose target the image does not have.
    let world = World::new();
    let layer = Tar::default()
        .symlink("absolute", target)
        .file("absolute/file", "x");
    assert_eq!(
        code(world.import_layers(&[layer.end()]).expect_err("refused")),
        "IMAGE_INVALID"
    );
    assert_eq!(
        fs::read_to_string(victim.join("file")).expect("file"),
        "untouched"
    );
}

#[test]
fn a_removal_through_a_link_stays_in_the_image() {
    let world = World::new();
    let victim = world.directory.path().join("victim");
    fs::create_dir(&victim).expect("mkdir");
    fs::write(victim.join("file"), "untouched").expect("write");
    let target = victim.to_str().expect("UTF-8");
    let lower = Tar::default()
        .symlink("tree", target)
        .symlink("link", target);
    // A directory over a link, and a deleted link: neither is followed.
    let upper = Tar::default()
        .dir("tree/")
        .entry(b'0', ".wh.link", "", 0o644, b"");
    let image = world
        .import_layers(&[lower.end(), upper.end()])
        .expect("an image");
    assert_eq!(names(&image.rootfs), ["tree"]);
    assert_eq!(names(&image.rootfs.join("tree")), [] as [&str; 0]);
    assert_eq!(
        fs::read_to_string(victim.join("file")).expect("file"),
        "untouched"
    );
}

#[test]
fn a_hard_link_shares_its_file_and_may_name_itself() {
    let world = World::new();
    let layer = Tar::default()
        .file("a", "x")
        .hard_link("b", "/a")
        .hard_link("a", "b");
    let image = world.import_layers(&[layer.end()]).expect("an image");
    let inode = |name: &str| fs::metadata(image.rootfs.join(name)).expect(name).ino();
    assert_eq!(inode("a"), inode("b"));
    let world = World::new();
    let layer = Tar::default().hard_link("b", "/etc/passwd");
    assert_eq!(
        code(world.import_layers(&[layer.end()]).expect_err("refused")),
        "IMAGE_INVALID"
    );
}

#[test]
fn directories_deeper_than_can_be_removed_are_refused() {
    let world = World::new();
    let mut layer = Tar::default();
    // Each link leads to where the last one ends: no name is long.
    for n in 0..60 {
        let (from, to) = (format!("l{n}"), format!("l{}", n + 1));
        layer = layer
            .dir(&format!("{from}/a/b/c/d/e/f/g/h"))
            .symlink(&to, &format!("{from}/a/b/c/d/e/f/g/h"));
        if n == 0 {
            layer = layer.dir("l0/");
        }
    }
    let error = world.import_layers(&[layer.end()]).expect_err("refused");
    // Too long a path, or too many links to it: whichever the kernel minds first.
    assert_eq!(code(error), "IMAGE_INVALID");
    assert_eq!(world.left(), [] as [&str; 0]);
}

#[test]
fn devices_are_left_out_and_setuid_is_taken_off() {
    let world = World::new();
    let layer = Tar::default()
        .entry(b'3', "null", "", 0o666, b"")
        .entry(b'4', "disk", "", 0o666, b"")
        .entry(b'6', "pipe", "", 0o666, b"")
        .entry(b'0', "su", "", 0o6755, b"x")
        .entry(b'5', "tmp/", "", 0o1777, b"");
    let image = world.import_layers(&[layer.end()]).expect("an image");
    assert_eq!(names(&image.rootfs), ["su", "tmp"]);
    let mode = |name: &str| {
        let data = fs::metadata(image.rootfs.join(name)).expect(name);
        data.permissions().mode() & 0o7777
    };
    assert_eq!(mode("su"), 0o755);
    assert_eq!(mode("tmp"), 0o1777);
}

#[test]
fn a_file_keeps_its_time_and_on_privileged_hosts_its_owner() {
    let world = World::new();
    let layer = Tar::default().file("a", "x").symlink("b", "a").dir("c/");
    let image = world.import_layers(&[layer.end()]).expect("an image");
    let data = |name: &str| fs::symlink_metadata(image.rootfs.join(name)).expect(name);
    assert_eq!(data("a").mtime(), 1_000_000);
    let user = nix::unistd::geteuid();
    let owner = if user.is_root() { 7 } else { user.as_raw() };
    for name in ["a", "b", "c"] {
        assert_eq!(data(name).uid(), owner, "{name}");
    }
}

#[test]
fn an_ordinary_user_can_read_and_remove_whatever_the_image_says() {
    let world = World::new();
    let images = Images::new(
        world.directory.path().join("images"),
        Ownership::Caller,
        Limits::default(),
    );
    let lower = Tar::default()
        .entry(b'5', "locked/", "", 0o000, b"")
        .entry(b'0', "none", "", 0, b"x");
    let upper = Tar::default().file("locked/in", "x");
    world.index(&[world.image(&architecture(), &[lower.end(), upper.end()])]);
    let image = images.import(&world.layout(), None).expect("an image");
    assert_eq!(read(&image, "locked/in"), "x");
    assert_eq!(read(&image, "none"), "x");
    fs::remove_dir_all(&image.rootfs).expect("removed");
}

#[test]
fn what_exceeds_a_limit_is_refused() {
    let layer = || Tar::default().file("a", "12345").file("b", "12345").end();
    for limits in [
        Limits {
            bytes: 9,
            ..Limits::default()
        },
        Limits {
            entries: 1,
            ..Limits::default()
        },
    ] {
        let mut world = World::new();
        world.limits = limits;
        assert_eq!(
            code(world.import_layers(&[layer()]).expect_err("refused")),
            "IMAGE_TOO_LARGE"
        );
        assert_eq!(world.left(), [] as [&str; 0]);
    }
    // Names and attributes that come before a file are held in memory.
    let long = vec![b'x'; 3 << 20];
    for kind in [b'L', b'K', b'x'] {
        let world = World::new();
        let layer = Tar::default()
            .entry(kind, "long", "", 0, &long)
            .file("a", "");
        assert_eq!(
            code(world.import_layers(&[layer.end()]).expect_err("refused")),
            "IMAGE_TOO_LARGE"
        );
    }
}

#[test]
fn bytes_that_are_not_those_that_were_named_are_refused() {
    let world = World::new();
    let layer = Tar::default().file("a", "right").end();
    let blob = world.blob(TAR, &layer);
    let manifest = world.image_of(&architecture(), std::slice::from_ref(&layer), &[blob]);
    world.index(&[manifest]);
    let path = world.layout().join("blobs/sha256").join(hex(&layer));

    fs::write(&path, Tar::default().file("a", "wrong").end()).expect("write");
    let error = world.import(None).expect_err("another content");
    assert!(matches!(error, ImageError::Digest { .. }), "{error}");
    assert_eq!(code(error), "IMAGE_INVALID");

    fs::write(&path, layer.get(..600).expect("longer")).expect("write");
    let error = world.import(None).expect_err("truncated");
    assert!(error.to_string().contains("truncated"), "{error}");

    fs::remove_file(&path).expect("rm");
    let error = world.import(None).expect_err("missing");
    assert!(error.to_string().contains("lacks the blob"), "{error}");
    assert_eq!(world.left(), [] as [&str; 0]);

    fs::write(&path, &layer).expect("write");
    assert_eq!(read(&world.import(None).expect("mended"), "a"), "right");
}

#[test]
fn a_packed_layer_must_unpack_to_what_the_configuration_names() {
    let world = World::new();
    let named = Tar::default().file("a", "named").end();
    let other = Tar::default().file("a", "other").end();
    let blob = world.blob(
        "application/vnd.oci.image.layer.v1.tar+zstd",
        &zstd::encode_all(&*other, 1).expect("zstd"),
    );
    world.index(&[world.image_of(&architecture(), &[named], &[blob])]);
    let error = world.import(None).expect_err("refused");
    assert!(matches!(error, ImageError::Digest { .. }), "{error}");
}

#[test]
fn a_layer_that_ends_in_the_middle_of_a_file_is_refused() {
    let whole = Tar::default().file("a", &"x".repeat(2000)).end();
    let half = whole.get(..1024).expect("longer").to_vec();
    let world = World::new();
    assert_eq!(
        code(world.import_layers(&[half]).expect_err("refused")),
        "IMAGE_INVALID"
    );
}

#[test]
fn the_image_of_a_tag_is_for_this_machine() {
    let world = World::new();
    let layer = |text| Tar::default().file("a", text).end();
    let of = |architecture: &str, text| {
        let mut manifest = world.image(architecture, &[layer(text)]);
        manifest["platform"] = json!({ "os": "linux", "architecture": architecture });
        manifest
    };
    let both = json!({ "manifests": [of("s390x", "other"), of(&architecture(), "ours")] });
    let both = world.json("application/vnd.oci.image.index.v1+json", &both);
    let foreign = json!({ "manifests": [of("s390x", "other")] });
    let foreign = world.json("application/vnd.oci.image.index.v1+json", &foreign);
    // Says nothing in the index: its configuration does.
    let silent = world.image("s390x", &[layer("other")]);
    world.index(&[
        tagged(both, "both"),
        tagged(foreign, "foreign"),
        tagged(silent, "silent"),
    ]);

    assert_eq!(
        read(&world.import(Some("both")).expect("ours"), "a"),
        "ours"
    );
    for tag in ["foreign", "silent"] {
        let error = world.import(Some(tag)).expect_err("for another machine");
        assert!(error.to_string().contains("linux/s390x"), "{error}");
        assert_eq!(code(error), "IMAGE_UNSUPPORTED");
    }
    for tag in [None, Some("latest")] {
        let error = world.import(tag).expect_err("which one?");
        assert!(
            error.to_string().contains("both, foreign, silent"),
            "{error}"
        );
        assert_eq!(code(error), "IMAGE_NOT_FOUND");
    }
    let error = world
        .images()
        .import(world.directory.path(), None)
        .expect_err("no layout");
    assert_eq!(code(error), "IMAGE_NOT_FOUND");
}

#[test]
fn an_index_that_leads_to_indices_without_end_is_refused() {
    let world = World::new();
    let layer = Tar::default().file("a", "").end();
    let mut nested = world.image(&architecture(), &[layer]);
    for _ in 0..4 {
        let index = json!({ "manifests": [nested] });
        nested = world.json("application/vnd.oci.image.index.v1+json", &index);
    }
    world.index(&[nested]);
    assert_eq!(
        code(world.import(None).expect_err("refused")),
        "IMAGE_INVALID"
    );
}

#[test]
fn a_digest_that_is_a_path_is_refused() {
    let world = World::new();
    for digest in ["sha256:../../../etc/passwd", "sha512:00", "sha256:AB", ""] {
        world.index(&[json!({ "mediaType": MANIFEST, "digest": digest, "size": 1 })]);
        assert_eq!(code(world.import(None).expect_err(digest)), "IMAGE_INVALID");
    }
}

#[test]
fn an_image_is_unpacked_once_whoever_asks_and_what_a_killed_maker_left_is_cleared() {
    let world = World::new();
    let layer = Tar::default().file("a", "x").end();
    world.index(&[world.image(&architecture(), &[layer])]);
    let first = world.import(None).expect("an image");
    let directory = first.rootfs.parent().expect("a directory");
    let name = directory
        .file_name()
        .expect("a name")
        .to_string_lossy()
        .into_owned();
    let inode = fs::metadata(&first.rootfs).expect("there").ino();
    let again: Vec<_> = std::thread::scope(|scope| {
        let import = || scope.spawn(|| world.import(None).expect("an image"));
        let all = [import(), import(), import()];
        all.map(|thread| thread.join().expect("joined")).into()
    });
    for image in &again {
        assert_eq!(fs::metadata(&image.rootfs).expect("there").ino(), inode);
    }
    drop((first, again));

    let images = world.directory.path().join("images");
    fs::remove_dir_all(images.join(&name)).expect("removed");
    fs::create_dir(images.join(format!("partial-{name}-killed"))).expect("mkdir");
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| world.import(None).expect("an image"));
        }
    });
    assert_eq!(world.left(), [name]);
    let mode = fs::metadata(&images).expect("there").permissions().mode();
    assert_eq!(
        mode & 0o777,
        0o700,
        "other users of the host reach nothing in it"
    );
}
