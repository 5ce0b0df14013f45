//! From the JSON text of a call's arguments to types, with problems in the words of JavaScript.

use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use crate::error::{Error, Result};

/// What is left unset means the documented default.
pub(super) fn parse<T: DeserializeOwned>(json: &str) -> Result<T> {
    let mut deserializer = serde_json::Deserializer::from_str(json);
    serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
        let field = error.path().to_string();
        let field = if field == "." { "options" } else { &field };
        // Without serde_json's position: the caller did not write this text.
        let problem = error.inner().to_string();
        let problem = problem
            .split_once(" at line ")
            .map_or(problem.as_str(), |(problem, _)| problem);
        Error::invalid_argument(field, problem)
    })
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
