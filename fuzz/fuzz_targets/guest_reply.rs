//! What PID 1 of a VM sends is written by a process that the host does not trust: decoding it never
//! panics, and what decodes is what its encoding decodes to.

#![no_main]

use agentvm_guest::protocol::{Reply, decode, encode};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|packet: &[u8]| {
    if let Some(reply) = decode::<Reply>(packet) {
        let again =
            encode(&reply).and_then(|bytes| decode::<Reply>(&bytes).map(|r| format!("{r:?}")));
        assert_eq!(again, Some(format!("{reply:?}")));
    }
});
