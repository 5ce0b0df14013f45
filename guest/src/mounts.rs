//! The VM's file system: its root, built node by node beside the host's, and the step across.

use std::ffi::{CStr, CString};
use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::Path;

use agentvm_guest::protocol::{Account, Node, Source, USER_ID};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::boot::{Failure, errno_of};
use crate::host_mounts;
use crate::image;
use crate::terminal::TTY_GROUP;

/// Where the new root grows, seen by this mount namespace only: a directory that every host has and
/// that no [`Source::HostPath`] lies under.
pub(crate) const NEW_ROOT: &str = "/proc";

/// Scratch mount points for the parts of an overlay, gone before the VM runs.
const LOWER: &str = "/proc/.lower";
const LAYER: &str = "/proc/.layer";

/// Where an overlay is made that is going to be the root.
const ROOT: &str = "/proc/.root";

const NONE: Option<&str> = None;

pub(crate) fn make_private() -> nix::Result<()> {
    // Nothing that is mounted from here on may reach the host, nor the host's later mounts the VM.
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE)
}

pub(crate) fn enter_new_root() -> nix::Result<()> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(
        Some("agentvm"),
        NEW_ROOT,
        Some("tmpfs"),
        flags,
        Some("mode=755,size=4m,nr_inodes=4096"),
    )
}

/// Makes one node of the root. The failure names the node.
pub(crate) fn make(node: &Node, trees: &[OwnedFd], table: &mut File) -> Result<(), Failure> {
    let (path, result) = match node {
        Node::Dir { path, mode, owner } => (path, directory(path, *mode, *owner)),
        Node::Symlink { path, target } => (
            path,
            symlink(target, at(path)).map_err(|error| errno_of(&error)),
        ),
        Node::Tree {
            path,
            source,
            read_only,
            no_exec,
        } => (path, tree(path, source, trees, *read_only, *no_exec)),
        Node::HostMount(mount) => return host_mounts::make(mount, trees, table),
        Node::Overlay {
            path,
            lowers,
            layer,
        } => (path, overlay(path, lowers, layer, trees)),
        Node::File { path, content } => (path, image::file(path, content)),
        Node::Authorities {
            path,
            from,
            otherwise,
            more,
        } => (path, image::authorities(path, from, otherwise, more)),
        Node::Accounts { path, lines } => (path, image::accounts(path, lines)),
        Node::Bind { path, from } => (path, show_at(path, from)),
        Node::Tmpfs {
            path,
            mode,
            size,
            inodes,
        } => (path, tmpfs(path, *mode, *size, *inodes)),
        Node::Proc { path } => (path, proc(path)),
        Node::Dev { path, shm_size } => (path, dev(path, *shm_size)),
    };
    result.map_err(|errno| Failure {
        step: format!("mount {path}"),
        errno,
    })
}

fn at(path: &str) -> String {
    format!("{NEW_ROOT}{path}")
}

fn directory(path: &str, mode: u32, owner: Account) -> nix::Result<()> {
    image::parent(path)?;
    let path = at(path);
    match fs::create_dir(&path) {
        Ok(()) => {}
        // Trees bring directories of their own; those keep what they are.
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => return Ok(()),
        Err(error) => return Err(errno_of(&error)),
    }
    fs::set_permissions(&path, fs::Permissions::from_mode(mode))
        .and_then(|()| match owner {
            Account::User => chown(&path, Some(USER_ID), Some(USER_ID)),
            Account::Root => Ok(()),
        })
        .map_err(|error| errno_of(&error))
}

fn tree(
    path: &str,
    source: &Source,
    trees: &[OwnedFd],
    read_only: bool,
    no_exec: bool,
) -> nix::Result<()> {
    let mut set = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV;
    if read_only {
        set |= libc::MOUNT_ATTR_RDONLY;
    }
    if no_exec {
        set |= libc::MOUNT_ATTR_NOEXEC;
    }
    let cloned;
    let tree = match source {
        Source::Descriptor(index) => trees.get(*index as usize).ok_or(Errno::EBADF)?,
        path => {
            cloned = clone_of_host(path)?;
            &cloned
        }
    };
    set_attributes(tree, set)?;
    image::check(path)?;
    attach(tree, &at(path))
}

/// `lowers` with `layer/upper` on top. `volatile` spares a sync of the whole host file system at
/// every unmount; what must survive a host crash (`/home/user`, `/var`) is not in an overlay.
fn overlay(path: &str, lowers: &[Source], layer: &Source, trees: &[OwnedFd]) -> nix::Result<()> {
    let is_root = path == "/";
    let target = if is_root {
        fs::create_dir(ROOT).map_err(|error| errno_of(&error))?;
        ROOT.to_owned()
    } else {
        image::check(path)?;
        at(path)
    };
    let lower_points: Vec<String> = (0..lowers.len()).map(|i| format!("{LOWER}{i}")).collect();
    let points = || lower_points.iter().map(String::as_str).chain([LAYER]);
    for (source, point) in lowers.iter().chain([layer]).zip(points()) {
        fs::create_dir(point).map_err(|error| errno_of(&error))?;
        match source {
            Source::Descriptor(index) => {
                attach(trees.get(*index as usize).ok_or(Errno::EBADF)?, point)?;
            }
            path => attach(&clone_of_host(path)?, point)?,
        }
    }
    let options = format!(
        "lowerdir={},upperdir={LAYER}/upper,workdir={LAYER}/work,userxattr,volatile",
        lower_points.join(":")
    );
    mount(
        Some("overlay"),
        target.as_str(),
        Some("overlay"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
        Some(options.as_str()),
    )?;
    // The overlay holds its own references; the parts must not be reachable beside it.
    for point in points() {
        umount2(point, MntFlags::MNT_DETACH)?;
        fs::remove_dir(point).map_err(|error| errno_of(&error))?;
    }
    if is_root {
        // Over the skeleton, which goes with the host's root.
        mount(Some(ROOT), NEW_ROOT, NONE, MsFlags::MS_MOVE, NONE)?;
    }
    Ok(())
}

/// Shows at `path` what the new root has at `from`. The VM's root may have put anything there, a link
/// that would lead to the host among it.
fn show_at(path: &str, from: &str) -> nix::Result<()> {
    let tree = host_mounts::clone_tree(&image::open_directory(from)?)?;
    host_mounts::attach(tree.as_fd(), image::open_directory(path)?.as_fd())
}

fn tmpfs(path: &str, mode: u32, size: u64, inodes: u64) -> nix::Result<()> {
    image::check(path)?;
    let options = format!("mode={mode:o},size={size},nr_inodes={inodes}");
    mount(
        Some("tmpfs"),
        at(path).as_str(),
        Some("tmpfs"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
        Some(options.as_str()),
    )
}

fn proc(path: &str) -> nix::Result<()> {
    image::check(path)?;
    mount(
        Some("proc"),
        at(path).as_str(),
        Some("proc"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC,
        NONE,
    )
}

/// Parts of /proc that tell about, or act on, the whole machine.
const PROC_EMPTY_FILES: [&str; 9] = [
    "interrupts",
    "kcore",
    "keys",
    "kallsyms",
    "latency_stats",
    "sched_debug",
    "sysrq-trigger",
    "timer_list",
    "timer_stats",
];
const PROC_EMPTY_DIRS: [&str; 3] = ["acpi", "scsi", "asound"];
/// PID 1's own among them: the VM's root has its user id, and could say there when it runs (`autogroup`).
/// Who may write there can have the kernel watch the pressure of the machine (`pressure`).
const PROC_READ_ONLY: [&str; 6] = ["1", "bus", "fs", "irq", "pressure", "sys"];

pub(crate) fn mask_proc() -> nix::Result<()> {
    let exists = |name: &str| Path::new("/proc").join(name).exists();
    for name in PROC_EMPTY_FILES.into_iter().filter(|name| exists(name)) {
        bind("/dev/null", &format!("/proc/{name}"))?;
    }
    for name in PROC_EMPTY_DIRS.into_iter().filter(|name| exists(name)) {
        mount(
            Some("tmpfs"),
            format!("/proc/{name}").as_str(),
            Some("tmpfs"),
            MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC,
            Some("size=0,nr_inodes=1"),
        )?;
    }
    for name in PROC_READ_ONLY.into_iter().filter(|name| exists(name)) {
        // Not by open_tree: a detached clone counts as a mount namespace, and those are forbidden.
        let path = format!("/proc/{name}");
        bind(&path, &path)?;
        let path = CString::new(path).map_err(|_| Errno::EINVAL)?;
        let attributes = libc::MOUNT_ATTR_RDONLY
            | libc::MOUNT_ATTR_NOSUID
            | libc::MOUNT_ATTR_NODEV
            | libc::MOUNT_ATTR_NOEXEC;
        change_attributes(
            &open_tree(&path, libc::OPEN_TREE_CLOEXEC)?,
            (attributes, 0),
            0,
        )?;
    }
    Ok(())
}

/// Device nodes of the host that are harmless and that programs expect.
const DEVICES: [&str; 6] = ["null", "zero", "full", "random", "urandom", "tty"];

const DEV_LINKS: [(&str, &str); 5] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
];

fn dev(path: &str, shm_size: u64) -> nix::Result<()> {
    image::check(path)?;
    let io = |result: std::io::Result<()>| result.map_err(|error| errno_of(&error));
    mount(
        Some("dev"),
        at(path).as_str(),
        Some("tmpfs"),
        MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC,
        Some("mode=755,size=64k,nr_inodes=64"),
    )?;
    for name in DEVICES {
        let node = at(&format!("{path}/{name}"));
        io(fs::write(&node, ""))?;
        bind(&format!("/dev/{name}"), &node)?;
    }
    for (name, target) in DEV_LINKS {
        io(symlink(target, at(&format!("{path}/{name}"))))?;
    }
    let pts = at(&format!("{path}/pts"));
    // The kernel has 4096 for all of the host.
    let options = "newinstance,ptmxmode=0666,mode=0620,max=256";
    // Where the VM has that group.
    let options = if nix::unistd::geteuid().is_root() {
        format!("{options},gid={TTY_GROUP}")
    } else {
        options.to_owned()
    };
    io(fs::create_dir(&pts))?;
    mount(
        Some("devpts"),
        pts.as_str(),
        Some("devpts"),
        MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC,
        Some(options.as_str()),
    )?;
    io(fs::create_dir(at(&format!("{path}/shm"))))?;
    tmpfs(&format!("{path}/shm"), 0o1777, shm_size, 65_536)
}

/// Makes the new root the root, and lets go of everything of the host.
pub(crate) fn leave_old_root() -> nix::Result<()> {
    nix::unistd::chdir(NEW_ROOT)?;
    // The two dots stack the old root on the new one (pivot_root(2), NOTES).
    nix::unistd::pivot_root(".", ".")?;
    umount2(".", MntFlags::MNT_DETACH)?;
    nix::unistd::chdir("/")
}

/// The skeleton itself is not for writing.
pub(crate) fn seal_root() -> nix::Result<()> {
    let root = open_tree(c"/", libc::OPEN_TREE_CLOEXEC)?;
    let attributes = libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV;
    change_attributes(&root, (attributes, 0), 0)
}

fn bind(source: &str, target: &str) -> nix::Result<()> {
    mount(Some(source), target, NONE, MsFlags::MS_BIND, NONE)
}

/// A detached copy of a mount and everything below it.
fn clone_of_host(source: &Source) -> nix::Result<OwnedFd> {
    let path = match source {
        Source::HostPath(path) => path,
        Source::RealPath(path) => return host_mounts::clone_tree(&host_mounts::open_real(path)?),
        Source::Descriptor(_) => return Err(Errno::EINVAL),
    };
    let path = CString::new(path.as_slice()).map_err(|_| Errno::EINVAL)?;
    let recursive = libc::AT_RECURSIVE.cast_unsigned();
    open_tree(
        &path,
        libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | recursive,
    )
}

fn open_tree(path: &CStr, flags: u32) -> nix::Result<OwnedFd> {
    // SAFETY: the path outlives the call.
    let fd = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) };
    let fd = RawFd::try_from(Errno::result(fd)?).map_err(|_| Errno::EBADF)?;
    // SAFETY: the kernel has just returned this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

pub(crate) fn set_attributes(tree: &OwnedFd, set: u64) -> nix::Result<()> {
    change_attributes(tree, (set, 0), libc::AT_RECURSIVE)
}

/// An attribute of the user's home, and of what is mounted below it.
#[cfg(feature = "weaken")]
pub(crate) fn take_from_home(attribute: u64) -> nix::Result<()> {
    let home = open_tree(c"/home/user", libc::OPEN_TREE_CLOEXEC)?;
    change_attributes(&home, (0, attribute), libc::AT_RECURSIVE)
}

/// Sets attributes, and clears others.
fn change_attributes(tree: &OwnedFd, (set, clear): (u64, u64), flags: i32) -> nix::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: set,
        attr_clr: clear,
        propagation: 0,
        userns_fd: 0,
    };
    // SAFETY: the struct outlives the call and its size is given.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | flags,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    Errno::result(result).map(drop)
}

fn attach(tree: &OwnedFd, target: &str) -> nix::Result<()> {
    let target = CString::new(target).map_err(|_| Errno::EINVAL)?;
    // SAFETY: both strings outlive the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            target.as_ptr(),
            libc::MOVE_MOUNT_F_EMPTY_PATH,
        )
    };
    Errno::result(result).map(drop)
}
