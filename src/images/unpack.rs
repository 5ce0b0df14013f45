//! Layers, one over the other, into one directory.
//!
//! The layers are flattened, not mounted over each other: an ordinary user can't make the device nodes
//! that overlayfs takes for deleted files, and its other marks need Linux 6.7.

use std::collections::HashSet;
use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat, openat2};
use nix::sys::stat::{Mode, fstatat, futimens, mkdirat};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchownat, linkat, symlinkat, unlinkat};
use tar::{Archive, Entry, EntryType};

use super::bounds::{Bounds, Limits};
use super::work::Work;
use super::{ImageError, Result};

/// Who owns the unpacked files on the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ownership {
    /// The ids of the archive: for a privileged process, whose VMs see them through an id map.
    AsInImage,
    /// This process's user, who is the only one that its VMs have.
    Caller,
}

/// Highest id of a VM; what is above belongs to nobody there.
const MAX_ID: u64 = 65_535;
const NOBODY: u32 = 65_534;

/// Names of one layer, which are remembered while it is unpacked.
const MAX_NAMES: usize = 256 << 20;

/// How deep directories may lie, counted on the host. Removing a tree takes a descriptor and some stack
/// for each level, and links would let an archive make deeper ones than a path can name.
const MAX_DEPTH: usize = 256;

/// What is read of a file at once.
const BUFFER: usize = 64 << 10;
const HOLE: i64 = 64 << 10;

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";

pub(super) struct Unpacking {
    root: File,
    ownership: Ownership,
    bounds: Bounds,
}

impl Unpacking {
    /// Into `path`, a new directory that nobody else touches.
    pub(super) fn begin(
        path: &Path,
        ownership: Ownership,
        limits: Limits,
        work: &Arc<Work>,
    ) -> Result<Self> {
        let root = (|| {
            DirBuilder::new().mode(0o755).create(path)?;
            fs::set_permissions(path, Permissions::from_mode(0o755))?;
            OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_DIRECTORY)
                .open(path)
        })()
        .map_err(|error| ImageError::host("can't make", path, error))?;
        Ok(Self {
            root,
            ownership,
            bounds: Bounds::new(limits, path, work),
        })
    }

    /// What its packed layers are read for.
    pub(super) fn work(&self) -> Arc<Work> {
        Arc::clone(self.bounds.work())
    }

    /// Unpacks an archive over what there is.
    pub(super) fn layer(&mut self, archive: impl Read) -> Result<()> {
        let mut archive = Archive::new(self.bounds.archive(archive));
        self.bounds.headers_follow();
        let mut new = New::default();
        for entry in archive.entries().map_err(broken)? {
            let mut entry = entry.map_err(broken)?;
            self.bounds.entry()?;
            let path = beneath(&entry.path_bytes())?;
            self.bounds.content_follows();
            self.entry(&path, &mut entry, &mut new)?;
            // What was not of use is read too: then what follows is headers.
            self.discard(&mut entry)?;
            self.bounds.headers_follow();
        }
        // What follows the end of an archive is part of what the digest is of.
        self.bounds.content_follows();
        io::copy(&mut archive.into_inner(), &mut io::sink())
            .map(drop)
            .map_err(broken)
    }

    fn discard<R: Read>(&mut self, entry: &mut Entry<'_, R>) -> Result<()> {
        let mut buffer = vec![0; BUFFER];
        loop {
            match entry.read(&mut buffer).map_err(broken)? {
                0 => return Ok(()),
                n => self.bounds.content(n)?,
            }
        }
    }

    fn entry<R: Read>(
        &mut self,
        path: &Path,
        entry: &mut Entry<'_, R>,
        new: &mut New,
    ) -> Result<()> {
        let kind = entry.header().entry_type();
        let failed = |errno| unusable(path, errno);
        let Some(name) = path.file_name() else {
            // The root itself.
            if kind.is_dir() {
                let root = self.root.try_clone().map_err(broken)?;
                self.finish(&root, entry, true).map_err(failed)?;
            }
            return Ok(());
        };
        let parent_path = path.parent().unwrap_or_else(|| Path::new(""));
        let parent = self.parent(path, parent_path)?;
        if name.as_bytes() == OPAQUE {
            return self.clear(&parent, parent_path, new);
        }
        if let Some(hidden) = name.as_bytes().strip_prefix(WHITEOUT) {
            let hidden = OsString::from_vec(hidden.to_vec());
            let whole = parent_path.join(&hidden);
            // "", "." and ".." after the prefix would not name an entry of this directory.
            if beneath(hidden.as_bytes())?.as_os_str() != hidden || hidden.is_empty() {
                return Err(invalid(path, "hides nothing that could be there"));
            }
            // Only what lower layers have is hidden.
            if !new.contains(&whole) {
                remove(&parent, Path::new(&hidden)).map_err(|error| host(path, error))?;
            }
            return Ok(());
        }
        new.insert(path)?;
        let name = Path::new(name);
        if kind.is_dir() {
            match mkdirat(&parent, name, Mode::from_bits_truncate(0o755)) {
                Ok(()) => {}
                Err(Errno::EEXIST) => {
                    let there = fstatat(&parent, name, AtFlags::AT_SYMLINK_NOFOLLOW);
                    if there.map_err(failed)?.st_mode & libc::S_IFMT != libc::S_IFDIR {
                        remove(&parent, name).map_err(|error| host(path, error))?;
                        let mode = Mode::from_bits_truncate(0o755);
                        mkdirat(&parent, name, mode).map_err(failed)?;
                    }
                }
                Err(errno) => return Err(failed(errno)),
            }
            let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            let made = openat(&parent, name, flags, Mode::empty()).map_err(failed)?;
            return self.finish(&File::from(made), entry, true).map_err(failed);
        }
        if kind.is_pax_global_extensions() {
            return Ok(());
        }
        if kind == EntryType::Link {
            // Looked at before what it replaces is removed: it may be its own target.
            let target = entry.link_name_bytes();
            let target = target.ok_or_else(|| invalid(path, "is a link to nothing"))?;
            return self.hard_link(path, &parent, name, &beneath(&target)?);
        }
        remove(&parent, name).map_err(|error| host(path, error))?;
        if kind == EntryType::Symlink {
            let target = entry.link_name_bytes();
            let target = target.ok_or_else(|| invalid(path, "is a link to nothing"))?;
            let target = Path::new(std::ffi::OsStr::from_bytes(&target)).to_owned();
            symlinkat(&target, &parent, name).map_err(failed)?;
            if let Some((uid, gid)) = self.owner(entry).map_err(failed)? {
                let (uid, gid) = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
                fchownat(&parent, name, uid, gid, AtFlags::AT_SYMLINK_NOFOLLOW).map_err(failed)?;
            }
        } else if matches!(
            kind,
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse
        ) {
            let flags = OFlag::O_CREAT
                | OFlag::O_EXCL
                | OFlag::O_WRONLY
                | OFlag::O_NOFOLLOW
                | OFlag::O_CLOEXEC;
            let mode = Mode::from_bits_truncate(0o600);
            let mut file = File::from(openat(&parent, name, flags, mode).map_err(failed)?);
            self.content(path, entry, &mut file)?;
            self.finish(&file, entry, false).map_err(failed)?;
        }
        // Devices are the VM's own, and pipes nobody ships: both are left out.
        Ok(())
    }

    /// Removes what lower layers have in a directory, once for each layer: what is there afterwards is the
    /// layer's own.
    fn clear(&self, directory: &OwnedFd, path: &Path, new: &mut New) -> Result<()> {
        if !new.clear(path)? {
            return Ok(());
        }
        let failed = |error| host(path, error);
        for entry in fs::read_dir(on_host(directory)).map_err(failed)? {
            self.work().check()?;
            let name = entry.map_err(failed)?.file_name();
            let whole = path.join(&name);
            if !new.contains(&whole) {
                remove(directory, Path::new(&name)).map_err(failed)?;
                continue;
            }
            let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            match openat(directory, Path::new(&name), flags, Mode::empty()) {
                Ok(below) => self.clear(&below, &whole, new)?,
                Err(Errno::ENOTDIR | Errno::ELOOP) => {}
                Err(errno) => return Err(failed(errno.into())),
            }
        }
        Ok(())
    }

    fn content<R: Read>(
        &mut self,
        path: &Path,
        entry: &mut Entry<'_, R>,
        file: &mut File,
    ) -> Result<()> {
        let mut buffer = vec![0; BUFFER];
        let mut ends_with_hole = false;
        let failed = |error| host(path, error);
        loop {
            let n = entry.read(&mut buffer).map_err(broken)?;
            if n == 0 {
                break;
            }
            self.bounds.content(n)?;
            let read = buffer.get(..n).unwrap_or_default();
            // A few bytes of an archive can stand for any number of zeros.
            ends_with_hole = n == BUFFER && read.iter().all(|&byte| byte == 0);
            if ends_with_hole {
                file.seek_relative(HOLE).map_err(failed)?;
            } else {
                file.write_all(read).map_err(failed)?;
                self.bounds.wrote(n)?;
            }
        }
        if ends_with_hole {
            let length = file.stream_position().map_err(failed)?;
            file.set_len(length).map_err(failed)?;
        }
        Ok(())
    }

    fn hard_link(&self, path: &Path, parent: &OwnedFd, name: &Path, target: &Path) -> Result<()> {
        let failed = |errno| unusable(path, errno);
        let target_name = target
            .file_name()
            .ok_or_else(|| invalid(path, "is a link to the root"))?;
        let from = target.parent().unwrap_or_else(|| Path::new(""));
        let from = self.open(from).map_err(failed)?;
        let there = fstatat(&from, target_name, AtFlags::AT_SYMLINK_NOFOLLOW).map_err(failed)?;
        if let Ok(replaced) = fstatat(parent, name, AtFlags::AT_SYMLINK_NOFOLLOW)
            && (replaced.st_dev, replaced.st_ino) == (there.st_dev, there.st_ino)
        {
            return Ok(());
        }
        remove(parent, name).map_err(|error| host(path, error))?;
        linkat(&from, target_name, parent, name, AtFlags::empty()).map_err(failed)
    }

    /// Owner, mode and time, in this order: a change of owner clears bits of the mode.
    fn finish<R: Read>(
        &self,
        file: &File,
        entry: &Entry<'_, R>,
        is_dir: bool,
    ) -> Result<(), Errno> {
        let errno = |error: io::Error| errno_of(&error);
        if let Some((uid, gid)) = self.owner(entry)? {
            fchown(file, Some(uid), Some(gid)).map_err(errno)?;
        }
        let mode = entry.header().mode().map_err(errno)?;
        // No program of a VM gains anything by setuid (`nosuid`), and none of the host shall.
        let mode = match (is_dir, self.ownership) {
            (true, Ownership::AsInImage) => mode & 0o3777,
            (false, Ownership::AsInImage) => mode & 0o777,
            // Who owns it must be able to unpack below it, to read it, and to remove it.
            (true, Ownership::Caller) => mode & 0o1777 | 0o700,
            (false, Ownership::Caller) => mode & 0o777 | 0o600,
        };
        file.set_permissions(Permissions::from_mode(mode))
            .map_err(errno)?;
        if !is_dir {
            // Compiled Python is only taken with the time of its source.
            let time = entry.header().mtime().map_err(errno)?;
            let time = TimeSpec::new(i64::try_from(time).unwrap_or(0), 0);
            futimens(file, &time, &time)?;
        }
        Ok(())
    }

    fn owner<R: Read>(&self, entry: &Entry<'_, R>) -> Result<Option<(u32, u32)>, Errno> {
        if self.ownership == Ownership::Caller {
            return Ok(None);
        }
        let errno = |error: io::Error| errno_of(&error);
        let id = |id: u64| match u32::try_from(id) {
            Ok(small) if id <= MAX_ID => small,
            _ => NOBODY,
        };
        let header = entry.header();
        let (uid, gid) = (header.uid().map_err(errno)?, header.gid().map_err(errno)?);
        Ok(Some((id(uid), id(gid))))
    }

    /// Opens a directory that must be there. Links on the way are followed as in the VM: from the
    /// image's root and never out of it.
    fn open(&self, path: &Path) -> Result<OwnedFd, Errno> {
        let path = if path.as_os_str().is_empty() {
            Path::new(".")
        } else {
            path
        };
        let how = OpenHow::new()
            .flags(OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        let directory = openat2(&self.root, path, how)?;
        let place = fs::read_link(on_host(&directory)).map_err(|error| errno_of(&error))?;
        if place.components().count() > MAX_DEPTH {
            return Err(Errno::ENAMETOOLONG);
        }
        Ok(directory)
    }

    /// The same, made if it is missing: not every archive has an entry for each directory.
    fn parent(&mut self, of: &Path, path: &Path) -> Result<OwnedFd> {
        let failed = |errno| unusable(of, errno);
        match self.open(path) {
            Err(Errno::ENOENT) => {}
            opened => return opened.map_err(failed),
        }
        let mut there = PathBuf::new();
        let mut directory = self.open(&there).map_err(failed)?;
        for component in path.components() {
            let name = Path::new(component.as_os_str());
            match mkdirat(&directory, name, Mode::from_bits_truncate(0o755)) {
                Ok(()) => self.bounds.entry()?,
                Err(Errno::EEXIST) => {}
                Err(errno) => return Err(failed(errno)),
            }
            there.push(name);
            directory = self.open(&there).map_err(failed)?;
        }
        Ok(directory)
    }
}

/// What the layer that is being unpacked has itself, with the directories that it is in.
#[derive(Default)]
struct New {
    paths: HashSet<PathBuf>,
    /// Directories without anything of lower layers. A layer may say so of one any number of times.
    cleared: HashSet<PathBuf>,
    bytes: usize,
}

impl New {
    fn insert(&mut self, path: &Path) -> Result<()> {
        for path in path.ancestors() {
            if !self.paths.insert(path.to_owned()) {
                break;
            }
            self.bytes += path.as_os_str().len();
        }
        self.check()
    }

    /// Whether that is not done yet.
    fn clear(&mut self, path: &Path) -> Result<bool> {
        let is_first = self.cleared.insert(path.to_owned());
        if is_first {
            self.bytes += path.as_os_str().len();
        }
        self.check().map(|()| is_first)
    }

    fn check(&self) -> Result<()> {
        if self.bytes > MAX_NAMES {
            return Err(ImageError::TooLarge(format!(
                "the names of a layer have more than {MAX_NAMES} bytes"
            )));
        }
        Ok(())
    }

    fn contains(&self, path: &Path) -> bool {
        self.paths.contains(path)
    }
}

/// Where an open directory is, for calls that take no descriptor.
fn on_host(directory: &OwnedFd) -> PathBuf {
    Path::new("/proc/self/fd").join(directory.as_raw_fd().to_string())
}

/// The name of an entry, relative to the root. One that leads out of it is refused.
fn beneath(name: &[u8]) -> Result<PathBuf> {
    let path = Path::new(std::ffi::OsStr::from_bytes(name));
    let mut beneath = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => beneath.push(name),
            // An absolute name means the same below the root.
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => {
                return Err(invalid(path, "leads out of the image"));
            }
        }
    }
    Ok(beneath)
}

/// Removes an entry of `directory` with everything in it, and follows no link. None is fine.
fn remove(directory: &OwnedFd, name: &Path) -> io::Result<()> {
    match unlinkat(directory, name, UnlinkatFlags::NoRemoveDir) {
        Ok(()) | Err(Errno::ENOENT) => Ok(()),
        Err(Errno::EISDIR | Errno::EPERM) => fs::remove_dir_all(on_host(directory).join(name)),
        Err(errno) => Err(errno.into()),
    }
}

fn invalid(path: &Path, problem: &str) -> ImageError {
    ImageError::Invalid(format!("its entry {} {problem}", path.display()))
}

fn unusable(path: &Path, errno: Errno) -> ImageError {
    match errno {
        Errno::ENOSPC | Errno::EDQUOT => host(path, errno.into()),
        _ => invalid(path, &format!("can't be made: {}", errno.desc())),
    }
}

fn host(path: &Path, error: io::Error) -> ImageError {
    ImageError::host("can't unpack", path, error)
}

fn broken(error: io::Error) -> ImageError {
    match error.downcast::<ImageError>() {
        Ok(own) => own,
        Err(error) => ImageError::Invalid(format!("a layer can't be read: {error}")),
    }
}

fn errno_of(error: &io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(libc::EINVAL))
}
