//! What each layer of the isolation is for: attacks that it refuses, and that succeed without it. Only
//! in builds with the feature `weaken`.
//!
//! Where one layer stands behind another, the one in front is left out in both cases.

use std::net::TcpListener;
use std::path::Path;

use agentvm::vm::mount::HostMount;
use agentvm::vm::namespace::{BootOptions, boot};
use agentvm::vm::{DynVm, Limits, User};

use super::child::{again, block_on, role};
use super::isolation::{SystemV, attempt, outcomes, sh_as, users};
use super::limits::has_cgroups;
use super::vm::{options, sh};

/// Who can do most in a VM.
fn strongest() -> User {
    *users().last().unwrap()
}

/// Runs `attack` in a VM that lacks `before`, then in one that lacks `layer` too.
fn shows(
    test: &str,
    layers: (&str, &str),
    attack: impl AsyncFnOnce(&DynVm) -> String,
    outcomes: (&str, &str),
) {
    shows_in(|data| options(data, "a"), test, layers, attack, outcomes);
}

/// The same in VMs with these options.
fn shows_in(
    options: impl FnOnce(&Path) -> BootOptions,
    test: &str,
    (before, layer): (&str, &str),
    attack: impl AsyncFnOnce(&DynVm) -> String,
    (refused, done): (&str, &str),
) {
    const OUTCOME: &str = "outcome: ";
    if role().is_some() {
        block_on(async {
            let data = tempfile::tempdir().unwrap();
            let vm: DynVm = boot(options(data.path())).await.unwrap().vm;
            println!("\n{OUTCOME}{}", attack(&vm).await);
            vm.shutdown().await;
        });
        return;
    }
    let without = format!("{before},{layer}");
    for (without, expected) in [(before, refused), (&without, done)] {
        let variable = format!("AGENTVM_WEAKEN={without}");
        let test = format!("weakened::{test}");
        let output = again(&["env", &variable], &test, "attack")
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let outcome = text.lines().find_map(|line| line.strip_prefix(OUTCOME));
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(outcome, Some(expected), "without {without:?}: {said}");
    }
}

/// How one system call goes for the strongest.
async fn call(vm: &DynVm, number: i64, arguments: &[&str]) -> String {
    let attempts = [attempt("call", number, arguments)];
    let mut outcomes = outcomes(vm, strongest(), &attempts).await;
    outcomes.remove(0).1
}

async fn printed(vm: &DynVm, command: &str) -> String {
    let output = sh_as(vm, strongest(), command).await;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.trim_end().replace('\n', " ")
}

#[test]
fn without_seccomp_a_program_can_be_another_kinds() {
    shows(
        "without_seccomp_a_program_can_be_another_kinds",
        ("", "seccomp"),
        async |vm| call(vm, libc::SYS_personality, &["6"]).await,
        ("EPERM", "done"),
    );
}

#[test]
fn without_seccomp_limits_of_pid_1_can_be_changed() {
    shows(
        "without_seccomp_limits_of_pid_1_can_be_changed",
        ("real uid", "seccomp"),
        async |vm| {
            let (resource, most) = (libc::RLIMIT_STACK.to_string(), "pack(\"QQ\", 65536, 65536)");
            call(vm, libc::SYS_prlimit64, &["1", &resource, most, "0"]).await
        },
        ("EPERM", "done"),
    );
}

#[test]
fn without_seccomp_core_dumps_can_go_into_a_pipe() {
    shows(
        "without_seccomp_core_dumps_can_go_into_a_pipe",
        ("", "seccomp"),
        async |vm| printed(vm, "ulimit -c 0; awk '/core/ {print $6}' /proc/self/limits").await,
        ("1", "0"),
    );
}

#[test]
fn without_seccomp_keys_can_be_used() {
    shows(
        "without_seccomp_keys_can_be_used",
        ("", "seccomp"),
        // KEYCTL_JOIN_SESSION_KEYRING
        async |vm| call(vm, libc::SYS_keyctl, &["1", "0"]).await,
        ("EPERM", "done"),
    );
}

#[cfg(target_arch = "x86_64")]
#[test]
fn without_seccomp_calls_of_another_architecture_are_made() {
    use super::isolation::system_calls::i386_call;

    if !std::path::Path::new("/proc/sys/abi/ldt16").exists()
        && !std::path::Path::new("/proc/sys/abi/vsyscall32").exists()
    {
        return; // A kernel without i386.
    }
    shows(
        "without_seccomp_calls_of_another_architecture_are_made",
        ("", "seccomp"),
        async |vm| format!("{:?}", i386_call(vm, strongest()).await),
        ("Signal(31)", "Code(0)"),
    );
}

#[test]
fn without_an_owner_of_its_own_a_vm_takes_what_the_hosts_root_may_have() {
    if !users().contains(&User::Root) {
        return; // One user has no more than the VM's own share.
    }
    shows(
        "without_an_owner_of_its_own_a_vm_takes_what_the_hosts_root_may_have",
        ("", "owner"),
        async |vm| {
            let hosts = std::fs::read_to_string("/proc/sys/fs/inotify/max_user_instances").unwrap();
            let hosts: usize = hosts.trim().parse().unwrap();
            // Each follower has an instance, or says that it could not get one.
            let follow = format!(
                ": >/tmp/followed; for user in 1 2 3 4 5; do for i in $(seq {}); do
                   setpriv --reuid $user --clear-groups tail -f /tmp/followed >/dev/null 2>>/tmp/$user &
                 done; done
                 until [ $(cat /proc/[0-9]*/comm | grep -c tail) = {} ]; do sleep 0.1; done; sleep 1",
                hosts / 5 + 1,
                (hosts / 5 + 1) * 5,
            );
            printed(vm, &follow).await;
            // SAFETY: no pointers.
            let instance = unsafe { libc::inotify_init1(libc::IN_CLOEXEC) };
            if instance < 0 { "taken" } else { "left" }.to_owned()
        },
        ("left", "taken"),
    );
}

#[test]
fn without_a_keyring_of_their_own_vms_find_the_hosts_keys() {
    const NAME: &str = "agentvm-test";
    if role().is_some() {
        // Threads have the keyring of who starts them.
        // SAFETY: integers, and strings that outlive the calls.
        let added = unsafe {
            libc::syscall(libc::SYS_keyctl, 1, std::ptr::null::<u8>());
            let (kind, name) = (c"user".as_ptr(), c"agentvm-test".as_ptr());
            libc::syscall(libc::SYS_add_key, kind, name, c"secret".as_ptr(), 6, -3)
        };
        assert!(added > 0, "no key");
    }
    let name = format!("\"{NAME}\"");
    shows(
        "without_a_keyring_of_their_own_vms_find_the_hosts_keys",
        ("seccomp", "keyring"),
        // KEYCTL_SEARCH in KEY_SPEC_SESSION_KEYRING
        async |vm| call(vm, libc::SYS_keyctl, &["10", "-3", "\"user\"", &name, "0"]).await,
        ("ENOKEY", "done"),
    );
}

#[test]
fn without_a_limit_of_them_namespaces_nest() {
    shows(
        "without_a_limit_of_them_namespaces_nest",
        ("seccomp", "forbid nested namespaces"),
        async |vm| {
            let user_namespace = libc::CLONE_NEWUSER.to_string();
            call(vm, libc::SYS_unshare, &[&user_namespace]).await
        },
        ("ENOSPC", "done"),
    );
}

#[test]
fn without_masks_the_kernel_tells_its_symbols() {
    shows(
        "without_masks_the_kernel_tells_its_symbols",
        ("", "mask /proc"),
        async |vm| printed(vm, "head -c 1 /proc/kallsyms | wc -c").await,
        ("0", "1"),
    );
}

#[test]
fn without_dropped_capabilities_root_has_raw_sockets() {
    if !users().contains(&User::Root) {
        return; // Nobody else keeps a capability when a program is started.
    }
    shows(
        "without_dropped_capabilities_root_has_raw_sockets",
        ("", "drop capabilities"),
        async |vm| call(vm, libc::SYS_socket, &["2", "3", "1"]).await,
        ("EPERM", "done"),
    );
}

#[test]
fn without_rlimits_the_hosts_hold() {
    shows(
        "without_rlimits_the_hosts_hold",
        ("", "setrlimit"),
        async |vm| printed(vm, "awk '/core/ {print $6 == 1}' /proc/self/limits").await,
        ("1", "0"),
    );
}

#[test]
fn without_a_net_namespace_the_hosts_loopback_is_reached() {
    shows(
        "without_a_net_namespace_the_hosts_loopback_is_reached",
        ("", "net namespace"),
        async |vm| {
            let server = TcpListener::bind("127.0.0.1:0").unwrap();
            let port = server.local_addr().unwrap().port();
            let connect = format!("exec 3<>/dev/tcp/127.0.0.1/{port} && echo connected || echo no");
            printed(vm, &format!("bash -c '{connect}' 2>/dev/null")).await
        },
        ("no", "connected"),
    );
}

#[test]
fn without_an_ipc_namespace_the_hosts_shared_memory_is_found() {
    shows(
        "without_an_ipc_namespace_the_hosts_shared_memory_is_found",
        ("", "ipc namespace"),
        async |vm| {
            let key = i32::try_from(std::process::id()).unwrap();
            let _objects = SystemV::make(key);
            call(vm, libc::SYS_shmget, &[&key.to_string(), "4096", "0"]).await
        },
        ("ENOENT", "done"),
    );
}

#[test]
fn without_a_cgroup_namespace_a_vm_sees_where_the_host_has_it() {
    if !has_cgroups() {
        return; // No VM is in a cgroup of its own.
    }
    shows_in(
        |data| BootOptions {
            limits: Limits {
                memory_bytes: Some(256 << 20),
                ..Limits::default()
            },
            ..options(data, "a")
        },
        "without_a_cgroup_namespace_a_vm_sees_where_the_host_has_it",
        ("", "see its own cgroup as the root"),
        async |vm| printed(vm, "grep :memory: /proc/self/cgroup | grep -c agentvm").await,
        ("0", "1"),
    );
}

/// Who a program is that the VM's root has made set-user-ID, and `user` runs.
async fn set_user_id(vm: &DynVm) -> String {
    let make = "cp /usr/bin/id id && chmod 6755 id";
    sh_as(vm, User::Root, &format!("cd /home/user && {make}")).await;
    let output = sh(vm, "./id -u").await;
    String::from_utf8_lossy(&output.stdout)
        .trim_end()
        .to_owned()
}

#[test]
fn without_no_new_privs_a_program_is_who_made_it_set_user_id() {
    if !users().contains(&User::Root) {
        return; // Nobody could become anybody else.
    }
    shows(
        "without_no_new_privs_a_program_is_who_made_it_set_user_id",
        // The kernel takes filters from those alone that gain nothing by a program.
        ("seccomp,landlock,nosuid", "no_new_privs"),
        set_user_id,
        ("1000", "0"),
    );
}

#[test]
fn without_nosuid_a_program_is_who_made_it_set_user_id() {
    if !users().contains(&User::Root) {
        return; // As above.
    }
    shows(
        "without_nosuid_a_program_is_who_made_it_set_user_id",
        ("seccomp,landlock,no_new_privs", "nosuid"),
        set_user_id,
        ("1000", "0"),
    );
}

#[test]
fn without_nodev_a_device_of_the_host_in_a_mount_is_open() {
    if !users().contains(&User::Root) {
        return; // Ordinary users make no devices.
    }
    // As /dev/full, which nobody minds.
    let (host, device) = (tempfile::tempdir().unwrap(), libc::makedev(1, 7));
    let (kind, all) = (nix::sys::stat::SFlag::S_IFCHR, 0o666);
    let (path, mode) = (
        host.path().join("full"),
        nix::sys::stat::Mode::from_bits_truncate(all),
    );
    nix::sys::stat::mknod(&path, kind, mode, device).unwrap();
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(all)).unwrap();
    shows_in(
        |data| BootOptions {
            mounts: vec![HostMount::new("/home/user/host", host.path(), true).unwrap()],
            private: vec![data.to_owned()],
            ..options(data, "a")
        },
        "without_nodev_a_device_of_the_host_in_a_mount_is_open",
        ("", "nodev"),
        async |vm| printed(vm, "head -c 1 host/full | wc -c").await,
        ("0", "1"),
    );
}

#[test]
fn without_landlock_who_has_capabilities_can_mount() {
    // SAFETY: a null pointer and integers, which ask for the version.
    let version = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, 0_usize, 0_usize, 1) };
    if version < 2 || !users().contains(&User::Root) {
        return; // A kernel without it, or nobody who has capabilities.
    }
    shows(
        "without_landlock_who_has_capabilities_can_mount",
        ("seccomp,drop capabilities", "landlock"),
        async |vm| {
            let (tmpfs, tmp, none) = ("\"tmpfs\"", "\"/tmp\"", "\"\"");
            call(vm, libc::SYS_mount, &[tmpfs, tmp, tmpfs, "0", none]).await
        },
        ("EPERM", "done"),
    );
}
