//! Digests, and streams that are checked against one.

use std::fmt::{self, Write as _};
use std::io::{self, Read};

use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use super::{ImageError, Result};

/// A SHA-256, which is what images are named by in practice.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
#[serde(try_from = "String")]
pub struct Digest(String);

impl Digest {
    pub(super) fn of(hash: Sha256) -> Self {
        let mut hex = String::with_capacity(64);
        for byte in hash.finalize() {
            // Writing to a String can't fail.
            let _ = write!(hex, "{byte:02x}");
        }
        Self(hex)
    }

    /// 64 lower-case hexadecimal digits.
    #[must_use]
    pub fn hex(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for Digest {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let hex = text.strip_prefix("sha256:").filter(|hex| {
            hex.len() == 64 && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
        });
        match hex {
            Some(hex) => Ok(Self(hex.to_owned())),
            None => Err(format!("{text:?} is no SHA-256 digest")),
        }
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.0)
    }
}

/// Hashes what is read through it.
pub(super) struct Verifying<R> {
    inner: R,
    hash: Sha256,
    wanted: Digest,
}

impl<R: Read> Verifying<R> {
    pub(super) fn new(inner: R, wanted: Digest) -> Self {
        Self {
            inner,
            hash: Sha256::new(),
            wanted,
        }
    }

    /// Reads to the end and compares.
    pub(super) fn finish(mut self) -> Result<R> {
        let mut rest = [0; 8192];
        while self
            .read(&mut rest)
            .map_err(|error| ImageError::reading(&self.wanted, error))?
            > 0
        {}
        let found = Digest::of(self.hash);
        if found == self.wanted {
            Ok(self.inner)
        } else {
            Err(ImageError::Digest {
                wanted: self.wanted,
                found: found.0,
            })
        }
    }
}

impl<R: Read> Read for Verifying<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.hash.update(buffer.get(..n).unwrap_or_default());
        Ok(n)
    }
}
