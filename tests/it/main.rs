//! Integration tests, linked once.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod agents;
mod child;
mod death;
mod doctor;
mod exhaustion;
mod faults;
mod isolation;
mod limits;
mod net;
mod session;
mod store;
mod unsupported;
mod vm;
#[cfg(feature = "weaken")]
mod weakened;
