//! Exact versions of npm packages.

use std::fmt;

/// An exact version as npm writes it: `1.2.3` or `1.2.3-rc.1`. Never a range or a tag, which would mean
/// something else tomorrow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Version(String);

impl Version {
    /// The problem with what is none is a clause about the text.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        const PROBLEM: &str = "must be an exact version as 1.2.3 or 1.2.3-rc.1: no range, no tag";
        /// More than npm takes.
        const MAX_LENGTH: usize = 256;
        let (release, prerelease) = text
            .split_once('-')
            .map_or((text, None), |(release, prerelease)| {
                (release, Some(prerelease))
            });
        let is_number = |part: &str| {
            !part.is_empty()
                && part.bytes().all(|byte| byte.is_ascii_digit())
                && (part == "0" || !part.starts_with('0'))
        };
        let is_identifier = |part: &str| {
            !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
        };
        let is_exact = text.len() <= MAX_LENGTH
            && release.split('.').count() == 3
            && release.split('.').all(is_number)
            && prerelease.is_none_or(|prerelease| prerelease.split('.').all(is_identifier));
        if is_exact {
            Ok(Self(text.to_owned()))
        } else {
            Err(PROBLEM)
        }
    }

    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_exact_version_is_one() {
        for exact in ["0.87.1", "1.0.0-rc.1", "10.20.30", "1.0.0-alpha-2.x"] {
            assert_eq!(Version::parse(exact).expect(exact).as_str(), exact);
        }
        for other in [
            "",
            "latest",
            "1",
            "1.2",
            "1.2.x",
            "^1.2.3",
            "~1.2.3",
            ">=1.2.3",
            "1.2.3 || 2.0.0",
            "v1.2.3",
            "1.2.3.4",
            "01.2.3",
            "1.2.3-",
            "1.2.3-a..b",
            "1.2.3+build",
            "1.2.3/../x",
            "npm:other@1.2.3",
            "*",
        ] {
            assert!(Version::parse(other).is_err(), "{other:?}");
        }
    }
}
