//! What `doctor` says on hosts that lack something, in the words of a boot that fails for it.

use agentvm::vm::namespace::examine;
use agentvm::vm::{Check, Diagnosis, Places, State};

use super::child::{block_on, in_child, unshare};
use super::unsupported::refuse_call;

fn examined() -> Diagnosis {
    let data = tempfile::tempdir().unwrap();
    let diagnosis = block_on(examine(Places {
        data_dir: data.path().join("data"),
        agents: data.path().join("agents"),
    }));
    let vms = data.path().join("data/vms");
    let left = std::fs::read_dir(vms).map_or(0, Iterator::count);
    assert_eq!(left, 0, "the temporary VM is left");
    diagnosis
}

fn check<'a>(diagnosis: &'a Diagnosis, name: &str) -> &'a Check {
    let found = diagnosis.checks.iter().find(|check| check.name == name);
    found.unwrap_or_else(|| panic!("no check {name}: {diagnosis:#?}"))
}

/// Finds that `name` is missing, for this reason and with this remedy; that VMs do not run; and nothing
/// else missing but `also`.
fn lacks(name: &str, feature: &str, remedy: &str, also: &[&str]) {
    let diagnosis = examined();
    assert!(!diagnosis.is_ok(), "{diagnosis:#?}");
    let found = check(&diagnosis, name);
    assert_eq!(found.state, State::Missing, "{found:?}");
    assert!(found.detail.contains(feature), "{found:?}");
    let trouble = found.trouble.as_ref().unwrap();
    assert!(trouble.remedy.contains(remedy), "{found:?}");
    assert_eq!(check(&diagnosis, "boot").state, State::Missing);
    for check in &diagnosis.checks {
        let expected = check.name == name || check.name == "boot" || also.contains(&check.name);
        assert!(
            expected || check.state != State::Missing,
            "{check:?} is not what is missing"
        );
    }
}

#[test]
fn a_host_with_all_of_it_is_ok() {
    let diagnosis = examined();
    assert!(diagnosis.is_ok(), "{diagnosis:#?}");
    for name in ["boot", "network", "mounts", "mount-api", "overlay"] {
        assert_eq!(check(&diagnosis, name).state, State::Ok, "{diagnosis:#?}");
    }
}

#[test]
fn no_user_namespaces_are_found() {
    in_child(
        &[
            "unshare",
            "--user",
            "--map-current-user",
            "--keep-caps",
            "sh",
            "-c",
            "echo 0 > /proc/sys/user/max_user_namespaces && exec \"$0\" \"$@\"",
        ],
        "doctor::no_user_namespaces_are_found",
        || {
            lacks(
                "user-namespaces",
                "the limit of namespaces is reached or 0",
                "user.max_user_namespaces",
                &[],
            );
        },
    );
}

#[test]
fn a_kind_of_namespace_that_can_not_be_made_is_named() {
    in_child(
        &[
            "unshare",
            "--user",
            "--map-current-user",
            "--keep-caps",
            "sh",
            "-c",
            "echo 0 > /proc/sys/user/max_net_namespaces && exec \"$0\" \"$@\"",
        ],
        "doctor::a_kind_of_namespace_that_can_not_be_made_is_named",
        || lacks("namespaces", "new net namespaces", "max_*_namespaces", &[]),
    );
}

#[test]
fn a_filter_that_forbids_mounts_is_found() {
    in_child(&[], "doctor::a_filter_that_forbids_mounts_is_found", || {
        refuse_call(libc::SYS_mount, Vec::new(), libc::EPERM);
        let also = ["mount-api", "proc", "overlay"];
        lacks(
            "mounts",
            "mounts are forbidden",
            "seccomp=unconfined",
            &also,
        );
    });
}

#[test]
fn a_forbidden_change_of_the_root_is_found() {
    in_child(
        &[],
        "doctor::a_forbidden_change_of_the_root_is_found",
        || {
            refuse_call(libc::SYS_pivot_root, Vec::new(), libc::EPERM);
            lacks("mounts", "mounts are forbidden", "seccomp=unconfined", &[]);
        },
    );
}

#[test]
fn a_kernel_without_the_mount_api_is_found() {
    in_child(
        &[],
        "doctor::a_kernel_without_the_mount_api_is_found",
        || {
            refuse_call(libc::SYS_open_tree, Vec::new(), libc::ENOSYS);
            let also = ["idmapped-mounts"];
            lacks("mount-api", "the kernel lacks the mount API", "5.12", &also);
        },
    );
}

#[test]
fn missing_seccomp_is_found() {
    in_child(&[], "doctor::missing_seccomp_is_found", || {
        refuse_call(libc::SYS_seccomp, Vec::new(), libc::EINVAL);
        lacks(
            "seccomp",
            "seccomp filters are not available",
            "CONFIG_SECCOMP_FILTER",
            &[],
        );
    });
}

#[test]
fn a_masked_proc_is_found() {
    // As a container runtime does it.
    let mut wrapper = unshare(&["--mount"]);
    wrapper.extend([
        "sh",
        "-c",
        "mount --bind /dev/null /proc/version && exec \"$0\" \"$@\"",
    ]);
    in_child(&wrapper, "doctor::a_masked_proc_is_found", || {
        lacks(
            "proc",
            "procfs can't be mounted",
            "systempaths=unconfined",
            &[],
        );
    });
}

#[test]
fn hidden_cgroups_are_told_and_do_not_keep_vms_from_running() {
    let mut wrapper = unshare(&["--mount"]);
    wrapper.extend([
        "sh",
        "-c",
        "mount -t tmpfs none /sys/fs/cgroup && exec \"$0\" \"$@\"",
    ]);
    in_child(
        &wrapper,
        "doctor::hidden_cgroups_are_told_and_do_not_keep_vms_from_running",
        || {
            let diagnosis = examined();
            assert!(diagnosis.is_ok(), "{diagnosis:#?}");
            let cgroups = check(&diagnosis, "cgroups");
            assert_eq!(cgroups.state, State::Degraded, "{cgroups:?}");
            assert!(
                cgroups
                    .trouble
                    .as_ref()
                    .unwrap()
                    .remedy
                    .contains("Delegate=yes")
            );
        },
    );
}

#[test]
fn a_kernel_that_has_no_nat_is_told_and_does_not_keep_vms_from_running() {
    in_child(
        &[],
        "doctor::a_kernel_that_has_no_nat_is_told_and_does_not_keep_vms_from_running",
        || {
            // Netlink is what the guest sets its rules with.
            let family = u64::from(libc::AF_NETLINK.cast_unsigned());
            let condition = seccompiler::SeccompCondition::new(
                0,
                seccompiler::SeccompCmpArgLen::Dword,
                seccompiler::SeccompCmpOp::Eq,
                family,
            )
            .unwrap();
            refuse_call(libc::SYS_socket, vec![condition], libc::EAFNOSUPPORT);
            let diagnosis = examined();
            assert!(diagnosis.is_ok(), "{diagnosis:#?}");
            assert_eq!(check(&diagnosis, "network").state, State::Degraded);
        },
    );
}
