//! What the store costs: events a second beside a bare `rusqlite` loop, and the latency of one event.
//!
//! `cargo bench --bench store [throughput|latency|history|idle]`; figures depend on the disk, so the
//! competitors take turns in one run, and the disk's own flush time is printed beside them.

#![expect(
    clippy::unwrap_used,
    reason = "a benchmark stops at the first surprise"
)]

use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use agentvm::ids::{Seq, SessionId};
use agentvm::store::{Durability, Event, History, NewSession, Query, Status, Store};
use rusqlite::{Connection, TransactionBehavior, params};
use tokio::runtime::Runtime;

fn main() {
    let only = std::env::args().nth(1).filter(|arg| !arg.starts_with('-'));
    let wanted = |name: &str| only.as_deref().is_none_or(|only| only == name);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        if wanted("throughput") {
            throughput().await;
        }
        if wanted("latency") {
            latency().await;
        }
        if wanted("idle") {
            idle().await;
        }
    });
    if wanted("history") {
        history(&runtime);
    }
}

fn session() -> NewSession {
    NewSession {
        id: SessionId::generate(),
        agent_type: "bench".to_owned(),
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

fn json(size: usize) -> Arc<str> {
    let head = r#"{"jsonrpc":"2.0","method":"session/update","params":{"text":""#;
    let tail = r#""}}"#;
    Arc::from(format!(
        "{head}{}{tail}",
        "x".repeat(size - head.len() - tail.len())
    ))
}

async fn open(dir: &Path) -> (Store, SessionId) {
    let store = Store::open(dir.join("vm.db"), Durability::Normal)
        .await
        .unwrap();
    let id = store.insert_session(session()).await.unwrap().id;
    (store, id)
}

/// Events a second from the first append until a listener has received the last one, and the mean
/// size of a batch.
async fn store_rate(size: usize, count: u32) -> (f64, u32) {
    let dir = tempfile::tempdir().unwrap();
    let (store, id) = open(dir.path()).await;
    let mut cursor = store.cursor(id, Seq(0)).unwrap();
    let commits = *store.commits().borrow();
    let text = json(size);
    let start = Instant::now();
    let producer = {
        let store = store.clone();
        tokio::spawn(async move {
            for _ in 0..count {
                // A copy each, as it would come from an agent's pipe.
                let event = Event::session_update(Arc::from(&*text));
                store.append(id, event).await.unwrap();
            }
        })
    };
    while cursor.at() < Seq(u64::from(count)) {
        cursor.next(1 << 20).await.unwrap();
    }
    let rate = f64::from(count) / start.elapsed().as_secs_f64();
    producer.await.unwrap();
    let batches = *store.commits().borrow() - commits;
    store.close().await.unwrap();
    (rate, count / u32::try_from(batches).unwrap().max(1))
}

/// The same events by a plain loop over `rusqlite`, with the same settings and batch size.
fn bare_rate(size: usize, count: u32, batch: u32) -> f64 {
    let dir = tempfile::tempdir().unwrap();
    let mut connection = Connection::open(dir.path().join("bare.db")).unwrap();
    connection
        .execute_batch(
            "PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL;
             PRAGMA wal_autocheckpoint = 2048;
             CREATE TABLE events (seq INTEGER PRIMARY KEY, created_at INTEGER, method TEXT, json TEXT)",
        )
        .unwrap();
    let text = json(size);
    let start = Instant::now();
    let mut seq = 0;
    while seq < count {
        let transaction = connection
            .transaction_with_behavior(TransactionBehavior::Immediate)
            .unwrap();
        let mut insert = transaction
            .prepare_cached("INSERT INTO events VALUES (?1, ?2, ?3, ?4)")
            .unwrap();
        for _ in 0..batch.min(count - seq) {
            seq += 1;
            let text: Arc<str> = Arc::from(&*text);
            insert
                .execute(params![seq, 1_764_000_000_000_i64, "session/update", text])
                .unwrap();
        }
        drop(insert);
        transaction.commit().unwrap();
    }
    f64::from(count) / start.elapsed().as_secs_f64()
}

async fn throughput() {
    for (size, count) in [(200, 200_000), (3000, 40_000)] {
        let mut ours = Vec::new();
        let mut bare = Vec::new();
        let mut batch = 0;
        for _ in 0..5 {
            let (rate, size_of_batch) = store_rate(size, count).await;
            ours.push(rate);
            batch = size_of_batch;
            bare.push(tokio::task::block_in_place(|| {
                bare_rate(size, count, batch)
            }));
        }
        let (ours, bare) = (median(&mut ours), median(&mut bare));
        println!(
            "throughput {size} B: store with a listener {ours:.0}/s, bare rusqlite {bare:.0}/s \
             ({:.2}), about {batch} events a batch",
            ours / bare
        );
    }
}

/// From `append` to the listener, on a store that has been idle for a moment.
async fn latency() {
    let dir = tempfile::tempdir().unwrap();
    for size in [200, 3000] {
        let (store, id) = open(dir.path()).await;
        let mut cursor = store.cursor(id, Seq(0)).unwrap();
        let text = json(size);
        let (sent, mut received) = tokio::sync::mpsc::channel(1);
        let listener = tokio::spawn(async move {
            while cursor.next(1 << 20).await.is_ok() {
                let _ = sent.send(Instant::now()).await;
            }
        });
        let mut times = Vec::new();
        for _ in 0..3000 {
            tokio::time::sleep(Duration::from_millis(1)).await;
            let start = Instant::now();
            store
                .append(id, Event::session_update(Arc::from(&*text)))
                .await
                .unwrap();
            let end = received.recv().await.unwrap();
            times.push((end - start).as_secs_f64() * 1e3);
        }
        store.close().await.unwrap();
        listener.await.unwrap();
        std::fs::remove_file(dir.path().join("vm.db")).unwrap();
        report(&format!("latency {size} B, append to listener"), &mut times);
    }
    let mut file = std::fs::File::create(dir.path().join("flush")).unwrap();
    let mut times = Vec::new();
    for _ in 0..200 {
        file.write_all(&[0; 4096]).unwrap();
        let start = Instant::now();
        file.sync_data().unwrap();
        times.push(start.elapsed().as_secs_f64() * 1e3);
    }
    report("the disk's fdatasync", &mut times);
}

/// Reading a session of a million events, and opening a file of many sessions, beside the same queries
/// by `rusqlite` alone: a connection for each, as [`History`] has it, and one that stays open.
fn history(runtime: &Runtime) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vm.db");
    let text = json(200);
    let id = runtime.block_on(async {
        let (store, id) = open(dir.path()).await;
        for n in 1..=1_000_000 {
            let mut event = Event::session_update(Arc::clone(&text));
            if n % 1000 == 0 {
                event.method = "_agentvm/turn_end".into();
            }
            store.append(id, event).await.unwrap();
        }
        store.close().await.unwrap();
        id
    });
    let reads = [
        ("first 100", 0, None),
        ("100 in the middle", 500_000, None),
        ("last 100", 999_900, None),
        (
            "100 turn ends from the middle",
            500_000,
            Some("_agentvm/turn_end"),
        ),
        ("none of an absent method", 0, Some("none")),
    ];
    println!("#### A session of 1,000,000 events\n");
    table_head([
        "",
        "p50 ms",
        "p99 ms",
        "× bare p50",
        "× bare p99",
        "× kept open p50",
    ]);
    let opens = |path: &Path| {
        runtime.block_on(async {
            let store = Store::open(path.to_owned(), Durability::Normal).await;
            store.unwrap().close().await.unwrap();
        });
    };
    compare(
        "open and close",
        || opens(&path),
        || drop(bare_open(&path)),
        None,
    );
    let history = runtime.block_on(History::open(path.clone()));
    let history = history.unwrap().unwrap();
    let kept = Connection::open(&path).unwrap();
    for (what, since, method) in reads {
        let query = Query {
            since: Seq(since),
            method: method.map(ToOwned::to_owned),
            limit: Some(100),
            max_bytes: 1 << 20,
        };
        let ours = || {
            let page = history.events(id, query.clone());
            drop(runtime.block_on(page).unwrap());
        };
        let bare = || drop(bare_read(&Connection::open(&path).unwrap(), since, method));
        let kept = || drop(bare_read(&kept, since, method));
        compare(what, ours, bare, Some(&kept));
    }

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vm.db");
    runtime.block_on(async {
        let (store, _) = open(dir.path()).await;
        for _ in 1..1000 {
            let id = store.insert_session(session()).await.unwrap().id;
            let event = Event::session_update(Arc::clone(&text));
            store.append(id, event).await.unwrap();
        }
        store.close().await.unwrap();
    });
    compare(
        "open and close, 1,000 sessions",
        || opens(&path),
        || drop(bare_open(&path)),
        None,
    );
    println!();
}

fn bare_read(connection: &Connection, since: u64, method: Option<&str>) -> Vec<(i64, String)> {
    let condition = method.map_or("true", |_| "method = ?2 AND method <> 'session/update'");
    let mut statement = connection
        .prepare(&format!(
            "SELECT id, json FROM events WHERE id > ?1 AND {condition} ORDER BY id LIMIT 100"
        ))
        .unwrap();
    let since = 1 << 40 | since.cast_signed();
    let row = |row: &rusqlite::Row<'_>| Ok((row.get(0)?, row.get(1)?));
    let rows = match method {
        Some(method) => statement.query_map(params![since, method], row),
        None => statement.query_map([since], row),
    };
    rows.unwrap().map(Result::unwrap).collect()
}

/// What a writer has to know: each session and its last event.
fn bare_open(path: &Path) -> Vec<(String, Option<i64>)> {
    let connection = Connection::open(path).unwrap();
    let mut statement = connection
        .prepare(
            "SELECT id, (SELECT events.id FROM events
                WHERE events.id BETWEEN number << 40 AND number << 40 | 0xFFFFFFFFFF
                ORDER BY events.id DESC LIMIT 1)
             FROM sessions",
        )
        .unwrap();
    let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?)));
    rows.unwrap().map(Result::unwrap).collect()
}

/// A row of a table: the competitors take turns.
fn compare(what: &str, ours: impl Fn(), bare: impl Fn(), kept: Option<&dyn Fn()>) {
    let mut times = [Vec::new(), Vec::new(), Vec::new()];
    for _ in 0..200 {
        let start = Instant::now();
        ours();
        times[0].push(milliseconds(start));
        let start = Instant::now();
        bare();
        times[1].push(milliseconds(start));
        if let Some(kept) = kept {
            let start = Instant::now();
            kept();
            times[2].push(milliseconds(start));
        }
    }
    for times in &mut times {
        times.sort_by(f64::total_cmp);
    }
    let [ours, bare, kept] = times;
    let (p50, p99) = (ours.len() / 2, ours.len() * 99 / 100);
    let of_kept = kept
        .get(p50)
        .map_or_else(|| "–".to_owned(), |kept| format!("{:.1}", ours[p50] / kept));
    println!(
        "| {what} | {:.3} | {:.3} | {:.2} | {:.2} | {of_kept} |",
        ours[p50],
        ours[p99],
        ours[p50] / bare[p50],
        ours[p99] / bare[p99],
    );
}

fn table_head<const N: usize>(columns: [&str; N]) {
    println!("| {} |", columns.join(" | "));
    println!("|---{}|", "|---:".repeat(N - 1));
}

fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

async fn idle() {
    let dir = tempfile::tempdir().unwrap();
    let mut stores = Vec::new();
    let before = resident_kib();
    for n in 0..200 {
        let dir = dir.path().join(n.to_string());
        std::fs::create_dir(&dir).unwrap();
        let (store, id) = open(&dir).await;
        for _ in 0..200 {
            store
                .append(id, Event::session_update(json(3000)))
                .await
                .unwrap();
        }
        store.flush(false).await.unwrap();
        store.rest(id);
        store.flush(false).await.unwrap();
        stores.push(store);
    }
    let each = (resident_kib() - before) / 200;
    println!(
        "idle: {each} KiB resident for each of {} stores that have written and rest",
        stores.len()
    );
}

fn resident_kib() -> i64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .and_then(|value| value.trim().strip_suffix(" kB"))
        .unwrap()
        .trim()
        .parse()
        .unwrap()
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn report(what: &str, times: &mut [f64]) {
    times.sort_by(f64::total_cmp);
    println!(
        "{what}: p50 {:.3} ms, p99 {:.3} ms, max {:.3} ms",
        times[times.len() / 2],
        times[times.len() * 99 / 100],
        times[times.len() - 1]
    );
}
