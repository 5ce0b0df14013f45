//! The first bytes of a connection: whether they begin TLS, and for which server.

use rustls::server::Acceptor;

/// Longer greetings than this do not exist: one with the keys of today has 2 KiB.
const MAX_HELLO: usize = 32 * 1024;

/// First byte of a TLS record that carries a handshake (RFC 8446, section 5.1).
const HANDSHAKE: u8 = 0x16;

/// Those of the other records.
const OTHER_RECORDS: [u8; 4] = [0x14, 0x15, 0x17, 0x18];

/// First byte of the version that every record and every hello has.
const MAJOR_VERSION: u8 = 3;

/// Bytes that tell what they begin.
const START: usize = 4;

/// What the bytes so far are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Inspection {
    /// More are needed.
    Incomplete,
    /// The beginning of something else.
    NotTls,
    /// They begin like TLS, and are no `ClientHello` that rustls can read. Servers may: some pass over an
    /// alert before it, or take one in the form of SSL 2.
    Malformed,
    Tls(ClientHello),
}

/// What the first bytes of a connection are, if they are no handshake; `None`: a handshake.
fn other(start: &[u8]) -> Option<Inspection> {
    let is_ssl2 = |first: u8| first & 0x80 != 0;
    Some(match start {
        [] => Inspection::Incomplete,
        [HANDSHAKE, ..] => return None,
        [first] if OTHER_RECORDS.contains(first) => Inspection::Incomplete,
        [first, MAJOR_VERSION, ..] if OTHER_RECORDS.contains(first) => Inspection::Malformed,
        // A length of two bytes, the kind of message (1: a client's hello) and its version.
        [first] | [first, _] | [first, _, 1] if is_ssl2(*first) => Inspection::Incomplete,
        [first, _, 1, MAJOR_VERSION, ..] if is_ssl2(*first) => Inspection::Malformed,
        _ => Inspection::NotTls,
    })
}

/// What a TLS client says first, as far as it matters where it goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientHello {
    /// In lower case, without a dot at its end. `None`: the hello names none, or an address.
    pub server_name: Option<String>,
    /// Application protocols that it offers, as ALPN names them, the dearest first.
    pub protocols: Vec<Vec<u8>>,
}

/// A greeting in the making: for bytes that come in pieces.
pub struct Hello {
    acceptor: Acceptor,
    /// As long as they could be many things.
    start: Vec<u8>,
    length: usize,
    outcome: Inspection,
}

impl Default for Hello {
    fn default() -> Self {
        Self {
            acceptor: Acceptor::default(),
            start: Vec::new(),
            length: 0,
            outcome: Inspection::Incomplete,
        }
    }
}

impl Hello {
    /// Takes the next bytes, which anybody may have sent.
    pub fn push(&mut self, mut bytes: &[u8]) -> &Inspection {
        if self.length == 0 && self.outcome == Inspection::Incomplete {
            self.start.extend(bytes.iter().take(START));
            if let Some(other) = other(&self.start) {
                self.outcome = other;
                return &self.outcome;
            }
        }
        while self.outcome == Inspection::Incomplete && !bytes.is_empty() {
            match self.acceptor.read_tls(&mut bytes) {
                Ok(read) if read > 0 => self.length += read,
                _ => self.outcome = Inspection::Malformed,
            }
            if self.outcome == Inspection::Incomplete {
                self.outcome = self.look();
            }
        }
        &self.outcome
    }

    fn look(&mut self) -> Inspection {
        match self.acceptor.accept() {
            Ok(Some(accepted)) => {
                let hello = accepted.client_hello();
                let server_name = hello.server_name().map(|name| {
                    let name = name.strip_suffix('.').unwrap_or(name);
                    name.to_ascii_lowercase()
                });
                let protocols = hello.alpn().into_iter().flatten();
                Inspection::Tls(ClientHello {
                    server_name,
                    protocols: protocols.map(<[u8]>::to_vec).collect(),
                })
            }
            Ok(None) if self.length <= MAX_HELLO => Inspection::Incomplete,
            Ok(None) | Err(_) => Inspection::Malformed,
        }
    }
}

/// What `bytes`, the first of a connection, are.
#[must_use]
pub fn inspect(bytes: &[u8]) -> Inspection {
    Hello::default().push(bytes).clone()
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::Arc;

    use rustls::pki_types::ServerName;
    use rustls::{ClientConfig, ClientConnection, RootCertStore};

    use super::*;

    /// What rustls's own client begins with.
    pub(crate) fn hello(server: &str) -> Vec<u8> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_root_certificates(RootCertStore::empty())
            .with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        let server = ServerName::try_from(server.to_owned()).expect("a name");
        let mut client = ClientConnection::new(Arc::new(config), server).expect("a client");
        let mut bytes = Vec::new();
        client.write_tls(&mut bytes).expect("a hello");
        bytes
    }

    fn tls(server_name: Option<&str>) -> Inspection {
        Inspection::Tls(ClientHello {
            server_name: server_name.map(str::to_owned),
            protocols: vec![b"h2".to_vec(), b"http/1.1".to_vec()],
        })
    }

    #[test]
    fn a_hello_names_its_server_in_lower_case_and_without_a_dot() {
        for name in ["api.example.com", "API.Example.COM", "api.example.com."] {
            assert_eq!(inspect(&hello(name)), tls(Some("api.example.com")));
        }
        assert_eq!(inspect(&hello("1.2.3.4")), tls(None));
    }

    #[test]
    fn pieces_are_what_they_are_together() {
        let bytes = hello("api.example.com");
        let mut pieces = Hello::default();
        let (last, others) = bytes.split_last().expect("bytes");
        for byte in others {
            assert_eq!(*pieces.push(&[*byte]), Inspection::Incomplete);
        }
        assert_eq!(*pieces.push(&[*last]), tls(Some("api.example.com")));
    }

    #[test]
    fn one_message_in_many_records_is_read() {
        let bytes = hello("api.example.com");
        let (header, message) = bytes.split_at(5);
        let records = message.chunks(50).flat_map(|part| {
            let length = u16::try_from(part.len()).expect("short").to_be_bytes();
            [&header[..3], &length, part].concat()
        });
        assert_eq!(
            inspect(&records.collect::<Vec<_>>()),
            tls(Some("api.example.com"))
        );
    }

    #[test]
    fn other_protocols_are_not_tls() {
        for bytes in [
            &b"GET / HTTP/1.1\r\n"[..],
            b"SSH-2.0-x\r\n",
            b"\0\0\0\x08\x04\xd2\x16\x2f",
        ] {
            assert_eq!(inspect(bytes), Inspection::NotTls);
        }
        assert_eq!(inspect(b""), Inspection::Incomplete);
    }

    #[test]
    fn what_servers_take_before_a_hello_or_for_one_is_no_other_protocol() {
        let alert = [
            &b"\x15\x03\x01\0\x02\x01\x70"[..],
            &hello("api.example.com"),
        ]
        .concat();
        assert_eq!(inspect(&alert), Inspection::Malformed);
        let ssl2 = b"\x80\x2e\x01\x03\x01\0\x15\0\0\0\x10";
        assert_eq!(inspect(ssl2), Inspection::Malformed);
        for bytes in [&alert[..], ssl2] {
            let mut pieces = Hello::default();
            let mut told = bytes.iter().map(|byte| pieces.push(&[*byte]).clone());
            let told = told.find(|told| *told != Inspection::Incomplete);
            assert_eq!(told, Some(Inspection::Malformed));
        }
        assert_eq!(inspect(b"\x15\x04"), Inspection::NotTls);
        assert_eq!(inspect(b"\x90\0\x01\0\x01"), Inspection::NotTls);
    }

    #[test]
    fn what_begins_like_tls_and_is_none_is_malformed() {
        let mut other_message = hello("api.example.com");
        other_message[5] = 2;
        assert_eq!(inspect(&other_message), Inspection::Malformed);
        assert_eq!(inspect(b"\x16GET / HTTP/1.1\r\n"), Inspection::Malformed);
    }

    #[test]
    fn a_hello_without_end_is_malformed() {
        // A message of 16 MiB, in records of 1 KiB.
        let mut hello = Hello::default();
        let first = [&[0x16, 3, 1, 4, 0, 1, 0xff, 0xff, 0xff][..], &[0; 1020]].concat();
        let next = [&[0x16, 3, 1, 4, 0][..], &[0; 1024]].concat();
        hello.push(&first);
        for _ in 0..64 {
            hello.push(&next);
        }
        assert_eq!(*hello.push(&next), Inspection::Malformed);
    }
}
