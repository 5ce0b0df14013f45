//! What an image can't take more of than it is given.

use std::fs;
use std::os::unix::fs::MetadataExt;

use super::*;
use crate::images::bounds::{Free, PER_FILE, Space};
use crate::images::inventory::on_disk;
use crate::images::work::{Work, attended};

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

/// A file whose content is not in the archive: its header says that it is all holes.
fn sparse(name: &str, length: u64) -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    header.set_path(name).expect("a short name");
    header.set_entry_type(tar::EntryType::GNUSparse);
    header.set_mode(0o644);
    header.set_uid(7);
    header.set_gid(8);
    header.set_mtime(0);
    header.set_size(0);
    let gnu = header.as_gnu_mut().expect("GNU");
    gnu.set_real_size(length);
    // As large numbers are written, which has room for all.
    gnu.sparse[0].offset[0] = 0x80;
    gnu.sparse[0].offset[4..].copy_from_slice(&length.to_be_bytes());
    gnu.sparse[0].numbytes[..11].copy_from_slice(b"00000000000");
    header.set_cksum();
    let mut archive = header.as_bytes().to_vec();
    archive.extend([0; 1024]);
    archive
}

fn limited(bytes: u64) -> World {
    let mut world = World::new();
    world.limits.bytes = bytes;
    world
}

#[test]
fn what_is_read_and_thrown_away_is_counted_too() {
    let content = vec![b'x'; 1 << 20];
    let mut trailing = Tar::default().file("a", "").end();
    trailing.resize(trailing.len() + content.len(), 0);
    let unused = |kind, name: &str| {
        Tar::default()
            .entry(kind, name, "to", 0o755, &content)
            .end()
    };
    for layer in [
        trailing,
        unused(b'5', "directory/"),
        unused(b'2', "link"),
        unused(b'0', ".wh.gone"),
        unused(b'6', "pipe"),
    ] {
        // What is packed well has few bytes of its own.
        let packed = zstd::encode_all(&*layer, 1).expect("zstd");
        let mut world = World::new();
        world.limits.bytes = 1 << 20;
        let blobs = [world.blob("application/vnd.oci.image.layer.v1.tar+zstd", &packed)];
        world.index(&[world.image_of(&architecture(), &[layer], &blobs)]);
        let error = world.import(None).expect_err("refused");
        assert!(matches!(error, ImageError::TooLarge(_)), "{error}");
        assert_eq!(world.left(), [] as [&str; 0]);
    }
}

#[test]
fn holes_are_counted_and_take_no_disk() {
    let world = limited(64 << 20);
    let layers = [sparse("holes", 48 << 20)];
    let image = world.import_layers(&layers).expect("an image");
    let data = fs::metadata(image.rootfs.join("holes")).expect("there");
    assert_eq!(data.len(), 48 << 20);
    assert!(data.blocks() * 512 < 1 << 20, "{} blocks", data.blocks());
    // The second is of no use, and read all the same.
    for layer in [sparse("holes", 65 << 20), sparse(".wh.gone", 1 << 32)] {
        let world = limited(64 << 20);
        let error = world.import_layers(&[layer]).expect_err("refused");
        assert_eq!(code(error), "IMAGE_TOO_LARGE");
        assert_eq!(world.left(), [] as [&str; 0]);
    }
}

#[test]
fn zeros_at_any_place_of_a_file_are_kept() {
    let zeros = "\0".repeat(200_000);
    for content in [
        zeros.clone(),
        format!("a{zeros}"),
        format!("{zeros}a"),
        format!("{zeros}a{zeros}"),
    ] {
        let world = limited(1 << 20);
        let layers = [Tar::default().file("a", &content).end()];
        let image = world.import_layers(&layers).expect("an image");
        assert!(read(&image, "a") == content);
    }
}

#[test]
fn directories_that_no_entry_names_are_counted() {
    let mut world = World::new();
    world.limits.entries = 10;
    let deep = |depth| {
        Tar::default()
            .file(&format!("{}a", "d/".repeat(depth)), "")
            .end()
    };
    world.import_layers(&[deep(9)]).expect("ten entries");
    let error = world.import_layers(&[deep(10)]).expect_err("eleven");
    assert_eq!(code(error), "IMAGE_TOO_LARGE");
}

#[test]
fn an_image_leaves_the_disk_the_space_that_is_to_stay_free() {
    let mut world = World::new();
    world.limits.min_free = u64::MAX;
    let content = "x".repeat(20 << 20);
    let error = world
        .import_layers(&[Tar::default().file("a", &content).end()])
        .expect_err("refused");
    assert!(error.to_string().contains("minFreeDiskBytes"), "{error}");
    assert_eq!(code(error), "STORE_FULL");
    assert_eq!(world.left(), [] as [&str; 0]);
}

#[test]
fn an_image_leaves_the_disk_room_for_files_too() {
    let directory = tempfile::tempdir().expect("a directory");
    let with = |counts_files, files| {
        let mut space = Space::new(directory.path(), 100 * PER_FILE);
        space.counts_files = counts_files;
        let bytes = u64::MAX;
        space.leaves(Free { bytes, files }, 0)
    };
    assert!(with(true, 100).is_ok());
    let error = with(true, 99).expect_err("too few");
    assert!(error.to_string().contains("only 99 files"), "{error}");
    assert_eq!(code(error), "STORE_FULL");
    assert!(with(false, 0).is_ok(), "any number");
}

#[tokio::test]
async fn an_unpacking_that_nobody_waits_for_ends() {
    let mut world = World::new();
    world.limits.bytes = u64::MAX;
    // Months of zeros.
    world.index(&[world.image(&architecture(), &[sparse("holes", 1 << 52)])]);
    let (images, layout) = (world.images(), world.layout());
    let (begun, has_begun) = std::sync::mpsc::channel();
    let (ended, has_ended) = std::sync::mpsc::channel();
    let tell = move |_| begun.send(()).unwrap_or_default();
    let unpacking = attended("an image", &tell, move |work| {
        let image = images.import(&layout, found(&layout), None, work);
        ended
            .send(image.map(drop).map_err(code))
            .expect("a test that waits");
        Ok(())
    });
    {
        let mut unpacking = std::pin::pin!(unpacking);
        while has_begun.try_recv().is_err() {
            let beat = std::time::Duration::from_millis(10);
            assert!(tokio::time::timeout(beat, &mut unpacking).await.is_err());
        }
    }
    assert_eq!(has_ended.recv().expect("an end"), Err("ABORTED".to_owned()));
    assert_eq!(world.left(), [] as [&str; 0]);
}

#[test]
fn an_image_that_nobody_waits_for_is_not_measured() {
    let directory = tempfile::tempdir().expect("a directory");
    let work = Work::default();
    assert!(on_disk(directory.path(), &work).is_ok());
    work.abandon();
    let measured = on_disk(directory.path(), &work);
    assert_eq!(code(measured.expect_err("given up")), "ABORTED");
}
