//! The VMs that there are in a data directory, whoever has made them.

use std::fs;
use std::io;
use std::path::Path;
use std::time::UNIX_EPOCH;

use serde::Deserialize;

use super::directory::{check_owner, host};
use crate::vm::VmError;

/// A VM that was made and not destroyed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Made {
    pub key: Vec<String>,
    /// Milliseconds since the epoch.
    pub created_at: u64,
}

/// What a VM's `vm.json` holds.
#[derive(Deserialize)]
struct Marker {
    key: Vec<String>,
}

/// In `<dataDir>/vms`, by key. One that is just being made is none yet.
pub(super) fn list(vms: &Path) -> Result<Vec<Made>, VmError> {
    check_owner(vms)?;
    let entries = match fs::read_dir(vms) {
        // Nothing has needed it yet.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(|error| host("can't list", vms, error))?,
    };
    let mut made = Vec::new();
    for entry in entries {
        let path = entry
            .map_err(|error| host("can't list", vms, error))?
            .path();
        // With an extension it is what a removal has left.
        if path.extension().is_none() {
            let marker = path.join("vm.json");
            made.extend(read(&marker).map_err(|error| host("can't read", &marker, error))?);
        }
    }
    made.sort_unstable_by(|one, other| one.key.cmp(&other.key));
    Ok(made)
}

/// The VM in a directory, if there is one that can be read.
#[must_use]
pub fn made(dir: &Path) -> Option<Made> {
    read(&dir.join("vm.json")).ok().flatten()
}

fn read(marker: &Path) -> io::Result<Option<Made>> {
    let text = match fs::read(marker) {
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            return Ok(None);
        }
        text => text?,
    };
    let Marker { key } = serde_json::from_slice(&text)?;
    let written = fs::metadata(marker)?.modified()?;
    let since = written.duration_since(UNIX_EPOCH).unwrap_or_default();
    let created_at = u64::try_from(since.as_millis()).unwrap_or(u64::MAX);
    Ok(Some(Made { key, created_at }))
}
