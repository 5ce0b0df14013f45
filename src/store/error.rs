//! What can go wrong with a VM's database, each variant with the file it is about.

use std::io;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use rusqlite::{Connection, ErrorCode, ffi};
use thiserror::Error;

use crate::error::{Code, Error};
use crate::ids::{Seq, SessionId};

#[derive(Debug, Clone, Error)]
pub enum StoreError {
    /// The file is not an intact database of ours.
    #[error(
        "{path:?} is damaged: {detail}. The VM's files are not affected. Restore the file from a \
         backup, or move it and its -wal and -shm files aside to go on without its sessions \
         (`sqlite3 {path:?} .recover` salvages what is readable)"
    )]
    Corrupt { path: PathBuf, detail: String },
    /// A later release of agentvm wrote the file.
    #[error(
        "{path:?} has schema version {found}, this agentvm knows {known}: open it with the newer \
         agentvm that wrote it. Nothing was changed"
    )]
    NewerSchema {
        path: PathBuf,
        found: i64,
        known: i64,
    },
    /// No space is left for the file.
    #[error(
        "no space for {path:?} ({detail}): free disk space or raise the quota, then resume the \
         session. What was stored before is kept"
    )]
    Full { path: PathBuf, detail: String },
    /// The file or its directory can't be used.
    #[error("can't {op} {path:?}: {}. {}", .errno.desc(), remedy(*.errno))]
    Io {
        op: &'static str,
        path: PathBuf,
        errno: Errno,
    },
    /// Another program keeps the file locked for longer than we wait.
    #[error(
        "{path:?} is locked by another program (a backup tool, a `sqlite3` shell?): end its \
         transaction, then try again"
    )]
    Busy { path: PathBuf },
    #[error("no session {session} in {path:?}: listPersistedSessions() lists them")]
    SessionNotFound { path: PathBuf, session: SessionId },
    /// A reader claims to have seen events that do not exist.
    #[error(
        "since {} is beyond the last event ({}) of session {session} in {path:?}: a power cut or a \
         restored backup took back what came after, or the number is another session's; read again \
         from {}", .since.0, .last.0, .last.0
    )]
    SeqAhead {
        path: PathBuf,
        session: SessionId,
        since: Seq,
        last: Seq,
    },
    /// The store was closed.
    #[error("{path:?} is closed: open the VM again to write to it")]
    Closed { path: PathBuf },
    /// A defect of agentvm: the store stops, so that nothing is numbered that was not written.
    #[error(
        "writing {path:?} was stopped by a defect of agentvm: {message}. What was stored before is \
         kept; open the VM again, and report this"
    )]
    Panicked { path: PathBuf, message: String },
    /// `SQLite` refused for a reason that none of the above covers.
    #[error("{path:?}: {detail}. What was stored before is kept; open the VM again")]
    Sqlite { path: PathBuf, detail: String },
}

fn remedy(errno: Errno) -> &'static str {
    match errno {
        Errno::EACCES | Errno::EPERM => {
            "Give this user read and write permission to the file and its directory"
        }
        Errno::EROFS => "Remount the file system writable, or use another data directory",
        Errno::EMFILE | Errno::ENFILE => "Raise the limit of open files (ulimit -n)",
        Errno::ENOENT => "The VM's directory is gone: it was deleted or moved",
        _ => "See the system log for the disk's state",
    }
}

impl StoreError {
    pub(super) fn corrupt(path: &Path, detail: impl Into<String>) -> Self {
        Self::Corrupt {
            path: path.to_owned(),
            detail: detail.into(),
        }
    }

    pub(super) fn io(op: &'static str, path: &Path, error: &io::Error) -> Self {
        Self::errno(
            op,
            path,
            Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)),
        )
    }

    pub(super) fn errno(op: &'static str, path: &Path, errno: Errno) -> Self {
        if is_full(errno) {
            return Self::Full {
                path: path.to_owned(),
                detail: errno.desc().to_owned(),
            };
        }
        Self::Io {
            op,
            path: path.to_owned(),
            errno,
        }
    }

    /// Translates an error of a connection that exists (and so may know the errno).
    pub(super) fn sqlite(path: &Path, connection: &Connection, error: &rusqlite::Error) -> Self {
        // SAFETY: the handle is valid as long as `connection` is borrowed; the call only reads it.
        let raw = unsafe { ffi::sqlite3_system_errno(connection.handle()) };
        Self::classify(path, Errno::from_raw(raw), error)
    }

    /// Translates an error of opening, where no connection came to be.
    pub(super) fn opening(path: &Path, error: &rusqlite::Error) -> Self {
        Self::classify(path, Errno::UnknownErrno, error)
    }

    fn classify(path: &Path, errno: Errno, error: &rusqlite::Error) -> Self {
        let rusqlite::Error::SqliteFailure(failure, _) = error else {
            // What remains are rows that are not what the schema promises.
            return Self::corrupt(path, error.to_string());
        };
        let known = errno != Errno::UnknownErrno;
        match failure.code {
            ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase => {
                Self::corrupt(path, error.to_string())
            }
            ErrorCode::SystemIoFailure
                if matches!(
                    failure.extended_code,
                    ffi::SQLITE_IOERR_SHORT_READ | ffi::SQLITE_IOERR_CORRUPTFS
                ) =>
            {
                Self::corrupt(path, error.to_string())
            }
            ErrorCode::DiskFull => Self::Full {
                path: path.to_owned(),
                detail: "the disk is full".to_owned(),
            },
            ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked => Self::Busy {
                path: path.to_owned(),
            },
            ErrorCode::ReadOnly => Self::errno("write", path, Errno::EROFS),
            ErrorCode::PermissionDenied => Self::errno("use", path, Errno::EACCES),
            // `sqlite3_system_errno` is only meaningful for these two.
            ErrorCode::CannotOpen if known => Self::errno("open", path, errno),
            ErrorCode::SystemIoFailure if known => Self::errno("use", path, errno),
            ErrorCode::SystemIoFailure => Self::errno("use", path, Errno::EIO),
            _ => Self::Sqlite {
                path: path.to_owned(),
                detail: error.to_string(),
            },
        }
    }
}

/// A full disk, an exhausted quota, a file over the process's size limit.
const fn is_full(errno: Errno) -> bool {
    matches!(errno, Errno::ENOSPC | Errno::EDQUOT | Errno::EFBIG)
}

impl From<StoreError> for Error {
    fn from(error: StoreError) -> Self {
        let code = match &error {
            StoreError::Corrupt { .. } => Code::StoreCorrupt,
            // Not STORE_CORRUPT: who moves such a file aside loses a healthy one.
            StoreError::NewerSchema { .. } => Code::VmUnsupported,
            StoreError::Full { .. } => Code::StoreFull,
            StoreError::Io { errno, .. } => Code::from(*errno),
            StoreError::Busy { .. } => Code::VmBusy,
            StoreError::SessionNotFound { .. } => Code::SessionNotFound,
            StoreError::SeqAhead { .. } => Code::SeqAhead,
            StoreError::Closed { .. } => Code::ClientClosed,
            StoreError::Panicked { .. } | StoreError::Sqlite { .. } => Code::Internal,
        };
        Self::new(code, error.to_string())
    }
}
