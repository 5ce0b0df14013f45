//! The tables, and how older files become current ones.
//!
//! Events are one B-tree keyed by session and number packed into `SQLite`'s 64-bit row id: 23 bits
//! of session, 40 bits of number. Measured against a `(session, seq)` primary key `WITHOUT ROWID`
//! and against a separate unique index, it writes 1.4 times as many 200-byte events a second, and a
//! 3 KB event stays in its leaf page instead of going to an overflow page. The view
//! `session_events` has the two columns for people with a `sqlite3` shell.

use std::ops::RangeInclusive;
use std::path::Path;

use rusqlite::{Connection, OptionalExtension, params};
use rusqlite_migration::{M, Migrations};

use super::error::StoreError;
use super::{Result, record::SESSION_UPDATE};
use crate::ids::Seq;

/// Marks a file as ours: "avm1".
const APPLICATION_ID: i32 = 0x6176_6d31;

/// Released migrations never change; a new version is a new entry. All that are due run in one
/// transaction: a crash leaves the version of before.
const VERSIONS: &[M<'static>] = &[
    M::up(
        "CREATE TABLE sessions (
        number INTEGER PRIMARY KEY CHECK (number BETWEEN 1 AND 0x7FFFFF),
        id TEXT NOT NULL UNIQUE,
        agent_type TEXT NOT NULL,
        agent_session_id TEXT,
        title TEXT,
        cwd TEXT NOT NULL,
        status TEXT NOT NULL,
        capabilities TEXT NOT NULL,
        agent_info TEXT NOT NULL,
        settings TEXT NOT NULL,
        created_at INTEGER NOT NULL,
        updated_at INTEGER NOT NULL,
        deleting INTEGER NOT NULL DEFAULT 0
    ) STRICT;
    CREATE TABLE events (
        id INTEGER PRIMARY KEY,
        created_at INTEGER NOT NULL,
        method TEXT NOT NULL,
        json TEXT NOT NULL
    ) STRICT;
    CREATE INDEX events_of_rare_methods ON events (method) WHERE method <> 'session/update';
    CREATE VIEW session_events AS
        SELECT sessions.id AS session, events.id & 0xFFFFFFFFFF AS seq, events.created_at,
               events.method, events.json
        FROM sessions JOIN events
          ON events.id BETWEEN sessions.number << 40 AND sessions.number << 40 | 0xFFFFFFFFFF
        WHERE NOT sessions.deleting;",
    ),
    M::up("ALTER TABLE sessions ADD COLUMN config TEXT NOT NULL DEFAULT '{}'"),
];

const MIGRATIONS: Migrations<'static> = Migrations::from_slice(VERSIONS);

const LATEST: i64 = 2;

const SEQ_BITS: u32 = 40;
const SEQ_MASK: i64 = (1 << SEQ_BITS) - 1;

/// The row id of an event of the session with this number.
pub(super) const fn event_id(session: i64, seq: Seq) -> i64 {
    session << SEQ_BITS | (seq.0.cast_signed() & SEQ_MASK)
}

pub(super) const fn seq_of(event_id: i64) -> Seq {
    Seq((event_id & SEQ_MASK).cast_unsigned())
}

/// The row ids that a session's events can have.
pub(super) const fn event_ids(session: i64) -> RangeInclusive<i64> {
    event_id(session, Seq(0))..=event_id(session, Seq(SEQ_MASK.cast_unsigned()))
}

/// The condition that selects a method's events through the cheapest path: nearly all events are
/// session updates, which are therefore not in the index.
pub(super) fn method_condition(method: &str) -> &'static str {
    if method == SESSION_UPDATE {
        "method = :method"
    } else {
        "method = :method AND method <> 'session/update'"
    }
}

/// The columns of a session, for a file that has any version: who only reads does not migrate.
pub(super) fn session_columns(connection: &Connection) -> rusqlite::Result<String> {
    let config = if version(connection)? < 2 {
        "'{}'"
    } else {
        "config"
    };
    Ok(format!(
        "number, id, agent_type, agent_session_id, title, cwd, status, capabilities, agent_info,
         settings, {config} AS config, created_at, updated_at"
    ))
}

fn version(connection: &Connection) -> rusqlite::Result<i64> {
    connection.pragma_query_value(None, "user_version", |row| row.get(0))
}

/// Number and time of a session's last event.
pub(super) fn end_of_log(
    connection: &Connection,
    session: i64,
) -> rusqlite::Result<Option<(Seq, i64)>> {
    let ids = event_ids(session);
    connection
        .prepare_cached(
            "SELECT id, created_at FROM events WHERE id BETWEEN ?1 AND ?2 ORDER BY id DESC LIMIT 1",
        )?
        .query_row(params![ids.start(), ids.end()], |row| {
            Ok((seq_of(row.get(0)?), row.get(1)?))
        })
        .optional()
}

/// Makes the tables in a new, empty file.
pub(super) fn create(path: &Path, connection: &mut Connection) -> Result<()> {
    connection
        .pragma_update(None, "application_id", APPLICATION_ID)
        .map_err(|error| StoreError::sqlite(path, connection, &error))?;
    migrate(path, connection)
}

/// Brings a file that [`check`] accepted to the latest version.
pub(super) fn migrate(path: &Path, connection: &mut Connection) -> Result<()> {
    MIGRATIONS
        .to_latest(connection)
        .map_err(|error| match error {
            rusqlite_migration::Error::RusqliteError { err, .. } => {
                StoreError::sqlite(path, connection, &err)
            }
            other => StoreError::Sqlite {
                path: path.to_owned(),
                detail: format!("migrating its schema failed: {other}"),
            },
        })
}

/// Whether the file is a database of ours, in a version that this code reads.
pub(super) fn check(path: &Path, connection: &Connection) -> Result<()> {
    let error = |error| StoreError::sqlite(path, connection, &error);
    let application_id: i32 = connection
        .pragma_query_value(None, "application_id", |row| row.get(0))
        .map_err(error)?;
    if application_id != APPLICATION_ID {
        return Err(StoreError::corrupt(path, "it is not a database of agentvm"));
    }
    let found = version(connection).map_err(error)?;
    if found > LATEST {
        return Err(StoreError::NewerSchema {
            path: path.to_owned(),
            found,
            known: LATEST,
        });
    }
    if found < 1 {
        return Err(StoreError::corrupt(path, "its tables were never made"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn migrations_are_well_formed_and_end_at_the_latest_version() {
        MIGRATIONS.validate().expect("valid migrations");
        let mut connection = Connection::open_in_memory().expect("a database");
        create(Path::new("memory"), &mut connection).expect("a schema");
        assert_eq!(version(&connection), Ok(LATEST));
    }

    #[test]
    fn an_event_id_holds_session_and_number() {
        let id = event_id(0x7F_FFFF, Seq(0xFF_FFFF_FFFF));
        assert_eq!(id, i64::MAX);
        assert_eq!(seq_of(id), Seq(0xFF_FFFF_FFFF));
        assert!(event_ids(2).contains(&event_id(2, Seq(1))));
        assert!(!event_ids(2).contains(&event_id(3, Seq(0))));
    }
}
