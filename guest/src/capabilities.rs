//! Capabilities of PID 1 and of what it starts.

use nix::errno::Errno;

/// What the VM's root keeps: what dpkg, apt and chown need, nothing that reaches the kernel.
/// `user` has none. Numbers of `linux/capability.h`.
const ROOT: [u32; 8] = [
    0, // CHOWN
    1, // DAC_OVERRIDE
    3, // FOWNER
    FSETID, 5,  // KILL
    6,  // SETGID
    7,  // SETUID
    10, // NET_BIND_SERVICE
];

/// [`ROOT`] as bits.
const ROOT_MASK: u64 = {
    let mut mask = 0;
    let mut i = 0;
    while i < ROOT.len() {
        mask |= 1 << ROOT[i];
        i += 1;
    }
    mask
};

const LAST_CAPABILITY: u32 = 63;
const VERSION_3: u32 = 0x2008_0522;

#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Data {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Sets this process's effective, permitted and inheritable sets.
fn set(effective: u64, permitted: u64) -> nix::Result<()> {
    let header = Header {
        version: VERSION_3,
        pid: 0,
    };
    let half = |shift: u32| Data {
        effective: low(effective >> shift),
        permitted: low(permitted >> shift),
        inheritable: 0,
    };
    let data = [half(0), half(32)];
    // SAFETY: version 3 takes one header and two data structs; both outlive the call.
    let result = unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) };
    Errno::result(result).map(drop)
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "the half is what is wanted"
)]
const fn low(bits: u64) -> u32 {
    bits as u32
}

/// With it, a program of somebody else that root writes to stays setuid.
const FSETID: u32 = 4;

/// Reduces PID 1, for good, to what it needs from now on. Without a mapped root that is nothing.
/// `setid`: whether root may have a part in files that are setuid.
pub(crate) fn keep(root_mapped: bool, setid: bool) -> nix::Result<()> {
    let kept = match (root_mapped, setid) {
        (true, true) => ROOT_MASK,
        (true, false) => ROOT_MASK & !(1 << FSETID),
        (false, _) => 0,
    };
    for capability in 0..=LAST_CAPABILITY {
        if kept & (1 << capability) != 0 {
            continue;
        }
        // SAFETY: prctl with integers. EINVAL: a number beyond the kernel's last capability.
        let result = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
        match Errno::result(result) {
            Ok(_) | Err(Errno::EINVAL) => {}
            Err(errno) => return Err(errno),
        }
    }
    // SAFETY: prctl with integers.
    let result = unsafe {
        libc::prctl(
            libc::PR_CAP_AMBIENT,
            libc::PR_CAP_AMBIENT_CLEAR_ALL,
            0,
            0,
            0,
        )
    };
    Errno::result(result)?;
    set(kept, kept)
}

/// Changes the uid from 'not mapped' to one of the VM without losing capabilities on the way.
pub(crate) fn across_uid_change(change: impl FnOnce() -> nix::Result<()>) -> nix::Result<()> {
    // SAFETY: prctl with integers.
    Errno::result(unsafe { libc::prctl(libc::PR_SET_KEEPCAPS, 1, 0, 0, 0) })?;
    change()?;
    // SAFETY: prctl with integers.
    Errno::result(unsafe { libc::prctl(libc::PR_SET_KEEPCAPS, 0, 0, 0, 0) })?;
    // KEEPCAPS saves the permitted set only; raise it again as far as the kernel knows capabilities.
    let all = known();
    set(all, all)
}

/// All capabilities that this kernel knows.
fn known() -> u64 {
    let mut all = 0;
    for capability in 0..=LAST_CAPABILITY {
        // SAFETY: prctl with integers; an unknown number is answered by EINVAL.
        if unsafe { libc::prctl(libc::PR_CAPBSET_READ, capability, 0, 0, 0) } == 1 {
            all |= 1 << capability;
        }
    }
    all
}
