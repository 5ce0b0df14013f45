//! Where an image is taken from.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::Reference;

/// What a caller names an image by. A VM keeps it as JSON, beside what it has found there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum Source {
    /// An image in a registry.
    Registry { reference: Reference },
    /// An OCI image layout directory; without a tag it holds one image.
    OciLayout { path: PathBuf, tag: Option<String> },
    /// A directory that is a root file system. It is used where it is, and must not change.
    Rootfs { path: PathBuf },
}

impl Source {
    /// A directory, as the root of whoever is told its name finds it.
    pub(super) fn absolute(path: &Path) -> PathBuf {
        std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
    }

    /// For progress: as Docker and skopeo name it.
    pub(super) fn name(&self) -> String {
        match self {
            Self::Registry { reference } => reference.to_string(),
            Self::OciLayout { path, tag } => {
                let tag = tag.as_ref().map(|tag| format!(":{tag}"));
                format!("oci:{}{}", path.display(), tag.unwrap_or_default())
            }
            Self::Rootfs { path } => path.display().to_string(),
        }
    }

    /// `path` may be relative to this process's working directory.
    #[must_use]
    pub fn oci_layout(path: &Path, tag: Option<String>) -> Self {
        let path = Self::absolute(path);
        Self::OciLayout { path, tag }
    }

    /// The same for a root file system.
    #[must_use]
    pub fn rootfs(path: &Path) -> Self {
        let path = Self::absolute(path);
        Self::Rootfs { path }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Registry { reference } => write!(f, "the image {reference}"),
            Self::OciLayout { path, tag } => {
                write!(f, "the image in {}", path.display())?;
                tag.as_ref()
                    .map_or(Ok(()), |tag| write!(f, " tagged {tag:?}"))
            }
            Self::Rootfs { path } => write!(f, "the root file system {}", path.display()),
        }
    }
}
