//! PID 1 of a VM.
//!
//! It builds the VM's root from inside fresh namespaces ([`boot`]), then serves the host over one
//! socket ([`serve`]): starts processes, signals them, opens files, reaps. Stdio and file contents
//! never pass through it, only descriptors do. When the host's end closes, it ends the VM.

mod boot;
mod capabilities;
mod control;
mod files;
mod mounts;
mod process;
mod serve;

use agentvm_guest::protocol::{CONTROL_FD, Reply, Request};

use crate::control::Control;

fn main() {
    // Anything else that is open belongs to nobody: the host closed its own before exec.
    let control = Control::inherited(CONTROL_FD);
    let Some((Request::Boot(spec), descriptors)) = control.receive() else {
        return; // The host died or gave up before the VM existed.
    };
    match boot::boot(&spec, descriptors) {
        Ok(booted) => {
            control.send(&Reply::Ready { net: booted.net }, &booted.sockets);
            drop(booted.sockets);
            // The lock goes last: whoever gets it next finds no process of this VM.
            serve::serve(&control);
            drop(booted.lock);
        }
        Err(failure) => control.send(
            &Reply::BootFailed {
                step: failure.step.into_bytes(),
                errno: failure.errno as i32,
            },
            &[],
        ),
    }
}
