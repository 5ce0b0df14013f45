//! A VM on disk: its directory, its two locks, its end.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::ids::IdMap;
use super::removal::remove_tree;
use super::{bases, packages};
use crate::vm::VmError;

/// How often a lock that a dying VM still holds is tried. The wait is short: it ends when the
/// kernel has killed the VM's processes.
const LOCK_POLL: Duration = Duration::from_millis(5);

/// Keeps a VM's directory for this process: another opener is told `VM_BUSY`.
///
/// The running VM holds a clone, and so does whoever writes to the directory from outside of it, the
/// store's owner: a VM can die on its own while there is still something to be written. Released with
/// the last clone.
#[derive(Debug, Clone)]
pub struct HostLock {
    _held: Arc<Flock<File>>,
}

/// `<dataDir>/vms/<id>`, held by this process alone.
#[derive(Debug)]
pub(super) struct Directory {
    path: PathBuf,
    host_lock: HostLock,
    /// Shared with PID 1, which lets go only when nothing of the VM is left.
    vm_lock: File,
    /// What the VM lies on. `None`: an image, whose lease the caller has.
    base: Option<bases::Lease>,
}

impl Directory {
    /// Makes the directory if need be and locks it. Waits while a VM of a dead process is being torn
    /// down; refuses while another process has it open.
    pub(super) async fn open(path: &Path, key: &str, ids: IdMap) -> Result<Self, VmError> {
        let directory = {
            let (path, key) = (path.to_owned(), key.to_owned());
            blocking(move || Self::prepare(&path, &key, ids)).await?
        };
        directory.wait_for_lock().await?;
        Ok(directory)
    }

    /// The part of [`Directory::open`] that does not wait: then the VM's own lock is still to be got.
    pub(super) fn prepare(path: &Path, key: &str, ids: IdMap) -> Result<Self, VmError> {
        let (host_lock, vm_lock) = prepare(path, key, ids)?;
        Ok(Self {
            path: path.to_owned(),
            host_lock: HostLock {
                _held: Arc::new(host_lock),
            },
            vm_lock,
            base: None,
        })
    }

    /// Keeps the base of a VM as long as the directory is held.
    pub(super) fn lies_on(&mut self, base: bases::Lease) {
        self.base = Some(base);
    }

    /// Takes the VM's lock, unless a VM of a dead process is still being torn down.
    pub(super) fn try_lock(&self) -> Result<bool, VmError> {
        try_flock(&self.vm_lock).map_err(|error| host("can't lock", &self.path.join("lock"), error))
    }

    pub(super) async fn wait_for_lock(&self) -> Result<(), VmError> {
        while !self.try_lock()? {
            tokio::time::sleep(LOCK_POLL).await;
        }
        Ok(())
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn host_lock(&self) -> HostLock {
        self.host_lock.clone()
    }

    pub(super) fn lock(&self) -> &File {
        &self.vm_lock
    }

    /// Removes the directory with everything in it.
    pub(super) async fn remove(self) -> Result<(), VmError> {
        blocking(move || {
            // Out of the way first: whoever opens this VM from now on gets a new, empty one.
            let doomed = self
                .path
                .with_extension(format!("deleted-{}", uuid::Uuid::now_v7()));
            fs::rename(&self.path, &doomed)
                .map_err(|error| host("can't remove", &self.path, error))?;
            remove_tree(&doomed).map_err(|error| host("can't remove", &doomed, error))
        })
        .await
    }
}

/// Refuses the directory of a VM that runs in another process. Keeps nobody from opening it: who does waits
/// for the VM's lock, which is looked at here for a moment.
pub async fn check_not_elsewhere(path: &Path, key: &str) -> Result<(), VmError> {
    let (path, key) = (path.to_owned(), key.to_owned());
    blocking(move || {
        let lock = path.join("lock");
        let file = match File::open(&lock) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            opened => opened.map_err(|error| host("can't open", &lock, error))?,
        };
        match Flock::lock(file, FlockArg::LockSharedNonblock) {
            Ok(_) => return Ok(()),
            Err((_, Errno::EWOULDBLOCK)) => {}
            Err((_, errno)) => return Err(host("can't lock", &lock, errno.into())),
        }
        let holder = path.join("host.lock");
        let text = fs::read_to_string(&holder);
        let text = text.map_err(|error| host("can't read", &holder, error))?;
        match text.trim().parse() {
            // One of this process is on its way, or on its way out; one of a dead process is going.
            Ok(pid) if pid == std::process::id().cast_signed() || fate(pid) != Fate::Alive => {
                Ok(())
            }
            pid => Err(open_elsewhere(&key, pid.ok())),
        }
    })
    .await
}

fn open_elsewhere(key: &str, pid: Option<i32>) -> VmError {
    VmError::Busy {
        key: key.to_owned(),
        holder: pid.map_or_else(String::new, |pid| format!(" (pid {pid})")),
    }
}

/// Removes what an interrupted `remove` has left beside the VMs of this data directory.
pub(super) fn sweep(vms: &Path) {
    let Ok(entries) = fs::read_dir(vms) else {
        return;
    };
    for entry in entries.flatten() {
        let deleted = Path::new(&entry.file_name())
            .extension()
            .is_some_and(|extension| extension.to_string_lossy().starts_with("deleted-"));
        if deleted && let Err(error) = remove_tree(&entry.path()) {
            // Another process may be at it too; the next start tries again.
            tracing::debug!(%error, path = %entry.path().display(), "left for the next sweep");
        }
    }
}

fn prepare(path: &Path, key: &str, ids: IdMap) -> Result<(Flock<File>, File), VmError> {
    let at = |what: &'static str| move |error| host(what, path, error);
    let parent = path.parent().unwrap_or(path);
    make_parent_of_many(parent).map_err(|error| host(cant_use(&error), parent, error))?;
    loop {
        make_private_dir(path).map_err(at("can't make the VM's directory"))?;
        let host_lock = lock_host(path, key)?;
        // Between making and locking, a `remove` may have taken the directory away.
        if !is_at(&host_lock, &path.join("host.lock")) {
            continue;
        }
        let vm_lock = lock_file(&path.join("lock"))?;
        // The marker is written last: without it the skeleton may be half made.
        let marker = path.join("vm.json");
        if !marker.exists() {
            make_skeleton(path, ids).map_err(at("can't set up the VM's directory"))?;
            let text = format!("{{\"format\":1,\"key\":{key}}}\n");
            write_atomically(&marker, text.as_bytes())
                .map_err(|error| host("can't write", &marker, error))?;
        }
        return Ok((host_lock, vm_lock));
    }
}

/// Makes `<dataDir>/<name>`, a private directory for directories that have nothing to do with each
/// other. `EACCES` if other users can change it, or could exchange it.
pub(super) fn make_parent_of_many(path: &Path) -> io::Result<()> {
    if !path.is_dir() {
        make_private_dir(path)?;
        if let Err(errno) = spread_children(path) {
            // Most file systems have no such flag, and no need of it.
            tracing::debug!(%errno, path = %path.display(), "the file system places what is in it");
        }
    }
    check_parent_of_many(path)
}

/// `EACCES` if other users can change what [`make_parent_of_many`] has made, or could exchange it.
fn check_parent_of_many(path: &Path) -> io::Result<()> {
    if let Some(data) = path.parent() {
        let data = fs::metadata(data)?;
        let trusted = is_of_this_user(&data) || data.uid() == 0;
        if !trusted || data.mode() & WRITABLE_BY_ALL != 0 {
            return Err(Errno::EACCES.into());
        }
    }
    let made = fs::symlink_metadata(path)?;
    if !made.is_dir() || !is_of_this_user(&made) || made.mode() & WRITABLE_BY_OTHERS != 0 {
        return Err(Errno::EACCES.into());
    }
    Ok(())
}

/// Makes sure that what lies in `<dataDir>/vms` was put there by this user, if anything does.
pub(super) fn check_owner(vms: &Path) -> Result<(), VmError> {
    match check_parent_of_many(vms) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            Err(host(NOT_OWN, vms, error))
        }
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(host("can't use the data directory", vms, error))
        }
        _ => Ok(()),
    }
}

const NOT_OWN: &str = "the data directory must be this user's own, and not writable by others (chown, \
    chmod, or another dataDir): can't use";

fn cant_use(error: &io::Error) -> &'static str {
    if error.kind() == io::ErrorKind::PermissionDenied {
        NOT_OWN
    } else {
        "can't make the data directory"
    }
}

// Whoever can write to a data directory can put a symlink where a directory of a VM is going to be,
// and have a process of root give away and mount what it leads to. A group may write to the data
// directory itself: where each user has one of its own, that is what mkdir(1) makes.
const WRITABLE_BY_ALL: u32 = 0o002;
const WRITABLE_BY_OTHERS: u32 = 0o022;

fn is_of_this_user(metadata: &fs::Metadata) -> bool {
    metadata.uid() == nix::unistd::geteuid().as_raw()
}

/// Tells ext4 that the directories in `path` are unrelated (`chattr +T`), so that it spreads them over
/// its block groups. Otherwise the inodes of all VMs come from the group that `path` is in, and ext4
/// without a journal passes over each one that was deleted there in the last minutes
/// (`recently_deleted`): where VMs come and go, or in a busy /tmp, an inode then costs up to a
/// millisecond instead of 25 µs, and a new VM has two dozen.
fn spread_children(path: &Path) -> nix::Result<()> {
    use std::os::fd::AsRawFd;
    const TOP_OF_HIERARCHIES: libc::c_int = 0x0002_0000; // FS_TOPDIR_FL of linux/fs.h
    let directory = File::open(path).map_err(|_| Errno::last())?;
    let mut flags: libc::c_int = 0;
    // SAFETY: both calls read or write one int, whatever their numbers say (ioctl_iflags(2)).
    unsafe {
        Errno::result(libc::ioctl(
            directory.as_raw_fd(),
            libc::FS_IOC_GETFLAGS,
            &raw mut flags,
        ))?;
        flags |= TOP_OF_HIERARCHIES;
        Errno::result(libc::ioctl(
            directory.as_raw_fd(),
            libc::FS_IOC_SETFLAGS,
            &raw const flags,
        ))?;
    }
    Ok(())
}

/// What was noticed about a VM's writable layers at its boot.
#[derive(Debug, Clone, Copy)]
pub(super) struct LastBoot {
    pub(super) base_changed: bool,
    pub(super) layers_suspect: bool,
}

/// Compares this boot with the last one, and remembers this one in its place.
///
/// A layer that is in use carries a marker of overlayfs (`volatile`), which refuses the next mount.
/// If this boot of the host left it, then only a process died and everything is in the page cache; if
/// an earlier one did, then the host crashed under it.
pub(super) fn record_boot(path: &Path, fingerprint: &str) -> Result<LastBoot, VmError> {
    let read = |path: &Path| match fs::read_to_string(path) {
        // The first boot, or a container that hides it.
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied
            ) =>
        {
            Ok(String::new())
        }
        read => read.map_err(|error| host("can't read", path, error)),
    };
    let boot_id = read(Path::new("/proc/sys/kernel/random/boot_id"))?;
    let record = path.join("boot");
    let now = format!("{fingerprint}\n{boot_id}");
    let before = read(&record)?;
    // The kernel's own marker (ovl_create_volatile_dirty); nothing inside the VM can reach it.
    // What can't be removed makes the mount fail, which says why.
    let work = path.join("layers/work/work");
    let incompatible = work.join("incompat");
    let volatile = incompatible.join("volatile");
    for directory in [&work, &incompatible, &volatile] {
        // Of mode 0: an ordinary user, who owns it, has to open it first.
        drop(fs::set_permissions(
            directory,
            Permissions::from_mode(0o700),
        ));
    }
    let in_use = fs::remove_file(volatile.join("dirty")).is_ok();
    drop(fs::remove_dir(volatile));
    drop(fs::remove_dir(incompatible));
    if before != now {
        write_atomically(&record, now.as_bytes())
            .map_err(|error| host("can't write", &record, error))?;
    }
    let mut before = before.lines();
    let base_changed = before.next().is_some_and(|last| last != fingerprint);
    let other_boot = before.next().is_some_and(|last| last != boot_id.trim());
    Ok(LastBoot {
        base_changed,
        layers_suspect: in_use && other_boot,
    })
}

/// Directories of a VM, relative to its own: who owns them inside, and their mode.
const SKELETON: [(&str, Owner, u32); 9] = [
    ("home", Owner::User, 0o755),
    ("var", Owner::Root, 0o755),
    ("var/cache", Owner::Root, 0o755),
    ("var/cache/agentvm", Owner::User, 0o700),
    ("var/lib", Owner::Root, 0o755),
    ("var/lib/agentvm", Owner::Root, 0o755),
    ("var/lib/agentvm/sessions", Owner::User, 0o700),
    ("var/log", Owner::Root, 0o755),
    ("var/tmp", Owner::Root, 0o1777),
];

/// Where a privileged host keeps what the VM's root writes outside of the durable directories.
const LAYERS: [(&str, Owner, u32); 4] = [
    ("root", Owner::Root, 0o700),
    ("layers", Owner::Root, 0o700),
    ("layers/upper", Owner::Root, 0o755),
    ("layers/work", Owner::Root, 0o755),
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Owner {
    User,
    Root,
}

fn make_skeleton(path: &Path, ids: IdMap) -> io::Result<()> {
    let layers = if ids.root_mapped() { &LAYERS[..] } else { &[] };
    make_directories(path, ids, SKELETON.iter().chain(layers))?;
    packages::lead_to_database(path, ids)
}

/// What a VM on an image has wherever it runs.
pub(super) fn make_layers(path: &Path, ids: IdMap) -> Result<(), VmError> {
    make_directories(path, ids, LAYERS.iter())
        .map_err(|error| host("can't make the layers of", path, error))
}

fn make_directories<'a>(
    path: &Path,
    ids: IdMap,
    directories: impl Iterator<Item = &'a (&'static str, Owner, u32)>,
) -> io::Result<()> {
    for (name, owner, mode) in directories {
        let directory = path.join(name);
        match DirBuilder::new().mode(*mode).create(&directory) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
        let owner = match owner {
            Owner::User => Some(ids.user_on_host()),
            Owner::Root => ids.root_on_host(),
        };
        if let Some((uid, gid)) = owner {
            chown(&directory, Some(uid), Some(gid))?;
        }
        // The umask of the host process is not the VM's.
        fs::set_permissions(&directory, Permissions::from_mode(*mode))?;
    }
    Ok(())
}

/// How long a lock may outlive its holder: a program that the holder was just starting has copies
/// of all its descriptors until it execs.
const COPIES_CLOSE: Duration = Duration::from_secs(1);

/// How long a holder may take to die: the kernel first gives back its memory, which for gigabytes takes
/// a tenth of a second, and more on a busy machine.
const DIES: Duration = Duration::from_secs(10);

/// Of the largest pid there can be.
const PID_WIDTH: usize = 10;

fn lock_host(path: &Path, key: &str) -> Result<Flock<File>, VmError> {
    let lock_path = path.join("host.lock");
    let began = Instant::now();
    let mut file = lock_file(&lock_path)?;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(mut lock) => {
                // For whoever finds it locked; a full disk is no reason not to boot. In place,
                // because ext4 sends a file that was truncated to the disk at once.
                let pid = format!("{:<PID_WIDTH$}\n", std::process::id());
                let written = lock.rewind().and_then(|()| lock.write_all(pid.as_bytes()));
                if let Err(error) = written {
                    tracing::debug!(%error, path = %lock_path.display(), "no pid in the lock");
                }
                return Ok(lock);
            }
            Err((mut busy, Errno::EWOULDBLOCK)) => {
                let mut text = String::new();
                // Empty: it has only just been locked.
                let _ = busy.rewind().and_then(|()| busy.read_to_string(&mut text));
                let pid: Option<i32> = text.trim().parse().ok();
                let patience = match pid.map(fate) {
                    Some(Fate::Gone) => COPIES_CLOSE,
                    Some(Fate::Dying) => DIES,
                    Some(Fate::Alive) | None => Duration::ZERO,
                };
                if began.elapsed() < patience {
                    std::thread::sleep(LOCK_POLL);
                    file = busy;
                    continue;
                }
                return Err(open_elsewhere(key, pid));
            }
            Err((_, errno)) => return Err(host("can't lock", &lock_path, errno.into())),
        }
    }
}

/// What has become of the process that a lock names.
#[derive(Debug, PartialEq, Eq)]
enum Fate {
    Alive,
    /// Killed, but not gone: it still has its descriptors.
    Dying,
    Gone,
}

fn fate(pid: i32) -> Fate {
    let Ok(status) = fs::read_to_string(format!("/proc/{pid}/status")) else {
        // Also of a process that is not for this one to see, if its pid says nothing else.
        return match nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), None) {
            Err(Errno::ESRCH) => Fate::Gone,
            _ => Fate::Alive,
        };
    };
    let field = |name: &str| {
        let mut lines = status.lines();
        lines.find_map(|line| Some(line.strip_prefix(name)?.trim()))
    };
    // Of a process whose main thread has ended, the others may still be at it.
    let ended = field("State:").is_some_and(|state| state.starts_with(['Z', 'X']));
    let killed = ["SigPnd:", "ShdPnd:"].iter().any(|name| {
        let pending = field(name).and_then(|bits| u64::from_str_radix(bits, 16).ok());
        pending.is_some_and(|bits| bits & (1 << (libc::SIGKILL - 1)) != 0)
    });
    if ended || killed || is_exiting(pid) {
        Fate::Dying
    } else {
        Fate::Alive
    }
}

/// Whether the kernel is taking it apart: `PF_EXITING` in the flags of `proc_pid_stat(5)`.
pub(super) fn is_exiting(pid: i32) -> bool {
    const PF_EXITING: u64 = 4;
    // The name before the flags may hold anything, parentheses too.
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
        stat.rsplit_once(')')
            .and_then(|(_, fields)| fields.split_whitespace().nth(6)?.parse().ok())
            .is_some_and(|flags: u64| flags & PF_EXITING != 0)
    })
}

fn lock_file(path: &Path) -> Result<File, VmError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(|error| host("can't open", path, error))
}

fn try_flock(file: &File) -> io::Result<bool> {
    use std::os::fd::AsRawFd;
    // SAFETY: integers. nix's Flock would unlock on drop, which here is PID 1's to do.
    match Errno::result(unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) }) {
        Ok(_) => Ok(true),
        Err(Errno::EWOULDBLOCK | Errno::EINTR) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

fn is_at(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    match (file.metadata(), fs::metadata(path)) {
        (Ok(ours), Ok(theirs)) => ours.dev() == theirs.dev() && ours.ino() == theirs.ino(),
        _ => false,
    }
}

pub(super) fn make_private_dir(path: &Path) -> io::Result<()> {
    match DirBuilder::new().recursive(true).mode(0o700).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        result => result,
    }
}

pub(super) fn write_atomically(path: &Path, content: &[u8]) -> io::Result<()> {
    let partial = path.with_extension("partial");
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&partial)?;
    let written = file
        .write_all(content)
        .and_then(|()| fs::rename(&partial, path));
    if written.is_err() {
        // On a full disk every block counts. What stays is written over by the next attempt.
        drop(fs::remove_file(&partial));
    }
    written
}

pub(super) fn host(what: &'static str, path: &Path, source: io::Error) -> VmError {
    VmError::Host {
        what,
        path: path.to_owned(),
        source,
    }
}

/// File-system work of the host may take long: never on an async thread.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, VmError> + Send + 'static,
) -> Result<T, VmError> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|error| {
            Err(VmError::Ended(format!(
                "a file-system task failed: {error}"
            )))
        })
}
