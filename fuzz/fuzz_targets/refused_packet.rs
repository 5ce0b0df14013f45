//! PID 1 hands out the log of what a VM's rules refuse, and may write to it what it likes: reading it
//! ends, and says no more than was written.

#![no_main]

use agentvm::net::log::parse;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let messages = parse(bytes);
    // A message has a header.
    assert!(messages.packets.len() <= bytes.len() / 16);
});
