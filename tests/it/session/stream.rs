//! A session's events as one stream: history, then what comes.

use agentvm::error::Code;
use agentvm::ids::{Seq, SessionId};
use agentvm::session::EventStream;

use super::fixture::{World, code, within};

async fn numbers(stream: &mut EventStream, count: usize) -> Vec<u64> {
    let mut numbers = Vec::new();
    while numbers.len() < count {
        let batch = within(stream.next()).await.unwrap().expect("more events");
        numbers.extend(batch.iter().map(|event| event.seq.0));
    }
    numbers
}

fn up_to(last: u64) -> Vec<u64> {
    (1..=last).collect()
}

#[tokio::test]
async fn without_follow_it_ends_where_the_log_ends() {
    let world = World::new().await;
    let session = world.session().await;
    world.run(session, "stream 2000").await.unwrap();
    let mut stream = world.vm.event_stream(session, Seq(0), false).unwrap();
    assert_eq!(numbers(&mut stream, 2003).await, up_to(2003));
    assert!(within(stream.next()).await.unwrap().is_none());
    let mut rest = world.vm.event_stream(session, Seq(2000), false).unwrap();
    assert_eq!(numbers(&mut rest, 3).await, [2001, 2002, 2003]);
    world.close().await;
}

#[tokio::test]
async fn with_follow_it_goes_on_over_turns_sleep_and_resume() {
    let world = World::new().await;
    let session = world.session().await;
    let mut stream = world.vm.event_stream(session, Seq(0), true).unwrap();
    let reader = tokio::spawn(async move { numbers(&mut stream, 3 * 1003).await });
    world.run(session, "stream 1000").await.unwrap();
    world.vm.sleep().await.unwrap();
    world.run(session, "stream 1000").await.unwrap();
    world.vm.close_session(session).await.unwrap();
    world.run(session, "stream 1000").await.unwrap();
    assert_eq!(within(reader).await.unwrap(), up_to(3009));
    world.close().await;
}

#[tokio::test]
async fn following_neither_boots_a_vm_nor_keeps_it_awake() {
    let world = World::new().await;
    let session = world.session().await;
    world.run(session, "say x").await.unwrap();
    world.vm.sleep().await.unwrap();
    let mut stream = world.vm.event_stream(session, Seq(0), true).unwrap();
    assert_eq!(numbers(&mut stream, 4).await, up_to(4));
    let following = tokio::time::timeout(std::time::Duration::from_millis(600), stream.next());
    assert!(following.await.is_err(), "there is nothing more");
    // What another process could have is free.
    let lock = std::fs::File::open(world.directory().join("host.lock")).unwrap();
    lock.try_lock().unwrap();
    world.close().await;
}

#[tokio::test]
async fn it_ends_with_the_session_and_refuses_what_does_not_exist() {
    let world = World::new().await;
    let session = world.session().await;
    world.run(session, "say x").await.unwrap();
    let mut stream = world.vm.event_stream(session, Seq(0), true).unwrap();
    assert_eq!(numbers(&mut stream, 4).await, up_to(4));
    let end = tokio::spawn(async move { stream.next().await });
    world.vm.destroy_session(session).await.unwrap();
    assert!(within(end).await.unwrap().unwrap().is_none());
    let unknown = world.vm.event_stream(SessionId::generate(), Seq(0), true);
    let unknown = within(unknown.unwrap().next()).await;
    assert_eq!(code(unknown), Code::SessionNotFound);
    let other = world.session().await;
    let mut ahead = world.vm.event_stream(other, Seq(7), true).unwrap();
    assert_eq!(code(within(ahead.next()).await), Code::SeqAhead);
    world.close().await;
}

#[tokio::test]
async fn closing_the_client_ends_it() {
    let world = World::new().await;
    let session = world.session().await;
    let mut stream = world.vm.event_stream(session, Seq(0), true).unwrap();
    let end = tokio::spawn(async move { stream.next().await });
    world.close().await;
    assert_eq!(code(within(end).await.unwrap()), Code::ClientClosed);
}

#[tokio::test]
async fn many_readers_of_a_streaming_session_each_get_everything_once() {
    let world = World::new().await;
    let session = world.session().await;
    let turn = world.start(session, "stream 20000");
    let readers: Vec<_> = (0..4)
        .map(|_| {
            let mut stream = world.vm.event_stream(session, Seq(0), true).unwrap();
            tokio::spawn(async move { numbers(&mut stream, 20_003).await })
        })
        .collect();
    for reader in readers {
        assert_eq!(within(reader).await.unwrap(), up_to(20_003));
    }
    within(turn).await.unwrap().unwrap();
    world.close().await;
}
