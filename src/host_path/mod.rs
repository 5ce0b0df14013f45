//! Paths of the host that a caller passes, so that no VM decides where they lead.
//!
//! A VM can make symlinks in what it is let write to. Where one of them lies on the way to a directory
//! that is mounted later, into this VM or into another, it would be the VM's choice what is mounted. So
//! [`resolve`] goes name by name and holds what it has looked at, and [`Exposure`] says which of the
//! symlinks on the way a VM could have made.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};
use std::time::UNIX_EPOCH;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, openat, readlinkat};
use nix::sys::stat::Mode;

pub use exposure::{Exposure, Refused, Spot};
pub use place::{Place, Table};

mod exposure;
mod place;

/// Directories in each other, of each of which a descriptor is open: links lead further than a path is long.
const MAX_DIRECTORIES: usize = 512;

/// Symlinks that one path may lead through, as for the kernel.
const MAX_LINKS: usize = 40;

/// What is at a path.
#[derive(Debug)]
pub struct Found {
    /// The thing itself, opened as a place only (`O_PATH`).
    pub descriptor: File,
    /// Its path without symlinks.
    pub real_path: PathBuf,
    links: Vec<Link>,
}

/// A symlink that was followed.
#[derive(Debug)]
struct Link {
    name: OsString,
    directory: File,
    /// The directories that led to it, the last one is `directory`.
    way: Vec<Identity>,
}

/// A directory, and not one that later gets the same inode number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
    /// In nanoseconds; 0 where the file system does not say.
    born: u128,
}

impl Identity {
    fn of(open: &File) -> io::Result<Self> {
        let metadata = open.metadata()?;
        let born = metadata.created().ok();
        Ok(Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            born: born
                .and_then(|born| born.duration_since(UNIX_EPOCH).ok())
                .map_or(0, |born| born.as_nanos()),
        })
    }
}

/// Finds what is at a path. Every directory on the way is opened in the one before it, and left by `..`
/// to the one that it was found in: whoever renames directories meanwhile changes nothing.
pub fn resolve(path: &Path) -> io::Result<Found> {
    let root = open_directory(&AT_FDCWD, OsStr::new("/"))?;
    let mut way = Way {
        identities: vec![Identity::of(&root)?],
        directories: vec![root],
    };
    let mut links = Vec::new();
    let mut left = names(&std::path::absolute(path)?);
    let descriptor = loop {
        let Some(name) = left.pop() else {
            break way.at()?.try_clone()?;
        };
        if name == ".." {
            way.leave();
            continue;
        }
        match open_directory(way.at()?, &name) {
            Ok(directory) => {
                way.enter(directory)?;
                continue;
            }
            Err(Errno::ENOTDIR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let found = open_place(way.at()?, &name)?;
        // Of a file that is no symlink the kernel says ENOENT here.
        let target = match readlinkat(&found, "") {
            Err(Errno::ENOENT) if left.is_empty() => break found,
            Err(Errno::ENOENT | Errno::EINVAL) => return Err(Errno::ENOTDIR.into()),
            target => PathBuf::from(target?),
        };
        if links.len() == MAX_LINKS {
            return Err(Errno::ELOOP.into());
        }
        links.push(Link {
            name,
            directory: way.at()?.try_clone()?,
            way: way.identities.clone(),
        });
        if target.is_absolute() {
            way.leave_all();
        }
        left.extend(names(&target));
    };
    Ok(Found {
        real_path: place::path_of(&descriptor)?,
        descriptor,
        links,
    })
}

/// The names of a path, the first one last.
fn names(path: &Path) -> Vec<OsString> {
    let names = path.components().filter_map(|component| match component {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some(OsString::from("..")),
        Component::CurDir | Component::RootDir | Component::Prefix(_) => None,
    });
    let mut names: Vec<_> = names.collect();
    names.reverse();
    names
}

/// The directories from the root to where one is.
struct Way {
    directories: Vec<File>,
    identities: Vec<Identity>,
}

impl Way {
    fn at(&self) -> io::Result<&File> {
        self.directories.last().ok_or_else(|| Errno::ENOENT.into())
    }

    fn enter(&mut self, directory: File) -> io::Result<()> {
        if self.directories.len() == MAX_DIRECTORIES {
            return Err(Errno::ENAMETOOLONG.into());
        }
        self.identities.push(Identity::of(&directory)?);
        self.directories.push(directory);
        Ok(())
    }

    fn leave(&mut self) {
        self.keep((self.directories.len() - 1).max(1));
    }

    fn leave_all(&mut self) {
        self.keep(1);
    }

    fn keep(&mut self, length: usize) {
        self.directories.truncate(length);
        self.identities.truncate(length);
    }
}

/// Opens a directory to go through. One that is mounted on demand (autofs) is mounted.
fn open_directory(at: &impl std::os::fd::AsFd, name: &OsStr) -> nix::Result<File> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    openat(at, name, flags, Mode::empty()).map(File::from)
}

fn open_place(at: &File, name: &OsStr) -> nix::Result<File> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    openat(at, name, flags, Mode::empty()).map(File::from)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    fn real(path: &Path) -> PathBuf {
        resolve(path).expect("a place").real_path
    }

    #[test]
    fn a_way_through_more_directories_than_anybody_makes_is_refused() {
        let directory = tempfile::tempdir().expect("a directory");
        let deep = directory.path().join("d/".repeat(MAX_DIRECTORIES));
        fs::create_dir_all(&deep).expect("mkdir");
        let error = resolve(&deep).expect_err("an error");
        assert_eq!(error.raw_os_error(), Some(libc::ENAMETOOLONG));
    }

    #[test]
    fn a_path_leads_where_the_kernel_leads_it() {
        let directory = tempfile::tempdir().expect("a directory");
        let at = |path: &str| directory.path().join(path);
        fs::create_dir_all(at("a/b")).expect("mkdir");
        fs::write(at("a/file"), "").expect("write");
        symlink("a/b/../file", at("relative")).expect("symlink");
        symlink(at("a"), at("absolute")).expect("symlink");
        symlink("../absolute/b", at("a/chain")).expect("symlink");
        for path in [
            "",
            "a",
            "a/",
            "a/./b",
            "a/file",
            "a/b/..",
            "relative",
            "absolute",
            "absolute/..",
            "absolute/file",
            "a/chain",
            "a/chain/../file",
        ] {
            let kernels = fs::canonicalize(at(path)).expect("canonicalize");
            assert_eq!(real(&at(path)), kernels, "{path:?}");
        }
        assert_eq!(real(Path::new("/../..")), Path::new("/"));
        assert_eq!(real(Path::new(".")), std::env::current_dir().expect("cwd"));
    }

    #[test]
    fn what_leads_nowhere_fails_as_for_the_kernel() {
        let directory = tempfile::tempdir().expect("a directory");
        let at = |path: &str| directory.path().join(path);
        fs::write(at("file"), "").expect("write");
        symlink("loop", at("loop")).expect("symlink");
        symlink("nowhere", at("dangling")).expect("symlink");
        for path in ["none", "none/..", "file/x", "file/..", "loop", "dangling"] {
            let ours = resolve(&at(path)).expect_err("a failure").raw_os_error();
            let kernels = fs::canonicalize(at(path)).expect_err("a failure");
            assert_eq!(ours, kernels.raw_os_error(), "{path:?}");
        }
    }
}
