//! The system calls that no process of a VM gets: what reaches the kernel's rarely used parts.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use agentvm_guest::protocol::SockFilter;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule,
};

/// Denied whatever the arguments. Mounts, namespaces and the like need capabilities that nobody in
/// the VM has; they are here so that a kernel bug in their early parts is out of reach too.
const DENIED: &[i64] = &[
    // Mounts and roots.
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_open_tree,
    libc::SYS_move_mount,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_quotactl,
    libc::SYS_quotactl_fd,
    libc::SYS_open_by_handle_at,
    libc::SYS_name_to_handle_at,
    libc::SYS_fanotify_init,
    // Namespaces.
    libc::SYS_setns,
    libc::SYS_unshare,
    // Programs in the kernel, tracing of the machine.
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_lookup_dcookie,
    libc::SYS_syslog,
    libc::SYS_acct,
    // Asynchronous calls that seccomp can't see.
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    // Keys are not namespaced.
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    // The machine itself.
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_reboot,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_clock_adjtime,
    libc::SYS_adjtimex,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_vhangup,
    libc::SYS_nfsservctl,
    libc::SYS_move_pages,
    libc::SYS_mbind,
    libc::SYS_set_mempolicy,
    libc::SYS_migrate_pages,
];

/// Denied on x86 only: they exist nowhere else.
#[cfg(target_arch = "x86_64")]
const DENIED_HERE: &[i64] = &[
    libc::SYS_iopl,
    libc::SYS_ioperm,
    libc::SYS_modify_ldt,
    libc::SYS_uselib,
    libc::SYS_ustat,
    libc::SYS_sysfs,
    libc::SYS__sysctl,
];
#[cfg(not(target_arch = "x86_64"))]
const DENIED_HERE: &[i64] = &[];

/// Socket families that ordinary programs use; every other one is denied.
const FAMILIES: [i32; 4] = [
    libc::AF_UNIX,
    libc::AF_INET,
    libc::AF_INET6,
    libc::AF_NETLINK,
];

/// `clone` flags that make namespaces. (`clone3` hides its flags from seccomp: nesting is also
/// forbidden by `/proc/sys/user/max_*_namespaces`.)
const NAMESPACE_FLAGS: [i32; 8] = [
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWNS,
    libc::CLONE_NEWPID,
    libc::CLONE_NEWNET,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWUTS,
    libc::CLONE_NEWCGROUP,
    libc::CLONE_NEWTIME,
];

/// Terminal injection: pushing bytes into the input of another program's terminal.
const IOCTLS: [u64; 2] = [libc::TIOCSTI, libc::TIOCLINUX];

/// The filter as the kernel takes it, compiled once.
pub(super) fn filter() -> Result<Vec<SockFilter>, String> {
    static FILTER: OnceLock<Result<Vec<SockFilter>, String>> = OnceLock::new();
    FILTER
        .get_or_init(|| compile().map_err(|error| error.to_string()))
        .clone()
}

/// Of programs in a VM that can write to directories of the host: what makes a file setuid or setgid.
/// `openat2` hides its mode from seccomp, and is as on a kernel without it.
pub(super) fn no_setid() -> Result<Vec<SockFilter>, String> {
    static FILTER: OnceLock<Result<Vec<SockFilter>, String>> = OnceLock::new();
    FILTER
        .get_or_init(|| compile_no_setid().map_err(|error| error.to_string()))
        .clone()
}

fn compile_no_setid() -> Result<Vec<SockFilter>, seccompiler::Error> {
    /// Not in `libc` for every C library.
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
    let has = |argument, bit: u32| {
        let (length, bit) = (SeccompCmpArgLen::Dword, u64::from(bit));
        SeccompCondition::new(argument, length, SeccompCmpOp::MaskedEq(bit), bit)
    };
    // The one bit of O_TMPFILE that is its own.
    let creates = [libc::O_CREAT, libc::O_TMPFILE & !libc::O_DIRECTORY];
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for bit in [libc::S_ISUID, libc::S_ISGID] {
        for (call, mode) in &modes {
            let rule = SeccompRule::new(vec![has(*mode, bit)?])?;
            rules.entry(*call).or_default().push(rule);
        }
        for (call, mode) in &creating {
            for flag in creates.map(i32::cast_unsigned) {
                let rule = SeccompRule::new(vec![has(*mode - 1, flag)?, has(*mode, bit)?])?;
                rules.entry(*call).or_default().push(rule);
            }
        }
    }
    let denied = SeccompAction::Errno(libc::EPERM.cast_unsigned());
    let arch = std::env::consts::ARCH.try_into()?;
    let program: BpfProgram =
        SeccompFilter::new(rules, SeccompAction::Allow, denied, arch)?.try_into()?;
    let openat2 = u32::try_from(libc::SYS_openat2).unwrap_or(u32::MAX);
    Ok(call_refused(openat2)
        .into_iter()
        .chain(program.into_iter().map(|f| SockFilter {
            code: f.code,
            jt: f.jt,
            jf: f.jf,
            k: f.k,
        }))
        .collect())
}

/// `ENOSYS` for one call.
fn call_refused(number: u32) -> [SockFilter; 3] {
    const LOAD_NUMBER: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS, offset 0: seccomp_data.nr
    const JUMP_IF_EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
    const RETURN: u16 = 0x06; // BPF_RET | BPF_K
    const ERRNO: u32 = 0x0005_0000; // SECCOMP_RET_ERRNO
    let instruction = |code, jt, jf, k| SockFilter { code, jt, jf, k };
    [
        instruction(LOAD_NUMBER, 0, 0, 0),
        instruction(JUMP_IF_EQUAL, 0, 1, number),
        instruction(RETURN, 0, 0, ERRNO | libc::ENOSYS.cast_unsigned()),
    ]
}

fn compile() -> Result<Vec<SockFilter>, seccompiler::Error> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = DENIED
        .iter()
        .chain(DENIED_HERE)
        .map(|call| (*call, Vec::new()))
        .collect();
    let mut conditional =
        |call: i64, conditions: Vec<SeccompCondition>| -> Result<(), seccompiler::Error> {
            rules
                .entry(call)
                .or_default()
                .push(SeccompRule::new(conditions)?);
            Ok(())
        };
    let dword = || SeccompCmpArgLen::Dword;
    // A pair is made like two sockets, for some families (TIPC) also connected like them.
    for call in [libc::SYS_socket, libc::SYS_socketpair] {
        let mut other_family = Vec::new();
        for family in FAMILIES {
            let family = u64::from(family.cast_unsigned());
            other_family.push(SeccompCondition::new(0, dword(), SeccompCmpOp::Ne, family)?);
        }
        conditional(call, other_family)?;
    }
    for flag in NAMESPACE_FLAGS {
        let flag = u64::from(flag.cast_unsigned());
        let has = SeccompCmpOp::MaskedEq(flag);
        conditional(
            libc::SYS_clone,
            vec![SeccompCondition::new(0, dword(), has, flag)?],
        )?;
    }
    for request in IOCTLS {
        let condition = SeccompCondition::new(1, dword(), SeccompCmpOp::Eq, request)?;
        conditional(libc::SYS_ioctl, vec![condition])?;
    }
    let denied = SeccompAction::Errno(libc::EPERM.cast_unsigned());
    let arch = std::env::consts::ARCH.try_into()?;
    // Other architectures' numbers are killed by seccompiler's own first instructions.
    let program: BpfProgram =
        SeccompFilter::new(rules, SeccompAction::Allow, denied, arch)?.try_into()?;
    Ok(x32_refused()
        .into_iter()
        .chain(program.into_iter().map(|f| SockFilter {
            code: f.code,
            jt: f.jt,
            jf: f.jf,
            k: f.k,
        }))
        .collect())
}

/// x32 calls carry the same architecture but other numbers: `ENOSYS`, as a kernel without x32 says.
fn x32_refused() -> Vec<SockFilter> {
    const X32_BIT: u32 = 0x4000_0000;
    const LOAD_NUMBER: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS, offset 0: seccomp_data.nr
    const JUMP_IF_GREATER_OR_EQUAL: u16 = 0x35; // BPF_JMP | BPF_JGE | BPF_K
    const RETURN: u16 = 0x06; // BPF_RET | BPF_K
    const ERRNO: u32 = 0x0005_0000; // SECCOMP_RET_ERRNO
    let instruction = |code, jt, jf, k| SockFilter { code, jt, jf, k };
    if cfg!(target_arch = "x86_64") {
        vec![
            instruction(LOAD_NUMBER, 0, 0, 0),
            instruction(JUMP_IF_GREATER_OR_EQUAL, 0, 1, X32_BIT),
            instruction(RETURN, 0, 0, ERRNO | libc::ENOSYS.cast_unsigned()),
        ]
    } else {
        Vec::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_filter_compiles_and_fits_the_kernel_limit() {
        let filter = filter().expect("a filter");
        assert!(filter.len() < 4096, "{} instructions", filter.len());
    }
}
