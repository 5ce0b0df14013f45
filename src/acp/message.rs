//! JSON-RPC messages, taken apart without losing a byte of them.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

/// One line of the agent. Parts borrow from the line.
#[derive(Debug)]
pub enum Message<'a> {
    Notification {
        method: Cow<'a, str>,
        params: Option<&'a RawValue>,
    },
    /// Wants an answer that repeats `id`, whatever JSON value that is.
    Request {
        id: &'a RawValue,
        method: Cow<'a, str>,
        params: Option<&'a RawValue>,
    },
    Response {
        id: &'a RawValue,
        result: Result<&'a RawValue, RpcError>,
    },
}

/// A JSON-RPC error object, `data` as it came.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RpcError {
    pub code: i64,
    #[serde(default)]
    pub message: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<Box<RawValue>>,
}

impl RpcError {
    /// The method is not one that this side offers.
    #[must_use]
    pub fn method_not_found(method: &str) -> Self {
        Self {
            code: -32601,
            message: format!("this client does not offer {method}"),
            data: None,
        }
    }

    /// From the `error` of an answer, which is one whatever it looks like.
    fn read(raw: &RawValue) -> Self {
        serde_json::from_str(raw.get()).unwrap_or_else(|_| Self {
            code: -32603,
            message: "it answered with an error that is none of JSON-RPC's".to_owned(),
            data: Some(raw.to_owned()),
        })
    }

    #[must_use]
    pub fn invalid_params(problem: &str) -> Self {
        Self {
            code: -32602,
            message: problem.to_owned(),
            data: None,
        }
    }
}

impl fmt::Display for RpcError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.message, self.code)
    }
}

#[derive(Deserialize)]
struct Envelope<'a> {
    #[serde(borrow, default, deserialize_with = "present")]
    id: Option<&'a RawValue>,
    #[serde(borrow, default)]
    method: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    params: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "present")]
    result: Option<&'a RawValue>,
    #[serde(borrow, default)]
    error: Option<&'a RawValue>,
}

/// For fields that default to `None`: `null` is a value too, only an absent field is `None`.
pub fn present<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<&'de RawValue>, D::Error> {
    Deserialize::deserialize(deserializer).map(Some)
}

/// How deep the values of a message may be nested. What is said in ACP stays below a hundred levels;
/// JavaScript reads any depth, but can't write a few thousand: `JSON.stringify` would throw.
pub(super) const MAX_NESTING: usize = 2000;

/// How many values a message may have, counted by what begins them: `[`, `{` and `,`.
///
/// What is said in ACP has some hundreds; JavaScript reads all kinds of so many within half a second, in which the process that
/// asked does nothing else.
pub const MAX_VALUES: usize = 100_000;

/// Why JavaScript should not have to read this JSON. Nearly always a matter of counting brackets and commas.
#[must_use]
pub(super) fn too_complex(json: &[u8]) -> Option<String> {
    let may_nest = json.len() > MAX_NESTING
        && (memchr::memchr2_iter(b'{', b'[', json).nth(MAX_NESTING)).is_some();
    if may_nest && depth(json) > MAX_NESTING {
        return Some(format!("nested more than {MAX_NESTING} levels deep"));
    }
    if has_more_values([json], MAX_VALUES) {
        return Some(format!("of more than {MAX_VALUES} values"));
    }
    None
}

/// Whether there are more than so many values in these texts, counted as for [`MAX_VALUES`].
#[must_use]
pub fn has_more_values<'a>(
    texts: impl IntoIterator<Item = &'a [u8], IntoIter: Clone>,
    limit: usize,
) -> bool {
    let texts = texts.into_iter();
    if texts.clone().map(<[u8]>::len).sum::<usize>() <= limit {
        return false;
    }
    let quickly = (texts.clone()).flat_map(|text| memchr::memchr3_iter(b'{', b'[', b',', text));
    // Those within strings do not count.
    quickly.take(limit + 1).count() > limit
        && texts.flat_map(beginnings_of_values).nth(limit).is_some()
}

/// How many values there are in this text, counted as for [`MAX_VALUES`].
#[must_use]
pub fn count_values(json: &str) -> usize {
    beginnings_of_values(json.as_bytes()).count()
}

fn beginnings_of_values(json: &[u8]) -> impl Iterator<Item = u8> {
    outside_strings(json).filter(|byte| matches!(byte, b'{' | b'[' | b','))
}

fn depth(json: &[u8]) -> usize {
    let (mut depth, mut deepest) = (0_usize, 0);
    for byte in outside_strings(json) {
        match byte {
            b'{' | b'[' => depth += 1,
            b'}' | b']' => depth = depth.saturating_sub(1),
            _ => {}
        }
        deepest = deepest.max(depth);
    }
    deepest
}

/// The bytes that are not in a string.
fn outside_strings(json: &[u8]) -> impl Iterator<Item = u8> {
    let (mut in_string, mut escaped) = (false, false);
    json.iter().copied().filter(move |byte| {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            _ => return !in_string,
        }
        false
    })
}

impl<'a> Message<'a> {
    /// `None`: not a JSON-RPC message.
    #[must_use]
    pub fn parse(line: &'a str) -> Option<Self> {
        let envelope: Envelope<'a> = serde_json::from_str(line).ok()?;
        let Envelope {
            id,
            method,
            params,
            result,
            error,
        } = envelope;
        match (method, id) {
            (Some(method), None) => Some(Self::Notification { method, params }),
            (Some(method), Some(id)) => Some(Self::Request { id, method, params }),
            (None, Some(id)) => {
                // An answer without either is JavaScript's `undefined` as a result. Whoever asked would
                // wait for another one for ever.
                let result = error.map_or_else(
                    || Ok(result.unwrap_or(RawValue::NULL)),
                    |error| Err(RpcError::read(error)),
                );
                Some(Self::Response { id, result })
            }
            (None, None) => None,
        }
    }
}

/// The values of every `sessionId` directly in a message's `params`: JSON allows a key twice.
#[derive(Debug, Default)]
pub struct OuterSessionIds<'a>(Vec<&'a RawValue>);

impl<'a> OuterSessionIds<'a> {
    #[must_use]
    pub fn of(params: Option<&'a RawValue>) -> Self {
        Self(fields(params, "sessionId"))
    }

    /// For who has read the whole of `params`, and found this one alone or none.
    #[must_use]
    pub fn only(id: Option<&'a RawValue>) -> Self {
        Self(id.into_iter().collect())
    }

    /// The agent's name of the session that the message is about.
    #[must_use]
    pub fn name(&self) -> Option<String> {
        serde_json::from_str(self.0.last()?.get()).ok()
    }

    /// `line`, of which the ids are parts, with `public` in their place, and not a byte else changed.
    #[must_use]
    pub fn replaced(&self, line: &str, public: &str) -> String {
        let mut text = String::with_capacity(line.len() + 2 * public.len());
        let mut copied = 0;
        for id in &self.0 {
            let Some(span) = span(line, id.get()) else {
                continue;
            };
            text.push_str(&line[copied..span.start]);
            text.push('"');
            text.push_str(public);
            text.push('"');
            copied = span.end;
        }
        text.push_str(&line[copied..]);
        text
    }
}

/// The values of every field of this name directly in an object: JSON allows a key twice.
struct Fields<'n>(&'n str);

impl<'de> DeserializeSeed<'de> for Fields<'_> {
    type Value = Vec<&'de RawValue>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Fields<'_> {
    type Value = Vec<&'de RawValue>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut values = Vec::new();
        while let Some(is_it) = map.next_key_seed(Key(self.0))? {
            if is_it {
                values.push(map.next_value::<&'de RawValue>()?);
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(values)
    }
}

/// Whether a key is this one. Another may hold what is no text, half of a surrogate pair.
struct Key<'n>(&'n str);

impl<'de> DeserializeSeed<'de> for Key<'_> {
    type Value = bool;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<bool, D::Error> {
        deserializer.deserialize_bytes(self)
    }
}

impl Visitor<'_> for Key<'_> {
    type Value = bool;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_bytes<E>(self, key: &[u8]) -> Result<bool, E> {
        Ok(key == self.0.as_bytes())
    }
}

/// Of something else than an object: none.
fn fields<'a>(json: Option<&'a RawValue>, name: &str) -> Vec<&'a RawValue> {
    let read = |json: &'a RawValue| {
        let mut json = serde_json::Deserializer::from_str(json.get());
        Fields(name).deserialize(&mut json).ok()
    };
    json.and_then(read).unwrap_or_default()
}

/// Whether the outer `params._meta` has a field of this name.
#[must_use]
pub fn has_outer_meta(params: Option<&RawValue>, name: &str) -> bool {
    let metas = fields(params, "_meta");
    metas.into_iter().any(|meta| has_field(Some(meta), name))
}

/// Whether an object has a field of this name.
#[must_use]
pub fn has_field(json: Option<&RawValue>, name: &str) -> bool {
    !fields(json, name).is_empty()
}

/// The agent's name of the session that a message is about, from the outer `params.sessionId`.
#[must_use]
pub fn outer_session_id(params: Option<&RawValue>) -> Option<String> {
    OuterSessionIds::of(params).name()
}

/// `line` with the outer `params.sessionId` replaced by `public`, and not a byte else changed.
///
/// `params` is the part of `line` that [`Message::parse`] found.
#[must_use]
pub fn with_session_id(line: &str, params: Option<&RawValue>, public: &str) -> String {
    OuterSessionIds::of(params).replaced(line, public)
}

/// Where `part`, which borrows from `whole`, lies in it.
fn span(whole: &str, part: &str) -> Option<Range<usize>> {
    let start = (part.as_ptr() as usize).checked_sub(whole.as_ptr() as usize)?;
    let end = start + part.len();
    (end <= whole.len()).then_some(start..end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn brackets_count_as_levels_where_they_nest_and_not_in_strings() {
        let is_too_deep =
            |json: String| too_complex(json.as_bytes()).is_some_and(|how| how.contains("nested"));
        let nested = |levels: usize| format!("{}{}", "[".repeat(levels), "]".repeat(levels));
        assert!(!is_too_deep(nested(MAX_NESTING)));
        assert!(is_too_deep(nested(MAX_NESTING + 1)));
        assert!(is_too_deep(r#"{"a":"#.repeat(MAX_NESTING + 1)));
        let side_by_side = format!("[{}]", "[],".repeat(2 * MAX_NESTING));
        assert!(!is_too_deep(side_by_side));
        let text = format!(r#"{{"a":"\"{}"}}"#, "[{".repeat(MAX_NESTING));
        assert!(!is_too_deep(text));
    }

    #[test]
    fn values_are_counted_but_not_in_strings() {
        let are_too_many =
            |json: String| too_complex(json.as_bytes()).is_some_and(|how| how.contains("values"));
        let numbers = |count: usize| format!("[{}0]", "0,".repeat(count - 1));
        assert!(!are_too_many(numbers(MAX_VALUES)));
        assert!(are_too_many(numbers(MAX_VALUES + 1)));
        assert!(are_too_many(format!("[{}0]", "{},".repeat(MAX_VALUES / 2))));
        let text = format!(r#"["\"{}"]"#, "{},".repeat(MAX_VALUES));
        assert!(!are_too_many(text));
    }

    fn rewritten(line: &str) -> String {
        let Some(Message::Notification { params, .. }) = Message::parse(line) else {
            panic!("not a notification: {line}");
        };
        with_session_id(line, params, "ours")
    }

    #[test]
    fn only_the_outer_session_id_changes() {
        let line = r#"{ "method":"x","unknown":[1e400,  null], "params":{"z":1,"sessionId" : "abc","a":{"sessionId":"inner"}},"big":12345678901234567890123}"#;
        assert_eq!(rewritten(line), line.replace(r#""abc""#, r#""ours""#));
    }

    #[test]
    fn an_escaped_or_repeated_key_does_not_let_the_private_id_through() {
        let line = r#"{"method":"x","params":{"session\u0049d":"abc","sessionId":"abc"}}"#;
        assert!(!rewritten(line).contains("abc"));
    }

    #[test]
    fn a_message_without_session_id_stays_as_it_is() {
        for line in [r#"{"method":"x"}"#, r#"{"method":"x","params":[1]}"#] {
            assert_eq!(rewritten(line), line);
        }
    }

    #[test]
    fn the_four_kinds_of_messages_are_told_apart() {
        let parse = |line| Message::parse(line);
        assert!(matches!(
            parse(r#"{"method":"m","id":null}"#),
            Some(Message::Request { .. })
        ));
        assert!(matches!(
            parse(r#"{"id":1,"result":null}"#),
            Some(Message::Response { result: Ok(_), .. })
        ));
        assert!(matches!(
            parse(r#"{"id":"a","error":{"code":-1,"message":"no"}}"#),
            Some(Message::Response { result: Err(_), .. })
        ));
        for garbage in ["", "hello", "{}", "[]", "42", r#"{"method":"#] {
            assert!(parse(garbage).is_none(), "{garbage}");
        }
    }

    #[test]
    fn error_data_is_kept_as_it_came() {
        let line = r#"{"id":1,"error":{"code":-32000,"message":"no","data":{"b":1.0,"a":[ ]}}}"#;
        let Some(Message::Response {
            result: Err(error), ..
        }) = Message::parse(line)
        else {
            panic!("not an error")
        };
        assert_eq!(
            error.data.map(|data| data.get().to_owned()).as_deref(),
            Some(r#"{"b":1.0,"a":[ ]}"#)
        );
    }

    #[test]
    fn an_answer_in_another_shape_is_still_an_answer() {
        assert!(matches!(
            Message::parse(r#"{"jsonrpc":"2.0","id":1}"#),
            Some(Message::Response { result: Ok(result), .. }) if result.get() == "null"
        ));
        for error in [r#""oops""#, r#"{"code":1.5,"message":"no"}"#, "[]"] {
            let line = format!(r#"{{"id":1,"error":{error}}}"#);
            let Some(Message::Response {
                result: Err(read), ..
            }) = Message::parse(&line)
            else {
                panic!("not an error: {line}")
            };
            assert_eq!(read.data.as_deref().map(RawValue::get), Some(error));
        }
    }

    #[test]
    fn a_mark_is_found_however_it_is_written() {
        let marked = |params: &str| {
            let params: Box<RawValue> = serde_json::from_str(params).expect("JSON");
            has_outer_meta(Some(&params), "agentvm")
        };
        assert!(marked(r#"{"_meta":{"x":1,"agentvm":{}}}"#));
        assert!(marked(r#"{"_meta":{"agentvm":null},"_meta":{}}"#));
        assert!(marked(r#"{"_m\u0065ta":{"\u0061gentvm":{}}}"#));
        assert!(marked(
            r#"{"\ud800":"\ud800","_meta":{"\udc00":1,"agentvm":{}}}"#
        ));
        for other in [
            r#"{"_meta":{}}"#,
            r#"{"update":{"_meta":{"agentvm":{}}}}"#,
            "[]",
        ] {
            assert!(!marked(other), "{other}");
        }
    }
}
