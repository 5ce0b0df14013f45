//! Which system calls the processes of a VM get: those that programs use, and no others.
//!
//! What is known and denied fails with `EPERM`, what is not known with `ENOSYS`, so that a program
//! takes the kernel for an older one and falls back. Calls of other architectures end the program (i386
//! on x86 among them); those of x32 are numbers that nobody knows.

mod calls;
mod program;

use std::collections::BTreeMap;
use std::sync::LazyLock;

use agentvm_guest::protocol::SockFilter;

use self::program::{ALLOW, Decision, Field, Test, fail, null, one_of, program, when};

/// Protocols of internet sockets. What else there is (SCTP, L2TP, MPTCP, …), the network of a VM does
/// not carry, and asking for it can load a module.
const INTERNET_PROTOCOLS: [i32; 5] = [
    0,
    libc::IPPROTO_ICMP,
    libc::IPPROTO_TCP,
    libc::IPPROTO_UDP,
    libc::IPPROTO_ICMPV6,
];

/// `clone` flags that make namespaces. (`CLONE_NEWTIME` is a part of the exit signal there.)
const NAMESPACE_FLAGS: i32 = libc::CLONE_NEWUSER
    | libc::CLONE_NEWNS
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWCGROUP;

/// Terminal injection: pushing bytes into the input of another program's terminal.
const IOCTLS: [u32; 2] = [0x5412, 0x541c]; // TIOCSTI, TIOCLINUX

/// What debuggers, sanitizers and `setarch` ask for. The others are emulations that nobody tests.
const PERSONALITIES: i32 = PER_LINUX32 | libc::UNAME26 | libc::ADDR_NO_RANDOMIZE;
const PER_LINUX32: i32 = 8;
/// Asks which one it is.
const PERSONALITY_QUERY: u32 = u32::MAX;

/// Say when a process runs, and where: its pid is their first argument.
const OF_ONE_PROCESS: [i64; 4] = [
    libc::SYS_sched_setaffinity,
    libc::SYS_sched_setattr,
    libc::SYS_sched_setparam,
    libc::SYS_sched_setscheduler,
];

/// Groups of a process. The kernel would let it have 65,536, and write them all out for whoever reads its
/// status, as PID 1 does for every process.
const MOST_GROUPS: u32 = 64;

/// Programs of a socket, as the first BPF has them. All of the machine share the memory of what the kernel
/// compiles them to (`net.core.bpf_jit_limit`), and without that no VM gets its filter of system calls.
const SOCKET_PROGRAMS: [i32; 2] = [libc::SO_ATTACH_FILTER, libc::SO_ATTACH_REUSEPORT_CBPF];

/// Of `ioprio_set(2)`: all processes of a user.
const IOPRIO_WHO_USER: u32 = 3;

/// The filter as the kernel takes it.
pub(super) fn filter() -> Vec<SockFilter> {
    static FILTER: LazyLock<Vec<SockFilter>> =
        LazyLock::new(|| program(decisions(), &fail(libc::ENOSYS)));
    FILTER.clone()
}

/// Of programs in a VM that can write to directories of the host: what makes a file setuid or setgid.
/// `openat2` hides its mode from seccomp, and is as on a kernel without it.
pub(super) fn no_setid() -> Vec<SockFilter> {
    static FILTER: LazyLock<Vec<SockFilter>> = LazyLock::new(|| program(setid_decisions(), &ALLOW));
    FILTER.clone()
}

fn decisions() -> BTreeMap<u32, Decision> {
    let mut decisions = BTreeMap::new();
    let mut decide = |call, decision| decisions.insert(number(call), decision);
    let lists = [calls::ALLOWED, calls::ALLOWED_HERE, calls::ALLOWED_NEW];
    for call in lists.into_iter().flatten() {
        decide(*call, ALLOW);
    }
    for call in calls::DENIED.iter().chain(calls::DENIED_HERE) {
        decide(*call, fail(libc::EPERM));
    }
    // A pair is made like two sockets, for some families (TIPC) also connected like them.
    decide(libc::SYS_socket, socket());
    decide(libc::SYS_socketpair, socket());
    decide(
        libc::SYS_clone,
        when(
            Field::Low(0),
            Test::AnyBit(NAMESPACE_FLAGS.cast_unsigned()),
            fail(libc::EPERM),
            ALLOW,
        ),
    );
    // It hides its flags from seccomp. Whoever knows it can do without.
    decide(libc::SYS_clone3, fail(libc::ENOSYS));
    decide(
        libc::SYS_ioctl,
        one_of(Field::Low(1), &IOCTLS, &fail(libc::EPERM), ALLOW),
    );
    decide(libc::SYS_personality, personality());
    decide(libc::SYS_prlimit64, prlimit());
    for call in OF_ONE_PROCESS {
        decide(call, not_pid_1(Field::Low(0)));
    }
    // The kernel, too, says EINVAL above its own limit.
    let too_many = Test::AtLeast(MOST_GROUPS + 1);
    let groups = when(Field::Low(0), too_many, fail(libc::EINVAL), ALLOW);
    decide(libc::SYS_setgroups, groups);
    decide(libc::SYS_setpriority, priority(libc::PRIO_USER));
    decide(libc::SYS_ioprio_set, priority(IOPRIO_WHO_USER));
    decide(calls::SETRLIMIT, core_limit(Field::Low(0), fail(0), ALLOW));
    let programs = SOCKET_PROGRAMS.map(i32::cast_unsigned);
    // As a kernel that does not have the option.
    let option = one_of(Field::Low(2), &programs, &fail(libc::ENOPROTOOPT), ALLOW);
    let of_sockets = Test::Equal(libc::SOL_SOCKET.cast_unsigned());
    decide(
        libc::SYS_setsockopt,
        when(Field::Low(1), of_sockets, option, ALLOW),
    );
    decisions
}

fn number(call: i64) -> u32 {
    u32::try_from(call).expect("numbers of system calls are small")
}

fn socket() -> Decision {
    // Of the types that there are (1 to 6, and 10) the bit of one: packet sockets by an old name.
    const SOCK_PACKET: u32 = 8;
    let (family, kind, protocol) = (Field::Low(0), Field::Low(1), Field::Low(2));
    let is = |value: i32| Test::Equal(value.cast_unsigned());
    // As a kernel without them: whoever wants to audit or to hear of devices goes on without.
    let no_protocol = fail(libc::EPROTONOSUPPORT);
    let routes = when(
        protocol,
        is(libc::NETLINK_ROUTE),
        ALLOW,
        no_protocol.clone(),
    );
    let protocols = INTERNET_PROTOCOLS.map(i32::cast_unsigned);
    let internet = one_of(protocol, &protocols, &ALLOW, no_protocol);
    let packets = Test::AnyBit(SOCK_PACKET);
    let internet = when(kind, packets, fail(libc::EPERM), internet);
    let families = [libc::AF_INET, libc::AF_INET6].map(i32::cast_unsigned);
    let others = one_of(family, &families, &internet, fail(libc::EPERM));
    let not_local = when(family, is(libc::AF_NETLINK), routes, others);
    when(family, is(libc::AF_UNIX), ALLOW, not_local)
}

fn personality() -> Decision {
    let persona = Field::Low(0);
    let unknown = Test::AnyBit(!PERSONALITIES.cast_unsigned());
    let change = when(persona, unknown, fail(libc::EPERM), ALLOW);
    when(persona, Test::Equal(PERSONALITY_QUERY), ALLOW, change)
}

/// Nobody changes a limit of PID 1, whose user the VM's root is (and `user`, where that is the only id).
fn prlimit() -> Decision {
    let (pid, resource) = (Field::Low(0), Field::Low(1));
    // With the old limit wanted too, success would leave the answer out.
    let change_core = null(3, fail(0), fail(libc::EPERM));
    let change = core_limit(resource, change_core, ALLOW);
    let change = when(pid, Test::Equal(1), fail(libc::EPERM), change);
    null(2, ALLOW, change)
}

/// Who made PID 1 wait for processors could keep it from ending what the VM runs.
fn not_pid_1(pid: Field) -> Decision {
    when(pid, Test::Equal(1), fail(libc::EPERM), ALLOW)
}

/// Of a process or a group, 1 is PID 1 or its own group, in which nothing else can be. Of a user, PID 1 may
/// always be among them: the VM's root can become whoever PID 1's real uid is.
fn priority(of_a_user: u32) -> Decision {
    let (kind, who) = (Field::Low(0), Field::Low(1));
    let all_of_a_user = Test::Equal(of_a_user);
    when(kind, all_of_a_user, fail(libc::EPERM), not_pid_1(who))
}

/// `RLIMIT_CORE` stays 1, the only value with which the kernel does not even start the program of a
/// `core_pattern` that is a pipe. Programs that must not leave a core set 0, some insist: they are told
/// that it worked.
fn core_limit(resource: Field, core: Decision, other: Decision) -> Decision {
    when(resource, Test::Equal(libc::RLIMIT_CORE), core, other)
}

fn setid_decisions() -> BTreeMap<u32, Decision> {
    /// Not in `libc` for every architecture.
    const FCHMODAT2: i64 = 452;
    // Calls that take a mode, and which argument it is.
    let mut modes = vec![
        (libc::SYS_fchmod, 1),
        (libc::SYS_fchmodat, 2),
        (FCHMODAT2, 2),
        (libc::SYS_mknodat, 2),
    ];
    // The same, where the mode is looked at only if the flags before it create a file.
    let mut creating = vec![(libc::SYS_openat, 3)];
    #[cfg(target_arch = "x86_64")]
    {
        modes.extend([
            (libc::SYS_chmod, 1),
            (libc::SYS_creat, 1),
            (libc::SYS_mknod, 1),
        ]);
        creating.push((libc::SYS_open, 2));
    }
    let setid = Test::AnyBit(libc::S_ISUID | libc::S_ISGID);
    // The one bit of O_TMPFILE that is its own.
    let creates = libc::O_CREAT | libc::O_TMPFILE & !libc::O_DIRECTORY;
    let creates = Test::AnyBit(creates.cast_unsigned());
    let by_mode = |mode| when(Field::Low(mode), setid, fail(libc::EPERM), ALLOW);
    let modes = modes
        .into_iter()
        .map(|(call, mode)| (number(call), by_mode(mode)));
    let creating = creating.into_iter().map(|(call, mode)| {
        let decision = when(Field::Low(mode - 1), creates, by_mode(mode), ALLOW);
        (number(call), decision)
    });
    let openat2 = (number(libc::SYS_openat2), fail(libc::ENOSYS));
    modes.chain(creating).chain([openat2]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel answers to a call with these arguments: an error, or 0 where it makes the call.
    fn answer(filter: &[SockFilter], call: i64, arguments: [u64; 6]) -> i32 {
        match program::run(filter, number(call), arguments) {
            libc::SECCOMP_RET_ALLOW => 0,
            refused if refused & !0xfff == libc::SECCOMP_RET_ERRNO => {
                (refused & 0xfff).cast_signed()
            }
            other => panic!("{other:#x}"),
        }
    }

    const NONE: [u64; 6] = [0; 6];

    #[test]
    fn no_call_is_in_two_lists() {
        let lists = [
            calls::ALLOWED,
            calls::ALLOWED_HERE,
            calls::ALLOWED_NEW,
            calls::DENIED,
            calls::DENIED_HERE,
            &[
                libc::SYS_socket,
                libc::SYS_socketpair,
                libc::SYS_clone,
                libc::SYS_clone3,
                libc::SYS_ioctl,
                libc::SYS_personality,
                libc::SYS_prlimit64,
                libc::SYS_setgroups,
                libc::SYS_setpriority,
                libc::SYS_setsockopt,
                libc::SYS_ioprio_set,
                calls::SETRLIMIT,
            ],
            &OF_ONE_PROCESS,
        ];
        let mut all: Vec<i64> = lists.into_iter().flatten().copied().collect();
        all.sort_unstable();
        let twice: Vec<_> = all.windows(2).filter(|two| two[0] == two[1]).collect();
        assert_eq!(twice, Vec::<&[i64]>::new());
    }

    #[test]
    fn every_number_gets_what_its_list_says() {
        let filter = filter();
        let lists = [calls::ALLOWED, calls::ALLOWED_HERE, calls::ALLOWED_NEW];
        for call in lists.into_iter().flatten() {
            assert_eq!(answer(&filter, *call, NONE), 0, "{call}");
        }
        for call in calls::DENIED.iter().chain(calls::DENIED_HERE) {
            assert_eq!(answer(&filter, *call, NONE), libc::EPERM, "{call}");
        }
    }

    /// The numbers of the kernel's `syscall_64.tbl`: a new name in it has to be put into a list.
    #[cfg(target_arch = "x86_64")]
    #[test]
    fn every_call_of_the_kernel_has_been_decided_about() {
        const LAST_KNOWN: i64 = 470;
        const X32: i64 = 0x4000_0000;
        let filter = filter();
        let unknown = |call: &i64| answer(&filter, *call, NONE) == libc::ENOSYS;
        let names_without_a_call = [
            174, 177, 178, // create_module, get_kernel_syms, query_module
            181, 182, 183, 184, 185, // getpmsg, putpmsg, afs_syscall, tuxcall, security
            205, 211, // set_thread_area, get_thread_area: of i386
            214, 215, 236, // epoll_ctl_old, epoll_wait_old, vserver
        ];
        let asynchronous = (206..=210).chain([333]);
        let gap = 337..=423; // Numbers of other architectures.
        let left_to_fall_back = [435, 457, 458, 459, 460, 461, 470];
        let mut expected: Vec<i64> = names_without_a_call
            .into_iter()
            .chain(asynchronous)
            .chain(gap)
            .chain(left_to_fall_back)
            .collect();
        expected.sort_unstable();
        let known = 0..=LAST_KNOWN;
        assert_eq!(known.filter(unknown).collect::<Vec<_>>(), expected);
        assert!((LAST_KNOWN + 1..1000).all(|call| unknown(&call)));
        assert!((X32..X32 + 1000).all(|call| unknown(&call)));
    }

    #[test]
    fn what_a_call_gets_can_depend_on_its_arguments() {
        let filter = filter();
        let check = |call, arguments: &[i64], expected| {
            let mut all = NONE;
            for (to, from) in all.iter_mut().zip(arguments) {
                *to = from.cast_unsigned();
            }
            assert_eq!(answer(&filter, call, all), expected, "{call} {arguments:?}");
        };
        let (unix, inet, inet6, netlink, packet, vsock) = (1, 2, 10, 16, 17, 40);
        for call in [libc::SYS_socket, libc::SYS_socketpair] {
            for (family, protocol, expected) in [
                (unix, 0, 0),
                (inet, 0, 0),
                (inet, 6, 0),
                (inet6, 58, 0),
                (inet, 132, libc::EPROTONOSUPPORT), // SCTP
                (inet, 262, libc::EPROTONOSUPPORT), // MPTCP
                (netlink, 0, 0),
                (netlink, 9, libc::EPROTONOSUPPORT),  // audit
                (netlink, 15, libc::EPROTONOSUPPORT), // uevent
                (packet, 3, libc::EPERM),
                (vsock, 0, libc::EPERM),
                // The kernel looks at 32 bits only.
                (vsock | 1 << 32, 0, libc::EPERM),
                (inet | 1 << 32, 0, 0),
            ] {
                check(call, &[family, 1, protocol], expected);
            }
            let flags = i64::from(libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK);
            for kind in 1..=6 {
                check(call, &[inet, kind | flags, 0], 0);
            }
            let packets = 10;
            check(call, &[inet, packets, 0], libc::EPERM);
            check(call, &[inet6, packets | flags, 6], libc::EPERM);
        }
        let thread = libc::CLONE_VM | libc::CLONE_THREAD | libc::CLONE_SIGHAND;
        check(libc::SYS_clone, &[thread.into()], 0);
        check(libc::SYS_clone, &[libc::SIGCHLD.into()], 0);
        for kind in [libc::CLONE_NEWUSER, libc::CLONE_NEWNET, libc::CLONE_NEWNS] {
            check(libc::SYS_clone, &[(kind | thread).into()], libc::EPERM);
        }
        check(libc::SYS_ioctl, &[0, 0x5401], 0); // TCGETS
        check(libc::SYS_ioctl, &[0, 0x5412], libc::EPERM);
        check(libc::SYS_ioctl, &[0, 0x5412 | 1 << 32], libc::EPERM);
        for (persona, expected) in [
            (0, 0),
            (0xffff_ffff, 0),
            (0x0004_0000, 0),
            (0x0040_0000, libc::EPERM), // READ_IMPLIES_EXEC
            (6, libc::EPERM),           // PER_BSD
        ] {
            check(libc::SYS_personality, &[persona], expected);
        }
        let (mine, first, core, files, pointer, far) = (0, 1, 4, 7, 0x1000, 1 << 32);
        for (arguments, expected) in [
            ([mine, files, 0, pointer], 0),
            ([mine, files, pointer, pointer], 0),
            ([first, files, 0, pointer], 0),
            ([first, files, pointer, 0], libc::EPERM),
            ([first, files, far, 0], libc::EPERM),
            ([mine, core, 0, pointer], 0),
            ([mine, core, pointer, pointer], libc::EPERM),
        ] {
            check(libc::SYS_prlimit64, &arguments, expected);
        }
    }

    #[test]
    fn a_process_has_few_groups() {
        let filter = filter();
        for (count, expected) in [
            (0, 0),
            (64, 0),
            (65, libc::EINVAL),
            (u64::from(u32::MAX), libc::EINVAL),
            ((1 << 32) + 65, libc::EINVAL),
        ] {
            let arguments = [count, 0x1000, 0, 0, 0, 0];
            assert_eq!(
                answer(&filter, libc::SYS_setgroups, arguments),
                expected,
                "{count}"
            );
        }
    }

    #[test]
    fn no_socket_gets_a_program() {
        let filter = filter();
        for (level, option, expected) in [
            (1, 26, libc::ENOPROTOOPT),
            (1, 51, libc::ENOPROTOOPT),
            ((1 << 32) + 1, (1 << 32) + 26, libc::ENOPROTOOPT),
            (1, 9, 0),  // SO_KEEPALIVE
            (1, 27, 0), // SO_DETACH_FILTER
            (6, 26, 0), // one of TCP's
        ] {
            let arguments = [3, level, option, 0x1000, 16, 0];
            let error = answer(&filter, libc::SYS_setsockopt, arguments);
            assert_eq!(error, expected, "{level} {option}");
        }
    }

    #[test]
    fn nobody_says_when_pid_1_runs() {
        let filter = filter();
        let check = |call, kind, who, expected| {
            let error = answer(&filter, call, [kind, who, 0, 0, 0, 0]);
            assert_eq!(error, expected, "{call} {kind} {who}");
        };
        let far = 1 << 32;
        for call in OF_ONE_PROCESS {
            for (pid, expected) in [(0, 0), (2, 0), (1, libc::EPERM), (far | 1, libc::EPERM)] {
                check(call, pid, 0, expected);
            }
        }
        let kinds = [
            (libc::SYS_setpriority, [0, 1, 2]),
            (libc::SYS_ioprio_set, [1, 2, 3]),
        ];
        for (call, [process, group, user]) in kinds {
            for kind in [process, group] {
                check(call, kind, 0, 0);
                check(call, kind, 2, 0);
                check(call, kind, 1, libc::EPERM);
                check(call, kind | far, 1 | far, libc::EPERM);
            }
            for who in [0, 1, 1000] {
                check(call, user, who, libc::EPERM);
            }
        }
    }

    #[test]
    fn a_change_of_the_core_limit_succeeds_without_being_made() {
        let filter = filter();
        let success = libc::SECCOMP_RET_ERRNO;
        let run = |call, arguments| program::run(&filter, number(call), arguments);
        assert_eq!(run(calls::SETRLIMIT, [4, 0x1000, 0, 0, 0, 0]), success);
        assert_eq!(run(libc::SYS_prlimit64, [0, 4, 0x1000, 0, 0, 0]), success);
    }

    #[test]
    fn where_the_host_is_writable_no_call_makes_a_file_setuid() {
        let filter = no_setid();
        let creates = libc::O_CREAT.cast_unsigned().into();
        for (mode, expected) in [(0o755, 0), (0o4755, libc::EPERM), (0o2755, libc::EPERM)] {
            let open = |flags| [0, 0, flags, mode, 0, 0];
            assert_eq!(
                answer(&filter, libc::SYS_fchmod, [0, mode, 0, 0, 0, 0]),
                expected
            );
            assert_eq!(answer(&filter, libc::SYS_openat, open(creates)), expected);
            assert_eq!(answer(&filter, libc::SYS_openat, open(0)), 0);
        }
        assert_eq!(answer(&filter, libc::SYS_openat2, NONE), libc::ENOSYS);
    }
}
