//! What reads bytes of images, in the form that the fuzz targets give it some.

use std::io::Read;
use std::path::Path;
use std::sync::Arc;

pub use super::challenge::Challenge;
use super::manifest::{Config, Document, Index};
use super::unpack::Unpacking;
use super::{Limits, Ownership, Platform, Result};

/// Unpacks archives over each other to `root`, which is made.
pub fn unpack<R: Read>(
    layers: impl IntoIterator<Item = R>,
    root: &Path,
    limits: Limits,
) -> Result<()> {
    let mut unpacking = Unpacking::begin(root, Ownership::Caller, limits, &Arc::default())?;
    layers
        .into_iter()
        .try_for_each(|layer| unpacking.layer(layer))
}

/// Reads a document as each kind that there is. Returns the digests that would be asked for next.
#[must_use]
pub fn documents(text: &[u8]) -> Vec<String> {
    let mut next = Vec::new();
    let platform = Platform::of_this_machine();
    if let Ok(Document {
        config,
        layers,
        manifests,
    }) = serde_json::from_slice(text)
    {
        for blob in config.iter().chain(&layers) {
            // Whether it can be unpacked is part of what is read.
            drop(blob.compression());
            next.push(blob.digest.to_string());
        }
        let chosen = Index { manifests }.choose(&platform);
        next.extend(chosen.map(|descriptor| descriptor.digest.to_string()));
    }
    if let Ok(Index { manifests }) = serde_json::from_slice(text) {
        let tagged = manifests.iter().filter(|manifest| manifest.tag().is_some());
        next.extend(tagged.map(|manifest| manifest.digest.to_string()));
    }
    if let Ok(config) = serde_json::from_slice::<Config>(text) {
        for (name, value) in config.execution.environment() {
            assert!(!name.is_empty() && !format!("{name}{value}").contains('\0'));
        }
        next.extend(config.rootfs.diff_ids.iter().map(ToString::to_string));
    }
    next
}
