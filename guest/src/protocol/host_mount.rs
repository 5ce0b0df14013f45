//! What of the host a VM is shown because its owner asked for it.

use serde::{Deserialize, Serialize};

use super::Bytes;

/// A directory or file of the host in the VM's root, without what is mounted below it on the host.
#[derive(Debug, Serialize, Deserialize)]
pub struct HostMount {
    /// Absolute, without `.`, `..` or empty components. What is missing of it is made.
    pub path: String,
    pub source: HostSource,
    /// Whether the source is a directory, not a file.
    pub directory: bool,
    pub read_only: bool,
    /// Directories below it that the VM sees empty, relative to it.
    pub hidden: Vec<Bytes>,
    /// Where the host has mounted something below a [`HostSource::Descriptor`] that the VM can write to:
    /// shown empty, too, and for the VM neither to remove nor to rename.
    pub submounts: Vec<Bytes>,
}

#[derive(Debug, Serialize, Deserialize)]
pub enum HostSource {
    /// A detached mount that a privileged host made, as index into the packet's trees.
    Descriptor(u32),
    /// A path of the host without symlinks, and what the host saw there.
    Path { path: Bytes, dev: u64, ino: u64 },
}
