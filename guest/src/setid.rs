//! Programs of a VM that can write to directories of the host make nothing setuid or setgid: the file
//! would be the host user's, and whoever runs it on the host would act as that user.
//!
//! It is a filter of the programs, not of PID 1, which opens files by a call that the filter can't look
//! into.

use std::sync::OnceLock;

use agentvm_guest::protocol::SockFilter;

static FILTER: OnceLock<Vec<libc::sock_filter>> = OnceLock::new();

/// From now on, for every program that is started. Once, at boot.
pub(crate) fn forbid(filter: &[SockFilter]) {
    let filter = filter.iter().map(|f| libc::sock_filter {
        code: f.code,
        jt: f.jt,
        jf: f.jf,
        k: f.k,
    });
    FILTER.get_or_init(|| filter.collect());
}

/// Whether a file must not get such permissions: neither does PID 1 give them to one that a program may
/// put in the place of another meanwhile.
pub(crate) fn forbids(mode: u32) -> bool {
    mode & (libc::S_ISUID | libc::S_ISGID) != 0 && FILTER.get().is_some()
}

/// To be called by a program's process before it execs. System calls only.
pub(crate) fn apply() -> Result<(), ()> {
    let Some(filter) = FILTER.get() else {
        return Ok(());
    };
    let program = libc::sock_fprog {
        len: u16::try_from(filter.len()).map_err(drop)?,
        filter: filter.as_ptr().cast_mut(),
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
    if result < 0 { Err(()) } else { Ok(()) }
}
