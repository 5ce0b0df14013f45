//! A root that somebody else has made: an image, and what the VM wrote over it.
//!
//! Until `pivot_root` an absolute link in it would lead to the host. Nothing is made or mounted through
//! a link.

use std::fs::{File, Permissions};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;

use agentvm_guest::protocol::Bytes;
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat, openat2};
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, unlinkat};

use crate::boot::errno_of;
use crate::mounts::NEW_ROOT;

/// Of a file of accounts that is read.
const MAX_FILE: u64 = 1 << 20;

/// Fails with `ELOOP` where a link is on the way, or at its end.
pub(crate) fn check(path: &str) -> nix::Result<()> {
    open_directory(path).map(drop)
}

/// The directory at `path`. Fails with `ELOOP` where a link is on the way, or at its end.
pub(crate) fn open_directory(path: &str) -> nix::Result<OwnedFd> {
    resolve(path.trim_start_matches('/'))
}

/// The directory that `path` lies in, and its name there.
pub(crate) fn parent(path: &str) -> nix::Result<(OwnedFd, &str)> {
    let (parent, name) = path.rsplit_once('/').ok_or(Errno::EINVAL)?;
    Ok((open_directory(parent)?, name))
}

fn resolve(relative: &str) -> nix::Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let root = open(NEW_ROOT, flags, Mode::empty())?;
    if relative.is_empty() {
        return Ok(root);
    }
    let how = OpenHow::new()
        .flags(flags)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
    openat2(&root, relative, how)
}

pub(crate) fn file(path: &str, content: &Bytes) -> nix::Result<()> {
    let (directory, name) = parent(path)?;
    // As it was left, which spares the disk at every boot but the first.
    if read(&directory, name).is_ok_and(|found| found == *content) {
        return Ok(());
    }
    write(&directory, name, content)
}

pub(crate) fn authorities(
    path: &str,
    from: &[String],
    otherwise: &Bytes,
    more: &Bytes,
) -> nix::Result<()> {
    let found = from.iter().find_map(|path| {
        let (directory, name) = parent(path).ok()?;
        read(&directory, name).ok()
    });
    let mut content = found.unwrap_or_else(|| otherwise.clone());
    if content.last().is_some_and(|&b| b != b'\n') {
        content.push(b'\n');
    }
    content.extend_from_slice(more);
    let (directory, name) = parent(path)?;
    write(&directory, name, &content)
}

pub(crate) fn accounts(path: &str, lines: &[String]) -> nix::Result<()> {
    let (directory, name) = parent(path)?;
    let mut content = match read(&directory, name) {
        Ok(content) => content,
        Err(Errno::ENOENT) => Vec::new(),
        Err(errno) => return Err(errno),
    };
    let before = content.len();
    for line in lines {
        let (name, number) = key(line.as_bytes());
        let taken = content.split(|&b| b == b'\n').map(key);
        if taken
            .into_iter()
            .any(|other| other.0 == name || other.1 == number)
        {
            continue;
        }
        if content.last().is_some_and(|&b| b != b'\n') {
            content.push(b'\n');
        }
        content.extend_from_slice(line.as_bytes());
        content.push(b'\n');
    }
    if content.len() == before {
        return Ok(());
    }
    write(&directory, name, &content)
}

/// Name and number of an account: the first and the third field of both formats.
fn key(line: &[u8]) -> (&[u8], Option<&[u8]>) {
    let mut fields = line.split(|&b| b == b':');
    (fields.next().unwrap_or_default(), fields.nth(1))
}

fn read(directory: &OwnedFd, name: &str) -> nix::Result<Vec<u8>> {
    // A pipe would make the open wait.
    let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let io = |error: std::io::Error| errno_of(&error);
    let file = File::from(openat(directory, name, flags, Mode::empty())?);
    let data = file.metadata().map_err(io)?;
    if !data.is_file() {
        return Err(Errno::EINVAL);
    }
    if data.len() > MAX_FILE {
        return Err(Errno::EFBIG);
    }
    let mut content = Vec::new();
    file.take(MAX_FILE).read_to_end(&mut content).map_err(io)?;
    Ok(content)
}

fn write(directory: &OwnedFd, name: &str, content: &[u8]) -> nix::Result<()> {
    match unlinkat(directory, name, UnlinkatFlags::NoRemoveDir) {
        Ok(()) | Err(Errno::ENOENT) => {}
        Err(errno) => return Err(errno),
    }
    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
    let io = |error: std::io::Error| errno_of(&error);
    let mode = Mode::from_bits_truncate(0o644);
    let mut file = File::from(openat(directory, name, flags, mode)?);
    file.write_all(content).map_err(io)?;
    // Whatever the umask.
    file.set_permissions(Permissions::from_mode(0o644))
        .map_err(io)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accounts_are_told_apart_by_name_and_number() {
        assert_eq!(
            key(b"user:x:1000:1000::/:/bin/sh"),
            (&b"user"[..], Some(&b"1000"[..]))
        );
        assert_eq!(key(b"user:x:1000:"), (&b"user"[..], Some(&b"1000"[..])));
        assert_eq!(key(b""), (&b""[..], None));
    }
}
