//! The names of things: which VM, which session, which event.

use std::fmt;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::error::{Code, Error, Result};

/// Namespace of the version-5 UUIDs that name a VM's directory.
const VM_NAMESPACE: Uuid = Uuid::from_u128(0x0b6e_6d1f_3a0c_4f5e_9d2a_61c7_8e4b_5f10);

/// What the caller calls a VM: one or more non-empty strings. `"a"` equals `["a"]`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct VmKey(Vec<String>);

impl VmKey {
    pub fn new(parts: Vec<String>) -> Result<Self> {
        if parts.is_empty() || parts.iter().any(String::is_empty) {
            return Err(Error::invalid_argument(
                "key",
                "a VM key is a non-empty string or a non-empty array of non-empty strings",
            ));
        }
        Ok(Self(parts))
    }

    /// The directory name of this VM: derived from the key, so there is no index to corrupt.
    #[must_use]
    pub fn id(&self) -> VmId {
        // Length-prefixed, so that ["ab"] and ["a", "b"] differ.
        let mut name = Vec::new();
        for part in &self.0 {
            name.extend_from_slice(&(part.len() as u64).to_le_bytes());
            name.extend_from_slice(part.as_bytes());
        }
        VmId(Uuid::new_v5(&VM_NAMESPACE, &name))
    }

    #[must_use]
    pub fn parts(&self) -> &[String] {
        &self.0
    }
}

impl fmt::Display for VmKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

/// A VM's directory name under `<dataDir>/vms`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct VmId(Uuid);

impl fmt::Display for VmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The public, permanent id of a session (`UUIDv7`, so ids sort by creation).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SessionId(Uuid);

impl SessionId {
    #[must_use]
    pub fn generate() -> Self {
        Self(Uuid::now_v7())
    }

    /// Parses an id that a caller handed in: anything else names no session.
    pub fn parse(text: &str) -> Result<Self> {
        Uuid::try_parse(text).map(Self).map_err(|_| {
            Error::new(
                Code::SessionNotFound,
                format!("no session {text:?} in this VM: listPersistedSessions() lists them"),
            )
        })
    }
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Number of an event within its session: 1, 2, 3, … without gaps. `Seq(0)` is 'before the first'.
#[derive(
    Debug, Default, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Seq(pub u64);

impl Seq {
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(parts: &[&str]) -> VmId {
        VmKey::new(parts.iter().map(ToString::to_string).collect())
            .expect("a valid key")
            .id()
    }

    #[test]
    fn vm_id_depends_on_how_the_key_is_split() {
        assert_eq!(id(&["ab"]), id(&["ab"]));
        assert_ne!(id(&["ab"]), id(&["a", "b"]));
    }

    #[test]
    fn empty_keys_are_refused() {
        assert!(VmKey::new(vec![]).is_err());
        assert!(VmKey::new(vec![String::new()]).is_err());
    }
}
