//! What a VM has instead of a value: the same at each boot, because programs keep it in their
//! configuration, and of no use to who knows it.

use std::fmt;
use std::fmt::Write as _;

use rustls::crypto::ring;
use sha2::{Digest as _, Sha256};
use zeroize::Zeroizing;

const PREFIX: &str = "agentvm-secret-";

/// Bytes of it, which are shown as twice as many digits: more than anybody guesses.
const LENGTH: usize = 16;

/// What the placeholders of a VM are made of.
pub struct PlaceholderKey(Zeroizing<[u8; 32]>);

impl PlaceholderKey {
    /// `None`: the system has no randomness to give.
    #[must_use]
    pub fn generate() -> Option<Self> {
        let mut key = Zeroizing::new([0; 32]);
        ring::default_provider()
            .secure_random
            .fill(&mut *key)
            .ok()?;
        Some(Self(key))
    }

    /// One that was kept; `None`: it is none.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        Some(Self(Zeroizing::new(bytes.try_into().ok()?)))
    }

    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &*self.0
    }

    pub(super) fn placeholder(&self, name: &str) -> String {
        // The key has a fixed length, and the digest is cut: nobody can go on from it.
        let digest = Sha256::new()
            .chain_update(*self.0)
            .chain_update(name)
            .finalize();
        let mut placeholder = PREFIX.to_owned();
        for byte in &digest[..LENGTH] {
            // Writing to a String can't fail.
            let _ = write!(placeholder, "{byte:02x}");
        }
        placeholder
    }
}

impl fmt::Debug for PlaceholderKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PlaceholderKey")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_placeholder_belongs_to_a_vm_and_a_name() {
        let key = PlaceholderKey::generate().expect("randomness");
        let kept = PlaceholderKey::from_bytes(key.as_bytes()).expect("a key");
        let placeholder = key.placeholder("KEY");
        assert_eq!(placeholder, kept.placeholder("KEY"));
        assert_eq!(placeholder.len(), PREFIX.len() + 2 * LENGTH);
        assert_ne!(placeholder, key.placeholder("KEY2"));
        let other = PlaceholderKey::generate().expect("randomness");
        assert_ne!(placeholder, other.placeholder("KEY"));
        assert!(PlaceholderKey::from_bytes(b"short").is_none());
    }
}
