//! The host process is killed while its agent streams, again and again, on the same session.

use std::time::{Duration, Instant};

use agentvm::ids::{Seq, SessionId};
use agentvm::session::{Item, Settings, text_prompt};
use agentvm::store::{Durability, Query, StoredEvent};

use super::fixture::{Log, World, open, vm_of, within};
use super::host::{self, Host};
use super::random::Random;
use crate::child::{block_on, role};

const TEST: &str = "session::kill::whatever_a_listener_was_handed_survives_a_kill_at_any_moment";

const KILLS: u64 = 200;

/// One in so many with `durability: "full"`.
const FULL_EVERY: u64 = 8;

/// Large enough that `SQLite` moves its WAL into the database now and then, also under a kill.
const SCRIPT: &str = "burst 400 2000";

/// Its events, with those of the short turn before it.
const EVENTS: u64 = 403 + 4;

#[test]
fn whatever_a_listener_was_handed_survives_a_kill_at_any_moment() {
    match role() {
        Some(role) => block_on(stream(&role)),
        None => block_on(kill_hosts()),
    }
}

/// A host process: resumes the session, sees whether it works, and streams.
async fn stream(role: &str) {
    let (durability, session) = role.split_once(' ').unwrap();
    let session = SessionId::parse(session).unwrap();
    let world = host::world().await;
    let settings = Settings {
        durability: match durability {
            "full" => Durability::Full,
            _ => Durability::Normal,
        },
        ..world.settings
    };
    let client = open(&world.data, &settings);
    let vm = vm_of(&client);
    let subscription = vm.subscribe().unwrap();
    println!();
    tokio::spawn(async move {
        loop {
            let items = subscription.next().await.unwrap();
            // Out of this process's hands before it counts as taken.
            host::report_lines(items.iter().filter_map(|item| match item {
                Item::Event { seq, json, .. } => Some(format!("{} {json}", seq.0)),
                Item::PermissionRequest { .. } | Item::Notice(_) => None,
            }));
            subscription.taken(&items);
        }
    });
    for script in ["remember", SCRIPT] {
        let turn = vm.send_prompt(session, text_prompt(script));
        within(turn).await.unwrap();
    }
    host::report("0 through");
    std::future::pending::<()>().await;
}

async fn kill_hosts() {
    let mut random = Random::new();
    let world = World::new().await;
    let session = world.session().await;
    world.run(session, "say first").await.unwrap();
    // The file is all that the rounds share.
    within(world.client.close()).await.unwrap();
    let reader = world.beside();
    let mut last = Log::read(&reader.vm, session).await.0.len() as u64;
    for round in 0..KILLS {
        let durability = if round % FULL_EVERY == 0 {
            "full"
        } else {
            "normal"
        };
        let mut host = Host::start(&[], TEST, &format!("{durability} {session}"), &world.data);
        let mut handed = Vec::new();
        // The wanted one may be beyond the end: then it is killed after it.
        let moment = random.below(EVENTS + EVENTS / 10);
        while handed.len() as u64 <= moment {
            let event = Handed::parse(&host.report().expect("it went on"));
            let through = event.seq == 0;
            if through {
                break;
            }
            handed.push(event);
        }
        let pause = Duration::from_micros(random.below(3000));
        let now = Instant::now();
        while now.elapsed() < pause {
            std::hint::spin_loop();
        }
        let rest = host.kill();
        handed.extend(rest.iter().map(|report| Handed::parse(report)));
        handed.retain(|event| event.seq > 0);

        // By a reader first, which finds the database and its WAL as they were left.
        let kept = events_after(&reader, session, last).await;
        let numbers: Vec<_> = kept.iter().map(|event| event.seq.0).collect();
        let expected: Vec<_> = (last + 1..).take(kept.len()).collect();
        assert_eq!(numbers, expected, "round {round}");
        assert!(kept.len() >= handed.len(), "round {round}: events are lost");
        for (handed, kept) in handed.iter().zip(&kept) {
            assert_eq!(handed.seq, kept.seq.0, "round {round}");
            assert_eq!(*handed.json, *kept.json, "round {round}");
        }
        last += kept.len() as u64;
    }
    assert_sound(&reader, session).await;
    reader.close().await;
}

/// The session goes on, and its whole log makes sense.
async fn assert_sound(world: &World, session: SessionId) {
    let remembered: usize = world.text(session, "remember").await.parse().unwrap();
    let log = world.log(session).await;
    let starts = log.of("_agentvm/turn_start");
    let ends = log.turn_ends();
    let turns = |events: &[serde_json::Value]| -> Vec<_> {
        let ids = events.iter().map(|params| params["turnId"].clone());
        ids.collect()
    };
    assert_eq!(turns(&starts), turns(&ends), "each turn has one end");
    let interrupted = ends.iter().filter(|end| end.get("interrupted").is_some());
    let interrupted = interrupted.count();
    // Nine of ten are meant to be; a machine that is busy elsewhere kills late.
    let hit = interrupted as u64 > KILLS / 10;
    assert!(hit, "only {interrupted} kills came within a turn");
    // The agent's own memory survived too: what it has answered, it knows.
    assert!(remembered <= starts.len());
    assert!(remembered >= starts.len() - interrupted);
    for end in ends {
        let stopped = end.get("stopReason").is_some();
        assert_ne!(stopped, end.get("interrupted").is_some(), "{end}");
    }
    within(world.vm.sleep()).await.unwrap();
    let file = rusqlite::Connection::open(world.directory().join("vm.db")).unwrap();
    let checked: String = file
        .query_row("PRAGMA integrity_check", [], |row| row.get(0))
        .unwrap();
    assert_eq!(checked, "ok");
}

async fn events_after(world: &World, session: SessionId, last: u64) -> Vec<StoredEvent> {
    let query = Query {
        since: Seq(last),
        method: None,
        limit: None,
        max_bytes: u64::MAX,
    };
    let page = within(world.vm.events(session, query)).await.unwrap();
    page.events
}

/// An event as the listener of a host process had it.
struct Handed {
    seq: u64,
    json: String,
}

impl Handed {
    fn parse(report: &str) -> Self {
        let (seq, json) = report.split_once(' ').unwrap();
        Self {
            seq: seq.parse().unwrap(),
            json: json.to_owned(),
        }
    }
}
