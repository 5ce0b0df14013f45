//! The messages between the host process and PID 1 of a VM.
//!
//! They travel over one `SOCK_SEQPACKET` socket pair as [`postcard`] bytes with descriptors as
//! ancillary data. The host trusts nothing that comes out of the VM: every
//! [`protocol::Reply`] is bounded and its descriptors are checked by `fstat` before use.

pub mod foreground;
pub mod mountinfo;
pub mod net;
pub mod protocol;
