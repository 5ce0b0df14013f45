//! From the JSON text of a call's arguments to types, with problems in the words of JavaScript.

use std::fmt;
use std::marker::PhantomData;

use serde::de::value::MapAccessDeserializer;
use serde::de::{DeserializeOwned, Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use crate::error::{Error, Result};

/// What is left unset means the documented default.
pub(super) fn parse<T: DeserializeOwned>(json: &str) -> Result<T> {
    parse_argument("options", json)
}

/// The same of an argument that has another name.
pub(super) fn parse_argument<T: DeserializeOwned>(name: &str, json: &str) -> Result<T> {
    parse_with(json, |field| field.unwrap_or(name).to_owned())
}

/// The same of an argument that is an option elsewhere, whose fields are named as there.
pub(super) fn parse_option<T: DeserializeOwned>(name: &str, json: &str) -> Result<T> {
    parse_with(json, |field| {
        field.map_or_else(|| name.to_owned(), |field| format!("{name}.{field}"))
    })
}

/// `named`: what a field is called, or all of it.
fn parse_with<T: DeserializeOwned>(
    json: &str,
    named: impl Fn(Option<&str>) -> String,
) -> Result<T> {
    let mut deserializer = serde_json::Deserializer::from_str(json);
    serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
        let field = error.path().to_string();
        let field = named(Some(&*field).filter(|field| *field != "."));
        // Without serde_json's position: the caller did not write this text.
        let problem = error.inner().to_string();
        let problem = problem
            .rsplit_once(" at line ")
            .map_or(problem.as_str(), |(problem, _)| problem);
        Error::invalid_argument(&field, in_words_of_javascript(problem))
    })
}

/// serde tells what is wrong as a sentence in words of Rust, and in no other form.
fn in_words_of_javascript(problem: &str) -> String {
    let of_kind = |kind, then| problem.strip_prefix(kind)?.rsplit_once(then);
    let quoted = |names: &str| names.replace('`', "\"");
    if let Some((found, wanted)) = of_kind("invalid type: ", ", expected ")
        .or_else(|| of_kind("invalid value: ", ", expected "))
    {
        format!(
            "must be {}, not {}",
            wanted_value(wanted),
            found_value(found)
        )
    } else if of_kind("invalid length ", ", expected struct ").is_some() {
        "must be an object, not an array".to_owned()
    } else if let Some((found, known)) = of_kind("unknown field ", ", expected ") {
        let known = known.strip_prefix("one of ").unwrap_or(known);
        format!("there is no {}: there is {}", quoted(found), quoted(known))
    } else if let Some((found, known)) = of_kind("unknown variant ", ", expected ") {
        format!("must be {}, not {}", quoted(known), quoted(found))
    } else if let Some(name) = problem.strip_prefix("missing field ") {
        format!("{} is missing", quoted(name))
    } else {
        match problem {
            // Of who knows names only.
            "expected value" => "must be a string".to_owned(),
            problem => problem.to_owned(),
        }
    }
}

fn wanted_value(words: &str) -> &str {
    match words {
        "a map" => "an object",
        "a sequence" => "an array",
        "path string" => "a string",
        words if words.starts_with("struct ") => "an object",
        words => words,
    }
}

/// A kind and a value, the latter quoted, as `boolean` and then `true`; or a kind alone.
fn found_value(words: &str) -> &str {
    match words {
        "map" => "an object",
        "sequence" => "an array",
        words => words
            .strip_prefix("string ")
            .or_else(|| words.split('`').nth(1))
            .unwrap_or(words),
    }
}

/// `T`, from an object: serde takes an array for the fields of a struct in their order, and an empty one for
/// a struct that needs none.
#[derive(Debug)]
pub(super) struct Object<T>(pub(super) T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Map<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for Map<T> {
            type Value = T;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map))
            }
        }

        deserializer.deserialize_map(Map(PhantomData)).map(Self)
    }
}

/// A whole number from `MIN` to `MAX`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Whole<const MIN: u64, const MAX: u64>(pub(super) u64);

/// `Number.MAX_SAFE_INTEGER`: above it, JavaScript's numbers are not exact.
pub(super) const MAX_SAFE: u64 = (1 << 53) - 1;

impl<const MIN: u64, const MAX: u64> Whole<MIN, MAX> {
    fn range() -> String {
        if MAX == MAX_SAFE {
            format!("a whole number of at least {MIN}")
        } else {
            format!("a whole number between {MIN} and {MAX}")
        }
    }

    fn of(value: &Value) -> Option<Self> {
        let number = value.as_u64()?;
        (MIN..=MAX).contains(&number).then_some(Self(number))
    }
}

impl<'de, const MIN: u64, const MAX: u64> Deserialize<'de> for Whole<MIN, MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        Self::of(&value)
            .ok_or_else(|| D::Error::custom(format!("must be {}, not {value}", Self::range())))
    }
}

/// A whole number from `MIN` to `MAX`, or `false`: `None`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct WholeOrFalse<const MIN: u64, const MAX: u64>(pub(super) Option<u64>);

impl<'de, const MIN: u64, const MAX: u64> Deserialize<'de> for WholeOrFalse<MIN, MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        if value == Value::Bool(false) {
            return Ok(Self(None));
        }
        let number = Whole::<MIN, MAX>::of(&value).ok_or_else(|| {
            let range = Whole::<MIN, MAX>::range();
            D::Error::custom(format!("must be {range}, or false, not {value}"))
        })?;
        Ok(Self(Some(number.0)))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::PathBuf;

    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(rename_all = "camelCase", deny_unknown_fields)]
    #[expect(dead_code, reason = "only parsed")]
    struct Options {
        a_text: Option<String>,
        path: Option<PathBuf>,
        flag: Option<bool>,
        list: Option<Vec<String>>,
        env: Option<BTreeMap<String, String>>,
        inner: Option<Object<Inner>>,
        kind: Option<Kind>,
        port: Option<Whole<1, 65_535>>,
    }

    #[derive(Debug, Deserialize)]
    #[expect(dead_code, reason = "only parsed")]
    struct Inner {
        must: String,
    }

    #[derive(Debug, Deserialize)]
    #[serde(rename_all = "lowercase")]
    enum Kind {
        Ask,
        Allow,
        Reject,
    }

    #[test]
    fn problems_are_told_in_the_words_of_javascript() {
        for (json, problem) in [
            ("[]", "options: must be an object, not an array"),
            ("null", "options: must be an object, not null"),
            (r#"{"aText":5}"#, "aText: must be a string, not 5"),
            (r#"{"aText":1.5}"#, "aText: must be a string, not 1.5"),
            (r#"{"aText":{}}"#, "aText: must be a string, not an object"),
            (r#"{"path":true}"#, "path: must be a string, not true"),
            (r#"{"flag":"yes"}"#, "flag: must be a boolean, not \"yes\""),
            (
                r#"{"flag":"a, expected b"}"#,
                "flag: must be a boolean, not \"a, expected b\"",
            ),
            (r#"{"list":"x"}"#, "list: must be an array, not \"x\""),
            (r#"{"list":[null]}"#, "list[0]: must be a string, not null"),
            (r#"{"env":[]}"#, "env: must be an object, not an array"),
            (r#"{"env":{"A":1}}"#, "env.A: must be a string, not 1"),
            (r#"{"inner":{}}"#, "inner: \"must\" is missing"),
            (
                r#"{"inner":["x"]}"#,
                "inner: must be an object, not an array",
            ),
            (r#"{"kind":true}"#, "kind: must be a string"),
            (
                r#"{"kind":"deny"}"#,
                "kind: must be one of \"ask\", \"allow\", \"reject\", not \"deny\"",
            ),
            (
                r#"{"port":"80"}"#,
                "port: must be a whole number between 1 and 65535, not \"80\"",
            ),
        ] {
            let error = parse::<Options>(json).expect_err(json);
            assert_eq!(error.message, problem);
        }
        let error = parse::<Options>(r#"{"speling":1}"#).expect_err("unknown");
        assert!(
            error
                .message
                .starts_with("speling: there is no \"speling\": there is \"aText\", "),
            "{error}"
        );
    }
}
