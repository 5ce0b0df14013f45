//! Integration tests, linked once.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod store;
mod vm;
