//! What a VM needs to know of an image that it has instead of the host's programs.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// An image on the host's disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Names what it holds. A VM remembers it, and boots on no other.
    pub id: String,
    /// Where it comes from, in its owner's words: kept with the VM, for who boots it next.
    pub source: String,
    /// Its files, which VMs see below a writable layer of their own. They must not change while a VM has
    /// them (overlayfs forbids it). Absolute, without symlinks: those that come to lie there are not
    /// followed.
    pub rootfs: PathBuf,
    /// They are a directory of somebody's, and not what was unpacked.
    pub is_directory: bool,
    /// What its programs are started with, unless the caller says otherwise.
    pub env: Vec<(String, String)>,
}

/// What a VM keeps of the [`Image`] that it was made with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MadeWith {
    pub id: String,
    pub source: String,
}
