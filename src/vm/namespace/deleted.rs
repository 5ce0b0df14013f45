//! What the programs of a VM hold of the disk that has no name any more: files that were deleted while
//! they were open or mapped.
//!
//! Not seen is a file that is only under way in a socket. One that is only mapped is known to be there, and not
//! how large it is, if this process is an ordinary user's: the kernel shows these to nobody else.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::time::Instant;

use nix::sys::statfs::{TMPFS_MAGIC, statfs};

use super::disk::Measured;

/// The deleted files that PID 1 and what descends from it hold, each once, as far as `deadline` lets it look:
/// thousands of threads may each have as many files. `device`: the file system that counts, also if it is
/// memory.
pub(super) fn measure(pid: i32, device: u64, deadline: Instant) -> Measured {
    let mut seen = HashSet::new();
    let mut measured = Measured {
        bytes: 0,
        files: 0,
        complete: true,
    };
    let mut count = |task: &str, held: &str| {
        let directory = format!("/proc/{task}/{held}");
        match names(&directory) {
            Ok(names) => {
                for name in names {
                    if Instant::now() >= deadline {
                        measured.complete = false;
                        return;
                    }
                    match deleted(&format!("{directory}/{name}"), device, &mut seen) {
                        Ok(Some(bytes)) => {
                            measured.bytes = measured.bytes.saturating_add(bytes);
                            measured.files += 1;
                        }
                        // Nor does it show any other.
                        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                            measured.complete &= !maps_deleted(task, device);
                            return;
                        }
                        Ok(None) | Err(_) => {}
                    }
                }
            }
            // The kernel closes what ends to all but root, for the instant until it is reaped.
            Err(_) if has_ended(task) => {}
            // A program can close its own from a process without privileges (`PR_SET_DUMPABLE`).
            Err(_) => measured.complete = false,
        }
    };
    for pid in with_descendants(pid) {
        let tasks = names(&format!("/proc/{pid}/task")).unwrap_or_default();
        // Of threads that outlive the first one, any can show what they all have mapped.
        if let Some(task) = tasks.iter().find(|task| !has_ended(task)) {
            count(task, "map_files");
        }
        // Each thread may have a table of its own.
        for task in &tasks {
            if Instant::now() >= deadline {
                measured.complete = false;
                return measured;
            }
            count(task, "fd");
        }
    }
    measured
}

/// Whether a thread is no more, or on its way out: one that runs has memory.
fn has_ended(task: &str) -> bool {
    fs::read_to_string(format!("/proc/{task}/statm")).map_or(true, |pages| pages.starts_with("0 "))
}

/// What the file that a link of `/proc` leads to takes of a disk, if it has no name and was not met before.
fn deleted(link: &str, device: u64, seen: &mut HashSet<(u64, u64)>) -> io::Result<Option<u64>> {
    // It opens nothing.
    let file = fs::metadata(link)?;
    if !file.is_file() || file.nlink() > 0 || !seen.insert((file.dev(), file.ino())) {
        return Ok(None);
    }
    Ok(match statfs(link) {
        // That is memory.
        Ok(system) if system.filesystem_type() == TMPFS_MAGIC && file.dev() != device => None,
        _ => Some(file.blocks().saturating_mul(512)),
    })
}

/// Whether a process has a file of this device mapped that has no name, by `proc_pid_maps(5)`: range,
/// permissions, offset, device, inode, path.
fn maps_deleted(task: &str, device: u64) -> bool {
    let device = format!("{:02x}:{:02x}", libc::major(device), libc::minor(device));
    let maps = fs::read(format!("/proc/{task}/maps")).unwrap_or_default();
    let mut lines = maps.split(|byte| *byte == b'\n');
    lines.any(|line| {
        let mut fields = line.split(|byte| *byte == b' ');
        line.ends_with(b" (deleted)") && fields.nth(3) == Some(device.as_bytes())
    })
}

/// Every process of a VM is a descendant of its PID 1, which is the first of them.
pub(super) fn with_descendants(pid: i32) -> Vec<i32> {
    let mut children: HashMap<i32, Vec<i32>> = HashMap::new();
    for name in names("/proc").unwrap_or_default() {
        if let Ok(pid) = name.parse()
            && let Some(parent) = parent_of(pid)
        {
            children.entry(parent).or_default().push(pid);
        }
    }
    let mut found = vec![pid];
    let mut next = 0;
    while let Some(pid) = found.get(next) {
        found.extend(children.remove(pid).unwrap_or_default());
        next += 1;
    }
    found
}

/// The parent of a process that is there.
pub(super) fn parent_of(pid: i32) -> Option<i32> {
    parent(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// The name of the program, in parentheses, may be anything.
fn parent(stat: &str) -> Option<i32> {
    let (_, after) = stat.rsplit_once(')')?;
    after.split_whitespace().nth(1)?.parse().ok()
}

fn names(directory: &str) -> io::Result<Vec<String>> {
    let entries = fs::read_dir(directory)?.flatten();
    Ok(entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect())
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsRawFd;
    use std::process::{Command, Stdio};
    use std::time::Duration;

    use super::*;

    fn later() -> Instant {
        Instant::now() + Duration::from_hours(1)
    }

    #[test]
    fn what_there_is_no_time_for_is_not_taken_for_nothing() {
        let own = i32::try_from(std::process::id()).expect("a pid");
        assert!(!measure(own, 0, Instant::now()).complete);
    }

    #[test]
    fn a_name_does_not_hide_who_the_parent_is() {
        assert_eq!(parent("7 (a) S 1 (b) R 42 7 7"), Some(42));
        assert_eq!(parent("7 (sh"), None);
    }

    #[test]
    fn a_deleted_file_that_a_child_has_open_twice_is_counted_once() {
        let mut file = tempfile::tempfile().expect("a file");
        let device = file.metadata().expect("its data").dev();
        file.write_all(&vec![1; 1 << 20]).expect("written");
        let again = file.try_clone().expect("cloned");
        let mut child = Command::new("sleep")
            .arg("100")
            .stdin(Stdio::from(file))
            .stdout(Stdio::from(again))
            .spawn()
            .expect("started");
        let pid = i32::try_from(child.id()).expect("a pid");
        let found = measure(pid, device, later()).bytes;
        child.kill().expect("killed");
        child.wait().expect("reaped");
        assert!((1 << 20..2 << 20).contains(&found), "{found}");
    }

    #[test]
    fn what_is_mapped_and_has_no_name_is_known_of() {
        let file = tempfile::tempfile().expect("a file");
        file.set_len(4096).expect("a length");
        let device = file.metadata().expect("its data").dev();
        let own = std::process::id().to_string();
        assert!(!maps_deleted(&own, device));
        // SAFETY: nobody uses what is mapped.
        let mapped = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                4096,
                libc::PROT_READ,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        assert_ne!(mapped, libc::MAP_FAILED);
        drop(file);
        assert!(maps_deleted(&own, device));
        // SAFETY: as above.
        unsafe { libc::munmap(mapped, 4096) };
    }

    #[test]
    fn what_has_ended_and_is_not_reaped_yet_hides_nothing() {
        let mut child = Command::new("true").spawn().expect("started");
        let pid = child.id();
        while !has_ended(&pid.to_string()) {
            std::thread::yield_now();
        }
        let pid = i32::try_from(pid).expect("a pid");
        assert!(measure(pid, 0, later()).complete);
        child.wait().expect("reaped");
    }
}
