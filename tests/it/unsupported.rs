//! Hosts that can't isolate say what they lack, and keep nothing of the attempt.

use std::collections::BTreeMap;
use std::fs;

use agentvm::error::Error;
use agentvm::vm::namespace::boot;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule,
};

use super::child::{block_on, in_child, unshare};
use super::vm::options;

/// Boots in this process, which can't; checks what is said and that nothing stays.
fn refuses(feature: &str, remedy: &str) {
    let data = tempfile::tempdir().unwrap();
    block_on(async {
        let descriptors = || fs::read_dir("/proc/self/fd").unwrap().count();
        // Twice: the first attempt opens what the process keeps for all VMs.
        for attempt in 0..2 {
            let before = descriptors();
            let error = boot(options(data.path(), "a")).await.err().unwrap();
            let error = Error::from(error);
            assert_eq!(error.code.as_str(), "VM_UNSUPPORTED", "{error}");
            assert!(error.message.contains(feature), "{error}");
            assert!(error.message.contains(remedy), "{error}");
            assert!(error.message.contains("npx agentvm doctor"), "{error}");
            assert_eq!(processes(), "", "left by attempt {attempt}");
            assert!(attempt == 0 || descriptors() == before, "descriptors leak");
        }
    });
}

/// Children of this process, zombies too.
fn processes() -> String {
    fs::read_dir("/proc/self/task")
        .unwrap()
        .map(|task| fs::read_to_string(task.unwrap().path().join("children")).unwrap())
        .collect()
}

/// Makes the kernel refuse a system call to this thread and all that it starts.
pub(super) fn refuse_call(call: i64, conditions: Vec<SeccompCondition>, errno: i32) {
    let rules = if conditions.is_empty() {
        Vec::new()
    } else {
        vec![SeccompRule::new(conditions).unwrap()]
    };
    let filter: BpfProgram = SeccompFilter::new(
        BTreeMap::from([(call, rules)]),
        SeccompAction::Allow,
        SeccompAction::Errno(errno.cast_unsigned()),
        std::env::consts::ARCH.try_into().unwrap(),
    )
    .unwrap()
    .try_into()
    .unwrap();
    seccompiler::apply_filter(&filter).unwrap();
}

#[test]
fn a_limit_of_no_user_namespaces_is_named() {
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
        "unsupported::a_limit_of_no_user_namespaces_is_named",
        || {
            refuses(
                "the limit of namespaces is reached or 0",
                "user.max_user_namespaces",
            );
        },
    );
}

#[test]
fn forbidden_namespaces_are_named() {
    in_child(&[], "unsupported::forbidden_namespaces_are_named", || {
        let flag = u64::from(libc::CLONE_NEWUSER.cast_unsigned());
        let has = SeccompCmpOp::MaskedEq(flag);
        let condition = SeccompCondition::new(0, SeccompCmpArgLen::Dword, has, flag).unwrap();
        refuse_call(libc::SYS_clone, vec![condition], libc::EPERM);
        refuses(
            "namespaces are forbidden to this process",
            "seccomp=unconfined",
        );
    });
}

#[test]
fn a_forbidden_mount_is_named() {
    in_child(&[], "unsupported::a_forbidden_mount_is_named", || {
        refuse_call(libc::SYS_mount, Vec::new(), libc::EPERM);
        refuses("mounts are forbidden", "seccomp=unconfined");
    });
}

#[test]
fn a_forbidden_clone_of_a_mount_is_named() {
    in_child(
        &[],
        "unsupported::a_forbidden_clone_of_a_mount_is_named",
        || {
            refuse_call(libc::SYS_open_tree, Vec::new(), libc::EPERM);
            refuses("mounts are forbidden", "seccomp=unconfined");
        },
    );
}

#[test]
fn a_kernel_without_the_mount_api_is_named() {
    in_child(
        &[],
        "unsupported::a_kernel_without_the_mount_api_is_named",
        || {
            refuse_call(libc::SYS_open_tree, Vec::new(), libc::ENOSYS);
            refuses("the kernel lacks the mount API", "Linux 5.12");
        },
    );
}

#[test]
fn a_kernel_without_mount_attributes_is_named() {
    in_child(
        &[],
        "unsupported::a_kernel_without_mount_attributes_is_named",
        || {
            refuse_call(libc::SYS_mount_setattr, Vec::new(), libc::ENOSYS);
            refuses("the kernel lacks the mount API", "Linux 5.12");
        },
    );
}

#[test]
fn a_forbidden_change_of_the_root_is_named() {
    in_child(
        &[],
        "unsupported::a_forbidden_change_of_the_root_is_named",
        || {
            refuse_call(libc::SYS_pivot_root, Vec::new(), libc::EPERM);
            refuses("mounts are forbidden", "seccomp=unconfined");
        },
    );
}

#[test]
fn forbidden_seccomp_is_named() {
    in_child(&[], "unsupported::forbidden_seccomp_is_named", || {
        refuse_call(libc::SYS_seccomp, Vec::new(), libc::EINVAL);
        refuses("seccomp filters are not available", "CONFIG_SECCOMP_FILTER");
    });
}

#[test]
fn a_masked_proc_is_named() {
    // Docker does this to /proc/kcore and others, which not every kernel has.
    let mut wrapper = unshare(&["--mount"]);
    wrapper.extend([
        "sh",
        "-c",
        "mount --bind /dev/null /proc/version && exec \"$0\" \"$@\"",
    ]);
    in_child(&wrapper, "unsupported::a_masked_proc_is_named", || {
        refuses("procfs can't be mounted", "systempaths=unconfined");
    });
}
