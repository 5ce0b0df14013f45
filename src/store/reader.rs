//! The SQL that reads. No query looks at more rows than it delivers, however long the log is.

use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rusqlite::types::Type;
use rusqlite::{Connection, OptionalExtension, Row, ToSql, named_params};

use super::error::StoreError;
use super::record::{Page, PageBuilder, Query, SESSION_UPDATE, SessionRecord, Status, StoredEvent};
use super::schema::{end_of_log, event_id, event_ids, method_condition, seq_of, session_columns};
use super::{Result, connection};
use crate::ids::{Seq, SessionId};

/// A database in a read transaction: all answers are of the same moment.
pub(super) struct Reader {
    path: PathBuf,
    connection: Connection,
}

impl Reader {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let reader = Self {
            path: path.to_owned(),
            connection: connection::open_reader(path)?,
        };
        match reader.connection.execute_batch("BEGIN") {
            Ok(()) => Ok(reader),
            Err(error) => Err(reader.error(&error)),
        }
    }

    #[cfg(test)]
    pub(super) const fn connection(&self) -> &Connection {
        &self.connection
    }

    /// All sessions, newest first.
    pub(super) fn sessions(&self) -> Result<Vec<SessionRecord>> {
        let records = || -> rusqlite::Result<Vec<SessionRecord>> {
            let columns = session_columns(&self.connection)?;
            self.connection
                .prepare(&format!(
                    "SELECT {columns} FROM sessions WHERE NOT deleting ORDER BY number DESC"
                ))?
                .query_map([], |row| record(&self.connection, row))?
                .collect()
        };
        records().map_err(|error| self.error(&error))
    }

    pub(super) fn session(&self, id: SessionId) -> Result<Option<SessionRecord>> {
        let found = || {
            let columns = session_columns(&self.connection)?;
            self.connection
                .query_row(
                    &format!("SELECT {columns} FROM sessions WHERE id = ?1 AND NOT deleting"),
                    [id.to_string()],
                    |row| record(&self.connection, row),
                )
                .optional()
        };
        found().map_err(|error| self.error(&error))
    }

    /// A session's events after `query.since`, in order.
    pub(super) fn events(&self, id: SessionId, query: &Query) -> Result<Page> {
        let number = self.number(id)?;
        let last = end_of_log(&self.connection, number)
            .map_err(|error| self.error(&error))?
            .map_or(Seq(0), |(seq, _)| seq);
        if query.since > last {
            return Err(StoreError::SeqAhead {
                path: self.path.clone(),
                session: id,
                since: query.since,
                last,
            });
        }
        page(&self.connection, number, query).map_err(|error| self.error(&error))
    }

    /// A session's last event of this method.
    pub(super) fn last_event(&self, id: SessionId, method: &str) -> Result<Option<StoredEvent>> {
        let number = self.number(id)?;
        last_of_method(&self.connection, number, method).map_err(|error| self.error(&error))
    }

    /// A session's number in this file.
    fn number(&self, id: SessionId) -> Result<i64> {
        self.connection
            .query_row(
                "SELECT number FROM sessions WHERE id = ?1 AND NOT deleting",
                [id.to_string()],
                |row| row.get(0),
            )
            .optional()
            .map_err(|error| self.error(&error))?
            .ok_or_else(|| StoreError::SessionNotFound {
                path: self.path.clone(),
                session: id,
            })
    }

    fn error(&self, error: &rusqlite::Error) -> StoreError {
        StoreError::sqlite(&self.path, &self.connection, error)
    }
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
