//! From what was found to the answer.

use std::net::IpAddr;

use hickory_proto::op::{Message, ResponseCode};
use hickory_proto::rr::{RData, Record};

use super::Question;
use crate::net::address::{Scope, scope};
use crate::net::policy::{Rule, denied};

/// Fills the answer. Addresses that can't be reached anyway are left out, so that programs fail at
/// the name; the boundary is the proxy, which judges the address that is dialled.
pub(super) fn answer(question: Question, found: Result<Vec<Record>, ResponseCode>) -> Message {
    let name = question.name().clone();
    let mut answer = question.into_answer();
    let mut records = match found {
        Ok(records) => records,
        Err(code) => {
            answer.metadata.response_code = code;
            return answer;
        }
    };
    let had_addresses = records.iter().any(|record| address(record).is_some());
    records.retain(|record| match address(record).map(scope) {
        None | Some(Scope::Public) => true,
        Some(scope) => {
            const ANY_PORT: u16 = 0;
            denied(&name, ANY_PORT, Rule::NotPublic(scope));
            false
        }
    });
    let has_addresses = records.iter().any(|record| address(record).is_some());
    // Aliases that lead nowhere any more go too: "no such record".
    if has_addresses || !had_addresses {
        answer.add_answers(records);
    }
    answer
}

fn address(record: &Record) -> Option<IpAddr> {
    match &record.data {
        RData::A(address) => Some(address.0.into()),
        RData::AAAA(address) => Some(address.0.into()),
        _ => None,
    }
}

/// The message in at most `limit` bytes: truncated, if it does not fit, to what makes the program
/// ask again over TCP.
pub(super) fn encode(answer: &Message, limit: usize) -> Option<Vec<u8>> {
    let bytes = match answer.to_vec() {
        Ok(bytes) if bytes.len() <= limit => bytes,
        Ok(_) => answer.truncate().to_vec().ok()?,
        Err(error) => {
            tracing::debug!(%error, "a DNS answer can't be encoded");
            let (id, op_code) = (answer.metadata.id, answer.metadata.op_code);
            let failure = Message::error_msg(id, op_code, ResponseCode::ServFail);
            failure.to_vec().ok()?
        }
    };
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use hickory_proto::op::Query;
    use hickory_proto::rr::rdata::{A, CNAME, TXT};
    use hickory_proto::rr::{Name, RecordType};

    use super::super::{Plan, answer_plan};
    use super::*;

    fn name(text: &str) -> Name {
        Name::from_ascii(text).expect("a name")
    }

    fn question(record_type: RecordType) -> Question {
        let mut message = Message::query();
        message.add_query(Query::query(name("example.com."), record_type));
        match answer_plan(&message.to_vec().expect("a message")) {
            Plan::LookUp(question) => question,
            other => panic!("{other:?}"),
        }
    }

    fn a(address: [u8; 4]) -> Record {
        Record::from_rdata(name("www.example.com."), 60, RData::A(A(address.into())))
    }

    fn alias() -> Record {
        let target = RData::CNAME(CNAME(name("www.example.com.")));
        Record::from_rdata(name("example.com."), 60, target)
    }

    #[test]
    fn only_public_addresses_are_answered() {
        let found = vec![alias(), a([10, 0, 0, 1]), a([1, 2, 3, 4])];
        let answer = answer(question(RecordType::A), Ok(found));
        assert_eq!(answer.answers, [alias(), a([1, 2, 3, 4])]);
        assert_eq!(answer.metadata.response_code, ResponseCode::NoError);
    }

    #[test]
    fn a_name_with_private_addresses_only_has_none() {
        let found = vec![alias(), a([10, 0, 0, 1]), a([127, 0, 0, 1])];
        let answer = answer(question(RecordType::A), Ok(found));
        assert_eq!(answer.answers, []);
        assert_eq!(answer.metadata.response_code, ResponseCode::NoError);
    }

    #[test]
    fn failures_are_passed_on() {
        let answer = answer(question(RecordType::A), Err(ResponseCode::NXDomain));
        assert_eq!(answer.metadata.response_code, ResponseCode::NXDomain);
    }

    #[test]
    fn an_answer_that_does_not_fit_is_truncated() {
        let text = RData::TXT(TXT::new(vec!["x".repeat(200); 10]));
        let found = vec![Record::from_rdata(name("example.com."), 60, text)];
        let answer = answer(question(RecordType::TXT), Ok(found));
        let long = encode(&answer, 65535).expect("an answer");
        assert!(long.len() > 2000);
        let short = encode(&answer, 512).expect("an answer");
        assert!(short.len() <= 512);
        let short = Message::from_vec(&short).expect("a message");
        assert!(short.metadata.truncation);
        assert_eq!(short.queries.len(), 1);
    }
}
