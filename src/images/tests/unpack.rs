//! From layers to files.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;

use super::*;

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
fn a_directory_is_cleared_once_however_often_a_layer_says_so() {
    let world = World::new();
    let opaque = |tar: Tar, name| tar.entry(b'0', name, "", 0o644, b"");
    let lower = Tar::default().file("a/b/old", "");
    let upper = opaque(Tar::default(), "a/b/.wh..wh..opq")
        .symlink("other-name", "a/b")
        .file("a/b/new", "")
        .file("other-name/newer", "");
    let upper = opaque(upper, "a/b/.wh..wh..opq");
    let upper = opaque(upper, "a/.wh..wh..opq");
    let image = world
        .import_layers(&[lower.end(), upper.end()])
        .expect("an image");
    assert_eq!(names(&image.rootfs.join("a/b")), ["new", "newer"]);
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
    let image = images
        .import(
            &world.layout(),
            found(&world.layout()),
            None,
            &Arc::default(),
        )
        .expect("an image");
    assert_eq!(read(&image, "locked/in"), "x");
    assert_eq!(read(&image, "none"), "x");
    fs::remove_dir_all(&image.rootfs).expect("removed");
}
