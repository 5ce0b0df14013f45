//! The order of events, and when a listener gets them.

use agentvm::session::{Item, Notice};

use super::fixture::{Listener, World, within};

#[tokio::test]
async fn sessions_in_parallel_have_numbers_of_their_own() {
    let world = World::new().await;
    let (one, two) = (world.session().await, world.session().await);
    let listener = Listener::of(&world.vm);
    let turns = [
        world.start(one, "stream 500"),
        world.start(two, "stream 500"),
    ];
    for turn in turns {
        turn.await.unwrap().unwrap();
    }
    for session in [one, two] {
        assert_eq!(world.log(session).await.0.len(), 503);
        assert_eq!(listener.numbers(session), (1..=503).collect::<Vec<_>>());
    }
    world.close().await;
}

#[tokio::test]
async fn everything_of_a_turn_is_delivered_before_its_prompt_resolves() {
    let world = World::new().await;
    let session = world.session().await;
    let listener = Listener::of(&world.vm);
    for turn in 1..=5 {
        world.run(session, "stream 20").await.unwrap();
        assert_eq!(listener.numbers(session).len(), turn * 23);
    }
    world.close().await;
}

#[tokio::test]
async fn a_listener_hears_what_happens_after_it_came() {
    let world = World::new().await;
    let early = Listener::of(&world.vm);
    let session = world.session().await;
    world.run(session, "say one").await.unwrap();
    let late = Listener::of(&world.vm);
    world.run(session, "say two").await.unwrap();
    assert_eq!(early.numbers(session), [1, 2, 3, 4, 5, 6, 7, 8]);
    assert_eq!(late.numbers(session), [5, 6, 7, 8]);
    world.close().await;
}

#[tokio::test]
async fn a_listener_goes_on_where_it_was_when_a_session_is_resumed() {
    let world = World::new().await;
    let listener = Listener::of(&world.vm);
    let session = world.session().await;
    world.run(session, "say one").await.unwrap();
    world.vm.sleep().await.unwrap();
    let late = Listener::of(&world.vm);
    world.run(session, "say two").await.unwrap();
    assert_eq!(listener.numbers(session), [1, 2, 3, 4, 5, 6, 7, 8]);
    assert_eq!(late.numbers(session), [5, 6, 7, 8]);
    world.close().await;
}

#[tokio::test]
async fn a_listener_that_takes_nothing_holds_up_no_agent_and_no_other() {
    let world = World::new().await;
    let session = world.session().await;
    let stuck = world.vm.subscribe().unwrap();
    let listener = Listener::of(&world.vm);
    let turn = world.start(session, "stream 5000\nsay done");
    listener.heard("turn_end").await;
    assert_eq!(world.log(session).await.0.len(), 5004);
    // `sendPrompt` waits for the listeners that are there: this one goes.
    drop(stuck);
    turn.await.unwrap().unwrap();
    world.close().await;
}

#[tokio::test]
async fn a_listener_is_told_that_the_vm_starts_and_ends() {
    let world = World::new().await;
    let listener = Listener::of(&world.vm);
    world.vm.wake().await.unwrap();
    world.vm.wake().await.unwrap();
    world.vm.sleep().await.unwrap();
    world.vm.sleep().await.unwrap();
    world.vm.wake().await.unwrap();
    world.vm.destroy().await.unwrap();
    let told = ["booted", "Sleep", "booted", "Destroy"];
    within(async {
        while listener.notices().len() < told.len() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert_eq!(listener.notices(), told);
    world.close().await;
}

#[tokio::test]
async fn a_slow_listener_hears_of_the_end_after_all_that_was_said_before_it() {
    let world = World::new().await;
    let session = world.session().await;
    let slow = world.vm.subscribe().unwrap();
    let listener = Listener::of(&world.vm);
    let turn = world.start(session, "stream 5000");
    listener.heard("turn_end").await;
    let asleep = tokio::spawn({
        let vm = world.vm.clone();
        async move { vm.sleep().await }
    });
    within(async {
        while !listener.notices().contains(&"Sleep".to_owned()) {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let mut events = 0;
    let ended = within(async {
        loop {
            let items = slow.next().await.unwrap();
            for item in &items {
                match item {
                    Item::Event { .. } => events += 1,
                    Item::Notice(Notice::VmShutdown { .. }) => return events,
                    _ => {}
                }
            }
            slow.taken(&items);
        }
    })
    .await;
    assert_eq!(ended, 5003);
    drop(slow);
    turn.await.unwrap().unwrap();
    asleep.await.unwrap().unwrap();
    world.close().await;
}

#[tokio::test]
async fn a_listener_hears_the_end_of_a_turn_that_a_close_ends() {
    let world = World::new().await;
    let session = world.session().await;
    let listener = Listener::of(&world.vm);
    let turn = world.start(session, "say working\ncancel");
    listener.said("working").await;
    within(world.vm.sleep()).await.unwrap();
    turn.await.unwrap().unwrap();
    listener.heard("turn_end").await;
    assert_eq!(listener.numbers(session), [1, 2, 3, 4]);
    world.close().await;
}
