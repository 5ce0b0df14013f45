//! Events into `SQLite` and nothing else, with the settings of agentvm's writer: `<file> <size> <count>
//! <batch>` writes `count` texts of `size` bytes in transactions of `batch`, and prints the
//! milliseconds that it took.
//!
//! Run by `npm run bench -- events`, as what agentvm is held against.

use std::error::Error;
use std::sync::Arc;
use std::time::Instant;

use rusqlite::{Connection, TransactionBehavior, params};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [path, size, count, batch] = &arguments[..] else {
        return Err("usage: bare <file> <size> <count> <batch>".into());
    };
    let (size, count, batch) = (size.parse()?, count.parse::<i64>()?, batch.parse::<i64>()?);
    let mut connection = Connection::open(path)?;
    connection.execute_batch(
        "PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL; PRAGMA wal_autocheckpoint = 2048;
         CREATE TABLE events (seq INTEGER PRIMARY KEY, created_at INTEGER, method TEXT, json TEXT)",
    )?;
    let text = "x".repeat(size);
    let start = Instant::now();
    let mut seq = 0;
    while seq < count {
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let mut insert =
            transaction.prepare_cached("INSERT INTO events VALUES (?1, ?2, ?3, ?4)")?;
        for _ in 0..batch.min(count - seq) {
            seq += 1;
            // A copy of its own, as of a text that came from a pipe.
            let text: Arc<str> = Arc::from(&*text);
            insert.execute(params![seq, 1_764_000_000_000_i64, "session/update", text])?;
        }
        drop(insert);
        transaction.commit()?;
    }
    println!("{}", start.elapsed().as_secs_f64() * 1e3);
    Ok(())
}
