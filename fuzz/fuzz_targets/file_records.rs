//! What a VM's worker tells of files comes through a pipe that its programs might write to, one day: the
//! records never make their reader panic, nor hold more than the last chunk and one record.

#![no_main]

use agentvm_guest::protocol::files::{MAX_RECORD, Records, framed};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (u8, &[u8])| {
    let (size, bytes) = input;
    let mut whole = Records::default();
    whole.add(bytes);
    let mut cut = Records::default();
    let mut came = Vec::new();
    'cut: for chunk in bytes.chunks(usize::from(size) + 1) {
        cut.add(chunk);
        loop {
            match cut.next() {
                Ok(Some(record)) => came.push(record),
                Ok(None) => break,
                Err(_) => break 'cut,
            }
        }
    }
    // However it is cut, the same comes out.
    for record in came {
        assert_eq!(whole.next(), Ok(Some(record.clone())));
        assert!(framed(&record).is_some_and(|framed| framed.len() <= MAX_RECORD + 2));
    }
    assert!(!matches!(whole.next(), Ok(Some(_))));
});
