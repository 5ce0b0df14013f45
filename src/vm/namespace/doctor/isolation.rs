//! What the kernel, and who confines this process, allow.

use nix::errno::Errno;

use super::EVERYTHING;
use super::probe::{Attempt, KINDS, Outcome, Step};
use crate::vm::namespace::ids::IdMap;
use crate::vm::namespace::unsupported;
use crate::vm::{Check, VmError};

pub(super) fn checks(outcome: &Outcome) -> Vec<Check> {
    let mut checks = vec![user_namespaces(outcome.user)];
    if outcome.user.is_err() {
        // The rest can only be tried in one.
        return checks;
    }
    checks.push(namespaces(outcome));
    checks.push(step(outcome, "id-maps", &[Step::IdMap], |errno| {
        unsupported::id_map("uid_map", errno)
    }));
    let mounts = [Step::PrivateMounts, Step::Tmpfs, Step::PivotRoot];
    checks.push(step(outcome, "mounts", &mounts, |errno| {
        unsupported::boot_step("pivot_root".to_owned(), errno)
    }));
    let api = [Step::CloneTree, Step::MountAttributes, Step::MoveMount];
    checks.push(step(outcome, "mount-api", &api, |errno| {
        unsupported::clone_tree(std::path::Path::new("/usr"), errno)
    }));
    checks.push(step(outcome, "proc", &[Step::Proc], |errno| {
        unsupported::boot_step("mount /proc".to_owned(), errno)
    }));
    checks.push(overlay(outcome.step(Step::Overlay)));
    checks.push(step(outcome, "seccomp", &[Step::Seccomp], |errno| {
        unsupported::boot_step("seccomp".to_owned(), errno)
    }));
    checks.push(landlock());
    checks
}

/// A second layer, on kernels that have it.
fn landlock() -> Check {
    const NAME: &str = "landlock";
    const CREATE_RULESET_VERSION: u32 = 1;
    // Before 2, a file could not be moved to another directory.
    const OLDEST: i64 = 2;
    // SAFETY: a null pointer and integers, which ask for the version.
    let version = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<u8>(),
            0_usize,
            CREATE_RULESET_VERSION,
        )
    };
    let detail = match Errno::result(version) {
        Ok(version) if version >= OLDEST => return Check::ok(NAME, format!("version {version}")),
        Ok(version) => format!("version {version} is too old"),
        Err(errno) => errno.desc().to_owned(),
    };
    Check::degraded(
        NAME,
        detail,
        "nothing: other layers refuse the same",
        "Linux 5.19 or later with landlock among its security modules (lsm=landlock,…)",
    )
}

fn user_namespaces(tried: Result<(), Errno>) -> Check {
    const NAME: &str = "user-namespaces";
    match tried {
        Ok(()) => Check::ok(NAME, "this process can make them"),
        Err(errno) => refused(
            NAME,
            unsupported::namespaces("clone a user namespace", errno),
        ),
    }
}

fn namespaces(outcome: &Outcome) -> Check {
    const NAME: &str = "namespaces";
    let names = KINDS.map(|(name, _)| name);
    let failed: Vec<(&str, Errno)> = names
        .into_iter()
        .zip(outcome.kinds)
        .filter_map(|(name, tried)| Some((name, tried.err()?)))
        .collect();
    let Some((_, errno)) = failed.first() else {
        return Check::ok(NAME, names.join(", "));
    };
    let kinds: Vec<&str> = failed.iter().map(|(name, _)| *name).collect();
    let step = format!("clone with new {} namespaces", kinds.join(", "));
    refused(NAME, unsupported::namespaces(&step, *errno))
}

/// One check of several steps: the first that failed is told, in the words of a boot that fails there.
fn step(
    outcome: &Outcome,
    name: &'static str,
    steps: &[Step],
    explain: impl Fn(Errno) -> VmError,
) -> Check {
    let failed = steps
        .iter()
        .map(|step| (*step, outcome.step(*step)))
        .find(|(_, attempt)| *attempt != Attempt::Done);
    match failed {
        None => Check::ok(name, "works in a user namespace"),
        Some((_, Attempt::Failed(errno))) => refused(name, explain(errno)),
        Some((step, Attempt::Killed)) => Check::missing(
            name,
            format!("a filter of system calls kills whoever tries it ({step:?})"),
            EVERYTHING,
            unsupported::CONTAINER,
        ),
        Some((step, _)) => Check::missing(
            name,
            format!("not tried: what comes before it fails ({step:?})"),
            EVERYTHING,
            "Mend what is missing above first",
        ),
    }
}

/// Where VMs have a root, it can change `/usr` and `/etc`: in an overlay.
fn overlay(attempt: Attempt) -> Check {
    const NAME: &str = "overlay";
    let detail = match attempt {
        Attempt::Done => return Check::ok(NAME, "works in a user namespace"),
        Attempt::Failed(errno) => errno.desc().to_owned(),
        Attempt::Killed => "a filter of system calls kills whoever mounts it".to_owned(),
        Attempt::Untried => "not tried: what comes before it fails".to_owned(),
    };
    let remedy = "Linux 5.11 or later with CONFIG_OVERLAY_FS; as root: modprobe overlay";
    if IdMap::of_this_process().is_ok_and(IdMap::root_mapped) {
        let remedy = format!("{remedy}. Or run the host process as an ordinary user");
        Check::missing(NAME, detail, EVERYTHING, remedy)
    } else {
        let lost = "nothing: VMs of an ordinary user have a read-only base";
        Check::degraded(NAME, detail, lost, remedy)
    }
}

/// In the words of a boot that fails for it.
fn refused(name: &'static str, error: VmError) -> Check {
    match error {
        VmError::Unsupported {
            feature,
            detail,
            remedy,
        } => Check::missing(name, format!("{feature} ({detail})"), EVERYTHING, remedy),
        error => Check::missing(
            name,
            error.to_string(),
            EVERYTHING,
            "See the error; as root: dmesg may tell more",
        ),
    }
}

/// Whether VMs have a root of their own.
pub(super) fn ids() -> Check {
    const NAME: &str = "vm-root";
    let ids = match IdMap::of_this_process() {
        Ok(ids) => ids,
        Err(error) => return refused(NAME, error),
    };
    match ids {
        IdMap::Range { base } => Check::ok(
            NAME,
            format!("VM ids 0 to 65535 are {base} and up on this host"),
        ),
        IdMap::Caller { uid, .. } => Check::degraded(
            NAME,
            format!("VM uid 1000 is uid {uid} of this host; there is no other id"),
            if ids.user_is_uncounted() {
                "no root in VMs: no apt-get, and /usr and /etc are read-only; nor a limit of their processes, \
                 as the kernel does not count those of root"
            } else {
                "no root in VMs: no apt-get, and /usr and /etc are read-only"
            },
            if uid == 0 {
                "Run the host process as an ordinary user (docker run --user), which is safer; or give root's \
                 container CAP_SYS_ADMIN and a full id map: there is no free range of 131072 ids now, or not \
                 that capability"
            } else {
                "Run the host process as root: its VMs get ids that nobody else has, and their root is \
                 never the host's. Or use an image that has what is needed"
            },
        ),
    }
}
