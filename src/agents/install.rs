//! Making one entry of the store: lock, partial directory, check, sync, rename.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::error::AgentError;
use super::npm::{Failure, Npm};
use super::pinned::Packages;

/// Written last, so that it proves the rest.
const MARKER: &str = "entry.json";

const WRITABLE_BY_ALL: u32 = 0o002;

const LOCKS: &str = ".locks";

/// Of a lock file. Where VMs run as the caller, their programs see it on a read-only mount, and could
/// lock whatever they may open: this they may open neither for reading nor, there, for writing.
pub(super) const LOCK_MODE: u32 = 0o200;
const PARTIAL: &str = ".partial-";

/// How often an entry's lock is tried while another installer has it.
const LOCK_POLL: Duration = Duration::from_millis(100);

/// What [`MARKER`] says.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Marker {
    format: u32,
    /// Of all files, in bytes, at the time of installation.
    pub(super) bytes: u64,
}

/// `None`: there is no such entry, or not a complete one.
pub(super) fn marker(entry: &Path) -> Option<Marker> {
    serde_json::from_slice(&fs::read(entry.join(MARKER)).ok()?).ok()
}

pub(super) fn is_installed(root: &Path, entry: &str) -> bool {
    root.join(entry).join(MARKER).exists()
}

/// Movement of an installation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Movement {
    /// For another installer of the same entry.
    Waiting { since: Duration },
    Installing {
        done: usize,
        total: usize,
        bytes: u64,
        since: Duration,
    },
}

/// Installs `packages` into the store at `root`, unless another installer has done so meanwhile.
/// `lay_out` adds to the packages what the entry needs besides; a failure of it is the installation's.
///
/// If it fails or is cancelled, nothing of the attempt is left. If the process is killed, the partial
/// directory stays until the next installation.
pub(super) async fn install<Finish>(
    root: &Path,
    packages: Packages,
    npm: &Npm,
    lay_out: Finish,
    cancelled: impl Future<Output = ()> + Send,
    moved: impl Fn(Movement) + Send + Sync,
) -> Result<(), AgentError>
where
    Finish: FnOnce(&Path) -> Result<(), AgentError> + Send + 'static,
{
    let entry = packages.entry.clone();
    let mut cancelled = std::pin::pin!(cancelled);
    let lock = {
        let locked = lock(root, &entry, |since| moved(Movement::Waiting { since }));
        tokio::select! {
            lock = locked => lock?,
            () = &mut cancelled => {
                return Err(AgentError::Cancelled { title: packages.title });
            }
        }
    };
    if is_installed(root, &entry) {
        return Ok(());
    }
    let expected = packages.expected()?;
    let partial = {
        let (root, entry) = (root.to_owned(), entry.clone());
        blocking(move || {
            sweep(&root, Some(&entry), None);
            Partial::new(&root, &entry, lock)
        })
        .await?
    };
    let directory = partial.path.clone();
    let started = Instant::now();
    let total = expected.len();
    let tick = |bytes| {
        let arrived = expected
            .iter()
            .filter(|package| package.arrived(&directory));
        moved(Movement::Installing {
            done: arrived.count(),
            total,
            bytes,
            since: started.elapsed(),
        });
    };
    let installed = match packages.write_manifests(&directory) {
        Ok(()) => npm
            .install(&directory, &packages.versions, cancelled, tick)
            .await
            .map_err(|failure| explain(failure, root, &packages, npm)),
        Err(error) => Err(error),
    };
    let root = root.to_owned();
    blocking(move || {
        let finished = installed
            .and_then(|()| packages.check(&partial.path))
            .and_then(|()| lay_out(&partial.path));
        match finished {
            Ok(()) => {
                // An npm may have outlived its killed installer by a moment, and made files again.
                sweep(&root, Some(&entry), Some(&partial.path));
                partial.publish_entry(&root, &entry)
            }
            Err(error) => {
                partial.remove();
                Err(error)
            }
        }
    })
    .await
}

fn explain(failure: Failure, root: &Path, packages: &Packages, npm: &Npm) -> AgentError {
    let title = packages.title.clone();
    match failure {
        Failure::Cancelled => AgentError::Cancelled { title },
        Failure::Start(source) => AgentError::NpmStart {
            title,
            command: npm.command(),
            source,
        },
        Failure::Npm { reason, output } => AgentError::Npm {
            title,
            store: root.to_owned(),
            reason,
            output,
        },
    }
}

/// The right to make something in an entry, or the entry. Given up on drop.
pub(super) type Lock = Flock<File>;

/// Waits for the lock of an entry; `waiting` is called about every second meanwhile.
pub(super) async fn lock(
    root: &Path,
    entry: &str,
    waiting: impl Fn(Duration) + Send + Sync,
) -> Result<Lock, AgentError> {
    let started = Instant::now();
    let mut reported = None;
    loop {
        let (root, entry) = (root.to_owned(), entry.to_owned());
        let tried = blocking(move || {
            make_root(&root)?;
            try_lock(&root, &entry)
        })
        .await?;
        if let Some(lock) = tried {
            return Ok(lock);
        }
        let since = started.elapsed();
        if reported != Some(since.as_secs()) {
            reported = Some(since.as_secs());
            waiting(since);
        }
        tokio::time::sleep(LOCK_POLL).await;
    }
}

/// Makes the store, readable by every user of every VM: inside, ids are other than on the host.
pub(super) fn make_root(root: &Path) -> Result<(), AgentError> {
    const MODE: u32 = 0o755;
    let failed = |source| store("can't make", root, source);
    DirBuilder::new()
        .recursive(true)
        .create(root)
        .map_err(failed)?;
    let mode = fs::metadata(root).map_err(failed)?.mode();
    // What lies there is run in every VM, with the keys of its sessions.
    if mode & WRITABLE_BY_ALL != 0 {
        return Err(AgentError::WritableByAll {
            store: root.to_owned(),
        });
    }
    if mode & 0o005 != 0o005 {
        // The umask, or someone who took it for a private directory.
        fs::set_permissions(root, Permissions::from_mode(MODE)).map_err(failed)?;
    }
    Ok(())
}

pub(super) fn try_lock(root: &Path, entry: &str) -> Result<Option<Lock>, AgentError> {
    let path = make_locks(root)?.join(entry);
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(LOCK_MODE)
        .open(&path)
        .map_err(|error| store("can't open", &path, error))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(Some(lock)),
        Err((_, Errno::EWOULDBLOCK | Errno::EINTR)) => Ok(None),
        Err((_, errno)) => Err(store("can't lock", &path, errno.into())),
    }
}

/// Makes the directory of all locks.
pub(super) fn make_locks(root: &Path) -> Result<PathBuf, AgentError> {
    let locks = locks(root);
    match DirBuilder::new().mode(0o700).create(&locks) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(store("can't make", &locks, error))
        }
        _ => Ok(locks),
    }
}

pub(super) fn locks(root: &Path) -> PathBuf {
    root.join(LOCKS)
}

/// Removes the partial directories of installers, and removers, that are dead: those of the entry `mine`,
/// which the caller has locked, but for the caller's own, `keep`, and those of others that nobody has
/// locked.
pub(super) fn sweep(root: &Path, mine: Option<&str>, keep: Option<&Path>) {
    let Ok(found) = fs::read_dir(root) else {
        return;
    };
    for found in found.flatten() {
        let name = found.file_name();
        let Some(entry) = name.to_str().and_then(entry_of_partial) else {
            continue;
        };
        if Some(entry) == mine {
            if keep != Some(&found.path()) {
                remove_tree(&found.path());
            }
        } else if let Ok(Some(_lock)) = try_lock(root, entry) {
            remove_tree(&found.path());
        }
    }
}

/// `pi-1.0.0-abc` for `.partial-<uuid>-pi-1.0.0-abc`.
fn entry_of_partial(name: &str) -> Option<&str> {
    let (_, entry) = name.strip_prefix(PARTIAL)?.split_once('-')?;
    Some(entry)
}

/// Takes away an entry that is there though it has no marker (there would be no installation
/// otherwise): somebody has damaged it, and it is of no use to anyone.
fn displace(root: &Path, entry: &str) -> Result<(), AgentError> {
    let aside = partial_path(root, entry);
    let place = root.join(entry);
    match fs::rename(&place, &aside) {
        Ok(()) => {
            remove_tree(&aside);
            Ok(())
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(store("can't replace", &place, error)),
    }
}

pub(super) fn partial_path(root: &Path, entry: &str) -> PathBuf {
    // A new name each time: an npm that outlives its killed installer for a moment writes into its
    // own directory only.
    root.join(format!("{PARTIAL}{}-{entry}", Uuid::now_v7().simple()))
}

pub(super) fn remove_tree(path: &Path) {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            // Nobody uses it, and the next installation tries again.
            tracing::warn!(%error, path = %path.display(), "can't remove a partial installation");
        }
        _ => {}
    }
}

/// A directory on its way to become (part of) an entry. It belongs to the holder of the entry's lock.
pub(super) struct Partial {
    pub(super) path: PathBuf,
    _lock: Lock,
}

impl Partial {
    pub(super) fn new(root: &Path, entry: &str, lock: Lock) -> Result<Self, AgentError> {
        let path = partial_path(root, entry);
        DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .map_err(|error| store("can't make", &path, error))?;
        Ok(Self { path, _lock: lock })
    }

    /// Makes it the entry.
    fn publish_entry(self, root: &Path, entry: &str) -> Result<(), AgentError> {
        if let Err(error) = self.mark().and_then(|()| displace(root, entry)) {
            self.remove();
            return Err(error);
        }
        self.publish(&root.join(entry))
    }

    /// Everything of the entry is on the disk before its marker is.
    fn mark(&self) -> Result<(), AgentError> {
        let failed = |what| move |error| store(what, &self.path, error);
        let bytes = open_to_everyone(&self.path).map_err(failed("can't set the modes in"))?;
        sync_file_system(&self.path).map_err(failed("can't sync"))?;
        let path = self.path.join(MARKER);
        let marker = format!("{{\"format\":1,\"bytes\":{bytes}}}\n");
        write_synced(&path, marker.as_bytes(), 0o644)
            .map_err(|error| store("can't write", &path, error))
    }

    /// Renames it to `place`, where nothing may be yet, and frees the lock.
    pub(super) fn publish(self, place: &Path) -> Result<(), AgentError> {
        let published = sync_directory(&self.path)
            .and_then(|()| fs::rename(&self.path, place))
            .and_then(|()| sync_directory(place.parent().unwrap_or(place)));
        if let Err(error) = published {
            self.remove();
            return Err(store("can't put in place", place, error));
        }
        Ok(())
    }

    pub(super) fn remove(self) {
        remove_tree(&self.path);
    }
}

/// What everyone needs to read a tree and run its programs, whatever the umask was, and nothing that
/// lets anyone but its owner change it. Returns the size of all files.
pub(super) fn open_to_everyone(directory: &Path) -> io::Result<u64> {
    let mut bytes = 0;
    for found in fs::read_dir(directory)? {
        let found = found?;
        let path = found.path();
        let data = found.metadata()?;
        if data.is_dir() {
            bytes += open_to_everyone(&path)?;
        } else if data.is_file() {
            bytes += data.len();
            let mode = if data.mode() & 0o100 == 0 {
                0o644
            } else {
                0o755
            };
            set_mode(&path, data.mode(), mode)?;
        }
    }
    set_mode(directory, fs::metadata(directory)?.mode(), 0o755)?;
    Ok(bytes)
}

fn set_mode(path: &Path, now: u32, wanted: u32) -> io::Result<()> {
    if now & 0o7777 == wanted {
        return Ok(());
    }
    fs::set_permissions(path, Permissions::from_mode(wanted))
}

pub(super) fn write_synced(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)?;
    file.write_all(content)?;
    file.set_permissions(Permissions::from_mode(mode))?;
    file.sync_all()
}

/// One call for ten thousand files.
fn sync_file_system(path: &Path) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    let directory = File::open(path)?;
    // SAFETY: an integer, of a descriptor that is open.
    Errno::result(unsafe { libc::syncfs(directory.as_raw_fd()) })?;
    Ok(())
}

pub(super) fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

pub(super) fn store(what: &'static str, path: &Path, source: io::Error) -> AgentError {
    AgentError::Store {
        what,
        path: path.to_owned(),
        source,
    }
}

/// File-system work may take long: never on an async thread.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, AgentError> + Send + 'static,
) -> Result<T, AgentError> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|error| Err(AgentError::Ended(error.to_string())))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]
mod tests;
