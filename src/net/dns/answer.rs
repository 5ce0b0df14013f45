//! From what was found to the answer.

use std::net::IpAddr;

use hickory_proto::op::{Message, ResponseCode};
use hickory_proto::rr::{RData, Record};

use super::Question;
use super::query::{plain, points_inside};
use crate::net::names::MAX_TTL;
use crate::net::policy::{Policy, Reason};

/// Fills the answer. Addresses that can't be reached anyway are left out, so that programs fail at
/// the name; the boundary is the proxy, which judges the address that is dialled. Says as well why
/// something was left out.
pub(super) fn answer(
    question: Question,
    found: Result<Vec<Record>, ResponseCode>,
    policy: &Policy,
) -> (Message, Option<Reason>) {
    let mut records = match found {
        Ok(records) => records,
        Err(code) => {
            let mut answer = question.into_answer();
            answer.metadata.response_code = code;
            return (answer, None);
        }
    };
    let aliases = records.iter().filter_map(|record| match &record.data {
        RData::CNAME(target) => Some(&target.0),
        _ => None,
    });
    // What must not be asked for is not reached by a name that leads to it.
    let denied = |target| policy.denied_alias(&plain(target));
    if let Some(reason) = aliases.clone().find_map(denied) {
        return (refuse(question), Some(reason));
    }
    if aliases.clone().any(points_inside) {
        let mut answer = question.into_answer();
        answer.metadata.response_code = ResponseCode::NXDomain;
        return (answer, None);
    }
    let mut answer = question.into_answer();
    let mut refused = None;
    let had_addresses = records.iter().any(|record| address(record).is_some());
    records.retain(|record| {
        let denied = address(record).and_then(|address| policy.denied_answer(address));
        let is_fine = denied.is_none();
        refused = refused.take().or(denied);
        is_fine
    });
    for record in &mut records {
        record.ttl = record.ttl.min(MAX_TTL);
    }
    let has_addresses = records.iter().any(|record| address(record).is_some());
    // Aliases that lead nowhere any more go too: "no such record".
    if has_addresses || !had_addresses {
        answer.add_answers(records);
    }
    (answer, refused)
}

/// The answer to who must not ask.
pub(super) fn refuse(question: Question) -> Message {
    let mut answer = question.into_answer();
    answer.metadata.response_code = ResponseCode::Refused;
    answer
}

/// The addresses that an answer gives out, with how long they may be remembered.
pub(super) fn addresses(answer: &Message) -> impl Iterator<Item = (IpAddr, u32)> {
    let records = answer.answers.iter();
    records.filter_map(|record| Some((address(record)?, record.ttl)))
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
    use crate::net::address::Scope;
    use crate::net::policy::{Otherwise, Rule, Rules};

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

    fn rules(otherwise: Otherwise, allow: &[&str], deny: &[&str]) -> Policy {
        let parse = |texts: &[&str]| {
            let rules = texts.iter().map(|text| Rule::parse(text).expect("a rule"));
            rules.collect()
        };
        Policy::default().with_rules(Rules {
            otherwise,
            allow: parse(allow),
            deny: parse(deny),
        })
    }

    const PRIVATE: Option<Reason> = Some(Reason::NotPublic(Scope::Private));

    #[test]
    fn only_public_addresses_are_answered() {
        let found = vec![alias(), a([10, 0, 0, 1]), a([1, 2, 3, 4])];
        let (answer, refused) = answer(question(RecordType::A), Ok(found), &Policy::default());
        assert_eq!(answer.answers, [alias(), a([1, 2, 3, 4])]);
        assert_eq!(answer.metadata.response_code, ResponseCode::NoError);
        assert_eq!(refused, PRIVATE);
        let given: Vec<_> = addresses(&answer).collect();
        assert_eq!(given, [([1, 2, 3, 4].into(), 60)]);
    }

    #[test]
    fn a_name_with_private_addresses_only_has_none() {
        let found = vec![alias(), a([10, 0, 0, 1]), a([127, 0, 0, 1])];
        let (answer, refused) = answer(question(RecordType::A), Ok(found), &Policy::default());
        assert_eq!(answer.answers, []);
        assert_eq!(answer.metadata.response_code, ResponseCode::NoError);
        assert_eq!(refused, PRIVATE);
    }

    #[test]
    fn private_addresses_that_a_rule_opens_are_answered() {
        let found = vec![a([10, 0, 0, 1]), a([10, 1, 0, 1])];
        let policy = rules(Otherwise::Allowlist, &["example.com", "10.0.0.0/16"], &[]);
        let (answer, _) = answer(question(RecordType::A), Ok(found), &policy);
        assert_eq!(answer.answers, [a([10, 0, 0, 1])]);
    }

    #[test]
    fn an_alias_to_a_denied_name_is_refused() {
        let found = vec![alias(), a([1, 2, 3, 4])];
        let policy = rules(Otherwise::Public, &[], &["www.example.com"]);
        let (answer, refused) = answer(question(RecordType::A), Ok(found), &policy);
        assert_eq!(answer.metadata.response_code, ResponseCode::Refused);
        assert_eq!(answer.answers, []);
        assert_eq!(refused, Some(Reason::Rule("www.example.com".into())));
    }

    #[test]
    fn nothing_is_to_be_remembered_for_more_than_an_hour() {
        let mut long = a([1, 2, 3, 4]);
        long.ttl = 86400;
        let (answer, _) = answer(question(RecordType::A), Ok(vec![long]), &Policy::default());
        assert_eq!(answer.answers[0].ttl, 3600);
    }

    #[test]
    fn failures_are_passed_on() {
        let failed = Err(ResponseCode::NXDomain);
        let (answer, _) = answer(question(RecordType::A), failed, &Policy::default());
        assert_eq!(answer.metadata.response_code, ResponseCode::NXDomain);
    }

    #[test]
    fn an_answer_that_does_not_fit_is_truncated() {
        let text = RData::TXT(TXT::new(vec!["x".repeat(200); 10]));
        let found = vec![Record::from_rdata(name("example.com."), 60, text)];
        let (answer, _) = answer(question(RecordType::TXT), Ok(found), &Policy::default());
        let long = encode(&answer, 65535).expect("an answer");
        assert!(long.len() > 2000);
        let short = encode(&answer, 512).expect("an answer");
        assert!(short.len() <= 512);
        let short = Message::from_vec(&short).expect("a message");
        assert!(short.metadata.truncation);
        assert_eq!(short.queries.len(), 1);
    }
}
