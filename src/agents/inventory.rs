//! What lies in the store, and which of it this version of agentvm uses.

use std::fs;
use std::io;
use std::path::Path;

use super::adapter;
use super::catalog::BuiltIn;
use super::compile_cache;
use super::error::AgentError;
use super::install::{self, store};
use super::lease;
use super::runtime;
use super::version::Version;

/// Something in the store: an entry, or a part of one that nothing uses any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreEntry {
    /// Its directory, relative to the store.
    pub name: String,
    /// The agent that it belongs to, as `createSession` takes it; `node` for a runtime.
    pub agent: String,
    pub version: String,
    /// Size of its files, without the parts that are listed by themselves.
    pub bytes: u64,
    pub used: Used,
    /// Whether a VM runs on it at this moment, of whatever process.
    pub in_use: bool,
}

/// What this version of agentvm does with an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Used {
    /// It is what `createSession` runs.
    Pinned,
    /// It is what a client runs that asks for this version.
    OnRequest,
    /// Nothing: it belongs to another version of agentvm.
    Never,
}

impl Used {
    /// As JavaScript sees it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pinned => "pinned",
            Self::OnRequest => "on-request",
            Self::Never => "unused",
        }
    }
}

/// Everything that is complete, by name. `package`: root of our npm package, which has the adapters.
pub(super) fn list(root: &Path, package: &Path) -> Result<Vec<StoreEntry>, AgentError> {
    let failed = |error| store("can't read", root, error);
    let mut entries = Vec::new();
    for name in names(root).map_err(failed)? {
        if name.starts_with('.') {
            continue;
        }
        // Somebody may remove it at this moment.
        if let Some(marker) = install::marker(&root.join(&name)) {
            entries.extend(entry(root, package, name, marker.bytes));
        }
    }
    entries.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(entries)
}

/// An entry and its unused parts; nothing for what has no name of ours.
fn entry(root: &Path, package: &Path, name: String, bytes: u64) -> Vec<StoreEntry> {
    let Some((agent, version)) = parse(&name) else {
        return Vec::new();
    };
    let used = used(agent, version, &name);
    let mut entry = StoreEntry {
        agent: agent.to_owned(),
        version: version.to_owned(),
        bytes,
        used,
        in_use: lease::is_in_use(root, &name),
        name,
    };
    let mut unused = Vec::new();
    let needed = needed_parts(package, &entry);
    for part in names(&root.join(&entry.name)).unwrap_or_default() {
        if !(part.starts_with(adapter::PREFIX) || part.starts_with(compile_cache::PREFIX)) {
            continue;
        }
        let name = format!("{}/{part}", entry.name);
        let bytes = size(&root.join(&name));
        if used == Used::Never || needed.contains(&part) {
            entry.bytes += bytes;
        } else {
            unused.push(StoreEntry {
                agent: entry.agent.clone(),
                version: entry.version.clone(),
                bytes,
                used: Used::Never,
                in_use: lease::is_in_use(root, &name),
                name,
            });
        }
    }
    unused.push(entry);
    unused
}

/// `pi` and `0.87.1` of `pi-0.87.1-3c237068ba42`, and of `pi-0.87.1-unpinned-3c237068ba42`.
fn parse(entry: &str) -> Option<(&str, &str)> {
    let (agent, rest) = entry.split_once('-')?;
    let (version, _hash) = rest.rsplit_once('-')?;
    let version = version.strip_suffix("-unpinned").unwrap_or(version);
    Some((agent, version))
}

fn used(agent: &str, version: &str, entry: &str) -> Used {
    if entry == *runtime::ENTRY {
        return Used::Pinned;
    }
    let Some(agent) = BuiltIn::find(agent) else {
        return Used::Never;
    };
    if *agent.definition().entry == *entry {
        return Used::Pinned;
    }
    let asked_for = Version::parse(version).ok();
    let asked_for = asked_for.and_then(|version| agent.entry(Some(&version)).ok());
    if asked_for.is_some_and(|asked_for| asked_for == entry) {
        Used::OnRequest
    } else {
        Used::Never
    }
}

/// Names of the directories in an entry, beside its packages, that this version uses.
fn needed_parts(package: &Path, entry: &StoreEntry) -> Vec<String> {
    let Some(agent) = BuiltIn::find(&entry.agent) else {
        return Vec::new();
    };
    let dist = adapter::dist(package, agent.definition().adapter);
    // In a checkout that is not built there is none.
    let Ok(adapter) = adapter::name(agent.name(), &dist) else {
        return Vec::new();
    };
    let program = Path::new(&adapter).join(adapter::MAIN);
    vec![compile_cache::name(&runtime::ENTRY, &program), adapter]
}

/// Of a directory that may not be there.
fn names(directory: &Path) -> io::Result<Vec<String>> {
    match fs::read_dir(directory) {
        Ok(found) => found
            .map(|found| Ok(found?.file_name().to_string_lossy().into_owned()))
            .collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

fn size(path: &Path) -> u64 {
    let Ok(data) = fs::symlink_metadata(path) else {
        return 0;
    };
    if data.is_dir() {
        let names = names(path).unwrap_or_default();
        names.iter().map(|name| size(&path.join(name))).sum()
    } else {
        data.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entrys_name_tells_agent_and_version() {
        for (name, parsed) in [
            ("pi-0.87.1-3c237068ba42", Some(("pi", "0.87.1"))),
            ("pi-1.0.0-rc.1-3c237068ba42", Some(("pi", "1.0.0-rc.1"))),
            ("pi-0.1.0-unpinned-3c237068ba42", Some(("pi", "0.1.0"))),
            ("something", None),
        ] {
            assert_eq!(parse(name), parsed, "{name}");
        }
    }
}
