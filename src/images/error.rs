//! What can go wrong with an image, each variant with the thing that failed.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::Digest;
use crate::error::{Code, Error};

#[derive(Debug, Error)]
pub enum ImageError {
    /// There is no such layout, tag or platform.
    #[error("{0}")]
    NotFound(String),
    /// It is not what the specification says, or not what its digest says.
    #[error("the image is not usable: {0}")]
    Invalid(String),
    /// Its bytes are not those that were named.
    #[error("the image is not usable: a blob should be {wanted}, but is sha256:{found}")]
    Digest { wanted: Digest, found: String },
    /// It is for another kind of machine.
    #[error("the image is for {found}, and this machine is {wanted}")]
    Platform { wanted: String, found: String },
    /// The registry does not give it to this user.
    #[error("{0}")]
    Denied(String),
    /// It could not be fetched.
    #[error("{0}")]
    Pull(String),
    /// It exceeds a limit.
    #[error("the image is too large: {0}")]
    TooLarge(String),
    /// A file of this host can't be used.
    #[error("{what} {path:?}: {source}")]
    Host {
        what: &'static str,
        path: PathBuf,
        source: io::Error,
    },
}

impl ImageError {
    pub(super) fn host(what: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Host {
            what,
            path: path.to_owned(),
            source,
        }
    }

    /// A stream that can't be read on: what it holds is broken.
    pub(super) fn reading(digest: &Digest, error: io::Error) -> Self {
        match error.downcast::<Self>() {
            Ok(own) => own,
            Err(error) => Self::Invalid(format!("{digest}: {error}")),
        }
    }
}

impl From<ImageError> for Error {
    fn from(error: ImageError) -> Self {
        let code = match &error {
            ImageError::NotFound(_) => Code::ImageNotFound,
            ImageError::Invalid(_) | ImageError::Digest { .. } => Code::ImageInvalid,
            ImageError::Denied(_) => Code::ImageDenied,
            ImageError::Pull(_) => Code::ImagePullFailed,
            ImageError::Platform { .. } => Code::ImageUnsupported,
            ImageError::TooLarge(_) => Code::ImageTooLarge,
            ImageError::Host { source, .. } => match source.raw_os_error() {
                Some(libc::ENOSPC | libc::EDQUOT) => Code::StoreFull,
                Some(raw) => Code::from_errno(raw),
                None => Code::Internal,
            },
        };
        Self::new(code, error.to_string())
    }
}
