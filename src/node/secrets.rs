//! Secrets from JavaScript. No error shows what was given: what is in the wrong place may be the value.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;

use napi::Env;
use napi::bindgen_prelude::PromiseRaw;
use napi_derive::napi;
use serde::de::value::MapAccessDeserializer;
use serde::de::{Error as _, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use zeroize::Zeroizing;

use super::argument::parse_option;
use super::error::promise;
use super::vm::NativeVm;
use crate::error::{Error, Result};
use crate::net::secrets::{Secret, SecretOptions, Secrets, Wrong};

/// By the name of the environment variable.
pub(super) type RawSecrets = Object<BTreeMap<String, Object<RawSecret>>>;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct RawSecret {
    value: Text,
    hosts: List,
    headers: Option<List>,
    query: Option<List>,
    placeholder: Option<Text>,
}

pub(super) fn secrets(raw: RawSecrets) -> Result<Secrets> {
    let wrong =
        |wrong: Wrong| Error::invalid_argument(&format!("secrets.{}", wrong.field), wrong.problem);
    let plain = |texts: List| texts.0.into_iter().map(|text| (*text.0).clone()).collect();
    let secrets = raw.0.into_iter().map(|(name, Object(raw))| {
        let options = SecretOptions {
            value: raw.value.0,
            hosts: plain(raw.hosts),
            headers: raw.headers.map(plain),
            query: raw.query.map(plain).unwrap_or_default(),
            placeholder: raw.placeholder.map(|text| (*text.0).clone()),
        };
        Secret::new(&name, options)
    });
    let secrets: Vec<_> = secrets.collect::<Result<_, _>>().map_err(wrong)?;
    Secrets::new(secrets).map_err(wrong)
}

/// `T`, which is an object in JavaScript.
pub(super) struct Object<T>(T);

/// A string.
struct Text(Zeroizing<String>);

/// Strings.
struct List(Vec<Text>);

/// What a value is expected to be. Any other is refused by its kind, which serde would show.
struct Expected<T>(&'static str, PhantomData<T>);

/// All kinds that `T` is not.
macro_rules! refuse {
    ($($kind:ident($type:ty)),*) => {
        $(fn $kind<E: serde::de::Error>(self, _: $type) -> Result<Self::Value, E> {
            Err(E::custom(format_args!("must be {}", self.0)))
        })*
    };
}

impl<'de, T: Deserialize<'de>> Visitor<'de> for Expected<Object<T>> {
    type Value = Object<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
        T::deserialize(MapAccessDeserializer::new(map)).map(Object)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, _: A) -> Result<Self::Value, A::Error> {
        Err(A::Error::custom(format_args!("must be {}", self.0)))
    }

    refuse!(
        visit_str(&str),
        visit_bool(bool),
        visit_u64(u64),
        visit_i64(i64),
        visit_f64(f64)
    );
}

impl Visitor<'_> for Expected<Text> {
    type Value = Text;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Self::Value, E> {
        Ok(Text(Zeroizing::new(text.to_owned())))
    }

    refuse!(
        visit_bool(bool),
        visit_u64(u64),
        visit_i64(i64),
        visit_f64(f64)
    );
}

impl<'de> Visitor<'de> for Expected<List> {
    type Value = List;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let mut list = Vec::new();
        while let Some(text) = seq.next_element()? {
            list.push(text);
        }
        Ok(List(list))
    }

    refuse!(
        visit_str(&str),
        visit_bool(bool),
        visit_u64(u64),
        visit_i64(i64),
        visit_f64(f64)
    );
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Expected::<Self>("an object", PhantomData))
    }
}

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Expected::<Self>("a string", PhantomData))
    }
}

impl<'de> Deserialize<'de> for List {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Expected::<Self>("an array of strings", PhantomData))
    }
}

#[napi]
impl NativeVm {
    /// `secrets`: JSON of the option.
    #[napi]
    pub fn set_secrets<'env>(
        &self,
        env: &'env Env,
        secrets: String,
    ) -> napi::Result<PromiseRaw<'env, ()>> {
        let handle = self.handle.clone();
        let json = Zeroizing::new(secrets);
        promise(env, async move {
            let raw = parse_option::<RawSecrets>("secrets", &json)?;
            handle.set_secrets(self::secrets(raw)?).await
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<Secrets> {
        secrets(parse_option("secrets", json)?)
    }

    #[test]
    fn secrets_are_parsed() {
        let json = r#"{"KEY":{"value":"v\u0061lue","hosts":["api.example.com"],"query":["key"]}}"#;
        assert!(!parse(json).expect("valid").is_empty());
        assert!(parse("{}").expect("valid").is_empty());
    }

    #[test]
    fn a_wrong_secret_is_named_and_not_shown() {
        for (json, problem) in [
            (r#""hush""#, "secrets: must be an object"),
            (r#"["hush"]"#, "secrets: must be an object"),
            (r#"{"KEY":"hush"}"#, "secrets.KEY: must be an object"),
            (r#"{"KEY":["hush"]}"#, "secrets.KEY: must be an object"),
            (
                r#"{"KEY":{"hosts":["a.example"]}}"#,
                "secrets.KEY: \"value\" is missing",
            ),
            (
                r#"{"KEY":{"value":"hush"}}"#,
                "secrets.KEY: \"hosts\" is missing",
            ),
            (
                r#"{"KEY":{"value":4711}}"#,
                "secrets.KEY.value: must be a string",
            ),
            (r#"{"KEY":{"value":["hush"]}}"#, "secrets.KEY.value: "),
            (
                r#"{"KEY":{"value":"a","hosts":"hush"}}"#,
                "secrets.KEY.hosts: must be an array of strings",
            ),
            (
                r#"{"KEY":{"value":"a","hosts":["hush!"]}}"#,
                "secrets.KEY.hosts[0]: ",
            ),
            (
                r#"{"KEY":{"value":"hush\n","hosts":["a.example"]}}"#,
                "secrets.KEY.value: ",
            ),
            (
                r#"{"KEY":{"value":"a","hosts":["a.example"],"header":"hush"}}"#,
                "secrets.KEY.header: there is no \"header\"",
            ),
        ] {
            let error = parse(json).expect_err(json);
            assert!(error.message.starts_with(problem), "{json}: {error}");
            for value in ["hush", "4711"] {
                assert!(!error.message.contains(value), "{error}");
            }
        }
    }
}
