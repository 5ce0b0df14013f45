//! What can go wrong with an image, each variant with the thing that failed.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::{Digest, Source, Stored};
use crate::error::{Code, Error};

/// As much is shown of each end of a text.
const SHOWN: usize = 400;

/// A text that may hold what an image or a registry says, for a terminal: nothing in it acts on one, and it
/// is no longer than anybody reads. Its end stays, which may say what to do.
#[must_use]
pub fn shown(text: &str) -> String {
    let length = text.chars().count();
    let is_long = length > 2 * SHOWN;
    let mut shown = String::new();
    for (at, own) in text.chars().enumerate() {
        if is_long && (SHOWN..length - SHOWN).contains(&at) {
            if at == SHOWN {
                shown.push('…');
            }
        } else if matches!(own, '"' | '\'' | '\\') {
            shown.push(own);
        } else {
            shown.extend(own.escape_debug());
        }
    }
    shown
}

fn shown_path(path: &Path) -> String {
    format!("\"{}\"", shown(&path.to_string_lossy()))
}

#[derive(Debug, Error)]
pub enum ImageError {
    /// There is no such layout, tag or platform.
    #[error("{}", shown(.0))]
    NotFound(String),
    /// It is not what the specification says, or not what its digest says.
    #[error("it is not usable: {}", shown(.0))]
    Invalid(String),
    /// Its bytes are not those that were named.
    #[error("it is not usable: a blob should be {wanted}, but is sha256:{found}")]
    Digest { wanted: Digest, found: String },
    /// It is for another kind of machine.
    #[error("it is for {}, and this machine is {wanted}", shown(.found))]
    Platform { wanted: String, found: String },
    /// The registry does not give it to this user.
    #[error("{}", shown(.0))]
    Denied(String),
    /// It could not be fetched.
    #[error("{}", shown(.0))]
    Pull(String),
    /// It exceeds a limit.
    #[error("it is too large: {}", shown(.0))]
    TooLarge(String),
    /// What is wrong with which image.
    #[error("{image}: {problem}")]
    Of { image: String, problem: Box<Self> },
    /// It would fill the disk.
    #[error(
        "an image leaves only {free} bytes free on the file system of {path:?}, where {min_free} stay free (minFreeDiskBytes): free some space, or set another imageStoreDir"
    )]
    DiskFull {
        path: PathBuf,
        free: u64,
        min_free: u64,
    },
    /// It would take the disk's room for files.
    #[error(
        "an image leaves only {free} files free on the file system of {path:?}, where {min_free} stay free (minFreeDiskBytes, of which each counts as 16 KiB): remove some, or set another imageStoreDir"
    )]
    DiskFullOfFiles {
        path: PathBuf,
        free: u64,
        min_free: u64,
    },
    /// The first digits of a digest are those of several images.
    #[error("several images begin like this: {0}")]
    Ambiguous(String),
    /// It can't be removed.
    #[error("the image {} is used by a VM", .0.digest)]
    InUse(Box<Stored>),
    /// Whoever asked for it has given up.
    #[error("nobody waits for the image any more")]
    Abandoned,
    /// A file of this host can't be used.
    #[error("{what} {}: {source}", shown_path(.path))]
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

    /// Names the image, where that is not told yet.
    pub(super) fn of(self, source: &Source) -> Self {
        match self {
            Self::Invalid(_) | Self::Digest { .. } | Self::Platform { .. } | Self::TooLarge(_) => {
                Self::Of {
                    image: source.to_string(),
                    problem: Box::new(self),
                }
            }
            told => told,
        }
    }

    fn code(&self) -> Code {
        match self {
            Self::NotFound(_) => Code::ImageNotFound,
            Self::Invalid(_) | Self::Digest { .. } => Code::ImageInvalid,
            Self::Denied(_) => Code::ImageDenied,
            Self::Pull(_) => Code::ImagePullFailed,
            Self::Platform { .. } => Code::ImageUnsupported,
            Self::TooLarge(_) => Code::ImageTooLarge,
            Self::Of { problem, .. } => problem.code(),
            Self::DiskFull { .. } | Self::DiskFullOfFiles { .. } => Code::StoreFull,
            Self::Ambiguous(_) => Code::InvalidArgument,
            Self::InUse(_) => Code::ImageInUse,
            Self::Abandoned => Code::Aborted,
            Self::Host { source, .. } => match source.raw_os_error() {
                Some(libc::ENOSPC | libc::EDQUOT) => Code::StoreFull,
                Some(raw) => Code::from_errno(raw),
                None => Code::Internal,
            },
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
        Self::new(error.code(), error.to_string())
    }
}
