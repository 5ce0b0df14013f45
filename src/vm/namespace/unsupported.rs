//! Turning what the kernel refused into what the host lacks and how to give it.

use std::fs;
use std::path::Path;

use nix::errno::Errno;

use super::directory::host;
use crate::vm::VmError;

/// `clone` with new namespaces was refused.
pub(super) fn namespaces(step: &str, errno: Errno) -> VmError {
    // This process's own limits, not what the host can do.
    if matches!(errno, Errno::EMFILE | Errno::ENFILE) {
        return host("can't start a VM's", Path::new("PID 1"), errno.into());
    }
    let (feature, remedy) = namespace_cause(errno);
    VmError::Unsupported {
        feature: feature.to_owned(),
        detail: format!("{step}: {}", errno.desc()),
        remedy: remedy.to_owned(),
    }
}

fn namespace_cause(errno: Errno) -> (&'static str, &'static str) {
    if setting("kernel/unprivileged_userns_clone") == Some(0) {
        return (
            "user namespaces for ordinary users are off",
            "As root: sysctl -w kernel.unprivileged_userns_clone=1",
        );
    }
    if is_apparmor_restricting() {
        return APPARMOR;
    }
    match errno {
        Errno::ENOSPC | Errno::EUSERS => (
            "the limit of namespaces is reached or 0",
            "As root: raise user.max_user_namespaces and the other user.max_*_namespaces (sysctl)",
        ),
        Errno::EPERM => ("namespaces are forbidden to this process", CONTAINER),
        Errno::EINVAL => (
            "the kernel lacks a kind of namespace",
            "agentvm needs Linux 5.12 or later with user, mount, pid, ipc, uts, net and cgroup \
             namespaces",
        ),
        Errno::EAGAIN | Errno::ENOMEM => (
            "no more processes can be started",
            "Raise the process limit (ulimit -u) or free memory",
        ),
        _ => (
            "namespaces can't be made",
            "agentvm needs Linux 5.12 or later with unprivileged user namespaces",
        ),
    }
}

const APPARMOR: (&str, &str) = (
    "AppArmor restricts user namespaces",
    "As root: sysctl -w kernel.apparmor_restrict_unprivileged_userns=0, or give this \
     program an AppArmor profile with 'userns,'",
);

/// Ubuntu since 23.10: an ordinary user may make a user namespace, but no profile lets it mount there.
fn is_apparmor_restricting() -> bool {
    setting("kernel/apparmor_restrict_unprivileged_userns") == Some(1)
        && !nix::unistd::geteuid().is_root()
}

/// Writing an id map was refused.
pub(super) fn id_map(file: &str, errno: Errno) -> VmError {
    if matches!(errno, Errno::EMFILE | Errno::ENFILE) {
        return host("can't write", Path::new(file), errno.into());
    }
    VmError::Unsupported {
        feature: "ids can't be mapped into a user namespace".to_owned(),
        detail: format!("writing {file}: {}", errno.desc()),
        remedy: "Run as root or as an ordinary user outside of a restricted container".to_owned(),
    }
}

pub(super) const CONTAINER: &str = "In a container: start it with --security-opt seccomp=unconfined --security-opt \
     apparmor=unconfined --security-opt systempaths=unconfined";

const MOUNT_API: (&str, &str) = (
    "the kernel lacks the mount API",
    "agentvm needs Linux 5.12 or later (open_tree, move_mount, mount_setattr), and a container \
     whose seccomp profile knows these calls",
);

/// A mount that the VM is to see could not be cloned in this process.
pub(super) fn clone_tree(path: &Path, errno: Errno) -> VmError {
    let (feature, remedy) = match errno {
        Errno::ENOSYS => MOUNT_API,
        Errno::EPERM => ("mounts are forbidden to this process", CONTAINER),
        _ => return host("can't clone the mount of", path, errno.into()),
    };
    VmError::Unsupported {
        feature: feature.to_owned(),
        detail: format!("clone the mount of {}: {}", path.display(), errno.desc()),
        remedy: remedy.to_owned(),
    }
}

/// A step inside the fresh namespaces failed.
pub(super) fn boot_step(step: String, errno: Errno) -> VmError {
    let mounts = step.starts_with("mount ")
        || [
            "make mounts private",
            "pivot_root",
            "mask /proc",
            "seal the root",
        ]
        .contains(&step.as_str());
    let (feature, remedy) = if step == "mount /proc" && errno == Errno::EPERM {
        (
            "procfs can't be mounted in a user namespace",
            "In a container: start it with --security-opt systempaths=unconfined, because its \
             masked /proc forbids a new one",
        )
    } else if mounts && errno == Errno::ENOSYS {
        MOUNT_API
    } else if mounts && matches!(errno, Errno::EPERM | Errno::EACCES) && is_apparmor_restricting() {
        APPARMOR
    } else if mounts && matches!(errno, Errno::EPERM | Errno::EACCES) {
        (
            "mounts are forbidden in a user namespace of this process",
            CONTAINER,
        )
    } else if step == "seccomp" {
        (
            "seccomp filters are not available",
            "agentvm needs a kernel with CONFIG_SECCOMP_FILTER",
        )
    } else {
        return VmError::Boot { step, errno };
    };
    VmError::Unsupported {
        feature: feature.to_owned(),
        detail: format!("{step}: {}", errno.desc()),
        remedy: remedy.to_owned(),
    }
}

fn setting(name: &str) -> Option<u64> {
    fs::read_to_string(format!("/proc/sys/{name}"))
        .ok()?
        .trim()
        .parse()
        .ok()
}
