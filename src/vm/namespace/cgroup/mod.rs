//! A VM's cgroups: made below this process's own, entered by PID 1 before it has started anything,
//! removed when the VM has ended. The host process is never in them.
//!
//! Joining one costs the first VM in a while some ten milliseconds, for which the kernel waits until all
//! CPUs have passed a certain point: VMs without limits that need one have none.

mod hierarchy;
mod name;
mod place;
mod signals;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::errno::Errno;

use self::hierarchy::{Controller, Hierarchies};
use self::place::Place;
pub(super) use self::signals::Signals;
use crate::vm::Limit;
use crate::vm::limits::Mechanism;

/// What the cgroups of a VM are to enforce.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Wanted {
    pub(super) memory_bytes: Option<u64>,
    pub(super) milli_cpus: Option<u64>,
    pub(super) pids: Option<u64>,
}

impl Wanted {
    pub(super) const fn nothing(self) -> bool {
        self.memory_bytes.is_none() && self.milli_cpus.is_none() && self.pids.is_none()
    }
}

/// A limit that can't be enforced here.
#[derive(Debug, Clone)]
pub(super) struct Refused {
    pub(super) limit: Limit,
    pub(super) why: String,
}

/// How the host's user gets what was refused.
pub(super) const REMEDY: &str = "Run where this process may make cgroups below its own: under systemd as \
     systemd-run --user --scope -p Delegate=yes node …, or a service with Delegate=yes; in a container with \
     a writable /sys/fs/cgroup and nothing else in the cgroup; with cgroup v1 as root. Or set \
     limits.bestEffort to do without";

/// The cgroups of one VM, which are there as long as this is.
#[derive(Debug, Default)]
pub(super) struct Cgroup {
    memory: Option<Place>,
    cpu: Option<Place>,
    cpu_accounting: Option<Place>,
    pids: Option<Place>,
    /// Each once.
    directories: Vec<PathBuf>,
}

/// What a VM takes, as far as there is a controller that counts it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Counted {
    pub(super) cpu_ms: Option<u64>,
    pub(super) memory_bytes: Option<u64>,
    pub(super) memory_peak_bytes: Option<u64>,
    pub(super) pids: Option<u64>,
}

impl Cgroup {
    /// Makes them, with every controller that there is: what is not limited is counted. Returns beside
    /// them what is wanted and can't be enforced.
    pub(super) fn make(wanted: Wanted) -> (Self, Vec<Refused>) {
        let hierarchies = Hierarchies::of_this_process();
        let mut cgroup = Self::default();
        let mut refused = Vec::new();
        let name = name::next();
        for (controller, limit, value) in [
            (Controller::Memory, Limit::Memory, wanted.memory_bytes),
            (Controller::Cpu, Limit::Cpus, wanted.milli_cpus),
            (Controller::CpuAccounting, Limit::Cpus, None),
            (Controller::Pids, Limit::Pids, wanted.pids),
        ] {
            let made = place::make(&hierarchies, controller, &name, &mut cgroup.directories);
            let made = made.and_then(|place| {
                if let Some(value) = value {
                    place.limit(controller, value)?;
                }
                Ok(place)
            });
            match made {
                Ok(place) => *cgroup.place_mut(controller) = Some(place),
                Err(why) if value.is_some() => refused.push(Refused { limit, why }),
                Err(why) => tracing::debug!(controller = controller.name(), why, "not counted"),
            }
        }
        (cgroup, refused)
    }

    const fn place_mut(&mut self, controller: Controller) -> &mut Option<Place> {
        match controller {
            Controller::Memory => &mut self.memory,
            Controller::Cpu => &mut self.cpu,
            Controller::CpuAccounting => &mut self.cpu_accounting,
            Controller::Pids => &mut self.pids,
        }
    }

    /// By which version this limit is enforced, if it is.
    pub(super) fn mechanism(&self, limit: Limit) -> Option<Mechanism> {
        let place = match limit {
            Limit::Memory => &self.memory,
            Limit::Cpus => &self.cpu,
            Limit::Pids => &self.pids,
            Limit::OpenFiles | Limit::Disk | Limit::FreeDisk => return None,
        };
        place.as_ref().map(Place::mechanism)
    }

    /// Makes a process a member, with all that it starts from then on.
    pub(super) fn enter(&self, pid: i32) -> Result<(), (PathBuf, io::Error)> {
        for directory in &self.directories {
            let file = directory.join("cgroup.procs");
            fs::write(&file, pid.to_string()).map_err(|error| (file, error))?;
        }
        Ok(())
    }

    pub(super) fn counted(&self) -> Counted {
        let memory = self.memory.as_ref();
        Counted {
            cpu_ms: self
                .cpu_accounting
                .as_ref()
                .or(self.cpu.as_ref())
                .and_then(Place::cpu_ms),
            memory_bytes: memory.and_then(Place::memory_bytes),
            memory_peak_bytes: memory.and_then(Place::memory_peak_bytes),
            pids: self.pids.as_ref().and_then(Place::pids),
        }
    }

    /// Processes that were killed for want of memory, since it was made.
    pub(super) fn killed_for_memory(&self) -> u64 {
        self.memory.as_ref().and_then(Place::oom_kills).unwrap_or(0)
    }

    /// Processes and threads that could not be started, since it was made.
    pub(super) fn refused_pids(&self) -> u64 {
        self.pids.as_ref().and_then(Place::refused).unwrap_or(0)
    }

    /// To be told when one of the two above changes.
    pub(super) fn signals(&self) -> io::Result<Signals> {
        Signals::new(self.memory.as_ref(), self.pids.as_ref())
    }
}

/// When nothing of the VM is left. A process that died without this leaves them to [`name::sweep`].
impl Drop for Cgroup {
    fn drop(&mut self) {
        for directory in &self.directories {
            if let Err(error) = fs::remove_dir(directory) {
                tracing::warn!(%error, directory = %directory.display(), "a VM's cgroup is left");
            }
        }
    }
}

fn write(file: &Path, value: &(impl ToString + ?Sized)) -> Result<(), String> {
    fs::write(file, value.to_string()).map_err(|error| why("write", file, &error))
}

fn why(what: &str, path: &Path, error: &io::Error) -> String {
    let errno = error.raw_os_error().map_or(Errno::EIO, Errno::from_raw);
    format!("can't {what} {}: {}", path.display(), errno.desc())
}

#[cfg(test)]
mod tests;
