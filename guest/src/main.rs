//! PID 1 of a VM.
//!
//! It builds the VM's root from inside fresh namespaces ([`boot`]), then serves the host over one
//! socket ([`serve`]): starts processes, signals them, opens files, reaps. Stdio and file contents
//! never pass through it, only descriptors do. When the host's end closes, it ends the VM.

#![cfg_attr(not(test), no_main)]

mod boot;
mod capabilities;
mod control;
mod copy;
mod ending;
mod files;
mod fork_bomb;
mod host_mounts;
mod image;
mod landlock;
mod limits;
mod mounts;
mod ports;
mod process;
mod processes;
mod serve;
mod setid;
mod spared;
mod terminal;
mod tree;
mod watch;
mod worker;

use std::ffi::c_int;

use agentvm_guest::protocol::{CONTROL_FD, Reply, Request};
use nix::errno::Errno;

use crate::control::Control;

/// Called by the C library, not by Rust's runtime. What that prepares is for programs with threads,
/// panics and a terminal, and looking for the end of the stack in `/proc/self/maps` alone takes a
/// fifth of a millisecond of every boot.
// SAFETY: no other symbol of this program is called main.
#[cfg_attr(not(test), unsafe(no_mangle))]
extern "C" fn main() -> c_int {
    default_signals();
    // Anything else that is open belongs to nobody: the host closed its own before exec.
    let control = Control::inherited(CONTROL_FD);
    let Some((Request::Boot(spec), descriptors)) = control.receive() else {
        return 0; // The host died or gave up before the VM existed.
    };
    match boot::boot(&spec, descriptors) {
        Ok(booted) => {
            let ready = Reply::Ready { net: booted.net };
            match control.hand_out(&ready, &booted.sockets) {
                Ok(()) => {
                    // Before anything of the VM runs: nobody in it can later let the host wait for them,
                    // as who shares a socket could (`O_NONBLOCK`, `SO_LINGER`).
                    drop(booted.sockets);
                    // The lock goes last: whoever gets it next finds no process of this VM.
                    serve::serve(&control);
                }
                Err(errno) => fail(&control, "hand out sockets", errno),
            }
            drop(booted.lock);
        }
        Err(failure) => fail(&control, &failure.step, failure.errno),
    }
    0
}

fn fail(control: &Control, step: &str, errno: Errno) {
    control.send(&Reply::BootFailed {
        step: step.as_bytes().to_vec(),
        errno: errno as i32,
    });
}

/// What the host process ignores (under nohup, say) is not to be ignored in the VM; and with SIGCHLD
/// ignored the kernel would reap for us and tell nobody.
fn default_signals() {
    /// `struct sigaction` as the kernel has it, all zero: `SIG_DFL`, no flags, an empty mask.
    const DEFAULT: [u64; 4] = [0; 4];
    for signal in 1..=64 {
        // The raw call: libc keeps two signals to itself. SIGKILL and SIGSTOP refuse, as they may.
        // SAFETY: the kernel reads 32 bytes, and writes nothing with a null pointer.
        unsafe {
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                DEFAULT.as_ptr(),
                std::ptr::null_mut::<u64>(),
                size_of::<u64>(),
            );
        }
    }
}
