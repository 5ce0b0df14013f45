//! What the images of the store were asked for as: the newest that each name has led to.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::store::{entries, make_private};
use super::users::write_durably;
use super::{Digest, ImageError, Reference, Result};

/// A name of an image.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Name {
    /// As `docker.io/library/python:3.12`, or `oci:/path/of/a/layout:tag`.
    pub(super) name: String,
    digest: String,
}

impl Name {
    pub(super) fn is_of(&self, image: &Digest) -> bool {
        self.digest == image.to_string()
    }
}

fn directory(root: &Path) -> PathBuf {
    root.join("names")
}

fn path(root: &Path, name: &str) -> PathBuf {
    directory(root).join(Digest::of(Sha256::new_with_prefix(name)).hex())
}

/// From now on `name` is this image, whose lease the caller has.
pub(super) fn give(root: &Path, name: &str, image: &Digest) -> Result<()> {
    make_private(&directory(root))?;
    let path = path(root, name);
    let failed = |error| ImageError::host("can't write", &path, error);
    let name = Name {
        name: name.to_owned(),
        digest: image.to_string(),
    };
    let text = serde_json::to_vec(&name).map_err(|error| failed(error.into()))?;
    if fs::read(&path).is_ok_and(|before| before == text) {
        return Ok(());
    }
    write_durably(&path, &text).map_err(failed)
}

pub(super) fn take(root: &Path, name: &str) -> Result<()> {
    let path = path(root, name);
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(ImageError::host("can't remove", &path, error))
        }
        _ => Ok(()),
    }
}

pub(super) fn all(root: &Path) -> Result<Vec<Name>> {
    let mut names: Vec<Name> = entries(&directory(root))?
        .into_iter()
        // What is half written, or was removed meanwhile, names nothing.
        .filter(|path| path.extension().is_none())
        .filter_map(|path| serde_json::from_slice(&fs::read(path).ok()?).ok())
        .collect();
    names.sort_unstable_by(|one, other| one.name.cmp(&other.name));
    Ok(names)
}

/// What a caller means by one word.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wanted {
    /// A name, in full.
    Name(String),
    /// `sha256:` and the first digits of a digest, 12 or more.
    Digest(String),
}

impl Wanted {
    pub fn parse(text: &str) -> Result<Self, String> {
        if let Some(hex) = text.strip_prefix("sha256:") {
            let is_digest = (12..=64).contains(&hex.len())
                && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
            return if is_digest {
                Ok(Self::Digest(text.to_owned()))
            } else {
                Err(format!(
                    "{text:?} is no digest: it has 12 to 64 lower-case hexadecimal digits after sha256:"
                ))
            };
        }
        if text
            .strip_prefix("oci:")
            .is_some_and(|path| path.starts_with('/'))
        {
            return Ok(Self::Name(text.to_owned()));
        }
        Ok(Self::Name(Reference::parse(text)?.to_string()))
    }
}
