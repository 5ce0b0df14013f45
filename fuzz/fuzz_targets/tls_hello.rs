//! Programs of a VM begin connections with what they like: pieces are judged as the whole is, and what
//! is no handshake is never taken for one.

#![no_main]

use agentvm::net::hello::{ClientHello, Hello, Inspection, inspect};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let whole = inspect(bytes);
    match &whole {
        Inspection::NotTls => assert_ne!(bytes[0], 0x16),
        Inspection::Malformed => assert!((0x14..0x19).contains(&bytes[0]) || bytes[0] >= 0x80),
        Inspection::Tls(ClientHello { server_name, .. }) => {
            assert_eq!(bytes[0], 0x16);
            if let Some(name) = server_name {
                assert_eq!(*name, name.to_ascii_lowercase());
                assert!(!name.is_empty() && !name.contains('\0'));
            }
        }
        Inspection::Incomplete => {}
    }
    let mut pieces = Hello::default();
    for piece in bytes.chunks(7) {
        pieces.push(piece);
    }
    // A hello is judged as soon as it is complete: what follows in the same read may make it invalid,
    // and never gives it another name.
    let (again, whole) = (pieces.push(&[]), &whole);
    if let (Inspection::Tls(_), Inspection::Tls(_)) = (again, whole) {
        assert_eq!(again, whole);
    }
    if *whole == Inspection::Incomplete {
        assert_eq!(again, whole);
    }
});
