//! The name of an image in a registry.

use std::fmt;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::Digest;

/// `[registry/]repository[:tag][@digest]`, as Docker and its kin read it: without a registry it is
/// Docker Hub's, without a tag or digest it is `latest`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Reference {
    registry: String,
    pub(super) repository: String,
    tag: Option<String>,
    pub(super) digest: Option<Digest>,
}

const DOCKER_HUB: &str = "docker.io";

const LATEST: &str = "latest";

impl Reference {
    pub fn parse(text: &str) -> Result<Self, String> {
        let (name, digest) = match text.split_once('@') {
            Some((name, digest)) => (name, Some(Digest::try_from(digest.to_owned())?)),
            None => (text, None),
        };
        // A colon before the last slash is that of a port.
        let (name, tag) = match name.rsplit_once(':') {
            Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
            _ => (name, digest.is_none().then_some(LATEST)),
        };
        let (registry, repository) = match name.split_once('/') {
            Some((first, rest)) if first.contains(['.', ':']) || first == "localhost" => {
                (first, rest.to_owned())
            }
            Some(_) => (DOCKER_HUB, name.to_owned()),
            None => (DOCKER_HUB, format!("library/{name}")),
        };
        let lower = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        let is_part = |part: &str| {
            part.bytes().all(|b| lower(b) || b"._-".contains(&b))
                && part.bytes().next().is_some_and(lower)
                && part.bytes().last().is_some_and(lower)
        };
        let is_host = |b: u8| b.is_ascii_alphanumeric() || b".-:[]".contains(&b);
        let is_tag = |tag: &str| {
            (1..=128).contains(&tag.len())
                && tag
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
                && !tag.starts_with(['.', '-'])
        };
        if repository.len() > 255
            || !repository.split('/').all(is_part)
            || !registry.bytes().all(is_host)
            || registry.starts_with(['.', '-', ':'])
            || !tag.is_none_or(is_tag)
        {
            return Err(format!(
                "{text:?} is no name of an image: it should be like \"python:3.12\" or \"registry.example.com/team/name:tag\""
            ));
        }
        Ok(Self {
            registry: registry.to_owned(),
            repository,
            tag: tag.map(str::to_owned),
            digest,
        })
    }

    /// As credentials name it.
    pub(super) fn registry(&self) -> &str {
        &self.registry
    }

    /// Where it is asked for: a tag that comes with a digest says nothing more.
    pub(super) fn wanted(&self) -> String {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => digest.to_string(),
            (None, Some(tag)) => tag.clone(),
            (None, None) => LATEST.to_owned(),
        }
    }

    /// In plain text only where no network is between.
    pub(super) fn is_loopback(&self) -> bool {
        let host = match self.registry.rsplit_once(':') {
            Some((host, port)) if !port.contains(']') => host,
            _ => &self.registry,
        };
        let address = host.trim_start_matches('[').trim_end_matches(']');
        host == "localhost" || address.parse().is_ok_and(|ip: IpAddr| ip.is_loopback())
    }

    /// Of the registry's API for this repository.
    pub(super) fn base(&self) -> String {
        let scheme = if self.is_loopback() { "http" } else { "https" };
        format!("{scheme}://{}/v2/{}", self.host(), self.repository)
    }

    /// Who is asked, with a port if the name has one.
    pub(super) fn host(&self) -> &str {
        match &*self.registry {
            // Docker Hub's API has another name than its images.
            DOCKER_HUB | "index.docker.io" => "registry-1.docker.io",
            host => host,
        }
    }
}

impl TryFrom<String> for Reference {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        Self::parse(&text)
    }
}

impl From<Reference> for String {
    fn from(reference: Reference) -> Self {
        reference.to_string()
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        match (&self.tag, &self.digest) {
            (tag, Some(digest)) => {
                tag.as_ref().map_or(Ok(()), |tag| write!(f, ":{tag}"))?;
                write!(f, "@{digest}")
            }
            (tag, None) => write!(f, ":{}", tag.as_deref().unwrap_or(LATEST)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_completed_as_docker_does() {
        let digest = format!("sha256:{}", "a".repeat(64));
        for (text, whole) in [
            ("python", "docker.io/library/python:latest"),
            ("python:3.12", "docker.io/library/python:3.12"),
            ("a/b", "docker.io/a/b:latest"),
            ("ghcr.io/a/b:c", "ghcr.io/a/b:c"),
            ("localhost/a", "localhost/a:latest"),
            ("localhost:5000/a/b", "localhost:5000/a/b:latest"),
            (&format!("a.b/c:d@{digest}"), &format!("a.b/c:d@{digest}")),
            (&format!("a.b/c@{digest}"), &format!("a.b/c@{digest}")),
        ] {
            assert_eq!(Reference::parse(text).expect(text).to_string(), whole);
        }
    }

    #[test]
    fn what_is_no_name_is_refused() {
        for text in [
            "",
            ":",
            "a:",
            "A",
            "a//b",
            "../a",
            "a/..",
            "a b",
            "a@sha256:1",
            "a:b/c?",
            "https://a.b/c",
            "a.b/",
        ] {
            assert!(Reference::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn only_registries_of_this_host_are_spoken_to_in_plain_text() {
        for (name, base) in [
            ("localhost:5000/a", "http://localhost:5000/v2/a"),
            ("127.0.0.1:5000/a", "http://127.0.0.1:5000/v2/a"),
            ("[::1]:5000/a", "http://[::1]:5000/v2/a"),
            (
                "127.0.0.1.example.com/a",
                "https://127.0.0.1.example.com/v2/a",
            ),
            ("python", "https://registry-1.docker.io/v2/library/python"),
        ] {
            assert_eq!(Reference::parse(name).expect(name).base(), base);
        }
    }
}
