//! Where this process's cgroups are: one hierarchy for each controller (v1), one for all (v2), or some
//! of both.
//!
//! A VM's cgroup is made below this process's own, so that the limits of a container or a service go on
//! holding for what runs in its VMs.

use std::fs;
use std::path::{Path, PathBuf};

/// The controllers that a VM's limits need.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Controller {
    Memory,
    Cpu,
    /// Of v1 only: what the others are used by is in their own files.
    CpuAccounting,
    Pids,
}

impl Controller {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Cpu => "cpu",
            Self::CpuAccounting => "cpuacct",
            Self::Pids => "pids",
        }
    }
}

/// Directories of this process's cgroups, as it sees them.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Hierarchies {
    /// A controller of v1, and this process's cgroup in its hierarchy.
    v1: Vec<(String, PathBuf)>,
    pub(super) v2: Option<Unified>,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Unified {
    pub(super) mount: PathBuf,
    pub(super) own: PathBuf,
}

impl Hierarchies {
    pub(super) fn of_this_process() -> Self {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        Self::parse(&read("/proc/self/cgroup"), &read("/proc/self/mountinfo"))
    }

    /// cgroups(7), "/proc files", and `proc_pid_mountinfo(5)`.
    fn parse(cgroup: &str, mountinfo: &str) -> Self {
        let mut found = Self::default();
        for line in mountinfo.lines() {
            let Some((mount, file_system)) = line.split_once(" - ") else {
                continue;
            };
            let mut mount = mount.split(' ').skip(3);
            let (Some(root), Some(point)) = (mount.next(), mount.next()) else {
                continue;
            };
            let mut file_system = file_system.split(' ');
            let (kind, options) = (file_system.next(), file_system.nth(1).unwrap_or_default());
            // Something mounted over it would hide it; the last one counts.
            match kind {
                Some("cgroup2") => {
                    if let Some(own) = own_directory(cgroup, "", root, point) {
                        let mount = PathBuf::from(unescape(point));
                        found.v2 = Some(Unified { mount, own });
                    }
                }
                Some("cgroup") => {
                    for controller in options.split(',') {
                        if let Some(own) = own_directory(cgroup, controller, root, point) {
                            found.v1.push((controller.to_owned(), own));
                        }
                    }
                }
                _ => {}
            }
        }
        found
    }

    pub(super) fn v1(&self, controller: Controller) -> Option<&Path> {
        let mut own = self.v1.iter().rev();
        own.find(|(name, _)| name == controller.name())
            .map(|(_, directory)| &**directory)
    }
}

/// `None`: what is mounted there does not contain this process's cgroup.
fn own_directory(cgroup: &str, controller: &str, root: &str, point: &str) -> Option<PathBuf> {
    let path = cgroup.lines().find_map(|line| {
        let (_, rest) = line.split_once(':')?;
        let (controllers, path) = rest.split_once(':')?;
        controllers
            .split(',')
            .any(|own| own == controller)
            .then_some(path)
    })?;
    let below = Path::new(path).strip_prefix(unescape(root)).ok()?;
    // Outside of the cgroup namespace that the mount was made in.
    (!path.starts_with("/..")).then(|| Path::new(&unescape(point)).join(below))
}

/// The octal escapes of mountinfo.
fn unescape(field: &str) -> String {
    ["\\040 ", "\\011\t", "\\012\n", "\\134\\"]
        .iter()
        .fold(field.to_owned(), |text, pair| {
            let (escape, plain) = pair.split_at(4);
            text.replace(escape, plain)
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_controller_of_v1_has_a_directory_of_its_own() {
        let found = Hierarchies::parse(
            "4:memory:/box/one\n2:cpu,cpuacct:/\n0::/\n",
            "20 1 0:1 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
             21 1 0:2 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
             22 1 0:3 / /sys/fs/cgroup/unified rw - cgroup2 none rw\n",
        );
        let v1 = |controller| found.v1(controller).and_then(Path::to_str);
        assert_eq!(
            v1(Controller::Memory),
            Some("/sys/fs/cgroup/memory/box/one")
        );
        assert_eq!(v1(Controller::Cpu), Some("/sys/fs/cgroup/cpu,cpuacct/"));
        assert_eq!(
            v1(Controller::CpuAccounting),
            Some("/sys/fs/cgroup/cpu,cpuacct/")
        );
        assert_eq!(v1(Controller::Pids), None);
        assert_eq!(
            found.v2.expect("mounted").own,
            Path::new("/sys/fs/cgroup/unified/")
        );
    }

    #[test]
    fn a_container_sees_its_own_cgroup_where_it_is_mounted() {
        let found = Hierarchies::parse(
            "0::/docker/abc/app\n",
            "20 1 0:1 /docker/abc /sys/fs/cgroup ro - cgroup2 cgroup rw,nsdelegate\n",
        );
        let v2 = found.v2.expect("mounted");
        assert_eq!(v2.mount, Path::new("/sys/fs/cgroup"));
        assert_eq!(v2.own, Path::new("/sys/fs/cgroup/app"));
    }

    #[test]
    fn a_cgroup_outside_of_what_is_mounted_is_none() {
        for path in ["/elsewhere", "/../outside"] {
            let found = Hierarchies::parse(
                &format!("0::{path}\n"),
                "20 1 0:1 /docker/abc /sys/fs/cgroup rw - cgroup2 cgroup rw\n",
            );
            assert_eq!(found, Hierarchies::default(), "{path}");
        }
    }
}
