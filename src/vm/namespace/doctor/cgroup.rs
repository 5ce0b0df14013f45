//! Whether this process may limit what its VMs take.

use std::fs;
use std::path::{Path, PathBuf};

use nix::unistd::{AccessFlags, access};

use crate::vm::Check;

const CONTROLLERS: [&str; 3] = ["memory", "cpu", "pids"];

/// What is there for one controller.
enum Found {
    /// A group of our own could be made below this one.
    Usable(&'static str),
    /// There is one that is not ours to divide.
    Forbidden(&'static str),
    Absent,
}

pub(super) fn check() -> Check {
    const NAME: &str = "cgroups";
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let found = CONTROLLERS.map(|controller| (controller, look(&own, &mounts, controller)));
    let detail: Vec<String> = found
        .iter()
        .map(|(controller, found)| match found {
            Found::Usable(version) => format!("{controller}: {version}"),
            Found::Forbidden(version) => format!("{controller}: {version}, not delegated"),
            Found::Absent => format!("{controller}: none"),
        })
        .collect();
    let detail = detail.join("; ");
    if found
        .iter()
        .all(|(_, found)| matches!(found, Found::Usable(_)))
    {
        return Check::ok(NAME, detail);
    }
    Check::degraded(
        NAME,
        detail,
        "limits of memory, cpus and processes hold for single processes at best, not for a VM as a whole",
        "Give the host process a cgroup of its own: as a service, Delegate=yes in its systemd unit; from a \
         shell, systemd-run --user --scope -p Delegate=yes node …; in a container, --cgroupns=private with \
         a writable /sys/fs/cgroup",
    )
}

/// Version 1 has a hierarchy for each controller, version 2 one for all.
fn look(own: &str, mounts: &str, controller: &str) -> Found {
    let has = |list: &str| list.split(',').any(|name| name == controller);
    for line in own.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(group)) = (fields.next(), fields.next()) else {
            continue;
        };
        if has(controllers) {
            let mount = mounts
                .lines()
                .find_map(|line| mount_of(line, "cgroup", &has));
            return found("version 1", mount.map(|mount| below(&mount, group)));
        }
    }
    let Some(group) = own.lines().find_map(|line| line.strip_prefix("0::")) else {
        return Found::Absent;
    };
    let Some(mount) = mounts
        .lines()
        .find_map(|line| mount_of(line, "cgroup2", &|_| true))
    else {
        return Found::Absent;
    };
    let group = below(&mount, group);
    let offered = fs::read_to_string(group.join("cgroup.controllers")).unwrap_or_default();
    if !offered.split_whitespace().any(|name| name == controller) {
        return Found::Absent;
    }
    // To divide it, its controllers have to be handed on.
    match access(&group.join("cgroup.subtree_control"), AccessFlags::W_OK) {
        Ok(()) => found("version 2", Some(group)),
        Err(_) => Found::Forbidden("version 2"),
    }
}

/// Where a hierarchy is mounted, if this line of `mountinfo` (proc(5)) is it.
fn mount_of(line: &str, kind: &str, has: &dyn Fn(&str) -> bool) -> Option<PathBuf> {
    let (before, after) = line.split_once(" - ")?;
    let mut after = after.split(' ');
    let (found, options) = (after.next()?, after.nth(1)?);
    let point = before.split(' ').nth(4)?;
    (found == kind && has(options)).then(|| PathBuf::from(point))
}

fn below(mount: &Path, group: &str) -> PathBuf {
    mount.join(group.trim_start_matches('/'))
}

fn found(version: &'static str, group: Option<PathBuf>) -> Found {
    let Some(group) = group else {
        return Found::Absent;
    };
    // Trying is the only way to know: ownership, mount flags and the limit of groups all count.
    let probe = group.join(format!("agentvm-doctor-{}", std::process::id()));
    match fs::create_dir(&probe) {
        Ok(()) => {
            if let Err(error) = fs::remove_dir(&probe) {
                tracing::warn!(%error, group = %probe.display(), "a cgroup is left");
            }
            Found::Usable(version)
        }
        Err(_) => Found::Forbidden(version),
    }
}
