//! One controller of a VM's cgroups: how it is asked for and read, in both versions.

use std::fs;
use std::path::{Path, PathBuf};

use super::hierarchy::{Controller, Hierarchies, Unified};
use super::{name, why, write};
use crate::vm::limits::Mechanism;

/// The kernel's default.
const PERIOD_US: u64 = 100_000;

/// With v1, the buffers of TCP and UDP may take so many parts of a VM's memory, beside it.
const NETWORK_SHARE: u64 = 4;

/// The leaf that this process moves into where its own cgroup is to have children: with v2, one that
/// hands out controllers has no processes of its own ("no internal process constraint").
const HOST: &str = "agentvm-host";

#[derive(Debug, Clone)]
pub(super) struct Place {
    version: Version,
    pub(super) directory: PathBuf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Version {
    V1,
    V2,
}

/// Makes the VM's directory in the hierarchy of `controller`, unless it is among `directories` already.
pub(super) fn make(
    hierarchies: &Hierarchies,
    controller: Controller,
    name: &str,
    directories: &mut Vec<PathBuf>,
) -> Result<Place, String> {
    let (version, parent) = if let Some(own) = hierarchies.v1(controller) {
        (Version::V1, own.to_owned())
    } else if controller == Controller::CpuAccounting {
        return Err("counted by the cpu controller of v2".to_owned());
    } else if let Some(unified) = &hierarchies.v2 {
        (Version::V2, delegated(unified, controller)?)
    } else {
        return Err("no cgroup hierarchy is mounted".to_owned());
    };
    let directory = parent.join(name);
    if !directories.contains(&directory) {
        name::sweep(&parent);
        fs::create_dir(&directory).map_err(|error| why("make", &directory, &error))?;
        directories.push(directory.clone());
    }
    Ok(Place { version, directory })
}

/// The cgroup of v2 that a VM's may be made in: this process's own, or one above it that was delegated
/// to its user, with the controller enabled for its children.
fn delegated(unified: &Unified, controller: Controller) -> Result<PathBuf, String> {
    let Unified { mount, own } = unified;
    let own = match own.file_name() {
        // Moved there for an earlier VM.
        Some(leaf) if leaf == HOST => own.parent().unwrap_or(own),
        _ => own,
    };
    if hands_out(own, controller) || enable(own, controller)? {
        return Ok(own.to_owned());
    }
    // What lies above root's cgroup is not delegated, though root could write there.
    let mut above = own.ancestors().skip(1);
    let found = above
        .by_ref()
        .take_while(|directory| directory.starts_with(mount) && !nix::unistd::geteuid().is_root())
        .find(|directory| hands_out(directory, controller) && is_writable(directory));
    found.map(Path::to_owned).ok_or_else(|| {
        format!(
            "the cgroup v2 {} has no {} controller to hand out",
            own.display(),
            controller.name()
        )
    })
}

fn hands_out(directory: &Path, controller: Controller) -> bool {
    lists(&directory.join("cgroup.subtree_control"), controller)
}

fn lists(file: &Path, controller: Controller) -> bool {
    fs::read_to_string(file).is_ok_and(|names| {
        names
            .split_whitespace()
            .any(|name| name == controller.name())
    })
}

fn is_writable(directory: &Path) -> bool {
    let may = nix::unistd::AccessFlags::W_OK;
    nix::unistd::eaccess(directory, may).is_ok()
        && nix::unistd::eaccess(&directory.join("cgroup.procs"), may).is_ok()
}

/// Enables a controller for children of this process's own cgroup, which it leaves for that if it is
/// alone in it. `false`: it is not to be had there.
fn enable(own: &Path, controller: Controller) -> Result<bool, String> {
    if !lists(&own.join("cgroup.controllers"), controller) || !is_writable(own) {
        return Ok(false);
    }
    let control = own.join("cgroup.subtree_control");
    let enabled = format!("+{}", controller.name());
    // The root of the whole hierarchy may have both processes and children with controllers.
    if write(&control, &enabled).is_ok() {
        return Ok(true);
    }
    let members = fs::read_to_string(own.join("cgroup.procs"))
        .map_err(|error| why("read", &own.join("cgroup.procs"), &error))?;
    let this = std::process::id().to_string();
    if members.lines().any(|pid| pid != this) {
        return Err(format!(
            "other processes are in the cgroup v2 {}, which then can't have limited children",
            own.display()
        ));
    }
    let leaf = own.join(HOST);
    match fs::create_dir(&leaf) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            return Err(why("make", &leaf, &error));
        }
        _ => {}
    }
    write(&leaf.join("cgroup.procs"), &this)?;
    write(&control, &enabled).map(|()| true)
}

impl Place {
    pub(super) const fn mechanism(&self) -> Mechanism {
        match self.version {
            Version::V1 => Mechanism::Cgroup1,
            Version::V2 => Mechanism::Cgroup2,
        }
    }

    pub(super) const fn version(&self) -> Version {
        self.version
    }

    /// Sets the limit of `controller`, in the unit of [`super::Wanted`].
    pub(super) fn limit(&self, controller: Controller, value: u64) -> Result<(), String> {
        let quota = value.saturating_mul(PERIOD_US / 1000);
        match (controller, self.version) {
            (Controller::Memory, Version::V1) => {
                self.set("memory.limit_in_bytes", &value)?;
                // Memory and swap together; a kernel without swap accounting has no such file.
                self.set_if_there("memory.memsw.limit_in_bytes", value)?;
                // What TCP and UDP hold is not part of either (v2 counts it), and else all that the host's
                // sockets share is this VM's to take. (The kernel logs once that v1's way is deprecated.)
                self.set_if_there("memory.kmem.tcp.limit_in_bytes", value / NETWORK_SHARE)
            }
            (Controller::Memory, Version::V2) => {
                self.set("memory.max", &value)?;
                self.set_if_there("memory.swap.max", 0)
            }
            (Controller::Cpu, Version::V1) => {
                self.set("cpu.cfs_period_us", &PERIOD_US)?;
                self.set("cpu.cfs_quota_us", &quota)
            }
            (Controller::Cpu, Version::V2) => self.set("cpu.max", &format!("{quota} {PERIOD_US}")),
            (Controller::Pids, _) => self.set("pids.max", &value),
            (Controller::CpuAccounting, _) => Ok(()),
        }
    }

    fn set(&self, file: &str, value: &impl ToString) -> Result<(), String> {
        write(&self.directory.join(file), value)
    }

    fn set_if_there(&self, file: &str, value: u64) -> Result<(), String> {
        if self.directory.join(file).exists() {
            self.set(file, &value)
        } else {
            Ok(())
        }
    }

    pub(super) fn cpu_ms(&self) -> Option<u64> {
        match self.version {
            Version::V1 => Some(self.number("cpuacct.usage")? / 1_000_000),
            Version::V2 => Some(self.field("cpu.stat", "usage_usec")? / 1000),
        }
    }

    pub(super) fn memory_bytes(&self) -> Option<u64> {
        match self.version {
            Version::V1 => self.number("memory.usage_in_bytes"),
            Version::V2 => self.number("memory.current"),
        }
    }

    pub(super) fn memory_peak_bytes(&self) -> Option<u64> {
        match self.version {
            Version::V1 => self.number("memory.max_usage_in_bytes"),
            // Since Linux 5.19.
            Version::V2 => self.number("memory.peak"),
        }
    }

    pub(super) fn pids(&self) -> Option<u64> {
        self.number("pids.current")
    }

    pub(super) fn oom_kills(&self) -> Option<u64> {
        match self.version {
            Version::V1 => self.field("memory.oom_control", "oom_kill"),
            Version::V2 => self.field("memory.events", "oom_kill"),
        }
    }

    pub(super) fn refused(&self) -> Option<u64> {
        self.field("pids.events", "max")
    }

    fn number(&self, file: &str) -> Option<u64> {
        let text = fs::read_to_string(self.directory.join(file)).ok()?;
        text.trim().parse().ok()
    }

    fn field(&self, file: &str, field: &str) -> Option<u64> {
        let text = fs::read_to_string(self.directory.join(file)).ok()?;
        text.lines().find_map(|line| {
            line.strip_prefix(field)?
                .strip_prefix(' ')?
                .trim()
                .parse()
                .ok()
        })
    }
}
