//! Programs of a VM write what they like into requests to hosts of secrets, and to others: a value goes
//! where it is for and nowhere else, and nothing else of a request changes.

#![no_main]

use std::sync::LazyLock;

use agentvm::net::secrets::fuzzed::{HEADER, HOST, Head, MOST, QUERY, Replacing, VALUE};
use libfuzzer_sys::fuzz_target;

static REPLACING: LazyLock<Replacing> = LazyLock::new(|| Replacing::new().expect("randomness"));

fuzz_target!(|bytes: &[u8]| {
    // Who says the value has it already.
    let says = |text: &[u8]| {
        text.windows(8)
            .any(|part| VALUE.as_bytes().starts_with(part))
    };
    let mut lines = bytes.split(|byte| *byte == b'\n');
    let target = lines.next().unwrap_or_default();
    let headers: Vec<_> = lines
        .filter_map(|line| {
            let at = line.iter().position(|byte| *byte == b':')?;
            Some((&line[..at], &line[at + 1..]))
        })
        .collect();
    if says(bytes) {
        return;
    }
    let length = |(target, headers): &Head| {
        target.len()
            + headers
                .iter()
                .map(|(name, value)| name.len() + value.len())
                .sum::<usize>()
    };
    let Some(elsewhere) = REPLACING.sent_to("b.example", target, &headers) else {
        return;
    };
    let Some(sent) = REPLACING.sent_to(HOST, target, &headers) else {
        return; // More values than there is room for.
    };
    // Base64 takes a third more, percent signs thrice as much.
    assert!(length(&sent) <= length(&elsewhere) + 3 * MOST);
    assert_eq!(sent.1.len(), elsewhere.1.len());
    for ((name, value), (_, before)) in sent.1.iter().zip(&elsewhere.1) {
        assert!(!says(before));
        assert!(name == HEADER || value == before, "{name}");
    }
    if sent.0 != elsewhere.0 {
        assert!(elsewhere.0.contains(&format!("{QUERY}=")) || elsewhere.0.contains('%'));
    }
});
