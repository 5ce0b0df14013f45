//! Integration tests, linked once.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod agents;
mod net;
mod store;
mod vm;
