//! Images: from a registry, an OCI image layout or a directory to a root file system.
//!
//! A [`Source`] says where an image is taken from. [`Images`] is the store of those that are unpacked,
//! each in a directory named by the digest of its manifest. What an image holds is anybody's bytes:
//! every size is bounded, every digest is checked, and no name in it leads out of the directory that it
//! is unpacked to.

pub use bounds::Limits;
pub use digest::Digest;
pub use error::{ImageError, shown};
pub use inventory::{Files, Removal, Stored};
pub use manifest::{Execution, Platform};
pub use names::Wanted;
pub use pull::{Progress, Step};
pub use reference::Reference;
pub use source::Source;
pub use store::{Image, Images};
pub use unpack::Ownership;
pub use users::Vms;

mod bounds;
mod challenge;
mod digest;
mod error;
#[doc(hidden)]
pub mod fuzzed;
mod inventory;
mod layout;
mod manifest;
mod names;
mod pull;
mod reference;
mod registry;
mod source;
mod store;
mod unpack;
mod users;
mod work;

pub type Result<T, E = ImageError> = std::result::Result<T, E>;

/// Manifests and configurations are small; a larger one is not read.
const MAX_DOCUMENT: u64 = 4 << 20;

/// An index may lead to an index, for the platforms of one tag. No real one goes deeper.
const MAX_NESTING: u32 = 3;

#[cfg(test)]
mod pull_tests;
#[cfg(test)]
mod tests;
