//! What is kept of images, and by whom.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::time::Duration;

use nix::fcntl::FlockArg;

use super::*;
use crate::images::store;
use crate::images::work::Work;

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

/// From here on, this thread can't bring files to the disk.
fn fail_syncs() {
    let fails = seccompiler::SeccompAction::Errno(libc::EIO.cast_unsigned());
    let filter = seccompiler::SeccompFilter::new(
        [(libc::SYS_syncfs, Vec::new())].into(),
        seccompiler::SeccompAction::Allow,
        fails,
        std::env::consts::ARCH.try_into().expect("an architecture"),
    );
    let filter = seccompiler::BpfProgram::try_from(filter.expect("a filter"));
    seccompiler::apply_filter(&filter.expect("a program")).expect("a filter");
}

#[test]
fn an_image_that_is_not_on_the_disk_does_not_appear() {
    let world = World::new();
    let layer = Tar::default().file("a", "x").end();
    world.index(&[world.image(&architecture(), &[layer])]);
    let failing = std::thread::scope(|scope| {
        let importing = scope.spawn(|| {
            fail_syncs();
            world.import(None)
        });
        importing.join().expect("joined")
    });
    let error = failing.expect_err("not synced");
    assert!(error.to_string().contains("can't sync"), "{error}");
    assert_eq!(world.left(), [] as [&str; 0]);
    assert_eq!(read(&world.import(None).expect("an image"), "a"), "x");
}

/// No VM but those whose directories hold the id of their image in a file.
fn vms() -> Vms {
    Vms {
        made_with: |directory| match fs::read_to_string(directory.join("image")) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            read => read.map(Some),
        },
        known: Vec::new(),
    }
}

fn wanted(text: &str) -> Wanted {
    Wanted::parse(text).expect(text)
}

impl World {
    /// An image with one file, by this tag of the layout alone.
    fn tagged_image(&self, tag: &str, content: &str) -> Image {
        let layer = Tar::default().file("a", content).end();
        self.index(&[tagged(self.image(&architecture(), &[layer]), tag)]);
        self.import(Some(tag)).expect("an image")
    }

    fn name(&self, tag: &str) -> String {
        format!("oci:{}:{tag}", self.layout().display())
    }

    /// A VM that sleeps: nothing but its directory says that it was made with the image.
    fn vm(&self, name: &str, image: Image) -> PathBuf {
        let directory = self.directory.path().join("data/vms").join(name);
        image.keep_for(&directory).expect("noted");
        fs::create_dir_all(&directory).expect("mkdir");
        fs::write(directory.join("image"), &image.id).expect("write");
        // Asleep, it has no lease.
        drop(image);
        directory
    }
}

#[test]
fn an_image_is_listed_with_its_names_its_size_and_its_vms() {
    let world = World::new();
    assert_eq!(world.images().list(&vms()).expect("a list"), []);
    let image = world.tagged_image("v1", &"x".repeat(100_000));
    let running = world.images().list(&vms()).expect("a list");
    assert!(running[0].is_running && running[0].vms.is_empty());
    let id = image.id.clone();
    let directory = world.vm("vm", image);
    let [stored] = &world.images().list(&vms()).expect("a list")[..] else {
        panic!("one image");
    };
    assert_eq!(stored.digest.to_string(), id);
    assert_eq!(stored.names, [world.name("v1")]);
    assert_eq!(stored.vms, [directory]);
    assert!(!stored.is_running);
    assert!((100_000..1_000_000).contains(&stored.bytes), "{stored:?}");
    assert!(stored.made_at > 0);
}

#[test]
fn an_image_is_found_whatever_is_wrong_with_another() {
    let world = World::new();
    let other = world.tagged_image("v1", "other").id;
    let id = world.tagged_image("v2", "x").id;
    let users = world.images().root().join("users");
    fs::create_dir_all(&users).expect("mkdir");
    let hex = other.trim_start_matches("sha256:");
    fs::write(users.join(hex), "no directory").expect("write");
    world.images().list(&vms()).expect_err("not readable");
    let found = world.images().find(&id, &vms()).expect("readable");
    assert_eq!(found.expect("there").names, [world.name("v2")]);
    let none = format!("sha256:{}", "a".repeat(64));
    assert_eq!(world.images().find(&none, &vms()).expect("none"), None);
}

#[test]
fn an_image_of_a_vm_that_sleeps_stays_until_the_vm_is_gone() {
    let world = World::new();
    let image = world.tagged_image("v1", "x");
    let id = image.id.clone();
    let rootfs = image.rootfs.clone();
    let directory = world.vm("vm", image);
    for wanted in [wanted(&world.name("v1")), wanted(&id)] {
        let error = world.images().remove(&wanted, &vms());
        match error.expect_err("in use") {
            ImageError::InUse(stored) => assert_eq!(stored.vms, std::slice::from_ref(&directory)),
            other => panic!("{other}"),
        }
    }
    let pruned = world.images().prune(&vms(), false).expect("pruned");
    assert_eq!((pruned.removed.len(), pruned.kept.len()), (0, 1));
    assert_eq!(pruned.kept[0].names, [world.name("v1")]);
    assert!(rootfs.exists());

    fs::remove_dir_all(&directory).expect("destroyed");
    let pretended = world.images().prune(&vms(), true).expect("looked");
    assert_eq!(pretended.removed.len(), 1);
    assert!(rootfs.exists());
    let pruned = world.images().prune(&vms(), false).expect("pruned");
    assert_eq!(pruned, pretended);
    assert_eq!(world.images().list(&vms()).expect("a list"), []);
    assert!(!rootfs.exists());
}

#[test]
fn an_image_that_somebody_has_open_stays_though_no_vm_was_made_with_it() {
    let world = World::new();
    let image = world.tagged_image("v1", "x");
    let pruned = world.images().prune(&vms(), false).expect("pruned");
    assert_eq!((pruned.removed.len(), pruned.kept.len()), (0, 1));
    let error = world.images().remove(&wanted(&image.id), &vms());
    assert_eq!(code(error.expect_err("in use")), "IMAGE_IN_USE");
    assert_eq!(read(&image, "a"), "x");
}

#[test]
fn a_vm_whose_disk_is_not_there_keeps_its_image() {
    let world = World::new();
    let image = world.tagged_image("v1", "x");
    let digest = Digest::try_from(image.id.clone()).expect("a digest");
    let directory = world.vm("vm", image);
    fs::remove_dir_all(world.directory.path().join("data")).expect("gone");
    // As if what it lay in had been on another disk.
    let records = world.images().root().join("users").join(digest.hex());
    let record = fs::read_dir(records).expect("records").flatten().next();
    let record = record.expect("a record").path();
    let text = fs::read_to_string(&record).expect("a record");
    let mut user: Value = serde_json::from_str(&text).expect("JSON");
    for device in user["devices"].as_array_mut().expect("devices") {
        *device = json!(device.as_u64().expect("a device") + 1);
    }
    fs::write(&record, user.to_string()).expect("write");
    let listed = world.images().list(&vms()).expect("a list");
    assert_eq!(listed[0].vms, [directory]);
    fs::write(&record, text).expect("write");
    let listed = world.images().list(&vms()).expect("a list");
    assert_eq!(listed[0].vms, [] as [PathBuf; 0]);
}

#[test]
fn a_vm_without_a_record_counts_where_the_caller_knows_it() {
    let world = World::new();
    let directory = world.vm("vm", world.tagged_image("v1", "x"));
    fs::remove_dir_all(world.images().root().join("users")).expect("removed");
    assert_eq!(world.images().list(&vms()).expect("a list")[0].vms.len(), 0);
    let vms = Vms {
        known: vec![directory.clone()],
        ..vms()
    };
    assert_eq!(
        world.images().list(&vms).expect("a list")[0].vms,
        [directory]
    );
}

#[test]
fn a_name_that_is_not_the_only_one_is_taken_away_and_the_image_stays() {
    let world = World::new();
    drop(world.tagged_image("v1", "x"));
    drop(world.tagged_image("v2", "x"));
    let removal = world.images().remove(&wanted(&world.name("v1")), &vms());
    let removal = removal.expect("untagged");
    assert_eq!(removal.untagged, [world.name("v1")]);
    assert_eq!(removal.removed, []);
    let removal = world.images().remove(&wanted(&world.name("v2")), &vms());
    let removal = removal.expect("removed");
    assert_eq!(removal.untagged, [world.name("v2")]);
    assert_eq!(removal.removed.len(), 1);
    let again = world.images().remove(&wanted(&world.name("v2")), &vms());
    assert_eq!(again.expect("nothing"), Removal::default());
}

#[test]
fn a_name_goes_with_what_it_leads_to_and_its_image_can_be_removed_by_digest() {
    let world = World::new();
    let first = world.tagged_image("v1", "first").id;
    let second = world.tagged_image("v1", "second").id;
    let listed = world.images().list(&vms()).expect("a list");
    let names = |id: &str| {
        let image = listed.iter().find(|image| image.digest.to_string() == id);
        image.expect("listed").names.clone()
    };
    assert_eq!(names(&first), [] as [&str; 0]);
    assert_eq!(names(&second), [world.name("v1")]);
    let prefix = first.get(..("sha256:".len() + 12)).expect("digits");
    let removal = world.images().remove(&wanted(prefix), &vms());
    assert_eq!(
        removal.expect("removed").removed[0].digest.to_string(),
        first
    );
    let left = world.images().list(&vms()).expect("a list");
    assert_eq!(left.len(), 1);
    assert_eq!(left[0].digest.to_string(), second);
}

#[test]
fn what_was_removed_is_unpacked_again_when_it_is_needed() {
    let world = World::new();
    let id = world.tagged_image("v1", "x").id;
    world.images().prune(&vms(), false).expect("pruned");
    let again = world.import(Some("v1")).expect("an image");
    assert_eq!(again.id, id);
    assert_eq!(read(&again, "a"), "x");
}

impl World {
    fn locks(&self) -> Vec<String> {
        let mut names = names(self.images().root());
        let is_lock = |name: &str| name.strip_suffix(".lock").is_some_and(|of| of != "blobs");
        names.retain(|name| is_lock(name));
        names
    }
}

#[test]
fn the_lock_of_an_image_is_there_as_long_as_the_image() {
    let world = World::new();
    let broken = Tar::default().file("a", "x").0;
    world
        .import_layers(&[broken.get(..600).expect("longer").to_vec()])
        .expect_err("refused");
    assert_eq!(world.locks(), [] as [&str; 0]);
    let image = world.tagged_image("v1", "x");
    assert_eq!(world.locks().len(), 1);
    world.images().prune(&vms(), false).expect("pruned");
    assert_eq!(world.locks().len(), 1, "in use");
    drop(image);
    // Of a maker that was killed.
    let killed = format!("owned-{}.lock", "a".repeat(64));
    fs::write(world.images().root().join(killed), "").expect("write");
    world.images().prune(&vms(), false).expect("pruned");
    assert_eq!(world.locks(), [] as [&str; 0]);
}

#[test]
fn a_lock_that_is_removed_while_it_is_waited_for_is_locked_anew() {
    let world = World::new();
    fs::create_dir_all(world.images().root()).expect("mkdir");
    let path = world.images().root().join("x.lock");
    let take = |how| store::lock(&path, how).expect("locked");
    let alone = take(FlockArg::LockExclusive).expect("nobody has it");
    assert!(take(FlockArg::LockSharedNonblock).is_none());
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| take(FlockArg::LockExclusive).expect("it waits"));
        // Wherever the other thread is by now, it must not end with a file that is gone.
        std::thread::yield_now();
        store::remove_lock(&path, &alone);
        drop(alone);
        let lock = waiting.join().expect("joined");
        let (ours, there) = (lock.metadata(), fs::metadata(&path));
        assert_eq!(ours.expect("open").ino(), there.expect("there").ino());
    });
}

#[test]
fn who_waits_for_an_image_that_another_makes_can_be_told_to_stop() {
    let world = World::new();
    let image = world.tagged_image("v1", "x");
    let directory = image.rootfs.parent().expect("a directory").to_owned();
    drop(image);
    let making = store::lock(&store::lock_of(&directory), FlockArg::LockExclusive);
    let _making = making.expect("locked").expect("nobody has it");
    let work = Arc::new(Work::default());
    let (ended, has_ended) = std::sync::mpsc::channel();
    let (layout, images, own) = (world.layout(), world.images(), Arc::clone(&work));
    // Not joined: if it can't be told, it waits for ever.
    std::thread::spawn(move || {
        let image = images.import(&layout, found(&layout), Some("v1"), &own);
        ended.send(image.map(drop).map_err(code))
    });
    work.abandon();
    // Nothing takes so long, unless it hangs.
    let ended = has_ended.recv_timeout(Duration::from_mins(1));
    assert_eq!(ended.expect("an end"), Err("ABORTED".to_owned()));
}

#[test]
fn makers_users_and_removers_never_meet_half_an_image() {
    let world = World::new();
    drop(world.tagged_image("v1", "x"));
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                for _ in 0..50 {
                    let image = world.import(Some("v1")).expect("an image");
                    assert_eq!(read(&image, "a"), "x");
                }
            });
        }
        for _ in 0..2 {
            scope.spawn(|| {
                for _ in 0..50 {
                    world.images().prune(&vms(), false).expect("pruned");
                }
            });
        }
    });
}

#[test]
fn pruning_clears_what_killed_makers_and_pulls_have_left_and_not_what_is_being_made() {
    let world = World::new();
    let image = world.tagged_image("v1", "x");
    let root = world.images().root().to_owned();
    let name = image.rootfs.parent().and_then(Path::file_name);
    let name = name.expect("a name").to_string_lossy().into_owned();
    let other = format!("partial-plain-{}-killed", "a".repeat(64));
    let ours = format!("partial-{name}-at-work");
    for left in [&*other, &*ours, "removed-half"] {
        fs::create_dir_all(root.join(left).join("rootfs")).expect("mkdir");
    }
    let blobs = root.join("blobs/sha256");
    fs::create_dir_all(&blobs).expect("mkdir");
    fs::write(blobs.join("b.partial"), "half").expect("write");
    let pruned = world.images().prune(&vms(), false).expect("pruned");
    let half = Files { count: 1, bytes: 4 };
    assert_eq!(pruned.layers, half);
    assert!(!root.join(other).exists() && !root.join("removed-half").exists());
    assert!(root.join(&ours).exists());
    drop(image);
    world.images().prune(&vms(), false).expect("pruned");
    assert!(!root.join(ours).exists());
}

#[test]
fn an_image_is_named_in_full_or_as_docker_completes_it_or_by_its_digest() {
    let python = "docker.io/library/python:3.12".to_owned();
    assert_eq!(wanted("python:3.12"), Wanted::Name(python));
    assert_eq!(wanted("oci:/a:b"), Wanted::Name("oci:/a:b".to_owned()));
    let digest = format!("sha256:{}", "a".repeat(12));
    assert_eq!(wanted(&digest), Wanted::Digest(digest));
    for wrong in ["", "sha256:abc", "sha256:AAAAAAAAAAAA", "a b"] {
        assert!(Wanted::parse(wrong).is_err(), "{wrong}");
    }
}
