//! An agent that says more than anybody reads.

use std::time::Duration;

use agentvm::session::{Item, Subscription};
use tokio::task::JoinHandle;

use super::fixture::{Listener, World};

/// Updates of one turn. A prompt adds three events: start, user message, end.
const UPDATES: u64 = 200_000;

/// What a host process may keep of them, in KiB. They come to 30 MB and their text, which the prompt
/// resolves to, to more than one; the store keeps the last of them in memory.
const GROWTH_KIB: u64 = 100 << 10;

/// Counts events, which have to come in order and to be those of `stream`, `pause` after each batch.
fn count(subscription: Subscription, pause: Duration) -> JoinHandle<u64> {
    tokio::spawn(async move {
        let mut last = 0;
        loop {
            let items = subscription.next().await.unwrap();
            for item in &items {
                let Item::Event { seq, json, .. } = item else {
                    continue;
                };
                last += 1;
                assert_eq!(seq.0, last);
                let update = last.checked_sub(2).filter(|n| (1..=UPDATES).contains(n));
                if let Some(update) = update {
                    assert!(json.contains(&format!(r#""text":"{update} ""#)), "{json}");
                }
            }
            if !pause.is_zero() {
                tokio::time::sleep(pause).await;
            }
            subscription.taken(&items);
            if last == UPDATES + 3 {
                return last;
            }
        }
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_thousand_updates_arrive_in_order_and_memory_stays_bounded() {
    let world = World::new().await;
    let session = world.session().await;
    let quick = count(world.vm.subscribe().unwrap(), Duration::ZERO);
    let slow = count(world.vm.subscribe().unwrap(), Duration::from_millis(1));
    let before = resident_kib();
    let turn = world.start(session, &format!("stream {UPDATES}"));
    let (turn, peak) = peak_until(turn).await;
    let text = turn.unwrap().text;
    let numbers = (1..=UPDATES).map(|n| format!("{n} "));
    assert!(text.split_inclusive(' ').map(ToOwned::to_owned).eq(numbers));
    assert_eq!(quick.await.unwrap(), UPDATES + 3);
    assert_eq!(slow.await.unwrap(), UPDATES + 3);
    let grown = peak.saturating_sub(before);
    assert!(grown < GROWTH_KIB, "{grown} KiB for {UPDATES} updates");
    assert_eq!(world.text(session, "say next").await, "next");
    world.vm.sleep().await.unwrap();
    assert_kept(&world);
    world.close().await;
}

/// In the file they are, each under its number.
fn assert_kept(world: &World) {
    let file = rusqlite::Connection::open(world.directory().join("vm.db")).unwrap();
    let query = format!(
        "SELECT count(*) = {UPDATES} FROM session_events WHERE seq BETWEEN 3 AND {UPDATES} + 2
         AND json_extract(json, '$.params.update.content.text') = (seq - 2) || ' '"
    );
    let all: bool = file.query_row(&query, [], |row| row.get(0)).unwrap();
    assert!(all);
}

/// The result of `work` and the most memory that this process had meanwhile.
async fn peak_until<T>(mut work: JoinHandle<T>) -> (T, u64) {
    let mut peak = 0;
    loop {
        peak = peak.max(resident_kib());
        tokio::select! {
            result = &mut work => return (result.unwrap(), peak),
            () = tokio::time::sleep(Duration::from_millis(5)) => {}
        }
    }
}

fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let number = line.unwrap().trim().trim_end_matches(" kB");
    number.parse().unwrap()
}

#[tokio::test]
async fn a_cancel_in_the_middle_of_a_flood_reaches_the_agent() {
    let world = World::new().await;
    let session = world.session().await;
    let pid = world.text(session, "pid").await;
    let listener = Listener::of(&world.vm);
    let turn = world.start(session, "flood");
    listener.said("1000 ").await;
    assert!(world.vm.cancel_prompt(session).await.unwrap());
    let turn = turn.await.unwrap().unwrap();
    assert_eq!(turn.stop_reason, "cancelled");
    // It obeyed: one that does not hear the cancel in time is stopped, and another one started.
    assert_eq!(world.text(session, "pid").await, pid);
    let log = world.log(session).await;
    let updates = log.agent_texts();
    let said: Vec<_> = turn.text.split_inclusive(' ').collect();
    assert_eq!(updates[1..=said.len()], said);
    world.close().await;
}
