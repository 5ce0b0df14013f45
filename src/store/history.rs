//! The SQL that reads: from any process, whether the VM runs or not.

use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rusqlite::types::Type;
use rusqlite::{Connection, OptionalExtension, Row, ToSql, Transaction};
use tokio::sync::Semaphore;

use super::error::StoreError;
use super::record::{Page, PageBuilder, Query, SESSION_UPDATE, SessionRecord, Status, StoredEvent};
use super::schema::{event_id, event_ids, last_event, method_condition, seq_of};
use super::{Result, blocking, connection};
use crate::ids::{Seq, SessionId};

/// Reads at the same time in this process, over all VMs; more wait.
static READS: Semaphore = Semaphore::const_new(8);

const RECORD: &str = "SELECT number, id, agent_type, agent_session_id, title, cwd, status,
    capabilities, agent_info, settings, created_at, updated_at FROM sessions WHERE NOT deleting";

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
                transaction
                    .prepare(&format!("{RECORD} ORDER BY number DESC"))?
                    .query_map([], |row| record(transaction, row))?
                    .collect()
            };
            records().map_err(|error| StoreError::sqlite(path, transaction, &error))
        })
        .await
    }

    pub async fn session(&self, id: SessionId) -> Result<Option<SessionRecord>> {
        self.read(move |path, transaction| {
            transaction
                .query_row(&format!("{RECORD} AND id = ?1"), [id.to_string()], |row| {
                    record(transaction, row)
                })
                .optional()
                .map_err(|error| StoreError::sqlite(path, transaction, &error))
        })
        .await
    }

    /// A session's events after `query.since`, in order.
    pub async fn events(&self, id: SessionId, query: Query) -> Result<Page> {
        self.read(move |path, transaction| {
            let error = |error| StoreError::sqlite(path, transaction, &error);
            let number = transaction
                .query_row(
                    "SELECT number FROM sessions WHERE id = ?1 AND NOT deleting",
                    [id.to_string()],
                    |row| row.get(0),
                )
                .optional()
                .map_err(error)?
                .ok_or_else(|| StoreError::SessionNotFound {
                    path: path.to_owned(),
                    session: id,
                })?;
            let last = last_event(transaction, number)
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
        let json = row.get_ref(3)?.as_str()?;
        if !page.accepts(json.len()) {
            break;
        }
        let method = row.get_ref(2)?.as_str()?;
        page.push(StoredEvent {
            seq: seq_of(row.get(0)?),
            created_at: row.get(1)?,
            method: if method == SESSION_UPDATE {
                Cow::Borrowed(SESSION_UPDATE)
            } else {
                Cow::Owned(method.to_owned())
            },
            json: Arc::from(json),
        });
    }
    Ok(page.finish())
}

/// Reads a row of `RECORD`.
fn record(connection: &Connection, row: &Row<'_>) -> rusqlite::Result<SessionRecord> {
    let (last_seq, last_time) = last_event(connection, row.get(0)?)?.unwrap_or((Seq(0), 0));
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
        last_seq,
        created_at: row.get(10)?,
        updated_at: row.get::<_, i64>(11)?.max(last_time),
    })
}

fn invalid(column: usize, value: &str) -> rusqlite::Error {
    rusqlite::Error::FromSqlConversionFailure(
        column,
        Type::Text,
        format!("unexpected value {value:?}").into(),
    )
}
