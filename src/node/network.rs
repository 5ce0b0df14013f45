//! Rules of the network from JavaScript.

#![expect(
    clippy::needless_pass_by_value,
    reason = "napi hands arguments over by value"
)]

use napi::Env;
use napi::bindgen_prelude::PromiseRaw;
use napi_derive::napi;
use serde::Deserialize;

use super::argument::{Object, parse_option};
use super::error::promise;
use super::vm::NativeVm;
use crate::error::{Error, Result};
use crate::net::{Otherwise, Rule, Rules};

/// More are no list that a person keeps.
const MAX_RULES: usize = 4096;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct RawNetwork {
    #[serde(default, rename = "default")]
    otherwise: RawOtherwise,
    #[serde(default)]
    allow: Vec<String>,
    #[serde(default)]
    deny: Vec<String>,
}

#[derive(Debug, Default, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum RawOtherwise {
    #[default]
    Public,
    None,
    Allowlist,
}

impl RawNetwork {
    /// `field`: where it was given.
    pub(super) fn rules(self, field: &str) -> Result<Rules> {
        let otherwise = match self.otherwise {
            RawOtherwise::Public => Otherwise::Public,
            RawOtherwise::None => Otherwise::None,
            RawOtherwise::Allowlist => Otherwise::Allowlist,
        };
        if otherwise == Otherwise::None && !self.allow.is_empty() {
            return Err(Error::invalid_argument(
                &format!("{field}.allow"),
                "is of no use where the default is \"none\": with \"allowlist\" nothing else is allowed",
            ));
        }
        let allow = rules(&self.allow, &format!("{field}.allow"))?;
        // Only those of addresses open what is not public.
        let unused = allow.iter().position(|rule| !rule.is_of_addresses());
        if otherwise == Otherwise::Public
            && let Some(index) = unused
        {
            return Err(Error::invalid_argument(
                &format!("{field}.allow[{index}]"),
                format!(
                    "\"{}\" is of no use where the default is \"public\", which allows all public hosts: \
                     with default: \"allowlist\" nothing else is allowed",
                    allow[index]
                ),
            ));
        }
        Ok(Rules {
            otherwise,
            allow,
            deny: rules(&self.deny, &format!("{field}.deny"))?,
        })
    }
}

fn rules(texts: &[String], field: &str) -> Result<Vec<Rule>> {
    if texts.len() > MAX_RULES {
        let problem = format!("has {} rules, and {MAX_RULES} is the most", texts.len());
        return Err(Error::invalid_argument(field, problem));
    }
    let parsed = texts.iter().enumerate().map(|(index, text)| {
        Rule::parse(text).map_err(|problem| {
            Error::invalid_argument(&format!("{field}[{index}]"), format!("{text:?} {problem}"))
        })
    });
    parsed.collect()
}

#[napi]
impl NativeVm {
    /// `network`: JSON of the rules. They hold at once; resolves when they are in force in a VM that runs.
    #[napi]
    pub fn set_network<'env>(
        &self,
        env: &'env Env,
        network: String,
    ) -> napi::Result<PromiseRaw<'env, ()>> {
        let handle = self.handle.clone();
        let rules = parse_option::<Object<RawNetwork>>("network", &network)
            .and_then(|raw| raw.0.rules("network"))
            .map(|rules| handle.set_network(rules));
        promise(env, async move {
            rules?;
            handle.apply_network().await
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network(json: &str) -> Result<Rules> {
        parse_option::<Object<RawNetwork>>("network", json)?
            .0
            .rules("network")
    }

    #[test]
    fn what_is_left_out_is_the_public_internet_without_rules() {
        assert_eq!(network("{}").expect("valid"), Rules::default());
        let rules = network(r#"{"default":"allowlist","allow":["*.example.com:443"]}"#);
        let rules = rules.expect("valid");
        assert_eq!(rules.otherwise, Otherwise::Allowlist);
        assert_eq!(rules.allow[0].to_string(), "*.example.com:443");
    }

    #[test]
    fn a_wrong_rule_is_named_with_its_place_and_what_is_wrong() {
        for (json, problem) in [
            (
                r#"{"allow":["1.0.0.0/8","10.0.0.1/8"]}"#,
                "network.allow[1]: \"10.0.0.1/8\" has bits beyond its prefix: write 10.0.0.0/8",
            ),
            (
                r#"{"deny":["https://a.test"]}"#,
                "network.deny[0]: \"https://a.test\" is a URL: a rule is host[:port[-port]]",
            ),
            (
                r#"{"allow":["10.0.0.0/8","a.test:443"]}"#,
                "network.allow[1]: \"a.test:443\" is of no use where the default is \"public\", which \
                 allows all public hosts: with default: \"allowlist\" nothing else is allowed",
            ),
            ("[]", "network: must be an object, not an array"),
            (r#"{"default":true}"#, "network.default: must be a string"),
            (
                r#"{"default":"none","allow":["a.test"]}"#,
                "network.allow: is of no use where the default is \"none\": with \"allowlist\" nothing \
                 else is allowed",
            ),
        ] {
            let error = network(json).expect_err(json);
            assert_eq!(error.code.as_str(), "INVALID_ARGUMENT");
            assert_eq!(error.message, problem);
        }
        let error = network(r#"{"default":"private"}"#).expect_err("no default");
        assert!(error.message.starts_with("network.default: "), "{error}");
    }
}
