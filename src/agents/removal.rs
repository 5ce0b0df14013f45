//! Taking entries out of the store, while others run on it and install into it.

use std::fs;
use std::path::Path;

use super::error::AgentError;
use super::install::{partial_path, remove_tree, store, sync_directory, try_lock};
use super::inventory::StoreEntry;
use super::lease::take_away;

/// What became of what was to be removed.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Removal {
    pub removed: Vec<StoreEntry>,
    pub kept: Vec<(StoreEntry, Why)>,
}

/// Why something was not removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// A VM runs on it, or an installer.
    InUse,
    /// Somebody is making something in it.
    Changing,
}

impl Why {
    /// As JavaScript sees it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::InUse => "in-use",
            Self::Changing => "installing",
        }
    }

    /// For a sentence.
    #[must_use]
    pub const fn clause(self) -> &'static str {
        match self {
            Self::InUse => "is in use by a running VM",
            Self::Changing => "is being installed",
        }
    }
}

impl Removal {
    /// An error if something had to stay.
    pub(super) fn complete(self, root: &Path) -> Result<Self, AgentError> {
        if self.kept.is_empty() {
            return Ok(self);
        }
        let kept = self.kept.iter();
        Err(AgentError::InUse {
            store: root.to_owned(),
            kept: kept
                .map(|(entry, why)| format!("{} {}", entry.name, why.clause()))
                .collect(),
        })
    }
}

/// Removes what nobody uses and nobody is just making. `pretend`: only looks.
pub(super) fn remove(
    root: &Path,
    entries: Vec<StoreEntry>,
    pretend: bool,
) -> Result<Removal, AgentError> {
    let mut removal = Removal::default();
    for entry in entries {
        match remove_one(root, &entry.name, pretend)? {
            None => removal.removed.push(entry),
            Some(why) => removal.kept.push((entry, why)),
        }
    }
    Ok(removal)
}

/// A rename takes it out of everyone's sight at once; what a crash then leaves is a partial directory,
/// which the next installation or pruning clears away.
fn remove_one(root: &Path, name: &str, pretend: bool) -> Result<Option<Why>, AgentError> {
    let entry = name.split('/').next().unwrap_or(name);
    let Some(_making) = try_lock(root, entry)? else {
        return Ok(Some(Why::Changing));
    };
    let Some(using) = take_away(root, name)? else {
        return Ok(Some(Why::InUse));
    };
    if pretend {
        return Ok(None);
    }
    let place = root.join(name);
    let aside = partial_path(root, entry);
    fs::rename(&place, &aside)
        // On the disk before the first file of it is gone.
        .and_then(|()| sync_directory(place.parent().unwrap_or(root)))
        .map_err(|error| store("can't remove", &place, error))?;
    // Whoever waits to use it finds that it is not there.
    drop(using);
    remove_tree(&aside);
    Ok(None)
}
