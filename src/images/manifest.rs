//! The documents of an image: index, manifest, configuration, in OCI's words and in Docker's.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::{Digest, ImageError, MAX_DOCUMENT, Result};

/// Refers to a blob.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Descriptor {
    #[serde(default)]
    media_type: String,
    pub(super) digest: Digest,
    pub(super) size: u64,
    platform: Option<Platform>,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

/// How a layer's archive is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Compression {
    None,
    Gzip,
    Zstd,
}

impl Descriptor {
    /// Of a document, whose type it says itself.
    pub(super) const fn of(digest: Digest, size: u64) -> Self {
        Self {
            media_type: String::new(),
            digest,
            size,
            platform: None,
            annotations: BTreeMap::new(),
        }
    }

    /// Refuses one that is too large for a document.
    pub(super) fn check_document(&self) -> Result<()> {
        if self.size > MAX_DOCUMENT {
            return Err(ImageError::TooLarge(format!(
                "{} says that it has {} bytes: the limit for JSON is {MAX_DOCUMENT}",
                self.digest, self.size
            )));
        }
        Ok(())
    }

    pub(super) fn tag(&self) -> Option<&str> {
        self.annotations
            .get("org.opencontainers.image.ref.name")
            .map(String::as_str)
    }

    pub(super) fn compression(&self) -> Result<Compression> {
        match &*self.media_type {
            "application/vnd.oci.image.layer.v1.tar"
            | "application/vnd.oci.image.layer.nondistributable.v1.tar" => Ok(Compression::None),
            "application/vnd.oci.image.layer.v1.tar+gzip"
            | "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"
            | "application/vnd.docker.image.rootfs.diff.tar.gzip" => Ok(Compression::Gzip),
            "application/vnd.oci.image.layer.v1.tar+zstd"
            | "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd" => {
                Ok(Compression::Zstd)
            }
            other => Err(ImageError::Invalid(format!(
                "the layer {} is of an unknown type, {other:?}",
                self.digest
            ))),
        }
    }
}

/// A manifest if it has a `config`, an index otherwise.
#[derive(Debug, Deserialize)]
pub(super) struct Document {
    pub(super) config: Option<Descriptor>,
    #[serde(default)]
    pub(super) layers: Vec<Descriptor>,
    #[serde(default)]
    pub(super) manifests: Vec<Descriptor>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Index {
    pub(super) manifests: Vec<Descriptor>,
}

impl Index {
    pub(super) fn choose(mut self, wanted: &Platform) -> Result<Descriptor> {
        let first = |fits: &dyn Fn(Option<&Platform>) -> bool| {
            let mut manifests = self.manifests.iter();
            manifests.position(|manifest| fits(manifest.platform.as_ref()))
        };
        let named = first(&|platform| platform.is_some_and(|platform| platform.is(wanted)));
        // One that does not say is looked at by its configuration.
        if let Some(at) = named.or_else(|| first(&|platform| platform.is_none())) {
            return Ok(self.manifests.swap_remove(at));
        }
        let all = self.manifests.iter().filter_map(|of| of.platform.as_ref());
        let found: Vec<_> = all.map(ToString::to_string).collect();
        Err(ImageError::Platform {
            wanted: wanted.to_string(),
            found: found.join(", "),
        })
    }
}

/// A kind of machine, in Go's words.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Platform {
    os: String,
    architecture: String,
}

impl Platform {
    #[must_use]
    pub fn of_this_machine() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        Self {
            os: "linux".to_owned(),
            architecture: architecture.to_owned(),
        }
    }

    pub(super) fn is(&self, wanted: &Self) -> bool {
        self == wanted
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)
    }
}

/// What an image may give every program: as much as one argument of a program may have.
const MAX_ENVIRONMENT: usize = 128 << 10;
const MAX_VARIABLES: usize = 1000;

/// What an image says about itself.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Config {
    os: String,
    architecture: String,
    #[serde(default, rename = "config")]
    pub(super) execution: Execution,
    pub(super) rootfs: RootFs,
}

impl Config {
    /// Refuses what is for another machine, or not the configuration of this image's layers.
    pub(super) fn check(&self, image: &Digest, layers: usize) -> Result<()> {
        let wanted = Platform::of_this_machine();
        let found = Platform {
            os: self.os.clone(),
            architecture: self.architecture.clone(),
        };
        if !found.is(&wanted) {
            return Err(ImageError::Platform {
                wanted: wanted.to_string(),
                found: found.to_string(),
            });
        }
        if self.rootfs.diff_ids.len() != layers {
            return Err(ImageError::Invalid(format!(
                "image {image} has {layers} layers, but its configuration names {}",
                self.rootfs.diff_ids.len()
            )));
        }
        let variables = self.execution.env.as_deref().unwrap_or_default();
        let bytes: usize = variables.iter().map(String::len).sum();
        if variables.len() > MAX_VARIABLES || bytes > MAX_ENVIRONMENT {
            return Err(ImageError::TooLarge(format!(
                "it gives its programs {} variables of {bytes} bytes, and {MAX_VARIABLES} of {MAX_ENVIRONMENT} bytes \
                 are the most",
                variables.len()
            )));
        }
        Ok(())
    }
}

/// How its programs are meant to be run.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Execution {
    /// `NAME=value`
    pub env: Option<Vec<String>>,
}

impl Execution {
    /// What programs are given, as names and values.
    #[must_use]
    pub fn environment(&self) -> Vec<(String, String)> {
        let pairs = self.env.iter().flatten();
        pairs
            .filter_map(|pair| pair.split_once('='))
            // Neither a program nor the guest could be told.
            .filter(|(name, value)| {
                !name.is_empty() && !value.contains('\0') && !name.contains('\0')
            })
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect()
    }
}

#[derive(Debug, Clone, Deserialize)]
pub(super) struct RootFs {
    #[serde(default)]
    pub(super) diff_ids: Vec<Digest>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_environment_is_no_larger_than_programs_can_be_given() {
        let wanted = Platform::of_this_machine();
        let image = format!("sha256:{}", "0".repeat(64));
        let image = Digest::try_from(image).expect("a digest");
        let check = |env: Vec<String>| {
            let config = Config {
                os: wanted.os.clone(),
                architecture: wanted.architecture.clone(),
                execution: Execution { env: Some(env) },
                rootfs: RootFs {
                    diff_ids: Vec::new(),
                },
            };
            config.check(&image, 0)
        };
        let variable = "A=".to_owned();
        assert!(check(vec![variable.clone(); MAX_VARIABLES]).is_ok());
        for env in [
            vec![variable; MAX_VARIABLES + 1],
            vec!["x".repeat(MAX_ENVIRONMENT + 1)],
        ] {
            let refused = check(env);
            assert!(matches!(refused, Err(ImageError::TooLarge(_))));
        }
    }
}
