//! Which system calls programs of a VM get. What they get by number alone, the filter's own tests say.

use std::iter::zip;

use agentvm::vm::exec::{ExecEnd, ExecOptions, exec};
use agentvm::vm::{DynVm, Exit, User};

use super::super::vm::{booted, stdout};
use super::{attempt, outcomes, owned, sh_as, users};

/// What `syscall` says for each number, with zeros as arguments.
async fn errors(vm: &DynVm, user: User, numbers: &[i64]) -> Vec<i32> {
    let numbers: Vec<String> = numbers.iter().map(ToString::to_string).collect();
    let each = "$! = 0; syscall($_, 0, 0, 0, 0, 0, 0); print $! + 0, qq(\\n)";
    let command = format!("perl -e 'for ({}) {{ {each} }}'", numbers.join(","));
    let output = sh_as(vm, user, &command).await;
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().map(|line| line.parse().unwrap()).collect()
}

#[tokio::test]
async fn denied_calls_fail_with_eperm_and_unknown_ones_with_enosys() {
    let denied = [
        libc::SYS_mount_setattr,
        libc::SYS_move_mount,
        libc::SYS_fsconfig,
        libc::SYS_fsmount,
        libc::SYS_fspick,
        467, // open_tree_attr
        libc::SYS_quotactl,
        libc::SYS_quotactl_fd,
        libc::SYS_fanotify_init,
        libc::SYS_acct,
        libc::SYS_io_uring_enter,
        libc::SYS_io_uring_register,
        libc::SYS_request_key,
        libc::SYS_kexec_load,
        libc::SYS_kexec_file_load,
        libc::SYS_init_module,
        libc::SYS_finit_module,
        libc::SYS_delete_module,
        libc::SYS_clock_settime,
        libc::SYS_setdomainname,
        libc::SYS_vhangup,
        libc::SYS_get_mempolicy,
        libc::SYS_mbind,
        libc::SYS_move_pages,
        libc::SYS_pidfd_getfd,
        libc::SYS_kcmp,
    ];
    // clone3, statmount, listmount; numbers of no architecture of ours; those to come.
    let mut unknown = vec![435, 457, 458];
    unknown.extend([libc::SYS_io_setup, libc::SYS_io_submit]);
    unknown.extend(400..420);
    unknown.extend(471..600);
    if cfg!(target_arch = "x86_64") {
        let x32_getpid = 0x4000_0000 + libc::SYS_getpid;
        unknown.push(x32_getpid);
    }
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    for user in users() {
        for (numbers, expected) in [(&denied[..], libc::EPERM), (&unknown, libc::ENOSYS)] {
            let errors = errors(&vm, user, numbers).await;
            assert_eq!(errors.len(), numbers.len());
            for (number, error) in zip(numbers, errors) {
                assert_eq!(error, expected, "{number} as {user:?}");
            }
        }
    }
    vm.shutdown().await;
}

#[tokio::test]
async fn sockets_reach_the_network_of_the_vm_and_nothing_else() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    let (datagram, raw) = ("2", "3");
    let sockets = [
        ("netlink, audit", ["16", raw, "9"], "EPROTONOSUPPORT"),
        ("netlink, devices", ["16", raw, "15"], "EPROTONOSUPPORT"),
        ("netlink, filters", ["16", raw, "12"], "EPROTONOSUPPORT"),
        ("netlink, routes", ["16", raw, "0"], "done"),
        ("sctp", ["2", "1", "132"], "EPROTONOSUPPORT"),
        ("raw", ["2", raw, "1"], "EPERM"),
        ("raw v6", ["10", raw, "58"], "EPERM"),
        ("packets by their old name", ["2", "10", "0"], "EPERM"),
        ("crypto", ["38", "5", "0"], "EPERM"),
        ("vsock", ["40", "1", "0"], "EPERM"),
        ("udp", ["2", datagram, "17"], "done"),
    ];
    let attempts: Vec<_> = sockets
        .iter()
        .map(|(name, arguments, _)| attempt(name, libc::SYS_socket, arguments))
        .collect();
    let expected = sockets.map(|(name, _, outcome)| owned((name, outcome)));
    for user in users() {
        assert_eq!(outcomes(&vm, user, &attempts).await, expected, "{user:?}");
    }
    vm.shutdown().await;
}

#[tokio::test]
async fn no_socket_gets_a_program() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    // It takes every packet: struct sock_fprog with one instruction, BPF_RET.
    let program = "pack(\"S x6 P\", 1, $code = pack(\"SCCL\", 6, 0, 0, 0xffff))";
    let attach = |name, option| {
        attempt(
            name,
            libc::SYS_setsockopt,
            &["3", "1", option, program, "16"],
        )
    };
    let calls = [
        attempt("socket", libc::SYS_socket, &["2", "2", "0"]),
        attach("filter", "26"),
        attach("choice of a socket", "51"),
    ];
    let expected = [
        ("socket", "done"),
        ("filter", "ENOPROTOOPT"),
        ("choice of a socket", "ENOPROTOOPT"),
    ];
    for user in users() {
        let outcomes = outcomes(&vm, user, &calls).await;
        assert_eq!(outcomes, expected.map(owned), "{user:?}");
    }
    vm.shutdown().await;
}

#[tokio::test]
async fn the_clock_can_be_asked_about_and_not_set() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    // struct timex: `modes` comes first; ADJ_FREQUENCY is 2.
    let timex = |modes: u32| format!("pack(\"L x252\", {modes})");
    let calls = [
        attempt("ask", libc::SYS_adjtimex, &[&timex(0)]),
        attempt("set", libc::SYS_adjtimex, &[&timex(2)]),
        attempt("set by clock", libc::SYS_clock_adjtime, &["0", &timex(2)]),
    ];
    for user in users() {
        assert_eq!(
            outcomes(&vm, user, &calls).await,
            [("ask", "done"), ("set", "EPERM"), ("set by clock", "EPERM")].map(owned),
            "{user:?}"
        );
    }
    vm.shutdown().await;
}

#[tokio::test]
async fn no_limit_of_pid_1_can_be_changed() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    let none = "pack(\"QQ\", 0, 0)";
    let calls = [libc::RLIMIT_NOFILE, libc::RLIMIT_CPU, libc::RLIMIT_NPROC].map(|resource| {
        let resource = resource.to_string();
        attempt("prlimit", libc::SYS_prlimit64, &["1", &resource, none, "0"])
    });
    for user in users() {
        for (_, outcome) in outcomes(&vm, user, &calls).await {
            assert_eq!(outcome, "EPERM", "{user:?}");
        }
    }
    assert_eq!(stdout(&vm, "echo alive").await, "alive\n");
    vm.shutdown().await;
}

#[tokio::test]
async fn nobody_says_when_pid_1_runs() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    let no_priority = "pack(\"l\", 0)";
    // struct sched_attr of SCHED_IDLE.
    let attributes = "pack(\"LL x40\", 48, 5)";
    let first_cpu = "pack(\"Q x120\", 1)";
    let calls = [
        attempt(
            "policy",
            libc::SYS_sched_setscheduler,
            &["1", "5", no_priority],
        ),
        attempt("parameter", libc::SYS_sched_setparam, &["1", no_priority]),
        attempt(
            "attributes",
            libc::SYS_sched_setattr,
            &["1", attributes, "0"],
        ),
        attempt(
            "processors",
            libc::SYS_sched_setaffinity,
            &["1", "128", first_cpu],
        ),
        attempt("nice", libc::SYS_setpriority, &["0", "1", "19"]),
        attempt("nice group", libc::SYS_setpriority, &["1", "1", "19"]),
        attempt("nice user", libc::SYS_setpriority, &["2", "0", "19"]),
        attempt("disk", libc::SYS_ioprio_set, &["1", "1", "0x6000"]),
        attempt("disk, group", libc::SYS_ioprio_set, &["2", "1", "0x6000"]),
        attempt("disk, user", libc::SYS_ioprio_set, &["3", "0", "0x6000"]),
    ];
    for user in users() {
        for (name, outcome) in outcomes(&vm, user, &calls).await {
            assert_eq!(outcome, "EPERM", "{name} as {user:?}");
        }
        for file in ["autogroup", "oom_score_adj", "timerslack_ns"] {
            let output = sh_as(&vm, user, &format!("echo 19 > /proc/1/{file}")).await;
            assert_ne!(output.exit, Exit::Code(0), "{file} as {user:?}");
        }
        let own = "sleep 60 & renice -n 5 -p $! && ionice -c 3 -p $! && chrt -i -p 0 $! && \
                   taskset -p 1 $! && renice -n 5 -g 0 && nice -n 15 ionice -c 2 -n 7 true; \
                   error=$?; kill %1; exit $error";
        let output = sh_as(&vm, user, own).await;
        assert_eq!(output.exit, Exit::Code(0), "{user:?}: {output:?}");
    }
    vm.shutdown().await;
}

#[tokio::test]
async fn a_process_has_few_groups() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    let groups = "pack(\"L*\", 1 .. 65)";
    let calls = [
        attempt("few", libc::SYS_setgroups, &["64", groups]),
        attempt("many", libc::SYS_setgroups, &["65", groups]),
    ];
    for user in users() {
        // Only root may say which groups it has.
        let few = if user == User::Root { "done" } else { "EPERM" };
        let expected = [("few", few), ("many", "EINVAL")].map(owned);
        assert_eq!(outcomes(&vm, user, &calls).await, expected, "{user:?}");
    }
    vm.shutdown().await;
}

#[tokio::test]
async fn the_limit_of_core_dumps_stays_the_one_that_pipes_obey() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    for user in users() {
        for change in ["ulimit -c 0", "ulimit -Sc 0", "ulimit -c unlimited"] {
            let command = format!("{change} && grep core /proc/self/limits");
            let output = sh_as(&vm, user, &command).await;
            let text = String::from_utf8(output.stdout).unwrap();
            let limits: Vec<&str> = text.split_whitespace().skip(4).collect();
            assert_eq!(limits, ["1", "1", "bytes"], "{change} as {user:?}");
        }
    }
    vm.shutdown().await;
}

/// An executable of this machine code.
#[cfg(target_arch = "x86_64")]
fn elf(code: &[u8]) -> Vec<u8> {
    const BASE: u64 = 0x40_0000;
    const HEADERS: u64 = 64 + 56;
    let size = HEADERS + u64::try_from(code.len()).unwrap();
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let mut put = |bytes: &[u8]| file.extend_from_slice(bytes);
    // Executable, x86-64, version 1; entry, program headers, no sections, no flags.
    put(&[2, 0, 62, 0, 1, 0, 0, 0]);
    for field in [BASE + HEADERS, 64, 0] {
        put(&field.to_le_bytes());
    }
    put(&[0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    // One segment to load, readable and executable.
    put(&[1, 0, 0, 0, 5, 0, 0, 0]);
    for field in [0, BASE, BASE, size, size, 0x1000] {
        put(&field.to_le_bytes());
    }
    put(code);
    file
}

#[cfg(target_arch = "x86_64")]
pub(crate) async fn i386_call(vm: &DynVm, user: User) -> Exit {
    // mov eax, 20 (getpid of i386); int 0x80; mov eax, 60 (exit); xor edi, edi; syscall
    let code = b"\xb8\x14\0\0\0\xcd\x80\xb8\x3c\0\0\0\x31\xff\x0f\x05";
    let options = ExecOptions {
        user,
        stdin: elf(code),
        ..ExecOptions::default()
    };
    let command = "cat > ~/i386 && chmod 755 ~/i386 && exec ~/i386";
    let ExecEnd::Exited(output) = exec(vm, command, options).await.unwrap() else {
        unreachable!("no time limit was given")
    };
    output.exit
}

#[cfg(target_arch = "x86_64")]
#[tokio::test]
async fn calls_of_another_architecture_end_the_program() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    for user in users() {
        let exit = i386_call(&vm, user).await;
        assert_eq!(exit, Exit::Signal(libc::SIGSYS), "{user:?}");
    }
    vm.shutdown().await;
}
