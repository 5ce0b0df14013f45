//! Calls that are given up at any moment leave nothing behind, and nobody else notices.

use std::fs;
use std::time::{Duration, Instant};

use agentvm::error::Code;
use agentvm::vm::exec::ExecOptions;

use super::fixture::{Listener, World, options, within};
use super::random::Random;

#[tokio::test]
async fn a_start_that_is_aborted_at_any_moment_leaves_nothing_and_harms_no_other() {
    let mut random = Random::new();
    let world = World::new().await;
    let other = world.session().await;
    let listener = Listener::of(&world.vm);
    let turn = world.start(other, "say undisturbed\ncancel");
    listener.said("undisturbed").await;
    let began = Instant::now();
    let mut kept = vec![other, world.session().await];
    let whole = began.elapsed();
    for round in 0..25 {
        let moment = random.moment_of(whole);
        // The moment is the point, not a wait for something.
        let abort = tokio::time::sleep(moment);
        let created = world.vm.create_session("pi", options(&[("A", "b")]), abort);
        match within(created).await {
            Ok(created) => kept.push(created.id),
            Err(error) => assert_eq!(error.code, Code::Aborted, "round {round}: {error}"),
        }
        assert_eq!(world.vm.sessions().await.unwrap().len(), kept.len());
        assert_eq!(world.env_files().len(), kept.len());
        let states = world.state_directories().await;
        assert_eq!(states.lines().count(), kept.len(), "round {round}");
        assert_eq!(world.agents().await.len(), kept.len(), "round {round}");
    }
    assert!(world.vm.cancel_prompt(other).await.unwrap());
    assert_eq!(turn.await.unwrap().unwrap().text, "undisturbed");
    for session in kept {
        assert_eq!(world.text(session, "say fine").await, "fine");
    }
    ends_without_a_trace(world).await;
}

#[tokio::test]
async fn a_start_that_is_aborted_while_its_vm_boots_leaves_nothing() {
    let mut random = Random::new();
    let world = World::new().await;
    let began = Instant::now();
    within(world.vm.wake()).await.unwrap();
    let boot = began.elapsed();
    for _ in 0..20 {
        within(world.vm.sleep()).await.unwrap();
        let abort = tokio::time::sleep(random.moment_of(boot));
        let created = world.vm.create_session("pi", options(&[]), abort);
        match within(created).await {
            Ok(_) => within(world.vm.destroy()).await.unwrap(),
            Err(error) => assert_eq!(error.code, Code::Aborted, "{error}"),
        }
        world.assert_nothing_half_made().await;
    }
    ends_without_a_trace(world).await;
}

#[tokio::test]
async fn a_prompt_that_is_cancelled_at_any_moment_ends_and_the_next_one_works() {
    const SCRIPT: &str = "say begun\nflood";
    let mut random = Random::new();
    let world = World::new().await;
    let session = world.session().await;
    world.run(session, "say first").await.unwrap();
    // Resumes, starts, and streams for as long again.
    within(world.vm.sleep()).await.unwrap();
    let began = Instant::now();
    world.run(session, "say second").await.unwrap();
    let whole = began.elapsed() * 2;
    for round in 0..25 {
        match round % 3 {
            0 => within(world.vm.sleep()).await.unwrap(),
            1 => within(world.vm.close_session(session)).await.unwrap(),
            _ => {} // the agent runs
        }
        let turn = world.start(session, SCRIPT);
        // So that there is something to cancel.
        tokio::task::yield_now().await;
        tokio::time::sleep(random.moment_of(whole)).await;
        let cancelled = within(world.vm.cancel_prompt(session)).await.unwrap();
        assert!(cancelled, "round {round}: a turn that nobody else ends");
        assert_eq!(turn.await.unwrap().unwrap().stop_reason, "cancelled");
        assert!(world.agents().await.len() <= 1, "round {round}");
    }
    assert_eq!(world.text(session, "say last").await, "last");
    let log = world.log(session).await;
    assert_eq!(log.of("_agentvm/turn_start").len(), log.turn_ends().len());
    ends_without_a_trace(world).await;
}

#[tokio::test]
async fn an_exec_that_is_given_up_at_any_moment_leaves_no_process() {
    let mut random = Random::new();
    let world = World::new().await;
    world.sh("true").await;
    // All of its group goes, and none can refuse.
    let command = "trap '' TERM HUP; sleep 12345 & sleep 12345 | sleep 12345";
    for _ in 0..40 {
        let run = world.vm.exec(command, ExecOptions::default());
        let moment = random.moment_of(Duration::from_millis(10));
        drop(tokio::time::timeout(moment, run).await);
    }
    within(async {
        while !world
            .sh("pgrep -f '[s]leep 12345' || true")
            .await
            .is_empty()
        {}
    })
    .await;
    ends_without_a_trace(world).await;
}

/// Closes the client: no VM and no process of one is left.
async fn ends_without_a_trace(world: World) {
    world.close().await;
    within(async {
        while !children().is_empty() {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

/// Pids of the processes that this one has started. (Tests in threads of one process have more: they
/// run under nextest, each in its own.)
fn children() -> String {
    let tasks = fs::read_dir("/proc/self/task").unwrap();
    let children = tasks.filter_map(|task| {
        // A thread may have ended meanwhile.
        fs::read_to_string(task.unwrap().path().join("children")).ok()
    });
    children.collect()
}
