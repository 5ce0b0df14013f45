//! Removes what VMs have left, which may be anything: trees deeper than any stack or descriptor table,
//! paths longer than the kernel takes, directories that even their owner may not enter.
//!
//! Nothing is followed and nothing nested: what lies two levels down is moved up one, until there are no
//! levels any more. Nobody else may be at work in the tree.

use std::ffi::{CStr, CString};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::{fs, io};

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, RenameFlags, openat, renameat2};
use nix::sys::stat::{FchmodatFlags, Mode, fchmod, fchmodat};
use nix::unistd::{UnlinkatFlags, unlinkat};

/// Names that are read at once.
const BATCH: usize = 1 << 16;

/// Removes a directory with all that is in it. One that does not exist is fine.
pub(super) fn remove_tree(path: &Path) -> io::Result<()> {
    let top = match enter(AT_FDCWD, path) {
        Err(Errno::ENOENT) => return Ok(()),
        top => top?,
    };
    let mut moved = 0;
    let mut names = names(&top)?;
    while !names.is_empty() {
        for name in names {
            if !remove(&top, &name)? {
                let directory = enter(&top, name.as_c_str())?;
                empty_into(&directory, &top, &mut moved)?;
                unlinkat(&top, name.as_c_str(), UnlinkatFlags::RemoveDir)?;
            }
        }
        names = self::names(&top)?;
    }
    fs::remove_dir(path)
}

/// Removes what is in `directory`; directories that are not empty go to `top`.
fn empty_into(directory: &OwnedFd, top: &OwnedFd, moved: &mut u64) -> nix::Result<()> {
    loop {
        let names = names(directory)?;
        if names.is_empty() {
            return Ok(());
        }
        for name in names {
            if !remove(directory, &name)? {
                // To be moved, a directory has to be writable itself.
                drop(enter(directory, name.as_c_str())?);
                move_up(directory, &name, top, moved)?;
            }
        }
    }
}

fn move_up(from: &OwnedFd, name: &CStr, top: &OwnedFd, moved: &mut u64) -> nix::Result<()> {
    loop {
        *moved += 1;
        let to = format!(".moved-{moved}");
        match renameat2(from, name, top, to.as_str(), RenameFlags::RENAME_NOREPLACE) {
            Err(Errno::EEXIST) => {}
            result => return result,
        }
    }
}

/// `false`: it is a directory that is not empty.
fn remove(directory: &OwnedFd, name: &CStr) -> nix::Result<bool> {
    match unlinkat(directory, name, UnlinkatFlags::NoRemoveDir) {
        Err(Errno::EISDIR) => {}
        removed => return removed.map(|()| true),
    }
    match unlinkat(directory, name, UnlinkatFlags::RemoveDir) {
        Err(Errno::ENOTEMPTY | Errno::EEXIST) => Ok(false),
        removed => removed.map(|()| true),
    }
}

/// Opens a directory, and lets its owner do everything in it.
fn enter<P: nix::NixPath + ?Sized>(
    at: impl std::os::fd::AsFd + Copy,
    name: &P,
) -> nix::Result<OwnedFd> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let opened = match openat(at, name, flags, Mode::empty()) {
        Err(Errno::EACCES) => {
            // A link would have been ELOOP or ENOTDIR.
            fchmodat(at, name, Mode::S_IRWXU, FchmodatFlags::FollowSymlink)?;
            openat(at, name, flags, Mode::empty())?
        }
        opened => opened?,
    };
    fchmod(&opened, Mode::S_IRWXU)?;
    Ok(opened)
}

/// Some of what is in a directory; none if there is nothing.
fn names(directory: &OwnedFd) -> nix::Result<Vec<CString>> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    // A file of its own: from the beginning, each time.
    let listed = Dir::openat(directory, ".", flags, Mode::empty())?;
    let mut names = Vec::new();
    for entry in listed {
        let entry = entry?;
        let name = entry.file_name();
        if ![c".", c".."].contains(&name) {
            names.push(name.to_owned());
        }
        if names.len() == BATCH {
            break;
        }
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use nix::sys::stat::mkdirat;

    use super::*;

    #[test]
    fn whatever_a_vm_has_left_is_removed_and_no_link_is_followed() {
        let world = tempfile::tempdir().expect("a directory");
        let kept = world.path().join("kept");
        fs::create_dir(&kept).expect("made");
        fs::write(kept.join("file"), "").expect("written");
        let tree = world.path().join("tree");
        fs::create_dir_all(tree.join("a/b/c")).expect("made");
        fs::create_dir_all(tree.join(".moved-1/x/y")).expect("made");
        fs::write(tree.join("a/b/c/file"), "").expect("written");
        symlink(&kept, tree.join("a/b/link")).expect("linked");
        symlink(&kept, tree.join("link")).expect("linked");
        for (closed, mode) in [("a/b/c", 0o000), ("a/b", 0o500), (".moved-1/x", 0o000)] {
            let mode = fs::Permissions::from_mode(mode);
            fs::set_permissions(tree.join(closed), mode).expect("closed");
        }
        remove_tree(&tree).expect("removed");
        assert!(!tree.exists());
        assert!(kept.join("file").exists());
        remove_tree(&tree).expect("nothing to remove");
    }

    #[test]
    fn a_tree_deeper_than_any_stack_is_removed() {
        let world = tempfile::tempdir().expect("a directory");
        let tree = world.path().join("tree");
        fs::create_dir(&tree).expect("made");
        let mut at = enter(AT_FDCWD, &tree).expect("entered");
        for _ in 0..20_000 {
            mkdirat(&at, "d", Mode::S_IRWXU).expect("made");
            at = enter(&at, "d").expect("entered");
        }
        fchmod(&at, Mode::empty()).expect("closed");
        drop(at);
        remove_tree(&tree).expect("removed");
        assert!(!tree.exists());
    }
}
