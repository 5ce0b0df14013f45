//! Opening the file: atomically made, checked, and with the settings that writers and readers need.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::unistd::AccessFlags;
use rusqlite::{Connection, OpenFlags};

use super::error::StoreError;
use super::{Durability, Result, schema};

/// How long to wait for a lock that another process holds. Ours never hold one for long: a reader in
/// WAL mode blocks no writer, and recovery after a crash takes the time of reading the WAL.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// The WAL is copied into the database when it has so many 4 KiB pages (8 MiB)…
const CHECKPOINT_PAGES: i64 = 2048;
/// …and keeps at most this size when it starts over.
const WAL_KEPT_BYTES: i64 = 8 << 20;

/// Page cache of the writer: a batch fits, and 500 idle VMs do not fill the memory.
const WRITER_CACHE_KIB: i64 = 2048;

/// What `SQLite` makes of the shared-memory file at first: a smaller one is nobody's.
const SHM_LEAST_BYTES: u64 = 32 << 10;

/// Opens the file for the VM's only writer, making it when it is missing.
pub(super) fn open_writer(path: &Path, durability: Durability) -> Result<Connection> {
    if !exists(path)? {
        create(path)?;
    }
    permitted(path, AccessFlags::R_OK | AccessFlags::W_OK)?;
    permitted(directory(path), AccessFlags::W_OK | AccessFlags::X_OK)?;
    make_companions_writable(path)?;
    let mut connection = Connection::open_with_flags(
        path,
        OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX,
    )
    .map_err(|error| StoreError::opening(path, &error))?;
    let settings = |connection: &Connection| {
        connection.busy_timeout(BUSY_TIMEOUT)?;
        connection.pragma_update(
            None,
            "synchronous",
            match durability {
                Durability::Normal => "NORMAL",
                Durability::Full => "FULL",
            },
        )?;
        // What is deleted is gone, not only forgotten.
        connection.pragma_update(None, "secure_delete", true)?;
        connection.pragma_update(None, "wal_autocheckpoint", CHECKPOINT_PAGES)?;
        connection.pragma_update(None, "journal_size_limit", WAL_KEPT_BYTES)?;
        connection.pragma_update(None, "cache_size", -WRITER_CACHE_KIB)
    };
    settings(&connection).map_err(|error| StoreError::sqlite(path, &connection, &error))?;
    schema::check(path, &connection)?;
    // It is in the file already, unless someone else's tool took it out.
    connection
        .pragma_update(None, "journal_mode", "WAL")
        .map_err(|error| StoreError::sqlite(path, &connection, &error))?;
    schema::migrate(path, &mut connection)?;
    Ok(connection)
}

/// Opens the file for reading only: nothing in it changes.
pub(super) fn open_reader(path: &Path) -> Result<Connection> {
    permitted(path, AccessFlags::R_OK)?;
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags)
        .map_err(|error| StoreError::opening(path, &error))?;
    connection
        .busy_timeout(BUSY_TIMEOUT)
        .map_err(|error| StoreError::sqlite(path, &connection, &error))?;
    match schema::check(path, &connection) {
        // A reader too needs the shared-memory file beside the database. Where it can't be made
        // (read-only media, a backup, a full disk), nobody of this user writes either, and nothing is
        // pending in a WAL: then the file can be read as it stands.
        Err(error) if is_still(path, &error) => {
            let connection = Connection::open_with_flags(
                immutable_uri(path),
                flags | OpenFlags::SQLITE_OPEN_URI,
            )
            .map_err(|error| StoreError::opening(path, &error))?;
            schema::check(path, &connection)?;
            Ok(connection)
        }
        checked => checked.map(|()| connection),
    }
}

/// Whether there is a database; a WAL without its database is damage, not absence.
pub(super) fn exists(path: &Path) -> Result<bool> {
    match fs::metadata(path) {
        Ok(file) if !file.is_file() => Err(StoreError::corrupt(path, "it is not a regular file")),
        // Files are made whole (see `create`), so an empty one was emptied by someone.
        Ok(file) if file.len() == 0 => Err(StoreError::corrupt(path, "it is empty")),
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            // To a disk that is not mounted, say: a new file must not take its place.
            if path.is_symlink() {
                return Err(StoreError::corrupt(
                    path,
                    "it is a link to a file that is not there",
                ));
            }
            if fs::metadata(wal(path)).is_ok_and(|wal| wal.len() > 0) {
                return Err(StoreError::corrupt(
                    path,
                    "it is missing, but its -wal file is there",
                ));
            }
            Ok(false)
        }
        Err(error) => Err(StoreError::io("open", path, &error)),
    }
}

/// The write-ahead log beside the database.
pub(super) fn wal(path: &Path) -> PathBuf {
    beside(path, "-wal")
}

/// Makes the file under another name and renames it when it is complete and on disk: there is never
/// a half-made one, whatever happens.
fn create(path: &Path) -> Result<()> {
    let unfinished = beside(path, ".new");
    for suffix in ["", "-journal", "-wal", "-shm"] {
        remove_if_there(&beside(&unfinished, suffix))?;
    }
    // A stale index of a WAL that is gone.
    for leftover in [wal(path), beside(path, "-shm")] {
        remove_if_there(&leftover)?;
    }
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&unfinished)
        .map_err(|error| StoreError::io("make", path, &error))?;
    let mut connection = Connection::open_with_flags(
        &unfinished,
        OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX,
    )
    .map_err(|error| StoreError::opening(path, &error))?;
    let settings = |connection: &Connection| {
        // A failed attempt is thrown away as a whole: no journal, one sync at the end.
        connection.pragma_update(None, "journal_mode", "OFF")?;
        connection.pragma_update(None, "synchronous", "OFF")?;
        // So that a deleted session's space goes back to the file system in small steps.
        connection.pragma_update(None, "auto_vacuum", "INCREMENTAL")
    };
    settings(&connection).map_err(|error| StoreError::sqlite(path, &connection, &error))?;
    schema::create(path, &mut connection)?;
    connection
        .pragma_update(None, "journal_mode", "WAL")
        .map_err(|error| StoreError::sqlite(path, &connection, &error))?;
    connection
        .close()
        .map_err(|(connection, error)| StoreError::sqlite(path, &connection, &error))?;
    let place = || -> io::Result<()> {
        file.sync_all()?;
        fs::rename(&unfinished, path)?;
        File::open(directory(path))?.sync_all()
    };
    place().map_err(|error| StoreError::io("make", path, &error))
}

fn remove_if_there(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(StoreError::io("remove", path, &error))
        }
        _ => Ok(()),
    }
}

/// Asks by access(2) and not by opening: closing a descriptor of the database would drop the locks
/// that other connections of this process hold on it (POSIX locks belong to the process).
fn permitted(path: &Path, access: AccessFlags) -> Result<()> {
    nix::unistd::eaccess(path, access).map_err(|errno| StoreError::errno("open", path, errno))
}

/// `SQLite` makes the files beside a database with its mode: a reader of one that was read-only for a
/// while has left them read-only.
fn make_companions_writable(path: &Path) -> Result<()> {
    for companion in [wal(path), beside(path, "-shm")] {
        if permitted(&companion, AccessFlags::W_OK).is_ok() {
            continue;
        }
        let made = fs::metadata(path)
            .and_then(|database| fs::set_permissions(&companion, database.permissions()));
        match made {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(StoreError::io("make writable", &companion, &error));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Nobody of this user can write the database, which `error` has kept from being read in the usual
/// way, and nothing of it is outside the one file.
fn is_still(path: &Path, error: &StoreError) -> bool {
    let is_smaller = |path: PathBuf, bytes| match fs::metadata(path) {
        Ok(file) => file.len() < bytes,
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    };
    let unwritten = match error {
        StoreError::Full { .. } => is_smaller(beside(path, "-shm"), SHM_LEAST_BYTES),
        _ => permitted(directory(path), AccessFlags::W_OK).is_err(),
    };
    unwritten && is_smaller(wal(path), 1)
}

fn immutable_uri(path: &Path) -> String {
    let mut uri = "file:".to_owned();
    for byte in path.as_os_str().as_bytes() {
        if byte.is_ascii_alphanumeric() || b"/-_.".contains(byte) {
            uri.push(char::from(*byte));
        } else {
            // Writing to a String does not fail.
            let _ = write!(uri, "%{byte:02X}");
        }
    }
    uri + "?immutable=1"
}

fn directory(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path.as_os_str());
    name.push(suffix);
    PathBuf::from(name)
}
