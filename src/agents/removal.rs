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

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]
mod tests {
    use super::*;
    use crate::agents::install::{Partial, lock};
    use crate::agents::inventory::{self, Used};
    use crate::agents::lease::Lease;
    use crate::agents::{AgentStore, runtime};
    use crate::agents::{BuiltIn, Version};
    use crate::error::{Code, Error};

    /// A store with empty entries of these names.
    fn store_with(entries: &[&str]) -> (tempfile::TempDir, AgentStore) {
        let root = tempfile::tempdir().unwrap();
        for entry in entries {
            make(root.path(), entry);
        }
        let store = AgentStore::new(root.path().into(), "/nowhere".into(), "/nowhere".into());
        (root, store)
    }

    fn make(root: &Path, entry: &str) {
        let directory = root.join(entry);
        fs::create_dir_all(directory.join("node_modules/a")).unwrap();
        fs::write(directory.join("node_modules/a/index.js"), "1").unwrap();
        fs::write(directory.join("entry.json"), r#"{"format":1,"bytes":7}"#).unwrap();
    }

    fn names(entries: &[StoreEntry]) -> Vec<&str> {
        entries.iter().map(|entry| entry.name.as_str()).collect()
    }

    fn left(root: &Path) -> Vec<String> {
        let found = fs::read_dir(root).unwrap();
        let mut names: Vec<_> = found
            .map(|found| found.unwrap().file_name().into_string().unwrap())
            .filter(|name| name != ".locks")
            .collect();
        names.sort();
        names
    }

    const OLD: &str = "pi-0.1.0-aaaaaaaaaaaa";
    const OLD_NODE: &str = "node-20.0.0-bbbbbbbbbbbb";

    #[tokio::test]
    async fn only_what_no_client_of_this_version_can_use_is_pruned() {
        let on_request = BuiltIn::Pi.entry(Some(&Version::parse("0.2.0").unwrap()));
        let on_request = on_request.unwrap();
        let pinned = &*BuiltIn::Pi.definition().entry;
        let used = [pinned, &**runtime::ENTRY, &*on_request];
        let (root, store) = store_with(&[OLD, OLD_NODE, used[0], used[1], used[2]]);
        let pretended = store.prune(true).await.unwrap();
        assert_eq!(names(&pretended.removed), [OLD_NODE, OLD]);
        assert_eq!(left(root.path()).len(), 5);
        assert_eq!(store.prune(false).await.unwrap(), pretended);
        let mut used = used.map(str::to_owned);
        used.sort();
        assert_eq!(left(root.path()), used);
    }

    #[tokio::test]
    async fn what_somebody_runs_on_stays_until_he_has_ended() {
        let (root, store) = store_with(&[OLD, OLD_NODE]);
        let lease = Lease::take(root.path(), OLD).await.unwrap();
        let pruned = store.prune(false).await.unwrap();
        assert_eq!(names(&pruned.removed), [OLD_NODE]);
        assert_eq!(pruned.kept[0].1, Why::InUse);
        let clone = lease.clone();
        drop(lease);
        let error = Error::from(store.remove(BuiltIn::Pi, None).await.unwrap_err());
        assert_eq!(error.code, Code::AgentInUse);
        assert!(
            error.message.contains(&format!("{OLD} is in use")),
            "{error}"
        );
        drop(clone);
        let removal = store.remove(BuiltIn::Pi, None).await.unwrap();
        assert_eq!(names(&removal.removed), [OLD]);
        assert!(left(root.path()).is_empty());
    }

    #[tokio::test]
    async fn what_is_just_being_made_stays() {
        let (root, store) = store_with(&[OLD]);
        let making = lock(root.path(), OLD, |_| {}).await.unwrap();
        let partial = Partial::new(root.path(), OLD, making).unwrap();
        let pruned = store.prune(false).await.unwrap();
        assert_eq!(pruned.kept[0].1, Why::Changing);
        assert!(partial.path.exists());
        assert!(root.path().join(OLD).exists());
    }

    #[tokio::test]
    async fn one_version_is_removed_and_others_stay() {
        let (root, store) = store_with(&[OLD, "pi-0.2.0-cccccccccccc"]);
        let removal = store.remove(BuiltIn::Pi, Some("0.2.0")).await.unwrap();
        assert_eq!(names(&removal.removed), ["pi-0.2.0-cccccccccccc"]);
        assert_eq!(left(root.path()), [OLD]);
        let again = store.remove(BuiltIn::Pi, Some("0.2.0")).await.unwrap();
        assert_eq!(again, Removal::default());
    }

    #[tokio::test]
    async fn a_removal_that_was_killed_half_way_is_finished_by_the_next() {
        let (root, store) = store_with(&[]);
        let aside = partial_path(root.path(), OLD);
        fs::create_dir_all(aside.join("node_modules")).unwrap();
        assert_eq!(store.list().await.unwrap(), []);
        store.prune(false).await.unwrap();
        assert!(left(root.path()).is_empty());
    }

    #[tokio::test]
    async fn an_old_adapter_goes_and_the_one_of_this_version_stays() {
        let package = tempfile::tempdir().unwrap();
        let directory = BuiltIn::Pi.definition().adapter;
        let dist = crate::agents::adapter::dist(package.path(), directory);
        fs::create_dir_all(&dist).unwrap();
        fs::write(dist.join("main.js"), "1").unwrap();
        let current = crate::agents::adapter::name("pi", &dist).unwrap();
        let entry = &*BuiltIn::Pi.definition().entry;
        let (root, _) = store_with(&[entry]);
        for adapter in [&current, "adapter-0"] {
            let directory = root.path().join(entry).join(adapter);
            fs::create_dir(&directory).unwrap();
            fs::write(directory.join("main.js"), "123").unwrap();
        }
        let store = AgentStore::new(root.path().into(), package.path().into(), "/nowhere".into());
        let old = format!("{entry}/adapter-0");
        let listed = inventory::list(root.path(), package.path()).unwrap();
        assert_eq!(names(&listed), [entry, &old]);
        // The marker's bytes, and those of the adapter that is in use.
        assert_eq!((listed[0].bytes, listed[0].used), (7 + 3, Used::Pinned));
        let _using = Lease::take(root.path(), &format!("{entry}/{current}"))
            .await
            .unwrap();
        let pruned = store.prune(false).await.unwrap();
        assert_eq!(names(&pruned.removed), [&old]);
        assert!(root.path().join(entry).join(current).exists());
    }
}
