//! From a layout to the layers of an image for this machine, each what its digest says.

use std::fs;
use std::io::Write;
use std::os::unix::fs::symlink;

use super::*;

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
        .import(
            world.directory.path(),
            found(world.directory.path()),
            None,
            &Arc::default(),
        )
        .expect_err("no layout");
    assert_eq!(code(error), "IMAGE_NOT_FOUND");
}

#[test]
fn what_names_this_machine_comes_before_what_names_none() {
    let world = World::new();
    let silent = world.image("s390x", &[Tar::default().file("a", "other").end()]);
    let mut ours = world.image(&architecture(), &[Tar::default().file("a", "ours").end()]);
    ours["platform"] = json!({ "os": "linux", "architecture": architecture() });
    let both = json!({ "manifests": [silent, ours] });
    world.index(&[world.json("application/vnd.oci.image.index.v1+json", &both)]);
    assert_eq!(read(&world.import(None).expect("ours"), "a"), "ours");
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
fn no_link_in_a_layout_is_followed() {
    let world = World::new();
    let layer = Tar::default().file("a", "x").end();
    world.index(&[world.image(&architecture(), std::slice::from_ref(&layer))]);
    let outside = world.directory.path().join("secret");
    fs::write(&outside, "secret:$6$salt").expect("write");
    let aside = world.directory.path().join("aside");
    for name in [
        "oci-layout",
        "index.json",
        "blobs",
        "blobs/sha256",
        &format!("blobs/sha256/{}", hex(&layer)),
    ] {
        let path = world.layout().join(name);
        fs::rename(&path, &aside).expect("moved");
        for target in [&aside, &outside] {
            symlink(target, &path).expect("symlink");
            let error = world.import(None).expect_err(name);
            assert!(error.to_string().contains("a symbolic link"), "{error}");
            assert!(!error.to_string().contains("salt"), "{error}");
            assert_eq!(code(error), "IMAGE_INVALID");
            fs::remove_file(&path).expect("rm");
        }
        fs::rename(&aside, &path).expect("moved back");
    }
    // Other names of a file, and of the layout itself, are what they are.
    let blob = world.layout().join("blobs/sha256").join(hex(&layer));
    fs::hard_link(&blob, &aside).expect("link");
    let link = world.directory.path().join("link");
    symlink(world.layout(), &link).expect("symlink");
    let image = world
        .images()
        .import(&link, found(&link), None, &Arc::default());
    assert_eq!(read(&image.expect("an image"), "a"), "x");
}

#[test]
fn a_layout_that_is_exchanged_after_it_was_found_decides_nothing() {
    let world = World::new();
    world.index(&[world.image(&architecture(), &[Tar::default().file("a", "x").end()])]);
    let layout = world.layout();
    let found = found(&layout);
    let aside = world.directory.path().join("aside");
    fs::rename(&layout, &aside).expect("moved");
    symlink("/", &layout).expect("symlink");
    let image = world.images().import(&layout, found, None, &Arc::default());
    assert_eq!(read(&image.expect("an image"), "a"), "x");
}

#[tokio::test]
async fn what_was_not_there_when_it_was_looked_for_is_not_looked_for_again() {
    let world = World::new();
    world.index(&[world.image(&architecture(), &[Tar::default().file("a", "x").end()])]);
    for source in [
        Source::oci_layout(&world.layout(), None),
        Source::rootfs(world.directory.path()),
    ] {
        let error = world.images().open(source, None, None, &|_| {}).await;
        assert_eq!(code(error.expect_err("nothing")), "IMAGE_NOT_FOUND");
    }
}

#[test]
fn what_is_no_file_in_a_layout_is_not_waited_for() {
    let world = World::new();
    let index = world.layout().join("index.json");
    nix::unistd::mkfifo(&index, nix::sys::stat::Mode::S_IRWXU).expect("mkfifo");
    let error = world.import(None).expect_err("a FIFO");
    assert!(error.to_string().contains("no regular file"), "{error}");
    assert_eq!(code(error), "IMAGE_INVALID");
}

#[test]
fn what_an_image_says_of_itself_does_nothing_to_a_terminal() {
    let long = format!("\u{1b}]0;title\u{7}\n\u{202e}{}", "x".repeat(1 << 20));
    let world = World::new();
    let image = || world.image(&architecture(), &[Tar::default().file("a", "x").end()]);
    let mut foreign = image();
    foreign["platform"] = json!({ "os": long, "architecture": "s390x" });
    let foreign = json!({ "manifests": [foreign] });
    let foreign = world.json("application/vnd.oci.image.index.v1+json", &foreign);
    let layer = Tar::default().file("a", "x").end();
    let blob = world.blob(&long, &layer);
    let unknown = world.image_of(&architecture(), &[layer], &[blob]);
    for (manifests, end) in [
        (vec![foreign], "this machine is linux/"),
        (vec![unknown], "xxx\""),
        (vec![tagged(image(), &long), image()], "xxx"),
    ] {
        world.index(&manifests);
        let error = world.import(None).expect_err("refused").to_string();
        assert!(error.contains(end), "{error}");
        assert!(error.chars().count() < 2000, "{error}");
        let acts = |own: char| own.is_control() || own == '\u{202e}';
        assert!(!error.contains(acts), "{error}");
    }
}

#[test]
fn what_is_shown_of_a_text_is_its_ends() {
    assert_eq!(
        shown("\"a\" is no name, 'b' is: é"),
        "\"a\" is no name, 'b' is: é"
    );
    let long = format!("begins{}ends", "x".repeat(1000));
    let shown = shown(&long);
    assert!(
        shown.starts_with("beginsx") && shown.ends_with("xends"),
        "{shown}"
    );
    assert_eq!(shown.chars().count(), 801);
}
