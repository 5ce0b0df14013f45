//! Files of the host that are copied into a VM, or out of it.
//!
//! No symlink that a VM could have made leads to them, and what is replaced is replaced where it was
//! looked at: the directories of the host may be mounted, and a VM may rename what is in them.

use std::ffi::{OsStr, OsString};
use std::fs::{File, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, openat, renameat};
use nix::sys::stat::{Mode, SFlag, fstatat};
use nix::unistd::{UnlinkatFlags, linkat, unlinkat};
use uuid::Uuid;

use super::client::Settings;
use super::machine::Machine;
use crate::error::{Code, Error};
use crate::host_path::{Exposure, Refused};
use crate::vm::file;

impl Machine {
    /// What of the host VMs can write to.
    pub(super) fn exposure(&self, settings: &Settings) -> Exposure {
        let data = self.base_cache.parent().unwrap_or(&self.base_cache);
        Exposure::new(data, settings.private_directories())
    }
}

/// Does what may wait for a disk on a thread for it.
pub(super) async fn on_a_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Refused> + Send + 'static,
) -> Result<T, Refused> {
    file::on_a_thread(move || Ok(work())).await?
}

/// Opens a regular file to be read.
pub(super) fn open(exposure: &Exposure, path: &Path) -> Result<File, Refused> {
    let place = exposure.open(path)?.descriptor;
    let found = place.metadata()?;
    if found.is_dir() {
        return Err(Errno::EISDIR.into());
    }
    if !found.is_file() {
        return Err(Errno::EINVAL.into());
    }
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(format!("/proc/self/fd/{}", place.as_raw_fd()))?;
    Ok(file)
}

/// A file that is not yet at its path. Where the file system can, it has no name until it is kept: a
/// process that is killed leaves nothing. Dropping it before it is kept removes it.
#[derive(Debug)]
pub(super) struct NewFile {
    file: File,
    directory: File,
    name: OsString,
    mode: Mode,
    /// Where it is meanwhile.
    temporary: Option<OsString>,
}

impl NewFile {
    /// One that is going to be at `path`, with the permissions of a file that is there.
    pub(super) fn beside(exposure: &Exposure, path: &Path) -> Result<Self, Refused> {
        if path.as_os_str().as_bytes().ends_with(b"/") {
            return Err(Errno::EISDIR.into());
        }
        let path = std::path::absolute(path)?;
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(Errno::EISDIR.into());
        };
        let directory = exposure.open(parent)?.descriptor;
        let mode = mode_at(&directory, name)?;
        let (file, temporary) = make(&directory)?;
        Ok(Self {
            file,
            directory,
            name: name.to_owned(),
            mode,
            temporary,
        })
    }

    pub(super) const fn file(&self) -> &File {
        &self.file
    }

    pub(super) fn keep(mut self) -> io::Result<()> {
        self.file
            .set_permissions(Permissions::from_mode(self.mode.bits()))?;
        let temporary = match self.temporary.clone() {
            Some(temporary) => temporary,
            None => match self.link(&self.name) {
                Err(Errno::EEXIST) => {
                    let temporary = temporary_name();
                    self.link(&temporary)?;
                    // From now on it is to be removed.
                    self.temporary.insert(temporary).clone()
                }
                linked => return Ok(linked?),
            },
        };
        // What is there is replaced, not followed, whatever it has become.
        renameat(&self.directory, &*temporary, &self.directory, &*self.name)?;
        self.temporary = None;
        Ok(())
    }

    fn link(&self, name: &OsStr) -> nix::Result<()> {
        let own = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        let follow = AtFlags::AT_SYMLINK_FOLLOW;
        linkat(AT_FDCWD, own.as_str(), &self.directory, name, follow)
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if let Some(temporary) = &self.temporary
            && let Err(error) = unlinkat(&self.directory, &**temporary, UnlinkatFlags::NoRemoveDir)
        {
            tracing::warn!(%error, path = ?temporary, "what is left of a download stays");
        }
    }
}

fn temporary_name() -> OsString {
    format!(".agentvm-download-{}", Uuid::now_v7().simple()).into()
}

/// A new file in `directory`, for nobody else to read until it is whole, and its name if it has one.
fn make(directory: &File) -> nix::Result<(File, Option<OsString>)> {
    let mode = Mode::S_IRUSR | Mode::S_IWUSR;
    let flags = OFlag::O_WRONLY | OFlag::O_CLOEXEC;
    match openat(directory, ".", flags | OFlag::O_TMPFILE, mode) {
        // Not on this file system.
        Err(Errno::EOPNOTSUPP | Errno::EISDIR | Errno::EINVAL) => {}
        made => return Ok((made?.into(), None)),
    }
    let name = temporary_name();
    let flags = flags | OFlag::O_CREAT | OFlag::O_EXCL;
    let file = openat(directory, &*name, flags, mode)?;
    Ok((file.into(), Some(name)))
}

/// The permissions of a regular file that is there, or of a new one. Anything else is not replaced.
fn mode_at(directory: &File, name: &OsStr) -> io::Result<Mode> {
    let found = match fstatat(directory, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
        Err(Errno::ENOENT) => return Ok(Mode::from_bits_truncate(0o666 & !umask())),
        found => found?.st_mode,
    };
    match SFlag::from_bits_truncate(found) & SFlag::S_IFMT {
        SFlag::S_IFREG => Ok(Mode::from_bits_truncate(found & 0o777)),
        SFlag::S_IFDIR => Err(Errno::EISDIR.into()),
        SFlag::S_IFLNK => Err(Errno::ELOOP.into()),
        // A rename would put a file in the place of a device.
        _ => Err(Errno::EINVAL.into()),
    }
}

/// The umask of this process; umask(2) can't be asked without changing it.
fn umask() -> u32 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mut lines = status.lines();
    let umask = lines.find_map(|line| line.strip_prefix("Umask:"));
    umask.map_or(0o022, |umask| {
        u32::from_str_radix(umask.trim(), 8).unwrap_or(0o077)
    })
}

/// A failure at a file of the host's: `what` could not be done.
pub(super) fn failed(what: &str, path: &Path, refused: Refused) -> Error {
    let shown = path.display();
    match refused {
        Refused::Io(error) => on_host(what, path, &error),
        Refused::Link { .. } => {
            let problem = format!("can't {what} \"{shown}\" on the host: {refused}");
            Error::new(Code::from(Errno::ELOOP), problem)
        }
        Refused::Record { .. } => Error::new(Code::StoreCorrupt, refused.to_string()),
    }
}

pub(super) fn on_host(what: &str, path: &Path, error: &io::Error) -> Error {
    let errno = Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO));
    let problem = match errno {
        Errno::EINVAL => "it is not a regular file",
        Errno::ELOOP => "it is a symbolic link",
        errno => errno.desc(),
    };
    Error::new(
        Code::from(errno),
        format!("can't {what} \"{}\" on the host: {problem}", path.display()),
    )
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write;
    use std::os::unix::fs::symlink;

    use super::*;

    fn world() -> (tempfile::TempDir, Exposure) {
        let directory = tempfile::tempdir().expect("a directory");
        let exposure = Exposure::new(directory.path(), Vec::new());
        (directory, exposure)
    }

    fn names(directory: &Path) -> Vec<OsString> {
        let entries = fs::read_dir(directory).expect("ls");
        entries
            .map(|entry| entry.expect("an entry").file_name())
            .collect()
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).expect("a file").permissions().mode() & 0o7777
    }

    #[test]
    fn a_file_appears_when_it_is_kept() {
        let (directory, exposure) = world();
        let path = directory.path().join("file");
        let new = NewFile::beside(&exposure, &path).expect("a file");
        new.file().write_all(b"new").expect("write");
        assert!(!path.exists());
        new.keep().expect("kept");
        assert_eq!(fs::read(&path).expect("read"), b"new");
        assert_eq!(mode(&path), 0o666 & !umask());
        assert_eq!(names(directory.path()), ["file"]);
    }

    #[test]
    fn a_file_that_is_replaced_gives_its_permissions_but_no_others_identity() {
        let (directory, exposure) = world();
        let path = directory.path().join("file");
        fs::write(&path, "old").expect("write");
        fs::set_permissions(&path, Permissions::from_mode(0o4750)).expect("chmod");
        let new = NewFile::beside(&exposure, &path).expect("a file");
        new.file().write_all(b"new").expect("write");
        new.keep().expect("kept");
        assert_eq!(fs::read(&path).expect("read"), b"new");
        assert_eq!(mode(&path), 0o750);
        assert_eq!(names(directory.path()), ["file"]);
    }

    #[test]
    fn one_that_is_not_kept_leaves_nothing() {
        let (directory, exposure) = world();
        let new = NewFile::beside(&exposure, &directory.path().join("file"));
        drop(new.expect("a file"));
        assert_eq!(names(directory.path()), [] as [&str; 0]);
    }

    #[test]
    fn a_link_that_comes_meanwhile_is_replaced() {
        let (directory, exposure) = world();
        let (path, other) = (
            directory.path().join("file"),
            directory.path().join("other"),
        );
        fs::write(&other, "other").expect("write");
        let new = NewFile::beside(&exposure, &path).expect("a file");
        symlink(&other, &path).expect("symlink");
        new.keep().expect("kept");
        assert!(!path.is_symlink());
        assert_eq!(fs::read(&other).expect("read"), b"other");
    }
}
