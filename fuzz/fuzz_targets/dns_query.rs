//! Programs of a VM send what they like to its resolver: an answer can be encoded, belongs to the
//! message, and only what is a plain question gets as far as the host's resolvers.

#![no_main]

use agentvm::net::dns::{Plan, answer_plan};
use hickory_proto::op::{Message, MessageType};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|message: &[u8]| {
    match answer_plan(message) {
        Plan::Ignore => {}
        Plan::Answer(answer) => {
            assert_eq!(answer.metadata.message_type, MessageType::Response);
            assert_eq!(answer.metadata.id.to_be_bytes(), message[..2]);
            let encoded = answer.to_vec().expect("an answer can be encoded");
            Message::from_vec(&encoded).expect("an answer can be decoded");
        }
        Plan::LookUp(question) => {
            assert!(question.name().is_fqdn(), "the host's search domains apply");
            let asked = Message::from_vec(message).expect("a question");
            assert_eq!(asked.queries.len(), 1);
            assert_eq!(asked.metadata.message_type, MessageType::Query);
        }
    }
});
