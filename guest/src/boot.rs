//! From fresh namespaces to a VM: one visible list of named steps.

use std::fs;
use std::os::fd::OwnedFd;

use agentvm_guest::net::{self, NetConfig};
use agentvm_guest::protocol::{BootSpec, NetState, Rlimit, SockFilter, USER_ID};
use nix::errno::Errno;

use crate::{capabilities, host_mounts, landlock, limits, mounts, setid};

/// Which step failed, and how.
pub(crate) struct Failure {
    pub(crate) step: String,
    pub(crate) errno: Errno,
}

pub(crate) struct Booted {
    pub(crate) net: NetState,
    /// The network's sockets, for the host.
    pub(crate) sockets: Vec<OwnedFd>,
    /// The VM's lock, to be held until nothing of the VM is left.
    pub(crate) lock: OwnedFd,
}

/// Every kind of namespace that a VM must not nest: a user namespace would hand a process all
/// capabilities over new mounts and sockets, which is most of the kernel's attack surface.
const NESTED_NAMESPACES: [&str; 8] = ["user", "mnt", "pid", "net", "ipc", "uts", "cgroup", "time"];

pub(crate) fn boot(spec: &BootSpec, descriptors: Vec<OwnedFd>) -> Result<Booted, Failure> {
    let mut descriptors = descriptors.into_iter();
    let lock = descriptors.next().ok_or_else(|| Failure {
        step: "receive the lock".to_owned(),
        errno: Errno::EBADF,
    })?;
    let trees: Vec<OwnedFd> = descriptors.collect();

    // The id maps are written by now: act as an id of the VM, no longer as 'overflow'.
    step("become the VM's first process", || {
        let real_uid = spec.real_uid;
        become_first(real_uid.map(|uid| if spec.has("real uid") { uid } else { 0 }))
    })?;
    // Of which the host has made this process a member meanwhile.
    layer(spec, "see its own cgroup as the root", || {
        // SAFETY: integers.
        Errno::result(unsafe { libc::unshare(libc::CLONE_NEWCGROUP) }).map(drop)
    })?;
    step("sethostname", || set_hostname(&spec.hostname))?;
    // Mounts first: they need the host's root to still be there.
    step("make mounts private", mounts::make_private)?;
    let mut table = host_mounts::mount_table().map_err(|errno| Failure {
        step: "open the table of mounts".to_owned(),
        errno,
    })?;
    step("mount the new root", mounts::enter_new_root)?;
    for node in &spec.root {
        mounts::make(node, &trees, &mut table)?;
    }
    drop(table);
    drop(trees);
    step("pivot_root", mounts::leave_old_root)?;
    #[cfg(feature = "weaken")]
    for (name, attribute) in [
        ("nosuid", libc::MOUNT_ATTR_NOSUID),
        ("nodev", libc::MOUNT_ATTR_NODEV),
    ] {
        if !spec.has(name) {
            step(name, || mounts::take_from_home(attribute))?;
        }
    }
    // These need /proc/sys while it is still writable.
    let (net, sockets) = configure_network(&spec.net);
    layer(spec, "forbid nested namespaces", forbid_nested_namespaces)?;
    step("limit what is counted per user", || {
        limits::write_sysctls(&spec.limits)
    })?;
    layer(spec, "mask /proc", mounts::mask_proc)?;
    if !spec.writable_root {
        step("seal the root", mounts::seal_root)?;
    }
    layer(spec, "setrlimit", || limits::set(&spec.limits))?;
    // From here on nothing can be mounted or configured any more.
    let setid = spec.program_seccomp.is_empty();
    layer(spec, "drop capabilities", || {
        capabilities::keep(spec.real_uid.is_some(), setid)
    })?;
    layer(spec, "no_new_privs", nix::sys::prctl::set_no_new_privs)?;
    layer(spec, "landlock", landlock::restrict)?;
    layer(spec, "seccomp", || install_seccomp(&spec.seccomp))?;
    if !setid {
        setid::forbid(&spec.program_seccomp);
    }
    // After the last change of credentials, which would undo it.
    step("become undumpable", become_undumpable)?;
    Ok(Booted { net, sockets, lock })
}

fn step(name: &str, run: impl FnOnce() -> nix::Result<()>) -> Result<(), Failure> {
    run().map_err(|errno| Failure {
        step: name.to_owned(),
        errno,
    })
}

/// A step that nothing but the isolation needs.
fn layer(
    spec: &BootSpec,
    name: &str,
    run: impl FnOnce() -> nix::Result<()>,
) -> Result<(), Failure> {
    if spec.has(name) {
        step(name, run)
    } else {
        Ok(())
    }
}

/// What the kernel counts for a real uid it counts over all VMs, whose ids are the same: descriptors that
/// are on their way through sockets, for one. PID 1 has a real uid of its own, so that no other VM's root
/// can use up what PID 1 needs to hand out a descriptor.
fn become_first(real_uid: Option<u32>) -> nix::Result<()> {
    let id = if real_uid.is_some() { 0 } else { USER_ID };
    let (real, uid, gid) = (real_uid.unwrap_or(id).into(), id.into(), id.into());
    if real_uid.is_some() {
        nix::unistd::setgroups(&[])?;
    }
    nix::unistd::setresgid(gid, gid, gid)?;
    capabilities::across_uid_change(|| nix::unistd::setresuid(real, uid, uid))?;
    // Otherwise its name would be the number of the descriptor that it was exec'ed from.
    nix::sys::prctl::set_name(c"agentvm-guest")?;
    // A session of its own: Ctrl-C in the terminal of the host process is not for the agents.
    nix::unistd::setsid()?;
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
    Ok(())
}

fn set_hostname(name: &[u8]) -> nix::Result<()> {
    // SAFETY: sethostname reads `len` bytes from the pointer.
    Errno::result(unsafe { libc::sethostname(name.as_ptr().cast(), name.len()) }).map(drop)
}

fn forbid_nested_namespaces() -> nix::Result<()> {
    for kind in NESTED_NAMESPACES {
        let path = format!("/proc/sys/user/max_{kind}_namespaces");
        match fs::write(&path, "0") {
            Ok(()) => {}
            // Kernels without this kind of namespace have nothing to forbid.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(errno_of(&error)),
        }
    }
    Ok(())
}

/// A kernel without what the redirect needs gives a VM without a network, and says why.
fn configure_network(config: &NetConfig) -> (NetState, Vec<OwnedFd>) {
    match net::configure(config) {
        Ok(sockets) => {
            let mut descriptors = vec![
                sockets.tcp4,
                sockets.dns_udp,
                sockets.dns_tcp,
                sockets.rules,
            ];
            let (v6, log) = (sockets.tcp6.is_some(), sockets.log.is_some());
            descriptors.extend(sockets.tcp6);
            descriptors.extend(sockets.log);
            (NetState::Up { v6, log }, descriptors)
        }
        Err((step, errno)) => {
            let down = NetState::Down {
                step: step.as_bytes().to_vec(),
                errno: errno as i32,
            };
            (down, Vec::new())
        }
    }
}

pub(crate) fn set_rlimit(limit: &Rlimit) -> nix::Result<()> {
    let value = libc::rlimit {
        rlim_cur: limit.soft,
        rlim_max: limit.hard,
    };
    // SAFETY: setrlimit reads the struct.
    Errno::result(unsafe { libc::setrlimit(limit.resource, &raw const value) }).map(drop)
}

fn install_seccomp(filter: &[SockFilter]) -> nix::Result<()> {
    let mut filter: Vec<libc::sock_filter> = filter
        .iter()
        .map(|f| libc::sock_filter {
            code: f.code,
            jt: f.jt,
            jf: f.jf,
            k: f.k,
        })
        .collect();
    let program = libc::sock_fprog {
        len: u16::try_from(filter.len()).map_err(|_| Errno::E2BIG)?,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: the kernel copies the program, which outlives the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            0,
            &raw const program,
        )
    };
    Errno::result(result).map(drop)
}

/// Processes of the VM share an id with PID 1 where only one id is mapped: none may trace it or read
/// its memory. The kernel forgets it at each change of credentials (`commit_creds`), so that it is done
/// again after each.
pub(crate) fn become_undumpable() -> nix::Result<()> {
    nix::sys::prctl::set_dumpable(false)
}

pub(crate) fn errno_of(error: &std::io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))
}
