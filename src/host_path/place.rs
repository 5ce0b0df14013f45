//! Where something is in its file system, whatever path leads there.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use agentvm_guest::mountinfo::unescape;

/// A path of a file system. Bind mounts give it other names, but no other place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    pub device: String,
    pub path: PathBuf,
    pub file_system: String,
}

impl Place {
    /// Whether `other` is the same place, or below it.
    #[must_use]
    pub fn holds(&self, other: &Self) -> bool {
        self.device == other.device && other.path.starts_with(&self.path)
    }
}

const MOUNTS: &str = "/proc/self/mountinfo";

/// The mounts that this process sees (`proc_pid_mountinfo(5)`).
#[derive(Debug)]
pub struct Table(Vec<Mounted>);

#[derive(Debug)]
struct Mounted {
    id: String,
    device: String,
    root: PathBuf,
    point: PathBuf,
    file_system: String,
}

impl Table {
    pub fn read() -> io::Result<Self> {
        let text = fs::read(MOUNTS).map_err(|error| {
            let problem = format!("can't read {MOUNTS}: {error}");
            io::Error::new(error.kind(), problem)
        })?;
        Ok(Self(
            text.split(|byte| *byte == b'\n')
                .filter_map(parse)
                .collect(),
        ))
    }

    /// `None`: on no mount that this process sees.
    pub fn place(&self, of: &impl AsRawFd) -> io::Result<Option<Place>> {
        let path = path_of(of)?;
        let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", of.as_raw_fd()))?;
        Ok(self.place_of(&path, &info))
    }

    fn place_of(&self, path: &Path, info: &str) -> Option<Place> {
        let id = info.lines().find_map(|line| line.strip_prefix("mnt_id:"))?;
        let mounted = self.0.iter().find(|mounted| mounted.id == id.trim())?;
        let below = path.strip_prefix(&mounted.point).ok()?;
        // To join an empty path would add a slash.
        let path = if below.as_os_str().is_empty() {
            mounted.root.clone()
        } else {
            mounted.root.join(below)
        };
        Some(Place {
            device: mounted.device.clone(),
            path,
            file_system: mounted.file_system.clone(),
        })
    }

    /// Where other file systems, or other parts of one, are mounted below `path`: relative to it.
    pub fn below<'a>(&'a self, path: &'a Path) -> impl Iterator<Item = &'a Path> {
        let points = self.0.iter().map(|mounted| &*mounted.point);
        points
            .filter_map(move |point| point.strip_prefix(path).ok())
            .filter(|below| !below.as_os_str().is_empty())
    }
}

/// The path of what is open, without symlinks.
pub(super) fn path_of(open: &impl AsRawFd) -> io::Result<PathBuf> {
    fs::read_link(format!("/proc/self/fd/{}", open.as_raw_fd()))
}

fn parse(line: &[u8]) -> Option<Mounted> {
    let text = |field: &[u8]| String::from_utf8_lossy(field).into_owned();
    let path = |field: &[u8]| PathBuf::from(std::ffi::OsString::from_vec(unescape(field)));
    let mut fields = line.split(|byte| *byte == b' ');
    let id = text(fields.next()?);
    let device = text(fields.nth(1)?);
    let (root, point) = (path(fields.next()?), path(fields.next()?));
    let file_system = text(fields.skip_while(|field| *field != b"-").nth(1)?);
    Some(Mounted {
        id,
        device,
        root,
        point,
        file_system,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_the_mount_table_is_read() {
        let line = br"36 35 98:0 /mnt1 /a\040b rw,noatime master:1 - ext3 /dev/root rw";
        let mounted = parse(line).expect("a mount");
        assert_eq!(mounted.id, "36");
        assert_eq!(mounted.device, "98:0");
        assert_eq!(mounted.root, Path::new("/mnt1"));
        assert_eq!(mounted.point, Path::new("/a b"));
        assert_eq!(mounted.file_system, "ext3");
    }
}
