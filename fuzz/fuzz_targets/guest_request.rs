//! What PID 1 reads: decoding it never panics, and what decodes is what its encoding decodes to. Only
//! the host writes it, but a PID 1 that panics takes its VM with it.

#![no_main]

use agentvm_guest::protocol::{Request, decode, encode};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|packet: &[u8]| {
    if let Some(request) = decode::<Request>(packet) {
        let again =
            encode(&request).and_then(|bytes| decode::<Request>(&bytes).map(|r| format!("{r:?}")));
        assert_eq!(again, Some(format!("{request:?}")));
    }
});
