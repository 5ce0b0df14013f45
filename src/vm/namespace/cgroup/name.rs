//! Names of VMs' cgroups: they say whose they are, so that what a killed process has left can be cleared
//! away, and nothing of one that lives.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{LazyLock, Mutex, PoisonError};

const PREFIX: &str = "agentvm-";

/// A process, for good, in the pid namespace that its number is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Owner {
    namespace: u64,
    pid: u32,
    started: u64,
}

static SELF: LazyLock<Owner> = LazyLock::new(|| {
    let pid = std::process::id();
    Owner {
        namespace: fs::metadata("/proc/self/ns/pid").map_or(0, |metadata| metadata.ino()),
        pid,
        started: started(pid).unwrap_or(0),
    }
});

/// A name that no other VM has.
pub(super) fn next() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let Owner {
        namespace,
        pid,
        started,
    } = *SELF;
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("{PREFIX}{namespace}-{pid}-{started}-{number}")
}

/// Removes from `parent`, once in the life of this process, what dead processes have left there. PID 1 of
/// a VM outlives them by moments: a cgroup with something in it can't be removed, and is left to the next
/// start.
pub(super) fn sweep(parent: &Path) {
    static SWEPT: Mutex<Option<HashSet<PathBuf>>> = Mutex::new(None);
    let mut swept = SWEPT.lock().unwrap_or_else(PoisonError::into_inner);
    if !swept.get_or_insert_default().insert(parent.to_owned()) {
        return;
    }
    drop(swept);
    let Ok(entries) = fs::read_dir(parent) else {
        return;
    };
    for entry in entries.flatten() {
        let is_left = entry
            .file_name()
            .to_str()
            .and_then(owner)
            .is_some_and(is_dead);
        if is_left && let Err(error) = fs::remove_dir(entry.path()) {
            tracing::debug!(%error, path = %entry.path().display(), "left for the next sweep");
        }
    }
}

fn owner(name: &str) -> Option<Owner> {
    let mut numbers = name
        .strip_prefix(PREFIX)?
        .split('-')
        .map(|number| number.parse::<u64>().ok());
    Some(Owner {
        namespace: numbers.next()??,
        pid: numbers.next()??.try_into().ok()?,
        started: numbers.next()??,
    })
}

/// A pid of another namespace says nothing here.
fn is_dead(owner: Owner) -> bool {
    let now = started(owner.pid);
    owner.namespace == SELF.namespace && owner != *SELF && now != Some(owner.started)
}

/// When it started, in ticks since boot: field 22 of `proc_pid_stat(5)`.
fn started(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_whitespace().nth(22 - 3)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_dead_processes_have_left_is_swept_and_nothing_else() {
        let parent = tempfile::tempdir().expect("a directory");
        let own = next();
        let namespace = SELF.namespace;
        // A pid that no process has: above the kernel's largest.
        let dead = format!("agentvm-{namespace}-4194305-7-1");
        // Of this process's number, but not of it.
        let reused = format!("agentvm-{namespace}-{}-0-1", std::process::id());
        let elsewhere = format!("agentvm-{}-4194305-7-1", namespace + 1);
        let names = [&own, &dead, &reused, &elsewhere, "user.slice", "agentvm-x"];
        for name in names {
            fs::create_dir(parent.path().join(name)).expect("made");
        }
        sweep(parent.path());
        let is_there = |name: &&str| parent.path().join(name).exists();
        let left: Vec<&str> = names.into_iter().filter(is_there).collect();
        assert_eq!(left, [&own, &elsewhere, "user.slice", "agentvm-x"]);
    }
}
