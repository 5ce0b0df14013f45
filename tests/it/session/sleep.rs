//! VMs that sleep and wake: by themselves, on demand, and while something else is under way.

use std::time::Duration;

use agentvm::error::{Code, Error};
use agentvm::session::{Item, Notice, PermissionPolicy, ShutdownReason, text_prompt};
use agentvm::store::Status;
use agentvm::vm::exec::ExecOptions;
use agentvm::vm::{GuestPath, User};

use super::clients::Host;
use super::fixture::{Listener, World, code, options, within};

/// Long enough for a call to begin, short enough to be waited for.
const SHORT: Duration = Duration::from_millis(50);

/// A world whose VM sleeps after this time.
async fn world(sleep_after: Duration) -> World {
    sleeping(World::new().await, sleep_after).await
}

/// Another client of the same VM, which wants it to sleep after this time.
async fn beside(world: &World, sleep_after: Duration) -> World {
    sleeping(world.beside(), sleep_after).await
}

async fn sleeping(mut world: World, sleep_after: Duration) -> World {
    within(world.client.close()).await.unwrap();
    world.settings.vm.sleep_after = Some(sleep_after);
    (world.client, world.vm) = world.another_client();
    world
}

fn is_sleep(item: &Item) -> bool {
    let reason = ShutdownReason::Sleep;
    matches!(item, Item::Notice(Notice::VmShutdown { reason: told }) if *told == reason)
}

/// How often it has slept so far.
fn sleeps(listener: &Listener) -> usize {
    let notices = listener.notices().into_iter();
    notices.filter(|notice| notice == "Sleep").count()
}

async fn exec(world: &World, command: &str) -> Result<(), Error> {
    let run = world.vm.exec(command, ExecOptions::default());
    within(run).await.map(drop)
}

#[tokio::test]
async fn a_vm_that_nothing_needs_sleeps_and_the_next_prompt_goes_on() {
    let world = world(SHORT).await;
    let listener = Listener::of(&world.vm);
    let session = world.session().await;
    assert_eq!(world.text(session, "remember").await, "1");
    listener.until(is_sleep).await;
    assert_eq!(world.record(session).await.status, Status::Suspended);
    assert_eq!(world.text(session, "remember").await, "2");
    world.close().await;
}

#[tokio::test]
async fn a_turn_keeps_its_vm_awake() {
    let world = world(SHORT).await;
    let session = world.session().await;
    let listener = Listener::of(&world.vm);
    let script = format!("say working\nsleep {}\npid", SHORT.as_millis() * 10);
    let turn = world.run(session, &script).await.unwrap();
    // A sleep would have cancelled it.
    assert_eq!(turn.stop_reason, "end_turn");
    listener.until(is_sleep).await;
    world.close().await;
}

#[tokio::test]
async fn a_turn_whose_caller_has_gone_keeps_its_vm_awake() {
    let world = world(SHORT).await;
    let session = world.session().await;
    let listener = Listener::of(&world.vm);
    let script = format!("say working\nsleep {}\nsay done", SHORT.as_millis() * 10);
    let turn = world.start(session, &script);
    listener.said("working").await;
    turn.abort();
    listener.said("done").await;
    listener.until(is_sleep).await;
    assert_eq!(
        world.log(session).await.turn_ends()[0]["stopReason"],
        "end_turn"
    );
    world.close().await;
}

#[tokio::test]
async fn a_turn_that_waits_for_permission_keeps_its_vm_awake() {
    let world = world(SHORT).await;
    let mut ask = options(&[]);
    ask.permission_policy = PermissionPolicy::Ask;
    let created = world.vm.create_session("pi", ask, std::future::pending());
    let session = within(created).await.unwrap().id;
    let listener = Listener::of(&world.vm);
    let turn = world.start(session, "permission allow_once");
    listener.heard("_agentvm/permission_request").await;
    let slept = tokio::time::timeout(SHORT * 6, listener.until(is_sleep));
    assert!(slept.await.is_err());
    let (_, request) = world.pending().remove(0);
    let request = request.permission_id.to_string();
    let answered = world.vm.respond_permission(session, &request, "once");
    within(answered).await.unwrap();
    assert_eq!(within(turn).await.unwrap().unwrap().stop_reason, "end_turn");
    listener.until(is_sleep).await;
    world.close().await;
}

#[tokio::test]
async fn a_call_that_is_under_way_keeps_its_vm_awake() {
    let world = world(SHORT).await;
    let listener = Listener::of(&world.vm);
    // A sleep would have given it up.
    exec(&world, "sleep 0.5").await.unwrap();
    listener.until(is_sleep).await;
    world.close().await;
}

#[tokio::test]
async fn what_an_agent_left_running_does_not_keep_its_vm_awake() {
    let world = world(SHORT).await;
    let listener = Listener::of(&world.vm);
    let session = world.session().await;
    world.run(session, "grandchild").await.unwrap();
    listener.until(is_sleep).await;
    assert_eq!(world.sh("pgrep -x sleep || true").await, "");
    world.close().await;
}

#[tokio::test]
async fn reading_neither_keeps_a_vm_awake_nor_wakes_it() {
    let world = World::new().await;
    let session = world.session().await;
    world.run(session, "say x").await.unwrap();
    let listener = Listener::of(&world.vm);
    let sleepy = beside(&world, SHORT).await;
    exec(&sleepy, "true").await.unwrap();
    let reads = async {
        loop {
            assert_eq!(world.log(session).await.agent_texts(), ["x"]);
            assert_eq!(world.record(session).await.id, session);
            tokio::task::yield_now().await;
        }
    };
    tokio::select! {
        () = reads => {}
        () = listener.until(is_sleep) => {}
    }
    assert_eq!(world.log(session).await.agent_texts(), ["x"]);
    assert_eq!(world.record(session).await.status, Status::Suspended);
    assert_eq!(listener.notices(), ["Sleep"]);
    sleepy.close().await;
    world.close().await;
}

#[tokio::test]
async fn of_two_clients_the_latest_caller_says_when_their_vm_sleeps() {
    let world = World::new().await;
    let listener = Listener::of(&world.vm);
    exec(&world, "true").await.unwrap();
    let other = beside(&world, SHORT).await;
    exec(&other, "true").await.unwrap();
    listener.until(is_sleep).await;
    world.close().await;
    other.close().await;
}

#[tokio::test]
async fn going_to_sleep_never_meets_a_call() {
    // At once, so that every call comes while the VM is about to sleep, or just does.
    let world = world(Duration::from_millis(1)).await;
    let listener = Listener::of(&world.vm);
    let session = world.session().await;
    let path = GuestPath::new("file").unwrap();
    let execs = async {
        for _ in 0..60 {
            exec(&world, "true").await.unwrap();
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    let files = async {
        for n in 0..60_u8 {
            let written = world.vm.write_file(&path, vec![n], User::User);
            within(written).await.unwrap();
            let read = within(world.vm.read_file(&path, User::User)).await;
            assert_eq!(read.unwrap(), [n]);
            tokio::time::sleep(Duration::from_millis(3)).await;
        }
    };
    let prompts = async {
        for n in 1..=6 {
            assert_eq!(world.text(session, "remember").await, n.to_string());
        }
    };
    tokio::join!(execs, files, prompts);
    listener.until(is_sleep).await;
    let notices = listener.notices();
    let expected = ["booted", "Sleep"].into_iter().cycle().take(notices.len());
    assert_eq!(notices, expected.collect::<Vec<_>>());
    world.close().await;
}

#[tokio::test]
async fn closing_the_client_while_its_vm_goes_to_sleep_waits_for_that() {
    let mut world = world(Duration::from_millis(1)).await;
    for pause in 0..20 {
        // It would be busy if anything had it open.
        exec(&world, "true").await.unwrap();
        tokio::time::sleep(Duration::from_micros(pause * 200)).await;
        within(world.client.close()).await.unwrap();
        (world.client, world.vm) = world.another_client();
    }
    world.close().await;
}

#[tokio::test]
async fn calls_that_come_while_a_vm_ends_wait_and_then_work() {
    let world = World::new().await;
    let session = world.session().await;
    let listener = Listener::of(&world.vm);
    let vm = &world.vm;
    let path = GuestPath::new("file").unwrap();
    vm.write_file(&path, b"kept".to_vec(), User::User)
        .await
        .unwrap();
    // The sleep is the first to begin.
    let (slept, ran, read, turn, woken) = Box::pin(within(async {
        tokio::join!(
            biased;
            vm.sleep(),
            vm.exec("true", ExecOptions::default()),
            vm.read_file(&path, User::User),
            vm.send_prompt(session, text_prompt("remember")),
            vm.wake(),
        )
    }))
    .await;
    slept.unwrap();
    ran.unwrap();
    assert_eq!(read.unwrap(), b"kept");
    let turn = turn.unwrap();
    assert_eq!((&*turn.stop_reason, &*turn.text), ("end_turn", "1"));
    woken.unwrap();
    assert_eq!(listener.notices(), ["Sleep", "booted"]);
    world.close().await;
}

#[tokio::test]
async fn sleep_gives_up_a_command_and_cancels_a_turn() {
    let world = World::new().await;
    let session = world.session().await;
    let listener = Listener::of(&world.vm);
    let turn = world.start(session, "say working\ncancel");
    listener.said("working").await;
    let (ran, slept) = within(async {
        tokio::join!(
            biased;
            world.vm.exec("sleep 1000", ExecOptions::default()),
            world.vm.sleep()
        )
    })
    .await;
    slept.unwrap();
    assert_eq!(code(ran), Code::Aborted);
    let turn = within(turn).await.unwrap().unwrap();
    assert_eq!(turn.stop_reason, "cancelled");
    assert_eq!(world.record(session).await.status, Status::Suspended);
    world.close().await;
}

#[tokio::test]
async fn sleep_gives_up_what_an_agent_was_asked() {
    let world = World::new().await;
    let session = world.session().await;
    let listener = Listener::of(&world.vm);
    let asked = world.vm.raw_send(session, "test/hang", None);
    let slept = async {
        listener.said("hanging").await;
        world.vm.sleep().await
    };
    let (asked, slept) = Box::pin(within(async { tokio::join!(asked, slept) })).await;
    slept.unwrap();
    assert_eq!(code(asked), Code::Aborted);
    world.close().await;
}

#[tokio::test]
async fn sleep_during_a_boot_ends_what_has_booted() {
    let world = World::new().await;
    let listener = Listener::of(&world.vm);
    let (woken, slept) =
        within(async { tokio::join!(biased; world.vm.wake(), world.vm.sleep()) }).await;
    // It had booted before it was put to sleep, or was given up.
    assert!(woken.is_ok() || code(woken) == Code::Aborted);
    slept.unwrap();
    world.vm.wake().await.unwrap();
    let notices = listener.notices();
    assert_eq!(notices.last().unwrap(), "booted");
    let booted = notices.iter().filter(|notice| *notice == "booted").count();
    assert_eq!(sleeps(&listener) + 1, booted);
    world.close().await;
}

#[tokio::test]
async fn calls_that_come_at_once_boot_their_vm_once() {
    let world = World::new().await;
    let listener = Listener::of(&world.vm);
    let (one, two, ran) = within(async {
        tokio::join!(
            world.vm.wake(),
            world.vm.wake(),
            world.vm.exec("true", ExecOptions::default())
        )
    })
    .await;
    one.unwrap();
    two.unwrap();
    ran.unwrap();
    assert_eq!(listener.notices(), ["booted"]);
    world.close().await;
}

#[tokio::test]
async fn sleep_while_a_session_is_made_leaves_nothing_of_it() {
    for moment in ["ON_START", "ON_INITIALIZE", "ON_NEW"] {
        let world = World::new().await;
        world.vm.wake().await.unwrap();
        let script = [(moment, "line no protocol\nhang")];
        let created = world
            .vm
            .create_session("pi", options(&script), std::future::pending());
        let slept = async {
            within(async { while world.agents().await.is_empty() {} }).await;
            world.vm.sleep().await
        };
        let (created, slept) = Box::pin(within(async { tokio::join!(created, slept) })).await;
        slept.unwrap();
        let error = created.unwrap_err();
        assert_eq!(error.code, Code::Aborted);
        assert!(error.message.contains("sleep"), "{error}");
        world.assert_nothing_half_made().await;
        world.close().await;
    }
}

#[tokio::test]
async fn sleep_at_any_moment_of_a_sessions_making_leaves_it_whole_or_not_at_all() {
    let world = World::new().await;
    let mut made = Vec::new();
    for pause in 0..12 {
        let created = world
            .vm
            .create_session("pi", options(&[]), std::future::pending());
        let slept = async {
            tokio::time::sleep(Duration::from_millis(pause * 20)).await;
            world.vm.sleep().await
        };
        let (created, slept) = Box::pin(within(async { tokio::join!(created, slept) })).await;
        slept.unwrap();
        match created {
            Ok(created) => made.push(created.id),
            Err(error) => assert_eq!(error.code, Code::Aborted, "{error}"),
        }
    }
    let mut listed: Vec<_> = world.vm.sessions().await.unwrap();
    listed.reverse();
    let listed: Vec<_> = listed.iter().map(|record| record.id).collect();
    assert_eq!(listed, made);
    assert_eq!(world.env_files().len(), made.len());
    for session in made {
        assert_eq!(world.text(session, "remember").await, "1");
    }
    world.close().await;
}

#[tokio::test]
async fn two_sleeps_at_once_are_one() {
    let world = World::new().await;
    world.vm.wake().await.unwrap();
    let listener = Listener::of(&world.vm);
    let (one, two) = within(async { tokio::join!(world.vm.sleep(), world.vm.sleep()) }).await;
    one.unwrap();
    two.unwrap();
    assert_eq!(listener.notices(), ["Sleep"]);
    world.close().await;
}

#[tokio::test]
async fn destroy_during_sleep_waits_for_it_and_removes_the_vm() {
    let world = World::new().await;
    let session = world.session().await;
    let listener = Listener::of(&world.vm);
    let (slept, destroyed) =
        within(async { tokio::join!(biased; world.vm.sleep(), world.vm.destroy()) }).await;
    slept.unwrap();
    destroyed.unwrap();
    assert!(!world.directory().exists());
    assert_eq!(listener.notices(), ["Sleep"]);
    let gone = world.run(session, "say x").await;
    assert_eq!(code(gone), Code::SessionNotFound);
    world.close().await;
}

#[tokio::test]
async fn a_sleep_whose_caller_gave_up_is_brought_to_its_end() {
    let world = World::new().await;
    world.vm.wake().await.unwrap();
    let listener = Listener::of(&world.vm);
    // Asked once, and dropped.
    tokio::select! {
        biased;
        _ = world.vm.sleep() => unreachable!("it ends a VM"),
        () = std::future::ready(()) => {}
    }
    listener.until(is_sleep).await;
    exec(&world, "true").await.unwrap();
    world.close().await;
}

/// Where a VM keeps files, as far as this host can.
fn kept_places() -> Vec<&'static str> {
    let mut places = vec!["/home/user", "/var/tmp"];
    if nix::unistd::geteuid().is_root() {
        places.extend(["/root", "/var/lib", "/usr/local/bin", "/usr/share", "/etc"]);
    }
    places
}

const FORGOTTEN: [&str; 3] = ["/tmp", "/run/user/1000", "/dev/shm"];

/// Puts a file into each of these places.
pub(super) async fn write_everywhere(world: &World) {
    for place in kept_places().into_iter().chain(FORGOTTEN) {
        let user = owner(place);
        let path = GuestPath::new(&format!("{place}/mark")).unwrap();
        let written = world.vm.write_file(&path, place.into(), user);
        within(written).await.unwrap();
    }
}

async fn assert_only_kept_files_are_left(world: &World) {
    for place in kept_places() {
        let path = GuestPath::new(&format!("{place}/mark")).unwrap();
        let read = within(world.vm.read_file(&path, owner(place))).await;
        assert_eq!(read.unwrap(), place.as_bytes(), "{place}");
    }
    for place in FORGOTTEN {
        let path = GuestPath::new(&format!("{place}/mark")).unwrap();
        let read = within(world.vm.read_file(&path, User::User)).await;
        assert_eq!(code(read), Code::Errno("ENOENT"), "{place}");
    }
}

fn owner(place: &str) -> User {
    let of_user = ["/home/user", "/var/tmp"].contains(&place) || FORGOTTEN.contains(&place);
    if of_user { User::User } else { User::Root }
}

#[tokio::test]
async fn files_survive_sleep_except_in_memory() {
    let world = World::new().await;
    write_everywhere(&world).await;
    world.vm.sleep().await.unwrap();
    assert_only_kept_files_are_left(&world).await;
    world.close().await;
}

#[tokio::test]
async fn files_survive_a_kill_of_the_host_process_except_in_memory() {
    let world = World::new().await;
    let mut host = Host::start(&world.data, "files");
    host.line("written");
    drop(host);
    assert_only_kept_files_are_left(&world).await;
    world.close().await;
}
