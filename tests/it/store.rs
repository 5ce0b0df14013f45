//! The store as the session layer sees it, including from other processes and after their death.

mod versions;

use std::borrow::Cow;
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use agentvm::error::Error;
use agentvm::ids::{Seq, SessionId};
use agentvm::store::{
    Durability, Event, History, NewSession, Query, SESSION_UPDATE, SessionChange, Status, Store,
    StoreError, StoredEvent,
};
use rusqlite::Connection;

fn session() -> NewSession {
    NewSession {
        id: SessionId::generate(),
        agent_type: "pi".to_owned(),
        agent_session_id: None,
        title: None,
        cwd: "/home/user".to_owned(),
        status: Status::Open,
        capabilities: Arc::from(r#"{"loadSession":true}"#),
        agent_info: Arc::from(r#"{"name":"pi"}"#),
        settings: Arc::from("{}"),
        config: Arc::from("{}"),
    }
}

fn update(text: impl AsRef<str>) -> Event {
    Event::session_update(Arc::from(text.as_ref()))
}

fn of_method(method: &str, json: &str) -> Event {
    Event {
        method: Cow::Owned(method.to_owned()),
        json: Arc::from(json),
    }
}

fn all() -> Query {
    after(0)
}

fn after(seq: u64) -> Query {
    Query {
        since: Seq(seq),
        method: None,
        limit: None,
        max_bytes: u64::MAX,
    }
}

fn texts(events: &[StoredEvent]) -> Vec<&str> {
    events.iter().map(|event| &*event.json).collect()
}

fn numbers(events: &[StoredEvent]) -> Vec<u64> {
    events.iter().map(|event| event.seq.0).collect()
}

fn code(error: StoreError) -> &'static str {
    let error = Error::from(error);
    assert!(error.message.contains("vm.db"), "names the file: {error}");
    match error.code.as_str() {
        "STORE_CORRUPT" => "STORE_CORRUPT",
        "STORE_FULL" => "STORE_FULL",
        "SEQ_AHEAD" => "SEQ_AHEAD",
        "SESSION_NOT_FOUND" => "SESSION_NOT_FOUND",
        "CLIENT_CLOSED" => "CLIENT_CLOSED",
        "VM_UNSUPPORTED" => "VM_UNSUPPORTED",
        "EACCES" => "EACCES",
        other => panic!("unexpected code {other}: {error}"),
    }
}

/// A directory with the path of a database in it.
fn place() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vm.db");
    (dir, path)
}

async fn open(path: &Path) -> Store {
    Store::open(path.to_owned(), Durability::Normal)
        .await
        .unwrap()
}

async fn open_error(path: &Path) -> StoreError {
    match Store::open(path.to_owned(), Durability::Normal).await {
        Ok(_) => panic!("{} opened", path.display()),
        Err(error) => error,
    }
}

/// A store with one session that has these events.
async fn store_with(path: &Path, events: &[&str]) -> (Store, SessionId) {
    let store = open(path).await;
    let id = store.insert_session(session()).await.unwrap().id;
    for event in events {
        store.append(id, update(event)).await.unwrap();
    }
    store.flush(false).await.unwrap();
    (store, id)
}

#[tokio::test]
async fn a_file_is_made_private_and_complete() {
    let (dir, path) = place();
    assert!(History::open(path.clone()).await.unwrap().is_none());
    let store = open(&path).await;
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
    store.close().await.unwrap();
    let names: Vec<_> = fs::read_dir(dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(names, ["vm.db"]);
}

#[tokio::test]
async fn events_are_numbered_from_1_and_kept_as_the_exact_text() {
    let (_dir, path) = place();
    let exact = r#"{ "b":1e400,  "a":"\u00e9 é" }"#;
    let (store, id) = store_with(&path, &[exact, "{}"]).await;
    for page in [
        store.events(id, all()).await.unwrap(),
        store.history().events(id, all()).await.unwrap(),
    ] {
        assert_eq!(numbers(&page.events), [1, 2]);
        assert_eq!(texts(&page.events), [exact, "{}"]);
        assert!(page.complete);
    }
}

#[tokio::test]
async fn memory_and_file_give_the_same_answers() {
    let (_dir, path) = place();
    let store = open(&path).await;
    let id = store.insert_session(session()).await.unwrap().id;
    for n in 1..=20 {
        let event = if n % 5 == 0 {
            of_method("_agentvm/turn_end", &n.to_string())
        } else {
            update(n.to_string())
        };
        store.append(id, event).await.unwrap();
    }
    store.flush(false).await.unwrap();
    for since in [0, 1, 7, 19, 20] {
        for method in [
            None,
            Some(SESSION_UPDATE),
            Some("_agentvm/turn_end"),
            Some("x"),
        ] {
            for limit in [None, Some(0), Some(1), Some(3)] {
                for max_bytes in [0, 4, u64::MAX] {
                    let query = Query {
                        since: Seq(since),
                        method: method.map(ToOwned::to_owned),
                        limit,
                        max_bytes,
                    };
                    let memory = store.events(id, query.clone()).await.unwrap();
                    let file = store.history().events(id, query.clone()).await.unwrap();
                    assert_eq!(memory, file, "{query:?}");
                }
            }
        }
    }
}

#[tokio::test]
async fn the_last_event_of_a_method_is_found() {
    let (_dir, path) = place();
    let (store, other) = store_with(&path, &["1"]).await;
    let id = store.insert_session(session()).await.unwrap().id;
    for event in [
        of_method("_agentvm/turn_start", "1"),
        update("2"),
        of_method("_agentvm/turn_start", "3"),
        update("4"),
        of_method("_agentvm/turn_end", "5"),
    ] {
        store.append(id, event).await.unwrap();
    }
    // A later session's events come after this one's in the file.
    let later = store.insert_session(session()).await.unwrap().id;
    let start = of_method("_agentvm/turn_start", "later");
    store.append(later, start).await.unwrap();
    store.flush(false).await.unwrap();
    let history = store.history();
    let last = async |id, method| {
        let last = history.last_event(id, method).await.unwrap();
        last.map(|event| (event.seq.0, event.json.to_string()))
    };
    let found = |number: u64| Some((number, number.to_string()));
    assert_eq!(last(id, "_agentvm/turn_start").await, found(3));
    assert_eq!(last(id, SESSION_UPDATE).await, found(4));
    assert_eq!(last(id, "_agentvm/turn_end").await, found(5));
    assert_eq!(last(id, "other").await, None);
    assert_eq!(last(other, "_agentvm/turn_start").await, None);
    let unknown = history.last_event(SessionId::generate(), "x").await;
    assert_eq!(code(unknown.unwrap_err()), "SESSION_NOT_FOUND");
}

#[tokio::test]
async fn paging_delivers_every_event_once() {
    let (_dir, path) = place();
    let texts: Vec<String> = (1..=100).map(|n| "x".repeat(n)).collect();
    let refs: Vec<&str> = texts.iter().map(String::as_str).collect();
    let (store, id) = store_with(&path, &refs).await;
    let mut seen = Vec::new();
    loop {
        let query = Query {
            max_bytes: 250,
            ..after(seen.len() as u64)
        };
        let page = store.history().events(id, query).await.unwrap();
        let bytes: usize = page.events.iter().map(|event| event.json.len()).sum();
        assert!(bytes <= 250, "{bytes}");
        seen.extend(numbers(&page.events));
        if page.complete {
            break;
        }
    }
    assert_eq!(seen, (1..=100).collect::<Vec<_>>());
}

#[tokio::test]
async fn since_beyond_the_last_event_is_refused() {
    let (_dir, path) = place();
    let (store, id) = store_with(&path, &["{}"]).await;
    for since in [2, 1 << 40, u64::MAX] {
        let memory = store.events(id, after(since)).await.unwrap_err();
        assert_eq!(code(memory), "SEQ_AHEAD");
        let file = store.history().events(id, after(since)).await.unwrap_err();
        assert_eq!(code(file), "SEQ_AHEAD");
    }
    assert!(store.cursor(id, Seq(2)).is_err());
}

#[tokio::test]
async fn an_unknown_session_is_refused_everywhere() {
    let (_dir, path) = place();
    let store = open(&path).await;
    let id = SessionId::generate();
    let not_found = |error| assert_eq!(code(error), "SESSION_NOT_FOUND");
    not_found(store.append(id, update("{}")).await.unwrap_err());
    not_found(store.events(id, all()).await.unwrap_err());
    not_found(store.history().events(id, all()).await.unwrap_err());
    not_found(store.committed(id).unwrap_err());
    not_found(store.delete_session(id).await.unwrap_err());
    not_found(
        store
            .update_session(id, SessionChange::default())
            .await
            .unwrap_err(),
    );
    assert_eq!(store.history().session(id).await.unwrap(), None);
}

#[tokio::test]
async fn two_sessions_have_their_own_numbers() {
    let (_dir, path) = place();
    let (store, one) = store_with(&path, &[]).await;
    let two = store.insert_session(session()).await.unwrap().id;
    for n in 1..=300 {
        assert_eq!(store.append(one, update("1")).await.unwrap(), Seq(n));
        if n % 3 == 0 {
            assert_eq!(store.append(two, update("2")).await.unwrap(), Seq(n / 3));
        }
    }
    store.close().await.unwrap();
    let history = History::open(path).await.unwrap().unwrap();
    let one = history.events(one, all()).await.unwrap().events;
    let two = history.events(two, all()).await.unwrap().events;
    assert_eq!(numbers(&one), (1..=300).collect::<Vec<_>>());
    assert_eq!(numbers(&two), (1..=100).collect::<Vec<_>>());
    assert!(one.iter().all(|event| &*event.json == "1"));
    assert!(two.iter().all(|event| &*event.json == "2"));
}

#[tokio::test]
async fn numbering_and_time_go_on_after_reopening() {
    let (_dir, path) = place();
    let (store, id) = store_with(&path, &["1", "2"]).await;
    store.close().await.unwrap();
    // As if the clock had been set back by an age meanwhile.
    let future = 9_000_000_000_000_i64;
    Connection::open(&path)
        .unwrap()
        .execute("UPDATE events SET created_at = ?1", [future])
        .unwrap();
    let store = open(&path).await;
    assert_eq!(store.committed(id).unwrap(), Seq(2));
    assert_eq!(store.append(id, update("3")).await.unwrap(), Seq(3));
    store.flush(true).await.unwrap();
    let page = store.events(id, all()).await.unwrap();
    assert_eq!(numbers(&page.events), [1, 2, 3]);
    assert!(page.events.iter().all(|event| event.created_at == future));
}

#[tokio::test]
async fn session_records_keep_what_they_are_told() {
    let (_dir, path) = place();
    let store = open(&path).await;
    let first = store.insert_session(session()).await.unwrap();
    let second = store.insert_session(session()).await.unwrap();
    let change = SessionChange {
        agent_session_id: Some("private".to_owned()),
        title: Some("Fix it".to_owned()),
        status: Some(Status::Suspended),
        settings: Some(Arc::from(r#"{"model":"m"}"#)),
        config: Some(Arc::from(r#"{"modes":null}"#)),
        ..SessionChange::default()
    };
    store.update_session(first.id, change).await.unwrap();
    store.append(first.id, update("{}")).await.unwrap();
    store.close().await.unwrap();

    let history = History::open(path).await.unwrap().unwrap();
    let records = history.sessions().await.unwrap();
    assert_eq!(records[0], second, "newest first");
    let changed = history.session(first.id).await.unwrap().unwrap();
    assert_eq!(records[1], changed);
    assert_eq!(changed.agent_session_id.as_deref(), Some("private"));
    assert_eq!(changed.title.as_deref(), Some("Fix it"));
    assert_eq!(changed.status, Status::Suspended);
    assert_eq!(&*changed.settings, r#"{"model":"m"}"#);
    assert_eq!(&*changed.config, r#"{"modes":null}"#);
    assert_eq!(changed.capabilities, first.capabilities);
    assert_eq!(changed.last_seq, Seq(1));
    assert_eq!(changed.created_at, first.created_at);
    assert!(changed.updated_at >= first.updated_at);
}

#[tokio::test]
async fn a_deleted_session_is_gone_and_its_space_is_given_back() {
    let (_dir, path) = place();
    let big = "secret ".repeat(400);
    let (store, kept) = store_with(&path, &["kept"]).await;
    let doomed = store.insert_session(session()).await.unwrap().id;
    for _ in 0..2000 {
        store.append(doomed, update(&big)).await.unwrap();
    }
    store.flush(false).await.unwrap();
    store.delete_session(doomed).await.unwrap();
    let gone = store.append(doomed, update("{}")).await.unwrap_err();
    assert_eq!(code(gone), "SESSION_NOT_FOUND");
    let gone = store.history().events(doomed, all()).await.unwrap_err();
    assert_eq!(code(gone), "SESSION_NOT_FOUND");
    assert_eq!(store.append(kept, update("more")).await.unwrap(), Seq(2));

    // The pages are freed between other work; each flush is a turn of it.
    loop {
        store.flush(true).await.unwrap();
        let reader = Connection::open(&path).unwrap();
        let free: i64 = reader
            .pragma_query_value(None, "freelist_count", |row| row.get(0))
            .unwrap();
        if free == 0 {
            break;
        }
    }
    // Nor is it in what the database no longer uses.
    store.flush(true).await.unwrap();
    for file in fs::read_dir(path.parent().unwrap()).unwrap() {
        let content = fs::read(file.unwrap().path()).unwrap();
        assert_eq!(memchr::memmem::find(&content, b"secret "), None);
    }
    store.close().await.unwrap();
    let size = fs::metadata(&path).unwrap().len();
    assert!(size < 100_000, "{size}");
    let store = open(&path).await;
    let page = store.events(kept, all()).await.unwrap();
    assert_eq!(texts(&page.events), ["kept", "more"]);
}

#[tokio::test]
async fn a_deletion_that_was_cut_short_is_finished_at_the_next_open() {
    let (_dir, path) = place();
    let (store, id) = store_with(&path, &["{}"]).await;
    store.close().await.unwrap();
    Connection::open(&path)
        .unwrap()
        .execute("UPDATE sessions SET deleting = 1", [])
        .unwrap();
    let store = open(&path).await;
    assert!(store.history().sessions().await.unwrap().is_empty());
    assert!(store.append(id, update("{}")).await.is_err());
    let reader = Connection::open(&path).unwrap();
    loop {
        store.flush(true).await.unwrap();
        let left: i64 = reader
            .query_row("SELECT count(*) FROM sessions", [], |row| row.get(0))
            .unwrap();
        if left == 0 {
            break;
        }
    }
    let events: i64 = reader
        .query_row("SELECT count(*) FROM events", [], |row| row.get(0))
        .unwrap();
    assert_eq!(events, 0);
}

#[tokio::test]
async fn a_cursor_sees_history_then_what_comes_each_once() {
    let (_dir, path) = place();
    let (store, id) = store_with(&path, &["1", "2", "3"]).await;
    store.rest(id); // what was there comes from the file
    let mut cursor = store.cursor(id, Seq(1)).unwrap();
    let writer = {
        let store = store.clone();
        tokio::spawn(async move {
            for n in 4..=5000 {
                store.append(id, update(n.to_string())).await.unwrap();
            }
        })
    };
    let mut seen = Vec::new();
    while seen.last() != Some(&5000) {
        for event in cursor.next(1 << 20).await.unwrap() {
            assert_eq!(event.json.parse::<u64>().unwrap(), event.seq.0);
            // What is in the file is committed; the number of it follows at once.
            while event.seq > store.committed(id).unwrap() {
                tokio::task::yield_now().await;
            }
            seen.push(event.seq.0);
        }
    }
    writer.await.unwrap();
    assert_eq!(seen, (2..=5000).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_cursor_gets_everything_before_it_learns_of_the_end() {
    let (_dir, path) = place();
    let (store, id) = store_with(&path, &[]).await;
    let mut cursor = store.cursor(id, Seq(0)).unwrap();
    for _ in 0..100 {
        store.append(id, update("{}")).await.unwrap();
    }
    store.close().await.unwrap();
    let mut seen = Vec::new();
    let end = loop {
        match cursor.next(10).await {
            Ok(events) => seen.extend(numbers(&events)),
            Err(error) => break error,
        }
    };
    assert_eq!(seen, (1..=100).collect::<Vec<_>>());
    assert_eq!(code(end), "CLIENT_CLOSED");
}

#[tokio::test]
async fn a_closed_store_says_so_and_closing_twice_is_fine() {
    let (_dir, path) = place();
    let (store, id) = store_with(&path, &["{}"]).await;
    let (one, two) = tokio::join!(store.close(), store.close());
    one.unwrap();
    two.unwrap();
    store.close().await.unwrap();
    let error = store.append(id, update("{}")).await.unwrap_err();
    assert_eq!(code(error), "CLIENT_CLOSED");
    assert_eq!(code(store.flush(false).await.unwrap_err()), "CLIENT_CLOSED");
    let page = store.events(id, all()).await.unwrap();
    assert_eq!(page.events.len(), 1, "reads go on");
}

#[tokio::test]
async fn a_dropped_store_still_commits_what_was_appended() {
    let (_dir, path) = place();
    let (store, id) = store_with(&path, &[]).await;
    let mut commits = store.commits();
    for _ in 0..500 {
        store.append(id, update("{}")).await.unwrap();
    }
    drop(store);
    while commits.changed().await.is_ok() {} // ends when the store is gone
    let history = History::open(path).await.unwrap().unwrap();
    assert_eq!(
        history.session(id).await.unwrap().unwrap().last_seq,
        Seq(500)
    );
}

#[tokio::test]
async fn durability_full_works_alike() {
    let (_dir, path) = place();
    let store = Store::open(path.clone(), Durability::Full).await.unwrap();
    let id = store.insert_session(session()).await.unwrap().id;
    store.append(id, update("{}")).await.unwrap();
    store.flush(true).await.unwrap();
    assert_eq!(store.committed(id).unwrap(), Seq(1));
}

#[tokio::test]
async fn appends_wait_while_the_writer_is_stalled() {
    let (_dir, path) = place();
    let (store, id) = store_with(&path, &[]).await;
    // Another program's write transaction stops ours.
    let stall = Connection::open(&path).unwrap();
    stall.execute_batch("BEGIN IMMEDIATE").unwrap();
    let event = update("x".repeat(64 * 1024));
    let mut queued = 0_u64;
    let waiting = loop {
        let mut append = Box::pin(store.append(id, event.clone()));
        let ready = tokio::task::unconstrained(async {
            tokio::select! { biased; seq = &mut append => Some(seq), () = async {} => None }
        })
        .await;
        match ready {
            Some(seq) => assert_eq!(seq.unwrap(), Seq(queued + 1)),
            None => break append,
        }
        queued += 1;
        assert!(queued < 100, "the queue takes more than 4 MiB");
    };
    assert!(queued > 50, "the queue takes less than it should: {queued}");
    assert_eq!(store.committed(id).unwrap(), Seq(0), "nothing is visible");
    stall.execute_batch("ROLLBACK").unwrap();
    assert_eq!(waiting.await.unwrap(), Seq(queued + 1));
    store.flush(false).await.unwrap();
    assert_eq!(store.committed(id).unwrap(), Seq(queued + 1));
}

#[tokio::test]
async fn an_event_larger_than_the_queue_goes_through() {
    let (_dir, path) = place();
    let huge = "x".repeat(20 << 20);
    let (store, id) = store_with(&path, &["1", &huge, "3"]).await;
    let page = store.events(id, all()).await.unwrap();
    assert_eq!(page.events[1].json.len(), huge.len());
    assert_eq!(numbers(&page.events), [1, 2, 3]);
}

#[tokio::test]
async fn the_wal_stays_small_while_others_read() {
    let (_dir, path) = place();
    let (store, id) = store_with(&path, &["{}"]).await;
    let history = store.history();
    let reads = tokio::spawn(async move {
        loop {
            let query = Query {
                max_bytes: 1 << 20,
                ..all()
            };
            history.events(id, query).await.unwrap();
        }
    });
    let event = update("x".repeat(64 * 1024));
    let mut largest = 0;
    for _ in 0..1500 {
        store.append(id, event.clone()).await.unwrap();
        largest = largest.max(fs::metadata(path.with_extension("db-wal")).unwrap().len());
    }
    reads.abort();
    assert!(largest < 48 << 20, "{largest}");
}

// Files that are not what they should be.

#[tokio::test]
async fn damaged_files_are_told_and_left_alone() {
    let (_dir, path) = place();
    let many = vec!["some text that takes space in the file"; 2000];
    let (store, _) = store_with(&path, &many).await;
    store.close().await.unwrap();
    let intact = fs::read(&path).unwrap();
    for damaged in [
        Vec::new(),
        b"garbage".to_vec(),
        vec![0x5a; 64 * 1024],
        intact[..50].to_vec(),
        intact[..4096].to_vec(),
        intact[..intact.len() / 2].to_vec(),
    ] {
        fs::write(&path, &damaged).unwrap();
        assert_eq!(code(open_error(&path).await), "STORE_CORRUPT");
        let error = History::open(path.clone()).await.unwrap_err();
        assert_eq!(code(error), "STORE_CORRUPT");
        assert_eq!(fs::read(&path).unwrap(), damaged, "left as it was");
    }
    fs::write(&path, &intact).unwrap();
    open(&path).await;
}

#[tokio::test]
async fn damage_in_the_middle_is_told_when_it_is_met() {
    let (_dir, path) = place();
    let many = vec!["some text that takes space in the file"; 2000];
    let (store, id) = store_with(&path, &many).await;
    store.close().await.unwrap();
    let mut bytes = fs::read(&path).unwrap();
    let middle = bytes.len() / 2 / 4096 * 4096;
    bytes[middle..middle + 4096].fill(0xff);
    fs::write(&path, &bytes).unwrap();
    let history = History::open(path).await.unwrap().unwrap();
    let error = history.events(id, all()).await.unwrap_err();
    assert_eq!(code(error), "STORE_CORRUPT");
}

#[tokio::test]
async fn another_programs_database_is_refused() {
    let (_dir, path) = place();
    Connection::open(&path)
        .unwrap()
        .execute_batch("CREATE TABLE mine (x)")
        .unwrap();
    assert_eq!(code(open_error(&path).await), "STORE_CORRUPT");
}

#[tokio::test]
async fn a_wal_without_its_database_is_not_taken_for_a_new_vm() {
    let (_dir, path) = place();
    let (store, _) = store_with(&path, &["{}"]).await;
    fs::rename(&path, path.with_extension("moved")).unwrap();
    assert_eq!(code(open_error(&path).await), "STORE_CORRUPT");
    let error = History::open(path).await.unwrap_err();
    assert_eq!(code(error), "STORE_CORRUPT");
    drop(store);
}

#[tokio::test]
async fn a_newer_schema_is_refused_without_a_change() {
    let (_dir, path) = place();
    open(&path).await.close().await.unwrap();
    Connection::open(&path)
        .unwrap()
        .pragma_update(None, "user_version", 99)
        .unwrap();
    assert_eq!(code(open_error(&path).await), "VM_UNSUPPORTED");
    let error = History::open(path.clone()).await.unwrap_err();
    assert_eq!(code(error), "VM_UNSUPPORTED");
    let version: i64 = Connection::open(&path)
        .unwrap()
        .pragma_query_value(None, "user_version", |row| row.get(0))
        .unwrap();
    assert_eq!(version, 99);
}

#[tokio::test]
async fn history_leaves_nothing_behind_that_harms() {
    let (dir, path) = place();
    let (store, id) = store_with(&path, &["{}"]).await;
    store.close().await.unwrap();
    let before = fs::read(&path).unwrap();
    let history = History::open(path.clone()).await.unwrap().unwrap();
    assert_eq!(history.events(id, all()).await.unwrap().events.len(), 1);
    assert_eq!(fs::read(&path).unwrap(), before);
    let store = open(&path).await;
    assert_eq!(store.append(id, update("{}")).await.unwrap(), Seq(2));
    store.close().await.unwrap();
    assert_eq!(history.events(id, all()).await.unwrap().events.len(), 2);
    dir.close().unwrap();
    assert!(matches!(
        history.sessions().await.unwrap_err(),
        StoreError::Io { .. }
    ));
}

// Other processes: this test binary, started again with one of the tests below.

/// Starts `role` in a process of its own; `wrapper` is put before the command.
fn start(role: &str, path: &Path, wrapper: &[&str]) -> Child {
    let exe = std::env::current_exe().unwrap();
    let mut words: Vec<&std::ffi::OsStr> = wrapper.iter().map(std::ffi::OsStr::new).collect();
    words.push(exe.as_os_str());
    Command::new(words[0])
        .args(&words[1..])
        .args(["--exact", "--ignored", "--nocapture", "--test-threads=1"])
        .arg(format!("store::{role}"))
        .env("AGENTVM_TEST_STORE", path)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

/// What makes `start` begin a process that permission bits bind: they do not bind root.
fn as_ordinary_user() -> &'static [&'static str] {
    if nix::unistd::geteuid().is_root() {
        &[
            "setpriv",
            "--reuid=65534",
            "--regid=65534",
            "--clear-groups",
        ]
    } else {
        &["env"]
    }
}

/// The path that `start` handed over.
fn handed_over() -> PathBuf {
    std::env::var_os("AGENTVM_TEST_STORE")
        .expect("started by another test")
        .into()
}

/// Tells the test that started this role. The harness leaves its own line unfinished.
fn report(what: impl std::fmt::Display) {
    println!("\n={what}");
}

/// What a role reports: the lines that begin with `=`.
fn reports(child: &mut Child) -> impl Iterator<Item = String> + use<> {
    BufReader::new(child.stdout.take().unwrap())
        .lines()
        .map_while(Result::ok)
        .filter_map(|line| line.strip_prefix('=').map(ToOwned::to_owned))
}

#[tokio::test]
#[ignore = "a role: appends until it is killed, and reports what a cursor received"]
async fn role_writer() {
    let store = open(&handed_over()).await;
    let id = store.history().sessions().await.unwrap()[0].id;
    let mut cursor = store.cursor(id, store.committed(id).unwrap()).unwrap();
    let appends = async {
        let start = store.committed(id).unwrap().0;
        for (n, length) in (start + 1..).zip((0..500).cycle()) {
            store
                .append(id, update(format!("{n} {}", "x".repeat(length))))
                .await
                .unwrap();
        }
    };
    let emission = async {
        loop {
            cursor.next(1 << 20).await.unwrap();
            report(format!("{}.", cursor.at().0));
        }
    };
    tokio::join!(appends, emission);
}

#[tokio::test]
async fn whatever_a_listener_received_survives_sigkill() {
    let (_dir, path) = place();
    let (store, id) = store_with(&path, &[]).await;
    store.close().await.unwrap();
    let mut survived = 0;
    for round in 0..20 {
        let mut child = start("role_writer", &path, &[]);
        let mut reports = reports(&mut child);
        // Killed after a different number of reports each time, in the middle of appends.
        let some: Vec<_> = reports.by_ref().take(1 + round * 7 % 20).collect();
        child.kill().unwrap();
        // What it had still reported before it died counts too; a line may be cut off.
        let received = some
            .into_iter()
            .chain(reports)
            .filter_map(|report| report.strip_suffix('.')?.parse::<u64>().ok())
            .last()
            .unwrap();
        child.wait().unwrap();

        // A reader first: it has to recover the WAL without writing to the database.
        let history = History::open(path.clone()).await.unwrap().unwrap();
        let events = history.events(id, after(survived)).await.unwrap().events;
        for (n, event) in (survived + 1..).zip(&events) {
            assert_eq!(event.seq, Seq(n));
            assert!(event.json.starts_with(&format!("{n} ")), "{event:?}");
        }
        survived += events.len() as u64;
        assert!(survived >= received, "{survived} of {received} in {round}");
    }
    let checked: String = Connection::open(&path)
        .unwrap()
        .query_row("PRAGMA integrity_check", [], |row| row.get(0))
        .unwrap();
    assert_eq!(checked, "ok");
}

#[tokio::test]
async fn another_process_reads_while_the_first_writes() {
    let (_dir, path) = place();
    let (store, id) = store_with(&path, &["1 "]).await;
    store.close().await.unwrap();
    let mut child = start("role_writer", &path, &[]);
    let mut reports = reports(&mut child);
    reports.next().unwrap();
    let history = History::open(path).await.unwrap().unwrap();
    let mut seen = 0;
    for _ in 0..300 {
        let record = history.session(id).await.unwrap().unwrap();
        let page = history.events(id, after(seen)).await.unwrap();
        for (n, event) in (seen + 1..).zip(&page.events) {
            assert_eq!(event.seq, Seq(n));
        }
        seen = page.events.last().map_or(seen, |event| event.seq.0);
        assert!(seen >= record.last_seq.0);
    }
    assert!(seen > 1);
    child.kill().unwrap();
    child.wait().unwrap();
}

#[tokio::test]
#[ignore = "a role: fills a small file system, then makes room"]
async fn role_disk_full() {
    let dir = handed_over();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=4m", "tmpfs"])
        .arg(&dir)
        .status()
        .unwrap();
    assert!(mounted.success());
    let ballast = dir.join("ballast");
    fs::write(&ballast, vec![0; 2 << 20]).unwrap();
    let path = dir.join("vm.db");
    let (store, id) = store_with(&path, &["first"]).await;
    let mut cursor = store.cursor(id, Seq(0)).unwrap();
    let big = "x".repeat(10_000);
    let full = loop {
        if let Err(error) = store.append(id, update(&big)).await {
            break error;
        }
    };
    assert_eq!(code(full), "STORE_FULL");
    assert_eq!(code(store.flush(true).await.unwrap_err()), "STORE_FULL");
    // What was committed is delivered and readable; the rest was never seen.
    let committed = store.committed(id).unwrap().0;
    assert!(committed > 1);
    let mut seen = Vec::new();
    let end = loop {
        match cursor.next(u64::MAX).await {
            Ok(events) => seen.extend(numbers(&events)),
            Err(error) => break error,
        }
    };
    assert_eq!(code(end), "STORE_FULL");
    assert_eq!(seen, (1..=committed).collect::<Vec<_>>());
    let page = store.history().events(id, all()).await.unwrap();
    assert_eq!(numbers(&page.events), seen);
    assert_eq!(code(store.close().await.unwrap_err()), "STORE_FULL");

    fs::remove_file(ballast).unwrap();
    let store = open(&path).await;
    let next = store.append(id, update("after")).await.unwrap();
    assert_eq!(next, Seq(committed + 1));
    store.flush(true).await.unwrap();
    store.close().await.unwrap();
    report("done");
}

#[tokio::test]
async fn a_full_disk_stops_the_store_and_takes_nothing_back() {
    let dir = tempfile::tempdir().unwrap();
    let mut child = start(
        "role_disk_full",
        dir.path(),
        &["unshare", "--user", "--map-root-user", "--mount"],
    );
    let reports: Vec<_> = reports(&mut child).collect();
    assert!(child.wait().unwrap().success());
    assert_eq!(reports, ["done"]);
}

#[tokio::test]
#[ignore = "a role: an ordinary user meets files that it may only read"]
async fn role_reader_without_rights() {
    let dir = handed_over();
    let path = dir.join("vm.db");
    assert_eq!(code(open_error(&path).await), "EACCES");
    let history = History::open(path.clone()).await.unwrap().unwrap();
    let id = history.sessions().await.unwrap()[0].id;
    let page = history.events(id, all()).await.unwrap();
    assert_eq!(texts(&page.events), ["{}"]);
    let secret = dir.join("secret/vm.db");
    assert_eq!(code(open_error(&secret).await), "EACCES");
    assert_eq!(code(History::open(secret).await.unwrap_err()), "EACCES");
    report("done");
}

#[tokio::test]
async fn a_file_without_write_permission_can_still_be_read() {
    let (dir, path) = place();
    let (store, _) = store_with(&path, &["{}"]).await;
    store.close().await.unwrap();
    let secret = dir.path().join("secret");
    fs::create_dir(&secret).unwrap();
    open(&secret.join("vm.db")).await.close().await.unwrap();
    let mode = |path: &Path, mode| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    };
    mode(&path, 0o444);
    mode(&secret.join("vm.db"), 0);
    mode(&secret, 0o755);
    mode(dir.path(), 0o555);
    let mut child = start("role_reader_without_rights", dir.path(), as_ordinary_user());
    let reports: Vec<_> = reports(&mut child).collect();
    assert!(child.wait().unwrap().success());
    assert_eq!(reports, ["done"]);
    mode(dir.path(), 0o755);
}
