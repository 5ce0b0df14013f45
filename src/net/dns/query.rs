//! What a message to the resolver deserves.

use std::net::{Ipv4Addr, Ipv6Addr};

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};

use crate::net::address::{Scope, scope};

/// Least size of every DNS message, and most of an answer over UDP without EDNS (RFC 1035).
const HEADER_LEN: usize = 12;

/// Bytes of a question: its name has 255.
const LONGEST: usize = 4096;

const PLAIN_DATAGRAM: u16 = 512;

/// Most of an answer over UDP: more may be cut into fragments (RFC 9715).
const MAX_DATAGRAM: u16 = 1232;

/// How long `localhost` may be remembered, in seconds.
const LOCALHOST_TTL: u32 = 86400;

/// What to do with a message.
#[derive(Debug)]
pub enum Plan {
    /// Not a question at all.
    Ignore,
    /// The answer is known.
    Answer(Message),
    /// Ask the host's resolvers.
    LookUp(Question),
}

/// A question that the host's resolvers may be asked.
#[derive(Debug)]
pub struct Question {
    query: Query,
    /// Everything of the answer but what was found.
    answer: Message,
    max_datagram: u16,
}

impl Question {
    #[must_use]
    pub fn name(&self) -> &Name {
        &self.query.name
    }

    /// As rules have it: in lower case, without a dot at its end.
    pub(super) fn plain_name(&self) -> String {
        plain(self.name())
    }

    #[must_use]
    pub fn record_type(&self) -> RecordType {
        self.query.query_type
    }

    pub(super) fn asks_for_ipv6(&self) -> bool {
        self.record_type() == RecordType::AAAA
    }

    /// Bytes that an answer over UDP may have.
    pub(super) fn max_datagram(&self) -> usize {
        usize::from(self.max_datagram)
    }

    /// The answer, to be filled.
    pub(super) fn into_answer(self) -> Message {
        self.answer
    }
}

/// A name as rules have it. A dot in a label ends none: it is written as a number, as nothing in a rule
/// is (RFC 4343, section 2.1).
pub(super) fn plain(name: &Name) -> String {
    let mut text = String::new();
    for label in name {
        if !text.is_empty() {
            text.push('.');
        }
        for byte in label {
            match byte {
                b'.' | b'\\' => text.extend(format!("\\{byte:03}").chars()),
                byte if byte.is_ascii_graphic() => text.push(byte.to_ascii_lowercase().into()),
                byte => text.extend(format!("\\{byte:03}").chars()),
            }
        }
    }
    text
}

/// Decides what a message deserves. Looks at nothing but the message, which anybody may have sent.
#[must_use]
pub fn answer_plan(message: &[u8]) -> Plan {
    const RESPONSE_BIT: u8 = 0x80;
    let [id_high, id_low, flags, ..] = *message else {
        return Plan::Ignore;
    };
    if message.len() < HEADER_LEN || flags & RESPONSE_BIT != 0 {
        // Answering an answer could go on for ever.
        return Plan::Ignore;
    }
    let id = u16::from_be_bytes([id_high, id_low]);
    let asked = is_short(message).then(|| Message::from_vec(message).ok());
    let Some(asked) = asked.flatten() else {
        let op_code = OpCode::from_u8((flags >> 3) & 0xf);
        let error = Message::error_msg(id, op_code, ResponseCode::FormErr);
        return Plan::Answer(error);
    };
    plan(&asked)
}

/// Whether it has one question, and room for little else. A name may lead over as many pointers as there is room
/// for, so that many names take as long as the square of their length.
fn is_short(message: &[u8]) -> bool {
    let count = |at: usize| {
        let bytes = message.get(at..)?.first_chunk()?;
        Some(u16::from_be_bytes(*bytes))
    };
    // Questions, answers, authorities, and what is said beside: EDNS, a signature.
    let [questions, answers, authorities, others] = [4, 6, 8, 10].map(count);
    message.len() <= LONGEST
        && (questions, answers, authorities) == (Some(1), Some(0), Some(0))
        && others.is_some_and(|others| others <= 2)
}

fn plan(asked: &Message) -> Plan {
    let mut answer = Message::new(
        asked.metadata.id,
        MessageType::Response,
        asked.metadata.op_code,
    );
    answer.metadata.recursion_desired = asked.metadata.recursion_desired;
    answer.metadata.recursion_available = true;
    let refuse = |mut answer: Message, code| {
        answer.metadata.response_code = code;
        Plan::Answer(answer)
    };
    if asked.metadata.op_code != OpCode::Query {
        return refuse(answer, ResponseCode::NotImp);
    }
    let [query] = &asked.queries[..] else {
        return refuse(answer, ResponseCode::FormErr);
    };
    answer.add_query(query.clone());
    let max_datagram = asked.edns.as_ref().map_or(PLAIN_DATAGRAM, |edns| {
        let mut ours = Edns::new();
        ours.set_max_payload(MAX_DATAGRAM);
        answer.set_edns(ours);
        edns.max_payload().clamp(PLAIN_DATAGRAM, MAX_DATAGRAM)
    });
    if asked.edns.as_ref().is_some_and(|edns| edns.version() > 0) {
        return refuse(answer, ResponseCode::BADVERS);
    }
    if query.query_class != DNSClass::IN {
        return refuse(answer, ResponseCode::Refused);
    }
    if query.name.is_localhost() {
        return localhost(answer, query);
    }
    // Names of the host's own network are none of the VM's business.
    if points_inside(&query.name) {
        return refuse(answer, ResponseCode::NXDomain);
    }
    match query.query_type {
        RecordType::A
        | RecordType::AAAA
        | RecordType::CAA
        | RecordType::CNAME
        | RecordType::MX
        | RecordType::NAPTR
        | RecordType::NS
        | RecordType::PTR
        | RecordType::SOA
        | RecordType::SRV
        | RecordType::SSHFP
        | RecordType::TLSA
        | RecordType::TXT => {
            let mut query = query.clone();
            // Complete: the host's search domains do not apply.
            query.name.set_fqdn(true);
            Plan::LookUp(Question {
                query,
                answer,
                max_datagram,
            })
        }
        // "There is none": they carry addresses and keys that would bypass the name.
        RecordType::HTTPS | RecordType::SVCB => Plan::Answer(answer),
        _ => refuse(answer, ResponseCode::NotImp),
    }
}

/// `localhost` and everything below it are the VM itself (RFC 6761, section 6.3).
fn localhost(mut answer: Message, query: &Query) -> Plan {
    let data = match query.query_type {
        RecordType::A => Some(RData::A(A(Ipv4Addr::LOCALHOST))),
        RecordType::AAAA => Some(RData::AAAA(AAAA(Ipv6Addr::LOCALHOST))),
        _ => None,
    };
    if let Some(data) = data {
        answer.add_answer(Record::from_rdata(query.name.clone(), LOCALHOST_TTL, data));
    }
    Plan::Answer(answer)
}

/// Whether a name of the reverse tree stands for an address, or a network, that is not public: neither its first
/// address nor its last. (All addresses together are no such network.)
pub(super) fn points_inside(name: &Name) -> bool {
    name.parse_arpa_name().is_ok_and(|network| {
        let ends = [network.network(), network.broadcast()];
        network.prefix_len() > 0 && ends.iter().all(|end| scope(*end) != Scope::Public)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asking(name: &str, record_type: RecordType) -> Message {
        let mut message = Message::query();
        message.metadata.id = 7;
        let name = Name::from_ascii(name).expect("a name");
        message.add_query(Query::query(name, record_type));
        message
    }

    fn plan_of(message: &Message) -> Plan {
        answer_plan(&message.to_vec().expect("a message"))
    }

    #[test]
    fn what_is_more_than_a_question_is_not_read() {
        // Each word is a pointer to the one before it, and each six bytes are a question.
        let mut message = vec![0, 7, 1, 0, 0x2a, 0xa8, 0, 0, 0, 0, 0, 0];
        for at in (10_u16..0x3ffe).step_by(2) {
            message.extend((0xc000 | at).to_be_bytes());
        }
        message.resize(usize::from(u16::MAX), 0xfe);
        assert!(!is_short(&message));
        assert_eq!(code(&answer_plan(&message)), ResponseCode::FormErr);
        // The same as one long question.
        message[4..6].copy_from_slice(&[0, 1]);
        assert!(!is_short(&message));
        let plain = asking("a.test", RecordType::A).to_vec();
        assert!(is_short(&plain.expect("a message")));
    }

    fn code(plan: &Plan) -> ResponseCode {
        match plan {
            Plan::Answer(answer) => answer.metadata.response_code,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_dot_in_a_label_ends_none() {
        let name = |labels: &[&[u8]]| plain(&Name::from_labels(labels.to_vec()).expect("a name"));
        assert_eq!(name(&[b"www", b"Allowed", b"test"]), "www.allowed.test");
        assert_eq!(name(&[b"exfil.allowed", b"test"]), "exfil\\046allowed.test");
        assert_eq!(name(&[b"a\\", b"\xff b_c-*"]), "a\\092.\\255\\032b_c-*");
        assert_eq!(plain(&Name::root()), "");
    }

    #[test]
    fn a_plain_question_is_looked_up_as_a_complete_name() {
        let Plan::LookUp(question) = plan_of(&asking("example.com", RecordType::A)) else {
            panic!("not looked up")
        };
        assert_eq!(question.name().to_ascii(), "example.com.");
        assert_eq!(question.max_datagram(), 512);
        assert_eq!(question.into_answer().metadata.id, 7);
    }

    #[test]
    fn the_datagram_size_that_is_asked_for_is_kept_within_bounds() {
        for (asked, expected) in [(0, 512), (1000, 1000), (u16::MAX, 1232)] {
            let mut message = asking("example.com", RecordType::TXT);
            let mut edns = Edns::new();
            edns.set_max_payload(asked);
            message.set_edns(edns);
            let Plan::LookUp(question) = plan_of(&message) else {
                panic!("not looked up")
            };
            assert_eq!(question.max_datagram(), expected);
        }
    }

    #[test]
    fn what_is_no_question_is_ignored() {
        assert!(matches!(answer_plan(b""), Plan::Ignore));
        assert!(matches!(answer_plan(&[0; 11]), Plan::Ignore));
        let mut response = asking("example.com", RecordType::A);
        response.metadata.message_type = MessageType::Response;
        assert!(matches!(plan_of(&response), Plan::Ignore));
    }

    #[test]
    fn a_broken_question_is_a_format_error_with_its_id() {
        let mut broken = asking("example.com", RecordType::A)
            .to_vec()
            .expect("a message");
        broken.truncate(20);
        let Plan::Answer(answer) = answer_plan(&broken) else {
            panic!("no answer")
        };
        assert_eq!(answer.metadata.response_code, ResponseCode::FormErr);
        assert_eq!(answer.metadata.id, 7);
    }

    #[test]
    fn every_prefix_and_every_flipped_byte_of_a_question_has_a_plan() {
        let mut message = asking("a.very.long.name.example.com", RecordType::A);
        message.set_edns(Edns::new());
        let bytes = message.to_vec().expect("a message");
        for len in 0..bytes.len() {
            drop(answer_plan(&bytes[..len]));
        }
        for at in 0..bytes.len() {
            for value in 0..=u8::MAX {
                let mut changed = bytes.clone();
                changed[at] = value;
                drop(answer_plan(&changed));
            }
        }
    }

    #[test]
    fn two_questions_in_one_message_are_a_format_error() {
        let mut message = asking("example.com", RecordType::A);
        let name = Name::from_ascii("example.org").expect("a name");
        message.add_query(Query::query(name, RecordType::A));
        assert_eq!(code(&plan_of(&message)), ResponseCode::FormErr);
    }

    #[test]
    fn other_operations_classes_and_types_are_refused() {
        let mut update = asking("example.com", RecordType::A);
        update.metadata.op_code = OpCode::Notify;
        assert_eq!(code(&plan_of(&update)), ResponseCode::NotImp);
        let mut chaos = asking("version.bind", RecordType::TXT);
        chaos.queries[0].set_query_class(DNSClass::CH);
        assert_eq!(code(&plan_of(&chaos)), ResponseCode::Refused);
        for record_type in [
            RecordType::AXFR,
            RecordType::ANY,
            RecordType::Unknown(65000),
        ] {
            let plan = plan_of(&asking("example.com", record_type));
            assert_eq!(code(&plan), ResponseCode::NotImp, "{record_type}");
        }
    }

    #[test]
    fn there_are_no_https_records() {
        let Plan::Answer(answer) = plan_of(&asking("example.com", RecordType::HTTPS)) else {
            panic!("no answer")
        };
        assert_eq!(answer.metadata.response_code, ResponseCode::NoError);
        assert!(answer.answers.is_empty());
    }

    #[test]
    fn localhost_is_the_vm_itself() {
        for (name, record_type, expected) in [
            ("localhost", RecordType::A, Some("127.0.0.1")),
            ("app.LOCALHOST.", RecordType::AAAA, Some("::1")),
            ("localhost", RecordType::MX, None),
        ] {
            let Plan::Answer(answer) = plan_of(&asking(name, record_type)) else {
                panic!("no answer")
            };
            let found = answer.answers.first().map(|record| record.data.to_string());
            assert_eq!(found.as_deref(), expected, "{name}");
        }
    }

    #[test]
    fn names_of_addresses_that_are_not_public_do_not_exist() {
        for name in [
            "1.0.0.10.in-addr.arpa",
            "10.in-addr.arpa",
            "254.169.254.169.in-addr.arpa",
            "1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.d.f.ip6.arpa",
        ] {
            let plan = plan_of(&asking(name, RecordType::PTR));
            assert_eq!(code(&plan), ResponseCode::NXDomain, "{name}");
        }
        let public = plan_of(&asking("8.8.8.8.in-addr.arpa", RecordType::PTR));
        assert!(matches!(public, Plan::LookUp(_)), "{public:?}");
    }
}
