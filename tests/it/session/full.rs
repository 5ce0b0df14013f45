//! The disk is full.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use agentvm::error::{Code, Error};
use agentvm::ids::VmKey;
use agentvm::store::Status;
use agentvm::vm::exec::ExecOptions;

use super::fixture::{Listener, World, within};
use crate::child::{block_on, in_child, unshare};

/// What a store does that finds no room: nothing else makes some.
const NO_FLOOR: Option<u64> = Some(0);

/// A file system of so many MiB, until this process ends. It is in a mount namespace of its own.
fn small_disk(at: &Path, mib: u64) {
    disk_with(at, &format!("size={mib}m"));
}

fn disk_with(at: &Path, size: &str) {
    fs::create_dir(at).unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", &format!("{size},mode=700"), "tmpfs"])
        .arg(at)
        .status()
        .unwrap();
    assert!(mounted.success());
}

/// Takes all but so many KiB of the file system of `path`, which is to be removed to get them back.
fn take_all_but(kib: u64, path: &Path) {
    let disk = nix::sys::statvfs::statvfs(path.parent().unwrap()).unwrap();
    let free = disk.blocks_available() * disk.fragment_size();
    let taken = usize::try_from(free - (kib << 10)).unwrap();
    fs::write(path, vec![0; taken]).unwrap();
}

fn on_a_small_disk(test: &str, body: impl Future<Output = ()>) {
    in_child(&unshare(&["--mount"]), test, || block_on(body));
}

fn assert_full(error: &Error, file: &Path) {
    assert_eq!(error.code, Code::StoreFull, "{error}");
    assert!(error.message.contains(file.to_str().unwrap()), "{error}");
    assert!(error.message.contains("free disk space"), "{error}");
}

#[test]
fn a_full_disk_suspends_a_session_which_goes_on_when_there_is_room() {
    const TEST: &str =
        "session::full::a_full_disk_suspends_a_session_which_goes_on_when_there_is_room";
    on_a_small_disk(TEST, async {
        let directory = tempfile::tempdir().unwrap();
        let data = directory.path().join("data");
        small_disk(&data, 64);
        let ballast = data.join("ballast");
        let mut world = World::at(directory, data).await;
        world.settings.vm.limits.min_free_disk_bytes = NO_FLOOR;
        let world = world.beside();
        let session = world.session().await;
        world.run(session, "say first").await.unwrap();
        let file = world.directory().join("vm.db");
        let listener = Listener::of(&world.vm);

        let elsewhere = World::new().await;
        let unaffected = elsewhere.session().await;
        let heard = Listener::of(&elsewhere.vm);
        let turn = elsewhere.start(unaffected, "say undisturbed\ncancel");
        heard.said("undisturbed").await;

        take_all_but(4096, &ballast);
        let full = world.run(session, "burst 1000000 10000").await;
        assert_full(&full.unwrap_err(), &file);
        assert_eq!(world.agents().await, Vec::<String>::new());
        assert_eq!(world.record(session).await.status, Status::Suspended);
        // What was committed is there for all, and no listener has seen anything else.
        let before = world.log(session).await.0;
        assert!(before.len() > 100, "{}", before.len());
        let seen: Vec<_> = (5..=before.len() as u64).collect();
        assert_eq!(listener.numbers(session), seen);
        assert_eq!(world.sh("echo reads work").await, "reads work\n");

        // As long as it is full, a prompt tries again, and no agent stays behind.
        for _ in 0..2 {
            let full = world.run(session, "burst 1000000 10000").await;
            assert_full(&full.unwrap_err(), &file);
            assert_eq!(world.agents().await, Vec::<String>::new());
        }

        fs::remove_file(&ballast).unwrap();
        let remembered: usize = world.text(session, "remember").await.parse().unwrap();
        assert!((3..=5).contains(&remembered), "{remembered}");
        let log = world.log(session).await;
        assert_eq!(log.0[..before.len()], before);
        let (starts, ends) = (log.of("_agentvm/turn_start"), log.turn_ends());
        assert_eq!(starts.len(), ends.len());
        for end in &ends[1..ends.len() - 1] {
            assert!(end["interrupted"]["reason"].is_string(), "{end}");
        }
        assert_eq!(log.agent_texts().last().unwrap(), &remembered.to_string());
        assert_eq!(world.record(session).await.status, Status::Open);

        assert!(elsewhere.vm.cancel_prompt(unaffected).await.unwrap());
        assert_eq!(turn.await.unwrap().unwrap().text, "undisturbed");
        assert_eq!(elsewhere.text(unaffected, "say on").await, "on");
        elsewhere.close().await;
        world.close().await;
    });
}

#[test]
fn a_session_that_a_full_disk_keeps_from_being_made_leaves_nothing() {
    const TEST: &str =
        "session::full::a_session_that_a_full_disk_keeps_from_being_made_leaves_nothing";
    on_a_small_disk(TEST, async {
        let directory = tempfile::tempdir().unwrap();
        let data = directory.path().join("data");
        small_disk(&data, 64);
        let ballast = data.join("ballast");
        let mut world = World::at(directory, data).await;
        world.settings.vm.limits.min_free_disk_bytes = NO_FLOOR;
        let world = world.beside();
        // From nothing at all up to enough.
        for kib in [0, 8, 16, 32, 48, 64, 128] {
            within(world.vm.wake()).await.unwrap();
            take_all_but(kib, &ballast);
            let created = world.create(&[("A", "b")]).await;
            if let Err(error) = &created {
                assert_eq!(error.code, Code::StoreFull, "{kib}: {error}");
                assert_eq!(world.vm.sessions().await.unwrap(), []);
                assert_eq!(world.env_files(), Vec::<PathBuf>::new());
                assert_eq!(world.state_directories().await, "");
                assert_eq!(world.agents().await, Vec::<String>::new());
            }
            fs::remove_file(&ballast).unwrap();
            // A record that could not even be taken back goes now.
            let session = world.session().await;
            let kept = 1 + usize::from(created.is_ok());
            assert_eq!(world.vm.sessions().await.unwrap().len(), kept, "{kib}");
            assert_eq!(world.env_files().len(), kept, "{kib}");
            assert_eq!(world.text(session, "say fine").await, "fine");
            within(world.vm.destroy()).await.unwrap();
        }
        world.close().await;
    });
}

#[test]
fn what_fills_the_disk_is_ended_while_there_is_room_for_the_stores_of_all() {
    const TEST: &str =
        "session::full::what_fills_the_disk_is_ended_while_there_is_room_for_the_stores_of_all";
    const FLOOR: u64 = 64 << 20;
    on_a_small_disk(TEST, async {
        let directory = tempfile::tempdir().unwrap();
        let data = directory.path().join("data");
        small_disk(&data, 256);
        let mut world = World::at(directory, data.clone()).await;
        world.settings.vm.limits.min_free_disk_bytes = Some(FLOOR);
        let world = world.beside();
        let session = world.session().await;
        let other = VmKey::new(vec!["other".to_owned()]).unwrap();
        let other = world.another_client().0.vm(other).unwrap();
        let command = "while sleep 0.05; do echo lives; done & exec sleep 1000";
        let undisturbed = {
            let other = other.clone();
            tokio::spawn(async move { other.exec(command, ExecOptions::default()).await })
        };

        let fill = "i=0; while head -c 1000000 /dev/zero > $i; do i=$((i+1)); sleep 0.01; done";
        let filled = within(world.vm.exec(fill, ExecOptions::default())).await;
        let error = filled.unwrap_err();
        assert_eq!(error.code, Code::VmLimit, "{error}");
        assert!(error.message.contains("minFreeDiskBytes"), "{error}");
        let disk = nix::sys::statvfs::statvfs(&data).unwrap();
        let free = disk.blocks_available() * disk.fragment_size();
        assert!((FLOOR / 4..FLOOR).contains(&free), "{free}");

        // Who does not fill it goes on, and so does the session when there is room.
        assert!(!undisturbed.is_finished());
        world.sh("rm -f [0-9]*").await;
        assert_eq!(world.text(session, "say on").await, "on");
        within(other.sleep()).await.unwrap();
        assert!(undisturbed.await.unwrap().is_err());
        world.close().await;
    });
}

#[test]
fn what_takes_all_files_of_the_disk_is_ended_while_there_are_some_for_the_stores_of_all() {
    const TEST: &str = "session::full::what_takes_all_files_of_the_disk_is_ended_while_there_are_some_for_the_stores_of_all";
    const FLOOR: u64 = 512 << 20;
    // Of 16 KiB.
    const FILES: u64 = FLOOR >> 14;
    on_a_small_disk(TEST, async {
        let directory = tempfile::tempdir().unwrap();
        let data = directory.path().join("data");
        disk_with(&data, "size=1g,nr_inodes=60000");
        let mut world = World::at(directory, data.clone()).await;
        world.settings.vm.limits.min_free_disk_bytes = Some(FLOOR);
        let world = world.beside();
        let session = world.session().await;

        // Empty ones take no space. With pauses: a file system in memory makes them faster than any disk.
        let fill = "i=0; while : > $i; do i=$((i+1)); [ $((i % 100)) != 0 ] || sleep 0.005; done";
        let filled = within(world.vm.exec(fill, ExecOptions::default())).await;
        let error = filled.unwrap_err();
        assert_eq!(error.code, Code::VmLimit, "{error}");
        assert!(error.message.contains("minFreeDiskBytes"), "{error}");
        let files = nix::sys::statvfs::statvfs(&data).unwrap().files_available();
        assert!((FILES / 8..FILES).contains(&files), "{files}");

        world.sh("find . -maxdepth 1 -name '[0-9]*' -delete").await;
        assert_eq!(world.text(session, "say on").await, "on");
        world.close().await;
    });
}
