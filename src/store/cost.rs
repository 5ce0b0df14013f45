//! What reading costs in a session of a million events, in steps of `SQLite` and never in time.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rusqlite::Connection;

use super::reader::Reader;
use super::record::{Event, NewSession, Query, SESSION_UPDATE, Status};
use super::writer::read_sessions;
use super::{Durability, Store};
use crate::ids::{Seq, SessionId};

const EVENTS: u64 = 1_000_000;
const RARE: &str = "_agentvm/turn_end";
/// Every so many events one is rare.
const RARE_EVERY: u64 = 1000;

/// What a query may take that delivers this many rows: some steps to find its place, then a few for
/// each row. A scan of the session would take a million.
const fn bound(rows: u64) -> u64 {
    200 + 10 * rows
}

fn session() -> NewSession {
    NewSession {
        id: SessionId::generate(),
        agent_type: "pi".to_owned(),
        agent_session_id: None,
        title: None,
        cwd: "/home/user".to_owned(),
        status: Status::Open,
        capabilities: Arc::from("{}"),
        agent_info: Arc::from("{}"),
        settings: Arc::from("{}"),
        config: Arc::from("{}"),
    }
}

async fn open(path: &Path) -> Store {
    Store::open(path.to_owned(), Durability::Normal)
        .await
        .expect("a store")
}

async fn add_session(store: &Store) -> SessionId {
    let record = store.insert_session(session()).await;
    record.expect("a session").id
}

async fn append(store: &Store, session: SessionId, event: Event) {
    store.append(session, event).await.expect("appended");
}

fn rare(json: &str) -> Event {
    Event {
        method: RARE.into(),
        json: Arc::from(json),
    }
}

/// Runs `work` and counts the steps of `SQLite`'s machine meanwhile on this connection, about one for
/// each time that it asks the handler.
fn steps<T>(connection: &Connection, work: impl FnOnce() -> T) -> (T, u64) {
    let count = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&count);
    let handler = move || {
        counter.fetch_add(1, Ordering::Relaxed);
        false
    };
    connection
        .progress_handler(1, Some(handler))
        .expect("a handler");
    let result = work();
    let none: Option<fn() -> bool> = None;
    connection.progress_handler(0, none).expect("no handler");
    (result, count.load(Ordering::Relaxed))
}

#[tokio::test]
async fn no_query_scans_a_long_session() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("vm.db");
    let store = open(&path).await;
    let before = add_session(&store).await;
    let long = add_session(&store).await;
    append(&store, before, rare("{}")).await;
    let json: Arc<str> = Arc::from("{}");
    for n in 1..=EVENTS {
        let event = if n % RARE_EVERY == 0 {
            rare("{}")
        } else {
            Event::session_update(Arc::clone(&json))
        };
        append(&store, long, event).await;
    }
    let after = add_session(&store).await;
    append(&store, after, rare("{}")).await;
    store.close().await.expect("closed");

    let reader = Reader::open(&path).expect("a reader");
    let connection = reader.connection();
    let events = |session, since, method: Option<&str>, limit| {
        let query = Query {
            since: Seq(since),
            method: method.map(ToOwned::to_owned),
            limit: Some(limit),
            max_bytes: u64::MAX,
        };
        let (page, steps) = steps(connection, || reader.events(session, &query));
        let found = page.expect("a page").events.len() as u64;
        assert!(
            steps <= bound(found),
            "{steps} steps for {found} rows of {query:?}"
        );
        found
    };
    for since in [0, 1, EVENTS / 2, EVENTS - 100] {
        assert_eq!(events(long, since, None, 100), 100);
        let left = EVENTS / RARE_EVERY - since / RARE_EVERY;
        assert_eq!(events(long, since, Some(RARE), 10), left.min(10));
        assert_eq!(events(long, since, Some("none"), 10), 0);
        let updates = events(long, since, Some(SESSION_UPDATE), 50);
        assert_eq!(updates, 50);
    }
    assert_eq!(events(long, EVENTS, None, 100), 0);
    assert_eq!(events(long, 0, Some(RARE), EVENTS), EVENTS / RARE_EVERY);
    // A page that its bytes end.
    let query = Query {
        since: Seq(EVENTS / 2),
        method: None,
        limit: None,
        max_bytes: 200,
    };
    let (page, taken) = steps(connection, || reader.events(long, &query));
    assert_eq!(page.expect("a page").events.len(), 100);
    assert!(taken <= bound(101), "{taken} steps for a page of 200 bytes");
    // The neighbours of a long session do not pay for it.
    for session in [before, after] {
        assert_eq!(events(session, 0, None, 100), 1);
        assert_eq!(events(session, 0, Some(RARE), 100), 1);
        assert_eq!(events(session, 0, Some(SESSION_UPDATE), 100), 0);
    }

    for method in [RARE, SESSION_UPDATE, "none"] {
        let (last, steps) = steps(connection, || reader.last_event(long, method));
        let last = last.expect("an answer").map(|event| event.seq.0);
        let expected = match method {
            RARE => Some(EVENTS),
            SESSION_UPDATE => Some(EVENTS - 1),
            _ => None,
        };
        assert_eq!(last, expected);
        assert!(steps <= bound(1), "{steps} steps for the last {method}");
    }

    let (sessions, taken) = steps(connection, || reader.sessions());
    let sessions = sessions.expect("the sessions");
    assert_eq!(sessions[1].last_seq, Seq(EVENTS));
    assert!(taken <= bound(3), "{taken} steps for 3 sessions");
    let (found, taken) = steps(connection, || reader.session(long));
    assert_eq!(found.expect("an answer").as_ref(), Some(&sessions[1]));
    assert!(taken <= bound(1), "{taken} steps for a session");

    let (found, taken) = steps(connection, || read_sessions(connection));
    assert_eq!(found.expect("the sessions").len(), 3);
    assert!(taken <= bound(3), "{taken} steps to open");
}

#[tokio::test]
async fn opening_looks_at_the_last_event_of_each_session_alone() {
    const SESSIONS: u64 = 1000;
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("vm.db");
    let store = open(&path).await;
    for _ in 0..SESSIONS {
        let id = add_session(&store).await;
        for _ in 0..20 {
            append(&store, id, Event::session_update(Arc::from("{}"))).await;
        }
    }
    store.close().await.expect("closed");
    let reader = Reader::open(&path).expect("a reader");
    let connection = reader.connection();
    // Two rows each: the session and its last event.
    let (found, taken) = steps(connection, || read_sessions(connection));
    assert_eq!(found.expect("the sessions").len() as u64, SESSIONS);
    assert!(taken <= bound(2 * SESSIONS), "{taken} steps to open");
    let (sessions, taken) = steps(connection, || reader.sessions());
    assert_eq!(sessions.expect("the sessions").len() as u64, SESSIONS);
    // A step for each column besides.
    assert!(taken <= bound(4 * SESSIONS), "{taken} steps to list");
}
