//! Which ids of the host the VM's ids are.

use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::{fs, process};

use agentvm_guest::protocol::USER_ID;
use nix::errno::Errno;
use nix::unistd::{getegid, geteuid};

use super::directory::host;
use crate::vm::Result;

/// How many ids a VM has where a range can be mapped.
pub(super) const RANGE: u32 = 65_536;

/// Ids of the host that come after those, of which each VM has one more.
const OWN: u32 = 65_536;

/// That one, in the VM.
const OWN_ID: u32 = RANGE;

/// What has to be free.
const ALL: u64 = RANGE as u64 + OWN as u64;

/// First id of the default range: between what systemd gives containers (up to 1879048191) and its
/// foreign range (from 2147352576), and far from `/etc/subuid`'s usual start at 100000.
const DEFAULT_BASE: u32 = 1_879_048_192;

const CAP_SYS_ADMIN: u32 = 21;
pub(super) const CAP_SYS_RESOURCE: u32 = 24;

/// `CAP_SETUID`, `CAP_SETPCAP`.
const TO_ACT_AS_ANOTHER: [u32; 2] = [7, 8];

/// The two ways a host maps ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum IdMap {
    /// A privileged host: VM ids 0..65536 are `base..` on the host, nobody else's, and one more is an id that
    /// no other VM has.
    Range { base: u32 },
    /// Anyone: VM id 1000 is the caller; there is no other id.
    Caller { uid: u32, gid: u32 },
}

/// Whether files of this process's VMs may belong to others than the caller.
pub fn maps_a_range() -> Result<bool> {
    Ok(IdMap::of_this_process()?.root_mapped())
}

impl IdMap {
    /// What this process can do, decided afresh: a program may drop privileges. Where it can't be found
    /// out (no more files may be opened), nothing is assumed: a VM of root that has no range would have
    /// root's own id.
    pub(super) fn of_this_process() -> Result<Self> {
        let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
        if uid == 0 && has_capability(CAP_SYS_ADMIN)? {
            let mut taken = Vec::new();
            for path in ["/etc/subuid", "/etc/subgid"] {
                let exists = Path::new(path).exists();
                let text = if exists { read(path)? } else { String::new() };
                taken.extend(parse_subordinate(&text));
            }
            if let Some(base) = free_base(&taken)
                && mapped_here(base)?
            {
                return Ok(Self::Range { base });
            }
        }
        Ok(Self::Caller { uid, gid })
    }

    pub(super) fn root_mapped(self) -> bool {
        matches!(self, Self::Range { .. })
    }

    /// Whether the VM's `user` is the root of the host's first namespace, whose processes the kernel does not
    /// count (`RLIMIT_NPROC`), as in a container whose root has no other ids.
    pub(super) fn user_is_uncounted(self) -> bool {
        let Self::Caller { uid: 0, .. } = self else {
            return false;
        };
        let is_root = |map: String| {
            let mut fields = map.split_whitespace();
            (fields.next(), fields.next()) == (Some("0"), Some("0"))
        };
        read("/proc/self/uid_map").map_or(true, is_root)
    }

    /// Whether this process may make VMs that are [owned](Self::namespace_owner) by another than itself,
    /// where that makes a difference.
    pub(super) fn can_disown(self) -> Result<bool> {
        for capability in TO_ACT_AS_ANOTHER {
            if self.root_mapped() && !has_capability(capability)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The owner, on the host, of what the VM's `user` owns.
    pub(super) fn user_on_host(self) -> (u32, u32) {
        match self {
            Self::Range { base } => (base + USER_ID, base + USER_ID),
            Self::Caller { uid, gid } => (uid, gid),
        }
    }

    /// The owner, on the host, of what the VM's root owns, where there is one.
    pub(super) fn root_on_host(self) -> Option<(u32, u32)> {
        match self {
            Self::Range { base } => Some((base, base)),
            Self::Caller { .. } => None,
        }
    }

    /// Who of the host is to own the user namespace of the next VM: an id of the VM's own, and each time
    /// another one, as VMs that have the same owner share what the kernel lets a user have.
    pub(super) fn namespace_owner(self) -> Option<u32> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        match self {
            Self::Range { base } => {
                // Processes begin at different ones.
                let number = process::id().wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed));
                Some(base + 1 + number % (RANGE - 1))
            }
            Self::Caller { .. } => None,
        }
    }

    /// Who of the VM its PID 1 is, for what the kernel counts by real uid over all VMs: nobody in another VM
    /// can become that.
    pub(super) fn real_uid_of_pid_1(self) -> Option<u32> {
        self.root_mapped().then_some(OWN_ID)
    }

    /// Writes the maps of a fresh user namespace.
    pub(super) fn write(self, pid: i32) -> Result<(), (&'static str, Errno)> {
        let write = |file: &'static str, text: String| {
            fs::write(format!("/proc/{pid}/{file}"), text).map_err(|error| {
                let errno = Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO));
                (file, errno)
            })
        };
        match self {
            Self::Range { base } => {
                static NEXT: AtomicU32 = AtomicU32::new(0);
                // Processes begin at different ones.
                let number = process::id().wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed));
                let own = base + RANGE + number % OWN;
                let map = format!("0 {base} {RANGE}\n");
                write("uid_map", format!("{map}{OWN_ID} {own} 1\n"))?;
                write("gid_map", map)
            }
            Self::Caller { uid, gid } => {
                // The kernel's condition for mapping a gid without privilege (user_namespaces(7)).
                write("setgroups", "deny".to_owned())?;
                write("uid_map", format!("{USER_ID} {uid} 1\n"))?;
                write("gid_map", format!("{USER_ID} {gid} 1\n"))
            }
        }
    }
}

/// The first range from the default on that no user of the host has been given.
fn free_base(taken: &[Range<u64>]) -> Option<u32> {
    let mut base = u64::from(DEFAULT_BASE);
    while let Some(taken) = taken
        .iter()
        .find(|taken| taken.start < base + ALL && base < taken.end)
    {
        base = taken.end;
    }
    // The top half is left alone: some file systems and tools treat ids as signed.
    (base + ALL <= 1 << 31)
        .then(|| u32::try_from(base).ok())
        .flatten()
}

/// `name:start:count` lines.
fn parse_subordinate(text: &str) -> Vec<Range<u64>> {
    text.lines()
        .filter_map(|line| {
            let mut fields = line.split(':').skip(1);
            let start: u64 = fields.next()?.trim().parse().ok()?;
            let count: u64 = fields.next()?.trim().parse().ok()?;
            Some(start..start.saturating_add(count))
        })
        .collect()
}

/// Inside a container, root may have fewer ids than it takes.
fn mapped_here(base: u32) -> Result<bool> {
    for path in ["/proc/self/uid_map", "/proc/self/gid_map"] {
        let mapped = read(path)?.lines().any(|line| {
            let mut fields = line.split_whitespace().map(str::parse::<u64>);
            let (Some(Ok(start)), _, Some(Ok(count))) =
                (fields.next(), fields.next(), fields.next())
            else {
                return false;
            };
            start <= u64::from(base) && u64::from(base) + ALL <= start.saturating_add(count)
        });
        if !mapped {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether this process has a capability in effect, from `CapEff` of `/proc/self/status`.
pub(super) fn has_capability(number: u32) -> Result<bool> {
    let status = read("/proc/self/status")?;
    Ok(status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok())
        .is_some_and(|bits| bits & (1 << number) != 0))
}

fn read(path: &str) -> Result<String> {
    fs::read_to_string(path).map_err(|error| host("can't read", Path::new(path), error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_given_to_a_user_is_stepped_over() {
        let base = u64::from(DEFAULT_BASE);
        assert_eq!(
            free_base(std::slice::from_ref(&(100_000..165_536))),
            Some(DEFAULT_BASE)
        );
        let after = free_base(std::slice::from_ref(&(base + 10..base + 20))).map(u64::from);
        assert_eq!(after, Some(base + 20));
    }

    #[test]
    fn malformed_subuid_lines_are_ignored() {
        let text = "ann:100000:65536\n\n# note\nbob:x:1\n";
        assert_eq!(parse_subordinate(text), vec![100_000..165_536]);
    }
}
