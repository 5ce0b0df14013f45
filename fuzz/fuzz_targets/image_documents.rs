//! A registry sends any JSON for an index, a manifest or a configuration: what is asked for next is named
//! by a digest and by nothing that could be a path or part of an address.

#![no_main]

use agentvm::images::fuzzed::documents;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &[u8]| {
    for digest in documents(text) {
        let hex = digest.strip_prefix("sha256:").expect("a digest");
        assert_eq!(hex.len(), 64);
        assert!(
            hex.bytes()
                .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
        );
    }
});
