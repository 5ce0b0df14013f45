//! Files of every released schema version, `store-v*.sql`: they open, read the same, and go on.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;

use agentvm::ids::Seq;
use agentvm::store::{History, SessionRecord, Status, StoredEvent};
use rusqlite::Connection;

use super::{
    all, as_ordinary_user, handed_over, open, place, report, reports, start, texts, update,
};

/// The released versions with the SQL that makes a file as they left it, oldest first.
fn released() -> Vec<(i64, String)> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it");
    let mut found: Vec<_> = fs::read_dir(directory)
        .unwrap()
        .filter_map(|entry| {
            let path = entry.unwrap().path();
            let name = path.file_name()?.to_str()?;
            let version = name.strip_prefix("store-v")?.strip_suffix(".sql")?;
            Some((version.parse().unwrap(), fs::read_to_string(path).unwrap()))
        })
        .collect();
    found.sort_by_key(|(version, _)| *version);
    found
}

fn make(path: &Path, sql: &str) {
    let connection = Connection::open(path).unwrap();
    connection.execute_batch(sql).unwrap();
    connection.close().unwrap();
}

fn version_of(path: &Path) -> i64 {
    let connection = Connection::open(path).unwrap();
    let version = connection.pragma_query_value(None, "user_version", |row| row.get(0));
    version.unwrap()
}

/// The schema's statements, without their layout.
fn schema_of(path: &Path) -> Vec<String> {
    let connection = Connection::open(path).unwrap();
    let mut statement = connection
        .prepare("SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL ORDER BY name")
        .unwrap();
    let statements = statement
        .query_map([], |row| row.get::<_, String>(0))
        .unwrap();
    statements
        .map(|sql| sql.unwrap().split_whitespace().collect::<Vec<_>>().concat())
        .collect()
}

/// Everything that a file tells, in the order of its sessions.
async fn told(history: &History) -> Vec<(SessionRecord, Vec<StoredEvent>)> {
    let mut told = Vec::new();
    for record in history.sessions().await.unwrap() {
        assert_eq!(
            history.session(record.id).await.unwrap().as_ref(),
            Some(&record)
        );
        let events = history.events(record.id, all()).await.unwrap().events;
        told.push((record, events));
    }
    told
}

/// What is in all of the files: two sessions, and a third whose deletion was cut short.
fn assert_is_what_was_stored(told: &[(SessionRecord, Vec<StoredEvent>)]) {
    let [(second, second_events), (first, first_events)] = told else {
        panic!("two sessions: {told:?}");
    };
    assert_eq!(first.title.as_deref(), Some("From an old version"));
    assert_eq!(first.agent_session_id.as_deref(), Some("private"));
    assert_eq!(first.status, Status::Closed);
    assert_eq!(&*first.capabilities, r#"{"loadSession":true}"#);
    assert_eq!(&*first.settings, r#"{"permissionPolicy":"ask"}"#);
    assert_eq!(&*first.config, "{}");
    assert_eq!(texts(first_events), ["1", "2"]);
    assert_eq!(first_events[1].method, "_agentvm/turn_end");
    assert_eq!(
        (first.last_seq, first.updated_at),
        (Seq(2), 1_764_000_000_002)
    );
    assert_eq!((&*second.agent_type, &*second.cwd), ("claude", "/work"));
    assert_eq!(
        (second.last_seq, second.updated_at),
        (Seq(1), 1_764_000_000_020)
    );
    assert_eq!(texts(second_events), [r#"{ "kept":"as it is" }"#]);
}

#[tokio::test]
async fn the_latest_version_is_among_the_released() {
    let (_dir, path) = place();
    open(&path).await.close().await.unwrap();
    let latest = version_of(&path);
    let released: Vec<i64> = released().into_iter().map(|(version, _)| version).collect();
    assert_eq!(released, (1..=latest).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_file_of_any_version_opens_and_goes_on() {
    for (_, sql) in released() {
        let (_dir, path) = place();
        make(&path, &sql);
        let before = told(&History::open(path.clone()).await.unwrap().unwrap()).await;
        assert_is_what_was_stored(&before);
        let store = open(&path).await;
        assert_eq!(told(&store.history()).await, before);
        for (record, events) in &before {
            let next = store.append(record.id, update("next")).await.unwrap();
            assert_eq!(next, record.last_seq.next());
            store.flush(true).await.unwrap();
            let page = store.history().events(record.id, all()).await.unwrap();
            assert_eq!(page.events[..events.len()], *events);
            assert_eq!(texts(&page.events).last(), Some(&"next"));
        }
        store.close().await.unwrap();
    }
}

#[tokio::test]
async fn a_file_of_any_version_becomes_what_a_new_one_is() {
    let (_dir, fresh) = place();
    open(&fresh).await.close().await.unwrap();
    for (version, sql) in released() {
        let (_dir, path) = place();
        make(&path, &sql);
        assert_eq!(version_of(&path), version);
        open(&path).await.close().await.unwrap();
        assert_eq!(version_of(&path), version_of(&fresh), "from {version}");
        assert_eq!(schema_of(&path), schema_of(&fresh), "from {version}");
    }
}

#[tokio::test]
async fn reading_a_file_of_any_version_changes_nothing() {
    for (version, sql) in released() {
        let (_dir, path) = place();
        make(&path, &sql);
        let before = fs::read(&path).unwrap();
        let history = History::open(path.clone()).await.unwrap().unwrap();
        assert_is_what_was_stored(&told(&history).await);
        assert_eq!(fs::read(&path).unwrap(), before, "version {version}");
    }
}

#[tokio::test]
async fn a_reader_goes_on_when_the_file_is_migrated_under_it() {
    let (_dir, path) = place();
    let (_, oldest) = released().remove(0);
    make(&path, &oldest);
    let history = History::open(path.clone()).await.unwrap().unwrap();
    let before = told(&history).await;
    let store = open(&path).await;
    assert_eq!(told(&history).await, before);
    store.close().await.unwrap();
    assert_eq!(told(&history).await, before);
}

#[tokio::test]
#[ignore = "a role: an ordinary user reads files of every version that it may not write"]
async fn role_reader_of_every_version() {
    for (version, _) in released() {
        let path = handed_over().join(format!("{version}.db"));
        let history = History::open(path).await.unwrap().unwrap();
        assert_is_what_was_stored(&told(&history).await);
    }
    report("done");
}

#[tokio::test]
async fn a_file_of_any_version_can_be_read_without_write_permission() {
    let dir = tempfile::tempdir().unwrap();
    for (version, sql) in released() {
        let path = dir.path().join(format!("{version}.db"));
        make(&path, &sql);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o444)).unwrap();
    }
    let mode = |mode| fs::set_permissions(dir.path(), fs::Permissions::from_mode(mode)).unwrap();
    mode(0o555);
    let mut child = start(
        "versions::role_reader_of_every_version",
        dir.path(),
        as_ordinary_user(),
    );
    let reports: Vec<_> = reports(&mut child).collect();
    assert!(child.wait().unwrap().success());
    assert_eq!(reports, ["done"]);
    mode(0o755);
}

#[tokio::test]
#[ignore = "a role: migrates a file, unless it is killed on the way"]
async fn role_migrates() {
    open(&handed_over()).await.close().await.unwrap();
    report("migrated");
}

/// A limit of the size of files kills a process, as suddenly as SIGKILL does, at the first write
/// beyond it: so each limit is another moment of the migration.
#[tokio::test]
async fn a_file_opens_whenever_its_migration_was_killed() {
    let (_, oldest) = released().remove(0);
    let mut killed = 0;
    for limit in (0_u32..).step_by(1030) {
        let (_dir, path) = place();
        make(&path, &oldest);
        // Keeps the index of the WAL in place, which is larger than the limits of interest.
        let other = Connection::open(&path).unwrap();
        let tables = "SELECT count(*) FROM sqlite_schema";
        let _: i64 = other.query_row(tables, [], |row| row.get(0)).unwrap();
        let fsize = format!("--fsize={limit}");
        let wrapper = ["prlimit", "--core=0", &fsize];
        let mut child = start("versions::role_migrates", &path, &wrapper);
        let reports: Vec<_> = reports(&mut child).collect();
        let ended = child.wait().unwrap();

        let version: i64 = other
            .pragma_query_value(None, "user_version", |row| row.get(0))
            .unwrap();
        let history = History::open(path.clone()).await.unwrap().unwrap();
        let before = told(&history).await;
        assert_is_what_was_stored(&before);
        let store = open(&path).await;
        assert_eq!(told(&history).await, before, "killed at {limit}");
        let id = before[0].0.id;
        assert_eq!(store.append(id, update("next")).await.unwrap(), Seq(2));
        store.close().await.unwrap();
        let checked: String = other
            .query_row("PRAGMA integrity_check", [], |row| row.get(0))
            .unwrap();
        assert_eq!(checked, "ok");

        if ended.success() {
            assert_eq!(reports, ["migrated"]);
            break;
        }
        assert_eq!(ended.signal(), Some(libc::SIGXFSZ), "killed at {limit}");
        // Later it can die too, of the deletion that it goes on with.
        killed += u32::from(version == 1);
    }
    assert!(killed > 3, "it was killed {killed} times");
}
