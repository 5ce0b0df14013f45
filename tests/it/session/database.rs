//! The database of a VM, read and written by several processes, and damaged in every way.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use agentvm::error::{Code, Error};
use agentvm::ids::{Seq, SessionId, VmKey};
use agentvm::session::{Resume, VmHandle, text_prompt};
use agentvm::store::{Query, Status};
use agentvm::vm::exec::ExecOptions;

use super::fixture::{Listener, World, code, options, within};
use super::host::{self, Host};
use crate::child::{block_on, in_child, role};

/// A host process that streams until it is killed.
async fn stream() {
    let world = host::world().await;
    let session = world.session().await;
    let listener = Listener::of(&world.vm);
    let turn = world.start(session, "flood");
    listener.said("1 ").await;
    host::report(session);
    drop(turn.await);
}

fn start(test: &str, world: &World) -> (Host, SessionId) {
    let mut host = Host::start(&[], test, "stream", &world.data);
    let session = SessionId::parse(&host.expect("")).unwrap();
    (host, session)
}

#[test]
fn another_process_reads_ever_longer_prefixes_of_what_the_first_writes() {
    const TEST: &str =
        "session::database::another_process_reads_ever_longer_prefixes_of_what_the_first_writes";
    if role().is_some() {
        return block_on(stream());
    }
    block_on(async {
        let world = World::new().await;
        let (host, session) = start(TEST, &world);
        let mut seen = 0;
        let mut pages = 0;
        // Until the writer has gone on under the reader for long.
        while pages < 100 || seen < 5000 {
            let record = world.record(session).await;
            assert_eq!(record.status, Status::Open);
            let page = events_after(&world.vm, session, seen).await.unwrap();
            for (number, event) in (seen + 1..).zip(&page) {
                assert_eq!(event.0, number);
            }
            for (_, json) in &page {
                serde_json::from_str::<serde_json::Value>(json).unwrap();
            }
            seen += page.len() as u64;
            assert!(seen >= record.last_seq.0, "a record ahead of its events");
            pages += 1;
        }
        let ahead = events_after(&world.vm, session, u64::MAX >> 24).await;
        assert_eq!(code(ahead), Code::SeqAhead);
        drop(host);
        world.close().await;
    });
}

#[test]
fn a_second_writer_is_refused_until_the_first_is_killed() {
    const TEST: &str = "session::database::a_second_writer_is_refused_until_the_first_is_killed";
    if role().is_some() {
        return block_on(stream());
    }
    block_on(async {
        let world = World::new().await;
        let (host, session) = start(TEST, &world);
        let vm = &world.vm;
        let busy = [
            world.create(&[]).await.err(),
            world.run(session, "say x").await.err(),
            within(vm.resume_session(session, Resume::default()))
                .await
                .err(),
            within(vm.exec("true", ExecOptions::default())).await.err(),
            within(vm.wake()).await.err(),
            within(vm.destroy()).await.err(),
        ];
        for error in busy {
            let error = error.expect("a refusal");
            assert_eq!(error.code, Code::VmBusy, "{error}");
            assert!(error.message.contains("process"), "{error}");
        }
        assert!(!world.log(session).await.0.is_empty());
        assert_eq!(world.env_files().len(), 1, "of a session that was not made");
        host.kill();
        // At once: whoever comes next waits for the end of the old VM.
        assert_eq!(world.text(session, "remember").await, "2");
        world.session().await;
        assert_eq!(world.vm.sessions().await.unwrap().len(), 2);
        world.close().await;
    });
}

/// Numbers and JSON of the events after `seen`.
async fn events_after(
    vm: &VmHandle,
    session: SessionId,
    seen: u64,
) -> Result<Vec<(u64, String)>, Error> {
    let query = Query {
        since: Seq(seen),
        method: None,
        limit: None,
        max_bytes: u64::MAX,
    };
    let page = within(vm.events(session, query)).await?;
    let events = page.events.iter();
    Ok(events
        .map(|event| (event.seq.0, event.json.to_string()))
        .collect())
}

/// A VM at rest that has a session with events, a file, and a neighbour.
struct Scene {
    world: World,
    session: SessionId,
    neighbour: VmHandle,
}

impl Scene {
    async fn new() -> Self {
        let world = World::new().await;
        let session = world.session().await;
        world.run(session, "stream 2000").await.unwrap();
        world.sh("echo precious > file").await;
        within(world.vm.sleep()).await.unwrap();
        let key = VmKey::new(vec!["neighbour".to_owned()]).unwrap();
        let neighbour = world.client.vm(key).unwrap();
        Self {
            world,
            session,
            neighbour,
        }
    }

    fn file(&self) -> PathBuf {
        self.world.directory().join("vm.db")
    }

    /// Reads, prompts and new sessions, none of which can work; what each came to.
    async fn attempts(&self) -> [(&'static str, Error); 5] {
        let (world, session) = (&self.world, self.session);
        [
            ("sessions", world.vm.sessions().await.unwrap_err()),
            (
                "events",
                events_after(&world.vm, session, 0).await.unwrap_err(),
            ),
            ("prompt", world.run(session, "say x").await.unwrap_err()),
            (
                "resume",
                within(world.vm.resume_session(session, Resume::default()))
                    .await
                    .unwrap_err(),
            ),
            ("create", world.create(&[]).await.unwrap_err()),
        ]
    }

    /// Nothing else suffers: the VM's files and programs, and another VM of the same client.
    async fn rest_works(&self) {
        let world = &self.world;
        assert_eq!(world.sh("cat file; echo more >> other").await, "precious\n");
        assert_eq!(world.env_files().len(), 1);
        let states = world.state_directories().await;
        assert_eq!(states, format!("{}\n", self.session));
        assert_eq!(world.agents().await, Vec::<String>::new());
        works(&self.neighbour).await;
    }
}

async fn works(vm: &VmHandle) {
    let created = vm.create_session("pi", options(&[]), std::future::pending());
    let session = within(created).await.unwrap().id;
    let turn = within(vm.send_prompt(session, text_prompt("say fine"))).await;
    assert_eq!(turn.unwrap().text, "fine");
}

/// The database is `damaged`: everything that needs it says so, and it can be repaired.
async fn is_told(damage: impl FnOnce(&Path)) {
    let scene = Scene::new().await;
    let (world, session, file) = (&scene.world, scene.session, scene.file());
    let intact = fs::read(&file).unwrap();
    damage(&file);
    let damaged = fs::read(&file).ok();
    for (what, error) in scene.attempts().await {
        assert_eq!(error.code, Code::StoreCorrupt, "{what}: {error}");
        let names_it = error.message.contains(file.to_str().unwrap());
        assert!(names_it, "{what}: {error}");
        assert!(error.message.contains("move it"), "{what}: {error}");
        assert!(error.message.contains("backup"), "{what}: {error}");
    }
    scene.rest_works().await;
    assert_eq!(fs::read(&file).ok(), damaged, "left as it was");

    // The ways back that the message names: without its sessions …
    let aside = file.with_extension("damaged");
    fs::rename(&file, &aside).unwrap();
    assert_eq!(world.vm.sessions().await.unwrap(), []);
    works(&world.vm).await;
    // … or with a backup.
    within(world.vm.sleep()).await.unwrap();
    fs::write(&file, &intact).unwrap();
    assert_eq!(world.log(session).await.0.len(), 2003);
    assert_eq!(world.text(session, "remember").await, "2");
    scene.world.close().await;
}

#[tokio::test]
async fn an_empty_database_is_told() {
    is_told(|file| fs::write(file, "").unwrap()).await;
}

#[tokio::test]
async fn a_database_of_garbage_is_told() {
    is_told(|file| {
        let length = usize::try_from(fs::metadata(file).unwrap().len()).unwrap();
        fs::write(file, vec![0x5a; length]).unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_database_that_was_cut_off_is_told() {
    is_told(|file| {
        let opened = fs::OpenOptions::new().write(true).open(file).unwrap();
        opened
            .set_len(opened.metadata().unwrap().len() / 2)
            .unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_directory_in_the_place_of_the_database_is_told() {
    is_told(|file| {
        fs::remove_file(file).unwrap();
        fs::create_dir(file).unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_dangling_link_in_the_place_of_the_database_is_told() {
    is_told(|file| {
        fs::remove_file(file).unwrap();
        std::os::unix::fs::symlink("/nowhere/vm.db", file).unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_database_that_another_program_made_is_told() {
    is_told(|file| {
        fs::remove_file(file).unwrap();
        let theirs = rusqlite::Connection::open(file).unwrap();
        theirs.execute_batch("CREATE TABLE mine (x)").unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_wal_of_garbage_takes_nothing_from_a_database_that_was_closed() {
    let scene = Scene::new().await;
    let (world, session) = (&scene.world, scene.session);
    let before = world.log(session).await.0;
    for name in ["vm.db-wal", "vm.db-shm"] {
        fs::write(world.directory().join(name), vec![0x5a; 100_000]).unwrap();
    }
    assert_eq!(world.log(session).await.0, before);
    assert_eq!(world.text(session, "remember").await, "2");
    within(world.vm.sleep()).await.unwrap();
    assert_eq!(world.log(session).await.0[..before.len()], before);
    scene.world.close().await;
}

#[test]
fn a_lost_wal_takes_back_the_end_of_a_history_and_nothing_else() {
    const TEST: &str =
        "session::database::a_lost_wal_takes_back_the_end_of_a_history_and_nothing_else";
    if let Some(session) = role() {
        return block_on(async {
            let session = SessionId::parse(&session).unwrap();
            let world = host::world().await;
            world.run(session, "stream 500").await.unwrap();
            host::report("streamed");
            std::future::pending::<()>().await;
        });
    }
    block_on(async {
        for garbage in [None, Some(vec![0x5a; 100_000])] {
            let scene = Scene::new().await;
            let (world, session) = (&scene.world, scene.session);
            let checkpointed = world.log(session).await.0;
            within(world.client.close()).await.unwrap();
            let mut host = Host::start(&[], TEST, &session.to_string(), &world.data);
            host.expect("streamed");
            host.kill();
            let reader = world.beside();
            let whole = reader.log(session).await.0;
            assert_eq!(whole.len(), checkpointed.len() + 503);
            let wal = world.directory().join("vm.db-wal");
            match garbage {
                Some(garbage) => fs::write(wal, garbage).unwrap(),
                None => fs::remove_file(wal).unwrap(),
            }
            let left = reader.log(session).await.0;
            assert_eq!(left, whole[..left.len()], "a prefix");
            assert!(left.len() >= checkpointed.len());
            // The agent's own memory is in its files.
            assert_eq!(reader.text(session, "remember").await, "3");
            reader.close().await;
        }
    });
}

/// A file or directory that can't be written while this lives. Permission bits do not bind root: for
/// root, it lies on a read-only mount, in a namespace of the test's own.
struct ReadOnly<'a>(&'a Path);

impl<'a> ReadOnly<'a> {
    fn new(path: &'a Path) -> Self {
        if is_root() {
            run("mount", &["--bind".as_ref(), path, path]);
            run("mount", &["-o".as_ref(), "remount,bind,ro".as_ref(), path]);
        } else {
            run("chmod", &["a-w".as_ref(), path]);
        }
        Self(path)
    }
}

impl Drop for ReadOnly<'_> {
    fn drop(&mut self) {
        if is_root() {
            run("umount", &[self.0]);
        } else {
            run("chmod", &["u+w".as_ref(), self.0]);
        }
    }
}

fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

fn run(program: &str, args: &[&Path]) {
    let status = Command::new(program).args(args).status().unwrap();
    assert!(status.success(), "{program} {args:?}");
}

fn where_it_may_mount(test: &str, body: impl Future<Output = ()>) {
    let wrapper: &[&str] = if is_root() {
        &["unshare", "--mount"]
    } else {
        &[]
    };
    in_child(wrapper, test, || block_on(body));
}

/// The error of a place that can't be written: it names `path` and a way out.
fn assert_read_only(what: &str, error: &Error, path: &Path) {
    let code = error.code.as_str();
    assert!(["EACCES", "EROFS"].contains(&code), "{what}: {error}");
    let names_it = error.message.contains(path.to_str().unwrap());
    assert!(names_it, "{what}: {error}");
}

#[test]
fn a_database_that_can_only_be_read_is_read() {
    const TEST: &str = "session::database::a_database_that_can_only_be_read_is_read";
    where_it_may_mount(TEST, async {
        let scene = Scene::new().await;
        let (world, session, file) = (&scene.world, scene.session, scene.file());
        let intact = fs::read(&file).unwrap();
        let read_only = ReadOnly::new(&file);
        assert_eq!(world.vm.sessions().await.unwrap().len(), 1);
        assert_eq!(world.log(session).await.0.len(), 2003);
        let writes = [
            ("prompt", world.run(session, "say x").await.err()),
            ("create", world.create(&[]).await.err()),
        ];
        for (what, error) in writes {
            assert_read_only(what, &error.unwrap(), &file);
        }
        scene.rest_works().await;
        within(world.vm.sleep()).await.unwrap();
        assert_eq!(fs::read(&file).unwrap(), intact);
        drop(read_only);
        assert_eq!(world.text(session, "remember").await, "2");
        scene.world.close().await;
    });
}

#[test]
fn a_vm_whose_directory_can_only_be_read_has_a_history() {
    const TEST: &str = "session::database::a_vm_whose_directory_can_only_be_read_has_a_history";
    where_it_may_mount(TEST, async {
        let scene = Scene::new().await;
        let (world, session) = (&scene.world, scene.session);
        let directory = world.directory();
        let read_only = ReadOnly::new(&directory);
        assert_eq!(world.vm.sessions().await.unwrap().len(), 1);
        assert_eq!(world.log(session).await.0.len(), 2003);
        // What lies in directories below may still be written, where only permission bits forbid it.
        let exec = within(world.vm.exec("true", ExecOptions::default())).await;
        if let Some(error) = exec.err() {
            assert_read_only("exec", &error, &directory);
        }
        let writes = [
            ("prompt", world.run(session, "say x").await.err()),
            ("create", world.create(&[]).await.err()),
        ];
        for (what, error) in writes {
            assert_read_only(what, &error.unwrap(), &directory);
        }
        works(&scene.neighbour).await;
        drop(read_only);
        scene.rest_works().await;
        assert_eq!(world.text(session, "remember").await, "2");
        scene.world.close().await;
    });
}
