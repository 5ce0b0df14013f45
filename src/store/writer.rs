//! The SQL that writes. Used by one pool thread at a time.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::path::{Path, PathBuf};

use rusqlite::{Connection, TransactionBehavior, named_params, params};

use super::error::StoreError;
use super::log::Log;
use super::record::{NewSession, SessionChange, SessionRecord};
use super::schema::{end_of_log, event_id, event_ids};
use super::shared::{Item, Reply, now_ms};
use super::{Durability, Result, connection};
use crate::ids::{Seq, SessionId};

/// Above this the WAL is emptied even if that means to wait for readers: `SQLite` itself starts it
/// over only when it happens to find no reader in it.
const WAL_MOST_BYTES: u64 = 32 << 20;

/// Steps in which a deleted session goes: about 1 MiB each, between the commits of others.
const DELETED_EVENTS_A_STEP: u32 = 256;
const FREED_PAGES_A_STEP: u32 = 256;

pub(super) struct Writer {
    path: PathBuf,
    connection: Connection,
    durability: Durability,
    /// Whether something was committed that a power cut could take back.
    unsynced: bool,
    /// Size of the WAL at which it is to be emptied.
    wal_bound: u64,
    deletions: VecDeque<Deletion>,
    /// Whether deletions left pages that are to go back to the file system.
    free_pages: bool,
}

/// A session that is invisible already, with events still to be removed.
struct Deletion {
    number: i64,
    /// `None` for one that an earlier process left unfinished.
    reply: Option<Reply<()>>,
}

/// A session that was added, with the number it got.
pub(super) struct Inserted {
    pub(super) number: i64,
    pub(super) record: SessionRecord,
}

impl Writer {
    /// Opens the file and reads where each session's numbering stands.
    pub(super) fn open(
        path: &Path,
        durability: Durability,
    ) -> Result<(Self, HashMap<SessionId, Log>)> {
        let connection = connection::open_writer(path, durability)?;
        let found = read_sessions(&connection)
            .map_err(|error| StoreError::sqlite(path, &connection, &error))?;
        let mut logs = HashMap::new();
        let mut deletions = VecDeque::new();
        for session in found {
            if session.deleting {
                deletions.push_back(Deletion {
                    number: session.number,
                    reply: None,
                });
                continue;
            }
            let id = SessionId::parse(&session.id).map_err(|_| {
                StoreError::corrupt(path, format!("it has a session named {:?}", session.id))
            })?;
            let (last, last_time) = session.last_event.unwrap_or((Seq(0), 0));
            logs.insert(id, Log::new(session.number, last, last_time));
        }
        let writer = Self {
            path: path.to_owned(),
            connection,
            durability,
            // An earlier process may have left commits in the WAL that it never synced.
            unsynced: true,
            wal_bound: WAL_MOST_BYTES,
            deletions,
            free_pages: false,
        };
        Ok((writer, logs))
    }

    /// Writes the batch as one transaction; when this returns, it is committed. After an error,
    /// nothing of it is.
    pub(super) fn write(&mut self, batch: &[Item]) -> Result<Vec<Inserted>> {
        if !batch.iter().any(Item::writes) {
            return Ok(Vec::new());
        }
        let inserted = self.transact(batch).map_err(|error| self.error(&error))?;
        self.unsynced = self.durability == Durability::Normal;
        Ok(inserted)
    }

    /// What is due after a commit: syncing and releasing memory for those who asked, and keeping the
    /// WAL small.
    pub(super) fn follow_up(&mut self, asked: &[Item]) -> Result<()> {
        if asked
            .iter()
            .any(|item| matches!(item, Item::Flush { sync: true, .. }))
        {
            self.sync()?;
        }
        if asked.iter().any(|item| matches!(item, Item::ReleaseMemory)) {
            self.connection
                .release_memory()
                .map_err(|error| self.error(&error))?;
        }
        self.bound_wal()
    }

    fn transact(&mut self, batch: &[Item]) -> rusqlite::Result<Vec<Inserted>> {
        let transaction = self
            .connection
            .transaction_with_behavior(TransactionBehavior::Immediate)?;
        let mut inserted = Vec::new();
        {
            let mut insert_event = transaction.prepare_cached(
                "INSERT INTO events (id, created_at, method, json) VALUES (?1, ?2, ?3, ?4)",
            )?;
            for item in batch {
                match item {
                    Item::Event { number, event, .. } => {
                        insert_event.execute(params![
                            event_id(*number, event.seq),
                            event.created_at,
                            event.method,
                            event.json,
                        ])?;
                    }
                    Item::Insert { session, .. } => {
                        inserted.push(insert_session(&transaction, session)?);
                    }
                    Item::Update { number, change, .. } => {
                        update_session(&transaction, *number, change)?;
                    }
                    Item::Delete { number, .. } => {
                        transaction.execute(
                            "UPDATE sessions SET deleting = 1 WHERE number = ?1",
                            [number],
                        )?;
                    }
                    Item::Flush { .. } | Item::ReleaseMemory | Item::Close => {}
                }
            }
        }
        transaction.commit()?;
        Ok(inserted)
    }

    /// Makes all commits survive a power cut.
    fn sync(&mut self) -> Result<()> {
        if !self.unsynced {
            return Ok(());
        }
        // What a checkpoint moved from the WAL to the database, the checkpoint has synced. Opening
        // the WAL here is safe: the locks that closing a descriptor would drop are not on this file.
        let wal = connection::wal(&self.path);
        match File::open(&wal).and_then(|file| file.sync_data()) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(StoreError::io("sync", &wal, &error));
            }
            _ => {}
        }
        self.unsynced = false;
        Ok(())
    }

    fn bound_wal(&mut self) -> Result<()> {
        let wal = connection::wal(&self.path);
        let size = match std::fs::metadata(&wal) {
            Ok(file) => file.len(),
            // Nothing was written yet.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => 0,
            Err(error) => return Err(StoreError::io("look at", &wal, &error)),
        };
        if size <= self.wal_bound {
            return Ok(());
        }
        if self.checkpoint()? {
            self.wal_bound = WAL_MOST_BYTES;
            return Ok(());
        }
        // Readers of ours end in milliseconds: this is another program with a transaction open. Not
        // every batch is to wait for it in vain.
        self.wal_bound = size + WAL_MOST_BYTES;
        tracing::warn!(
            path = %self.path.display(),
            size,
            "another program reads the database for long: its WAL grows until it ends"
        );
        Ok(())
    }

    /// Copies the whole WAL into the database and empties it; `false` if a reader prevents that.
    fn checkpoint(&self) -> Result<bool> {
        self.connection
            .query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| {
                row.get::<_, i64>(0)
            })
            .map(|busy| busy == 0)
            .map_err(|error| self.error(&error))
    }

    pub(super) fn has_deletions(&self) -> bool {
        self.free_pages || !self.deletions.is_empty()
    }

    pub(super) fn delete_later(&mut self, number: i64, reply: Option<Reply<()>>) {
        self.deletions.push_back(Deletion { number, reply });
    }

    /// Removes one step's worth of a deleted session; then frees the pages.
    pub(super) fn delete_some(&mut self) -> Result<()> {
        if let Some(deletion) = self.deletions.front() {
            let finished = self
                .delete_events(deletion.number)
                .map_err(|error| self.error(&error))?;
            if finished && let Some(deletion) = self.deletions.pop_front() {
                self.free_pages = true;
                if let Some(reply) = deletion.reply {
                    drop(reply.send(Ok(())));
                }
            }
        } else if self.free_pages {
            self.free_pages = self.free_some().map_err(|error| self.error(&error))?;
            if !self.free_pages {
                // What was deleted is still in the WAL. Another program that reads keeps it there until
                // the next checkpoint.
                self.checkpoint()?;
            }
        }
        self.unsynced = self.durability == Durability::Normal;
        self.bound_wal()
    }

    fn delete_events(&self, number: i64) -> rusqlite::Result<bool> {
        let ids = event_ids(number);
        let transaction = self.connection.unchecked_transaction()?;
        let deleted = transaction.execute(
            "DELETE FROM events WHERE id IN
               (SELECT id FROM events WHERE id BETWEEN ?1 AND ?2 LIMIT ?3)",
            params![ids.start(), ids.end(), DELETED_EVENTS_A_STEP],
        )?;
        let finished = deleted < DELETED_EVENTS_A_STEP as usize;
        if finished {
            transaction.execute("DELETE FROM sessions WHERE number = ?1", [number])?;
        }
        transaction.commit()?;
        Ok(finished)
    }

    /// Gives free pages back to the file system. Whether there are more.
    fn free_some(&self) -> rusqlite::Result<bool> {
        let mut statement = self
            .connection
            .prepare(&format!("PRAGMA incremental_vacuum({FREED_PAGES_A_STEP})"))?;
        let mut rows = statement.query([])?;
        // It frees a page a step.
        while rows.next()?.is_some() {}
        let left: i64 = self
            .connection
            .pragma_query_value(None, "freelist_count", |row| row.get(0))?;
        Ok(left > 0)
    }

    /// Answers those who wait for a deletion when the store fails. Their sessions stay invisible; the
    /// next to open the file finishes the work.
    pub(super) fn refuse_deletions(&mut self, error: &StoreError) {
        self.free_pages = false;
        for deletion in self.deletions.drain(..) {
            if let Some(reply) = deletion.reply {
                drop(reply.send(Err(error.clone())));
            }
        }
    }

    pub(super) fn close(mut self) -> Result<()> {
        // Deleted sessions are gone for everyone; what is left of them goes at the next open.
        for deletion in self.deletions.drain(..) {
            if let Some(reply) = deletion.reply {
                drop(reply.send(Ok(())));
            }
        }
        // A reader may prevent the checkpoint. Nothing is lost then: the WAL stays beside the file.
        self.checkpoint()?;
        let path = self.path;
        self.connection
            .close()
            .map_err(|(connection, error)| StoreError::sqlite(&path, &connection, &error))
    }

    fn error(&self, error: &rusqlite::Error) -> StoreError {
        StoreError::sqlite(&self.path, &self.connection, error)
    }
}

impl Item {
    const fn writes(&self) -> bool {
        match self {
            Self::Event { .. }
            | Self::Insert { .. }
            | Self::Update { .. }
            | Self::Delete { .. } => true,
            Self::Flush { .. } | Self::ReleaseMemory | Self::Close => false,
        }
    }
}

pub(super) struct Found {
    number: i64,
    id: String,
    deleting: bool,
    last_event: Option<(Seq, i64)>,
}

pub(super) fn read_sessions(connection: &Connection) -> rusqlite::Result<Vec<Found>> {
    let mut statement = connection.prepare("SELECT number, id, deleting FROM sessions")?;
    let rows = statement.query_map([], |row| {
        let number = row.get(0)?;
        Ok(Found {
            number,
            id: row.get(1)?,
            deleting: row.get(2)?,
            last_event: end_of_log(connection, number)?,
        })
    })?;
    rows.collect()
}

fn insert_session(connection: &Connection, session: &NewSession) -> rusqlite::Result<Inserted> {
    let now = now_ms();
    connection
        .prepare_cached(
            "INSERT INTO sessions (id, agent_type, agent_session_id, title, cwd, status,
                 capabilities, agent_info, settings, config, created_at, updated_at)
             VALUES (:id, :agent_type, :agent_session_id, :title, :cwd, :status,
                 :capabilities, :agent_info, :settings, :config, :now, :now)",
        )?
        .execute(named_params! {
            ":id": session.id.to_string(),
            ":agent_type": session.agent_type,
            ":agent_session_id": session.agent_session_id,
            ":title": session.title,
            ":cwd": session.cwd,
            ":status": session.status.as_str(),
            ":capabilities": session.capabilities,
            ":agent_info": session.agent_info,
            ":settings": session.settings,
            ":config": session.config,
            ":now": now,
        })?;
    let session = session.clone();
    Ok(Inserted {
        number: connection.last_insert_rowid(),
        record: SessionRecord {
            id: session.id,
            agent_type: session.agent_type,
            agent_session_id: session.agent_session_id,
            title: session.title,
            cwd: session.cwd,
            status: session.status,
            capabilities: session.capabilities,
            agent_info: session.agent_info,
            settings: session.settings,
            config: session.config,
            last_seq: Seq(0),
            created_at: now,
            updated_at: now,
        },
    })
}

fn update_session(
    connection: &Connection,
    number: i64,
    change: &SessionChange,
) -> rusqlite::Result<()> {
    connection
        .prepare_cached(
            "UPDATE sessions SET
                 agent_session_id = coalesce(:agent_session_id, agent_session_id),
                 title = coalesce(:title, title),
                 cwd = coalesce(:cwd, cwd),
                 status = coalesce(:status, status),
                 capabilities = coalesce(:capabilities, capabilities),
                 agent_info = coalesce(:agent_info, agent_info),
                 settings = coalesce(:settings, settings),
                 config = coalesce(:config, config),
                 updated_at = max(:now, updated_at)
             WHERE number = :number",
        )?
        .execute(named_params! {
            ":number": number,
            ":agent_session_id": change.agent_session_id,
            ":title": change.title,
            ":cwd": change.cwd,
            ":status": change.status.map(super::Status::as_str),
            ":capabilities": change.capabilities,
            ":agent_info": change.agent_info,
            ":settings": change.settings,
            ":config": change.config,
            ":now": now_ms(),
        })?;
    Ok(())
}
