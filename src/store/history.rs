//! The SQL that reads: from any process, whether the VM runs or not.

use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rusqlite::types::Type;
use rusqlite::{Connection, OptionalExtension, Row, ToSql, Transaction, named_params};
use tokio::sync::Semaphore;

use super::error::StoreError;
use super::record::{Page, PageBuilder, Query, SESSION_UPDATE, SessionRecord, Status, StoredEvent};
use super::schema::{end_of_log, event_id, event_ids, method_condition, seq_of, session_columns};
use super::{Result, blocking, connection};
use crate::ids::{Seq, SessionId};

/// Reads at the same time in this process, over all VMs; more wait.
static READS: Semaphore = Semaphore::const_new(8);

/// The read side of a VM's database.
///
/// Each call opens the file, reads in one short transaction, and closes it: an idle history costs
/// nothing, and no reader keeps a writer's WAL from being emptied for long.
#[derive(Debug, Clone)]
pub struct History {
    path: PathBuf,
}

impl History {
    /// `None` when there is no file yet: the VM never had a session.
    pub async fn open(path: PathBuf) -> Result<Option<Self>> {
        let history = Self::of(path);
        let path = history.path.clone();
        let exists = blocking(&history.path, move || {
            Ok(connection::exists(&path)? && connection::open_reader(&path).map(|_| true)?)
        })
        .await?;
        Ok(exists.then_some(history))
    }

    pub(super) fn of(path: PathBuf) -> Self {
        Self { path }
    }

    /// All sessions, newest first.
    pub async fn sessions(&self) -> Result<Vec<SessionRecord>> {
        self.read(|path, transaction| {
            let records = || -> rusqlite::Result<Vec<SessionRecord>> {
                let columns = session_columns(transaction)?;
                transaction
                    .prepare(&format!(
                        "SELECT {columns} FROM sessions WHERE NOT deleting ORDER BY number DESC"
                    ))?
                    .query_map([], |row| record(transaction, row))?
                    .collect()
            };
            records().map_err(|error| StoreError::sqlite(path, transaction, &error))
        })
        .await
    }

    pub async fn session(&self, id: SessionId) -> Result<Option<SessionRecord>> {
        self.read(move |path, transaction| {
            let found = || {
                let columns = session_columns(transaction)?;
                transaction
                    .query_row(
                        &format!("SELECT {columns} FROM sessions WHERE id = ?1 AND NOT deleting"),
                        [id.to_string()],
                        |row| record(transaction, row),
                    )
                    .optional()
            };
            found().map_err(|error| StoreError::sqlite(path, transaction, &error))
        })
        .await
    }

    /// A session's events after `query.since`, in order.
    pub async fn events(&self, id: SessionId, query: Query) -> Result<Page> {
        self.read(move |path, transaction| {
            let error = |error| StoreError::sqlite(path, transaction, &error);
            let number = number_of(path, transaction, id)?;
            let last = end_of_log(transaction, number)
                .map_err(error)?
                .map_or(Seq(0), |(seq, _)| seq);
            if query.since > last {
                return Err(StoreError::SeqAhead {
                    path: path.to_owned(),
                    session: id,
                    since: query.since,
                    last,
                });
            }
            page(transaction, number, &query).map_err(error)
        })
        .await
    }

    /// A session's last event of this method, if there is one. Its cost does not depend on how many
    /// events the session has.
    pub async fn last_event(&self, id: SessionId, method: &str) -> Result<Option<StoredEvent>> {
        let method = method.to_owned();
        self.read(move |path, transaction| {
            let number = number_of(path, transaction, id)?;
            last_of_method(transaction, number, &method)
                .map_err(|error| StoreError::sqlite(path, transaction, &error))
        })
        .await
    }

    /// Runs `work` in one read transaction of a connection of its own.
    async fn read<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Path, &Transaction<'_>) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let path = self.path.clone();
        // The semaphore is never closed.
        let turn = READS.acquire().await;
        let result = blocking(&self.path, move || {
            let connection = connection::open_reader(&path)?;
            let transaction = connection
                .unchecked_transaction()
                .map_err(|error| StoreError::sqlite(&path, &connection, &error))?;
            work(&path, &transaction)
        })
        .await;
        drop(turn);
        result
    }
}

/// A session's number in this file.
fn number_of(path: &Path, connection: &Connection, id: SessionId) -> Result<i64> {
    connection
        .query_row(
            "SELECT number FROM sessions WHERE id = ?1 AND NOT deleting",
            [id.to_string()],
            |row| row.get(0),
        )
        .optional()
        .map_err(|error| StoreError::sqlite(path, connection, &error))?
        .ok_or_else(|| StoreError::SessionNotFound {
            path: path.to_owned(),
            session: id,
        })
}

fn last_of_method(
    connection: &Connection,
    number: i64,
    method: &str,
) -> rusqlite::Result<Option<StoredEvent>> {
    let condition = method_condition(method);
    let ids = event_ids(number);
    connection
        .query_row(
            &format!(
                "SELECT id, created_at, method, json FROM events
                 WHERE id BETWEEN :first AND :last AND {condition} ORDER BY id DESC LIMIT 1"
            ),
            named_params! { ":first": ids.start(), ":last": ids.end(), ":method": method },
            event,
        )
        .optional()
}

fn page(connection: &Connection, number: i64, query: &Query) -> rusqlite::Result<Page> {
    let condition = query.method.as_deref().map_or("true", method_condition);
    let mut statement = connection.prepare(&format!(
        "SELECT id, created_at, method, json FROM events
         WHERE id > :since AND id <= :last AND {condition} ORDER BY id"
    ))?;
    let since = event_id(number, query.since);
    let last = *event_ids(number).end();
    let mut parameters: Vec<(&str, &dyn ToSql)> = vec![(":since", &since), (":last", &last)];
    if let Some(method) = &query.method {
        parameters.push((":method", method));
    }
    let mut rows = statement.query(parameters.as_slice())?;
    let mut page = PageBuilder::new(query);
    while page.wants_more()
        && let Some(row) = rows.next()?
    {
        if !page.accepts(row.get_ref(3)?.as_bytes()?.len()) {
            break;
        }
        page.push(event(row)?);
    }
    Ok(page.finish())
}

/// Reads a row of `id, created_at, method, json`.
fn event(row: &Row<'_>) -> rusqlite::Result<StoredEvent> {
    let method = row.get_ref(2)?.as_str()?;
    Ok(StoredEvent {
        seq: seq_of(row.get(0)?),
        created_at: row.get(1)?,
        method: if method == SESSION_UPDATE {
            Cow::Borrowed(SESSION_UPDATE)
        } else {
            Cow::Owned(method.to_owned())
        },
        json: Arc::from(row.get_ref(3)?.as_str()?),
    })
}

/// Reads a row of `session_columns`.
fn record(connection: &Connection, row: &Row<'_>) -> rusqlite::Result<SessionRecord> {
    let (last_seq, last_time) = end_of_log(connection, row.get(0)?)?.unwrap_or((Seq(0), 0));
    let id: String = row.get(1)?;
    let status: String = row.get(6)?;
    Ok(SessionRecord {
        id: SessionId::parse(&id).map_err(|_| invalid(1, &id))?,
        agent_type: row.get(2)?,
        agent_session_id: row.get(3)?,
        title: row.get(4)?,
        cwd: row.get(5)?,
        status: Status::parse(&status).ok_or_else(|| invalid(6, &status))?,
        capabilities: row.get(7)?,
        agent_info: row.get(8)?,
        settings: row.get(9)?,
        config: row.get(10)?,
        last_seq,
        created_at: row.get(11)?,
        updated_at: row.get::<_, i64>(12)?.max(last_time),
    })
}

fn invalid(column: usize, value: &str) -> rusqlite::Error {
    rusqlite::Error::FromSqlConversionFailure(
        column,
        Type::Text,
        format!("unexpected value {value:?}").into(),
    )
}
