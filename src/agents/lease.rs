//! Who runs on what of the store: removal leaves it alone.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::error::AgentError;
use super::install::{LOCK_MODE, blocking, locks, make_locks, store};

/// How often a lock is tried while somebody removes what it stands for.
const POLL: Duration = Duration::from_millis(20);

/// Keeps something of the store from being removed, by whatever process, until the last clone is
/// dropped or the process ends.
///
/// It is a shared `flock` on a file beside the store's entries. Who removes takes it exclusively.
#[derive(Debug, Clone)]
pub struct Lease {
    /// Of the lock.
    path: PathBuf,
    /// `None`: this user may write nothing in the store, and so not lock anything.
    _lock: Option<Arc<Flock<File>>>,
}

impl Lease {
    /// `name`: of an entry, or a part of one, as `pi-0.87.1-3c237068ba42/adapter-0a1b2c3d4e5f`, which
    /// need not be there. Waits for a removal of it that is under way.
    pub(super) async fn take(root: &Path, name: &str) -> Result<Self, AgentError> {
        let path = path(root, name);
        loop {
            let (root, of) = (root.to_owned(), name.to_owned());
            let taken = blocking(move || lock(&root, &of, FlockArg::LockSharedNonblock)).await?;
            let lock = match taken {
                Taken::Lock(lock) => Some(Arc::new(lock)),
                Taken::NotWritable => None,
                Taken::Busy => {
                    tokio::time::sleep(POLL).await;
                    continue;
                }
            };
            return Ok(Self { path, _lock: lock });
        }
    }
}

/// Whether they keep the same.
impl PartialEq for Lease {
    fn eq(&self, other: &Self) -> bool {
        self.path == other.path
    }
}

impl Eq for Lease {}

/// The right to remove something. `None`: it is in use.
pub(super) fn take_away(root: &Path, name: &str) -> Result<Option<Flock<File>>, AgentError> {
    match lock(root, name, FlockArg::LockExclusiveNonblock)? {
        Taken::Lock(lock) => Ok(Some(lock)),
        Taken::Busy => Ok(None),
        Taken::NotWritable => {
            let error = io::Error::from_raw_os_error(libc::EACCES);
            Err(store("can't lock", &path(root, name), error))
        }
    }
}

/// Whether somebody runs on it at this moment.
pub(super) fn is_in_use(root: &Path, name: &str) -> bool {
    let file = OpenOptions::new().write(true).open(path(root, name));
    // No file: nobody ever has.
    file.is_ok_and(|file| Flock::lock(file, FlockArg::LockExclusiveNonblock).is_err())
}

enum Taken {
    Lock(Flock<File>),
    Busy,
    NotWritable,
}

fn lock(root: &Path, name: &str, how: FlockArg) -> Result<Taken, AgentError> {
    let path = match make_locks(root) {
        Ok(_) => path(root, name),
        Err(AgentError::Store { source, .. }) if is_not_writable(&source) => {
            return Ok(Taken::NotWritable);
        }
        Err(error) => return Err(error),
    };
    let opened = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(LOCK_MODE)
        .open(&path);
    let file = match opened {
        Ok(file) => file,
        Err(error) if is_not_writable(&error) => return Ok(Taken::NotWritable),
        Err(error) => return Err(store("can't open", &path, error)),
    };
    match Flock::lock(file, how) {
        Ok(lock) => Ok(Taken::Lock(lock)),
        Err((_, Errno::EWOULDBLOCK | Errno::EINTR)) => Ok(Taken::Busy),
        Err((_, errno)) => Err(store("can't lock", &path, errno.into())),
    }
}

/// A store that an image brings, or another user.
fn is_not_writable(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EROFS | libc::EACCES | libc::EPERM)
    )
}

/// Beside the locks of installers, whose names are those of the entries alone.
fn path(root: &Path, name: &str) -> PathBuf {
    locks(root).join(format!("{}.use", name.replace('/', "+")))
}
