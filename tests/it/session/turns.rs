//! Turns that are cancelled, cut off, or follow the end of their agent.

use std::time::{Duration, Instant};

use agentvm::error::Code;
use agentvm::session::{Item, Notice, Resume};
use agentvm::store::Status;

use super::fixture::{Listener, World, code, options, within};

#[tokio::test]
async fn a_cancelled_turn_resolves_as_cancelled() {
    let world = World::new().await;
    let session = world.session().await;
    let listener = Listener::of(&world.vm);
    let turn = world.start(session, "say working\ncancel");
    listener.said("working").await;
    assert!(within(world.vm.cancel_prompt(session)).await.unwrap());
    let turn = turn.await.unwrap().unwrap();
    assert_eq!((&*turn.stop_reason, &*turn.text), ("cancelled", "working"));
    let ended = &world.log(session).await.turn_ends()[0];
    assert_eq!(ended["stopReason"], "cancelled");
    world.close().await;
}

#[tokio::test]
async fn cancel_with_nothing_under_way_says_so() {
    let world = World::new().await;
    let session = world.session().await;
    assert!(!within(world.vm.cancel_prompt(session)).await.unwrap());
    world.vm.close_session(session).await.unwrap();
    assert!(!within(world.vm.cancel_prompt(session)).await.unwrap());
    let unknown = agentvm::ids::SessionId::generate();
    let cancelled = within(world.vm.cancel_prompt(unknown)).await;
    assert_eq!(code(cancelled), Code::SessionNotFound);
    world.close().await;
}

#[tokio::test]
async fn an_agent_that_ignores_a_cancel_is_stopped_and_the_next_prompt_resumes() {
    let world = World::new().await;
    let session = world.session().await;
    let listener = Listener::of(&world.vm);
    let turn = world.start(session, "say working\nhang");
    listener.said("working").await;
    assert!(within(world.vm.cancel_prompt(session)).await.unwrap());
    assert_eq!(turn.await.unwrap().unwrap().stop_reason, "cancelled");
    assert_eq!(world.record(session).await.status, Status::Suspended);
    assert_eq!(world.text(session, "remember").await, "2");
    assert_eq!(world.record(session).await.status, Status::Open);
    let log = world.log(session).await;
    assert_eq!(log.turn_ends().len(), 2);
    assert_eq!(log.agent_texts(), ["working", "2"]);
    world.close().await;
}

#[tokio::test]
async fn an_agent_that_reads_nothing_blocks_neither_a_huge_prompt_nor_its_cancel() {
    let world = World::new().await;
    let session = world.session().await;
    world.run(session, "deaf").await.unwrap();
    // Larger than what a pipe and Node's buffers take.
    let turn = world.start(session, &format!("say {}", "x".repeat(4 << 20)));
    let listener = Listener::of(&world.vm);
    listener.heard("user_message_chunk").await;
    assert!(within(world.vm.cancel_prompt(session)).await.unwrap());
    assert_eq!(turn.await.unwrap().unwrap().stop_reason, "cancelled");
    world.close().await;
}

#[tokio::test]
async fn requests_that_nobody_reads_the_answers_of_do_not_stop_a_cancel() {
    let world = World::new().await;
    let session = world.session().await;
    let listener = Listener::of(&world.vm);
    let turn = world.start(session, "deaf\nsay flooding\nrequests 20000\nhang");
    listener.said("flooding").await;
    assert!(within(world.vm.cancel_prompt(session)).await.unwrap());
    assert_eq!(turn.await.unwrap().unwrap().stop_reason, "cancelled");
    assert_eq!(world.text(session, "say better").await, "better");
    world.close().await;
}

#[tokio::test]
async fn a_process_that_holds_the_input_of_a_dead_agent_does_not_keep_its_turn() {
    let world = World::new().await;
    let session = world.session().await;
    let listener = Listener::of(&world.vm);
    let turn = world.start(
        session,
        "grandchild\ndeaf\nsay flooding\nrequests 1300\nexit 1",
    );
    listener.said("flooding").await;
    assert_eq!(code(turn.await.unwrap()), Code::AgentExited);
    world.close().await;
}

#[tokio::test]
async fn one_turn_at_a_time() {
    let world = World::new().await;
    let session = world.session().await;
    let listener = Listener::of(&world.vm);
    let turn = world.start(session, "say working\ncancel");
    listener.said("working").await;
    let second = world.run(session, "say me too").await;
    assert_eq!(code(second), Code::SessionBusy);
    world.vm.cancel_prompt(session).await.unwrap();
    turn.await.unwrap().unwrap();
    assert_eq!(world.log(session).await.turn_ends().len(), 1);
    world.close().await;
}

#[tokio::test]
async fn an_agent_that_exits_between_turns_is_resumed_by_the_next_prompt() {
    let world = World::new().await;
    let session = world.session().await;
    let first = world.text(session, "pid").await;
    let answer = "line {\"id\":$ID,\"result\":{\"stopReason\":\"end_turn\"}}\nexit 0";
    world.run(session, answer).await.unwrap();
    // Reaped, not only dying: a prompt that meets a dying agent fails as any that is cut off.
    within(async { while !world.sh(&format!("ls -d /proc/{first}")).await.is_empty() {} }).await;
    let second = world.text(session, "pid").await;
    assert_ne!(first, second);
    assert_eq!(world.text(session, "remember").await, "4");
    world.close().await;
}

#[tokio::test]
async fn what_an_agent_repeats_when_it_resumes_is_not_logged_again() {
    let world = World::new().await;
    let session = world.session().await;
    world.run(session, "say one").await.unwrap();
    world.vm.close_session(session).await.unwrap();
    assert_eq!(world.agents().await, Vec::<String>::new());
    assert_eq!(world.record(session).await.status, Status::Closed);
    world.run(session, "say two").await.unwrap();
    let log = world.log(session).await;
    assert_eq!(log.agent_texts(), ["one", "two"]);
    assert_eq!(log.texts("user_message_chunk"), ["say one", "say two"]);
    world.close().await;
}

#[tokio::test]
async fn an_environment_that_was_not_kept_is_asked_for() {
    let world = World::new().await;
    let mut forget = options(&[("KEY", "secret")]);
    forget.persist_env = false;
    let created = world
        .vm
        .create_session("pi", forget, std::future::pending());
    let session = within(created).await.unwrap().id;
    assert_eq!(world.env_files().len(), 0);
    world.vm.close_session(session).await.unwrap();
    assert_eq!(code(world.run(session, "say x").await), Code::EnvRequired);
    let again = Resume {
        env: Some(options(&[("KEY", "again")]).env),
        ..Resume::default()
    };
    within(world.vm.resume_session(session, again))
        .await
        .unwrap();
    assert_eq!(world.text(session, "env KEY").await, "again");
    // What was asked not to be kept is not kept now either.
    assert_eq!(world.env_files().len(), 0);
    world.close().await;
}

#[tokio::test]
async fn a_kept_environment_can_be_read_by_its_owner_only() {
    use std::os::unix::fs::PermissionsExt;
    let world = World::new().await;
    world.session_with(&[("KEY", "secret")]).await;
    let files = world.env_files();
    assert_eq!(files.len(), 1);
    let mode = |path: &std::path::Path| path.metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&files[0]), 0o600);
    assert_eq!(mode(files[0].parent().unwrap()), 0o700);
    assert!(
        std::fs::read_to_string(&files[0])
            .unwrap()
            .contains("secret")
    );
    world.close().await;
}

#[tokio::test]
async fn closing_a_session_ends_its_turn_as_cancelled() {
    let world = World::new().await;
    let session = world.session().await;
    let listener = Listener::of(&world.vm);
    let turn = world.start(session, "say working\ncancel");
    listener.said("working").await;
    within(world.vm.close_session(session)).await.unwrap();
    within(world.vm.close_session(session)).await.unwrap();
    assert_eq!(turn.await.unwrap().unwrap().stop_reason, "cancelled");
    assert_eq!(world.record(session).await.status, Status::Closed);
    assert_eq!(world.agents().await, Vec::<String>::new());
    world.close().await;
}

#[tokio::test]
async fn a_prompt_during_a_close_waits_for_it_and_resumes() {
    let world = World::new().await;
    let session = world.session().await;
    let listener = Listener::of(&world.vm);
    let turn = world.start(session, "say working\ncancel\n");
    listener.said("working").await;
    let vm = world.vm.clone();
    let (closed, text) = tokio::join!(within(vm.close_session(session)), async {
        tokio::task::yield_now().await;
        world.text(session, "remember").await
    });
    closed.unwrap();
    assert_eq!(text, "2");
    turn.await.unwrap().unwrap();
    assert_eq!(world.agents().await.len(), 1, "two agents of one session");
    assert_eq!(world.record(session).await.status, Status::Open);
    world.close().await;
}

#[tokio::test]
async fn a_session_that_hangs_while_it_resumes_can_be_cancelled_and_closed() {
    let world = World::new().await;
    let session = world.session_with(&[("ON_LOAD", "stderr 1\nhang")]).await;
    world.vm.close_session(session).await.unwrap();
    let started = async || {
        within(async {
            while world.agents().await.is_empty() {
                tokio::task::yield_now().await;
            }
        })
        .await;
    };
    let turn = world.start(session, "say never");
    started().await;
    assert!(within(world.vm.cancel_prompt(session)).await.unwrap());
    assert_eq!(turn.await.unwrap().unwrap().stop_reason, "cancelled");
    assert_eq!(world.agents().await, Vec::<String>::new());
    let turn = world.start(session, "say never");
    started().await;
    within(world.vm.close_session(session)).await.unwrap();
    assert_eq!(turn.await.unwrap().unwrap().stop_reason, "cancelled");
    assert_eq!(world.agents().await, Vec::<String>::new());
    world.close().await;
}

#[tokio::test]
async fn a_turn_cancelled_while_its_session_resumes_does_not_run() {
    let world = World::new().await;
    let session = world.session_with(&[("ON_LOAD", "sleep 300")]).await;
    world.vm.close_session(session).await.unwrap();
    let turn = world.start(session, "say too late");
    tokio::time::sleep(Duration::from_millis(20)).await;
    within(world.vm.cancel_prompt(session)).await.unwrap();
    assert_eq!(turn.await.unwrap().unwrap().stop_reason, "cancelled");
    assert_eq!(world.log(session).await.agent_texts(), Vec::<String>::new());
    world.close().await;
}

#[tokio::test]
async fn a_vm_that_sleeps_in_a_turn_cancels_it_and_the_session_goes_on_later() {
    let world = World::new().await;
    let session = world.session().await;
    let listener = Listener::of(&world.vm);
    let turn = world.start(session, "say working\ncancel");
    listener.said("working").await;
    within(world.vm.sleep()).await.unwrap();
    assert_eq!(turn.await.unwrap().unwrap().stop_reason, "cancelled");
    assert_eq!(world.record(session).await.status, Status::Suspended);
    assert_eq!(world.text(session, "remember").await, "2");
    world.close().await;
}

#[tokio::test]
async fn destroying_a_vm_in_a_turn_ends_it_and_leaves_an_empty_one() {
    let world = World::new().await;
    let session = world.session().await;
    let listener = Listener::of(&world.vm);
    let turn = world.start(session, "say working\nhang");
    listener.said("working").await;
    let began = Instant::now();
    within(world.vm.destroy()).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(30));
    assert_eq!(turn.await.unwrap().unwrap().stop_reason, "cancelled");
    assert!(!world.directory().exists());
    assert_eq!(
        code(world.run(session, "say x").await),
        Code::SessionNotFound
    );
    assert_eq!(world.sh("ls").await, "");
    world.close().await;
}

#[tokio::test]
async fn the_death_of_a_vm_ends_its_turns_and_the_next_prompt_boots_it_again() {
    let world = World::new().await;
    let session = world.session().await;
    let listener = Listener::of(&world.vm);
    let turn = world.start(session, "say working\nhang");
    listener.said("working").await;
    let pid_1 = guest_of_this_process();
    nix::sys::signal::kill(pid_1, nix::sys::signal::Signal::SIGKILL).unwrap();
    assert_eq!(code(turn.await.unwrap()), Code::AgentExited);
    let told = |item: &_| matches!(item, Item::Notice(Notice::VmShutdown { .. }));
    listener.until(told).await;
    assert_eq!(world.text(session, "remember").await, "2");
    assert_eq!(world.log(session).await.turn_ends().len(), 2);
    world.close().await;
}

/// PID 1 of this process's one VM. (Tests in threads of one process have more: they skip this by
/// running under nextest, as `npm run check` does.)
fn guest_of_this_process() -> nix::unistd::Pid {
    let own = std::process::id().to_string();
    let stat = |entry: std::fs::DirEntry| std::fs::read_to_string(entry.path().join("stat")).ok();
    let found = std::fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| stat(entry.unwrap()));
    let mut guests = found.filter_map(|stat| {
        let (pid, rest) = stat.split_once(" (agentvm-guest) ")?;
        let parent = rest.split(' ').nth(1)?;
        (parent == own).then(|| pid.parse().unwrap())
    });
    nix::unistd::Pid::from_raw(guests.next().unwrap())
}

/// A cancelled turn that ran `command` in a process group of its own.
async fn cancelled_with(world: &World, env: &[(&str, &str)], command: &str, end: &str) {
    let listener = Listener::of(&world.vm);
    let session = world.session_with(env).await;
    // What was there before the turn is not the turn's. (The kernel dates processes to 10 ms.)
    world
        .run(session, "shell exec -a before sleep 1000\nsleep 30")
        .await
        .unwrap();
    let turn = world.start(
        session,
        &format!("shell {command}\nuntil /home/user/up\nsay up\n{end}"),
    );
    listener.said("up").await;
    assert!(within(world.vm.cancel_prompt(session)).await.unwrap());
    assert_eq!(turn.await.unwrap().unwrap().stop_reason, "cancelled");
}

/// Names of the programs that the agents' commands are.
async fn programs(world: &World) -> Vec<String> {
    let names = world
        .sh("for p in /proc/[0-9]*; do tr '\\0' ' ' < $p/cmdline | grep -E '^(before|front|behind|deep) ' ; done; true")
        .await;
    let mut names: Vec<_> = names
        .lines()
        .filter_map(|line| line.split(' ').next().map(ToOwned::to_owned))
        .collect();
    names.sort();
    names
}

/// One in the background, which is there when the others start, and two in the foreground.
const COMMANDS: &str = "setsid bash -c 'exec -a behind bash -c \"touch behind; sleep 1000; :\"' & \
    until [ -e behind ]; do sleep 0.01; done; \
    (exec -a deep sleep 1000) & touch up; exec -a front sleep 1000";

#[tokio::test]
async fn a_cancel_ends_the_commands_of_the_turn_and_leaves_what_runs_in_the_background() {
    let world = World::new().await;
    cancelled_with(&world, &[], COMMANDS, "cancel").await;
    assert_eq!(programs(&world).await, ["before", "behind"]);
    assert_eq!(world.agents().await.len(), 1);
    world.close().await;
}

#[tokio::test]
async fn the_commands_of_an_agent_that_ignores_a_cancel_end_with_it() {
    let world = World::new().await;
    cancelled_with(&world, &[], COMMANDS, "hang").await;
    assert_eq!(programs(&world).await, ["before", "behind"]);
    assert_eq!(world.agents().await.len(), 0);
    world.close().await;
}
