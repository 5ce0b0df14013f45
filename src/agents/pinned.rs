//! The npm packages of an entry: pinned by a lockfile of this crate, or in another version that somebody
//! asked for by its number.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde::Deserialize;
use uuid::Uuid;

use super::error::AgentError;
use super::install::store;
use super::version::Version;

/// Raise when what we make of the same packages changes (see `install.rs`, `runtime.rs`): they then
/// get entries of new names.
const LAYOUT_VERSION: u32 = 1;

/// Namespace of the version-5 UUIDs that name a lockfile.
const LOCK_NAMESPACE: Uuid = Uuid::from_u128(0x2f1e_90aa_6d0b_4c55_b8f7_3d52_10c9_7e64);

/// Packages that make one entry of the store.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pinned {
    /// First part of the entry's name.
    pub(super) name: &'static str,
    /// Version of `package`: second part of the entry's name.
    pub(super) version: &'static str,
    /// The package that all others are dependencies of.
    pub(super) package: &'static str,
    /// `package.json` and `package-lock.json` as npm reads them.
    pub(super) manifest: &'static str,
    pub(super) lock: &'static str,
    /// Files without which the entry would be useless.
    pub(super) files: &'static [&'static str],
}

impl Pinned {
    /// Name of the entry: its directory in the store. Hashes the lockfile: kept by who needs it often.
    pub(super) fn entry(&self) -> String {
        let content = format!("{LAYOUT_VERSION}\0{}\0{}", self.manifest, self.lock);
        format!("{}-{}-{}", self.name, self.version, hash(&content))
    }

    /// Name of the entry of the same packages with another version of the main one, which this crate has
    /// no lockfile for.
    pub(super) fn entry_in_version(&self, version: &Version) -> Result<String, AgentError> {
        Ok(self.in_version(version)?.entry)
    }

    /// What npm is to install.
    pub(super) fn packages(&self) -> Packages {
        Packages {
            entry: self.entry(),
            title: format!("{} {}", self.name, self.version),
            manifest: Cow::Borrowed(self.manifest),
            versions: Versions::Locked(self.lock),
            files: self.files,
        }
    }

    /// The same with another version of the main package.
    pub(super) fn in_version(&self, version: &Version) -> Result<Packages, AgentError> {
        let title = format!("{} {version}", self.name);
        let manifest = self.manifest_of(version);
        let manifest = manifest.map_err(|source| AgentError::Lockfile {
            title: title.clone(),
            source,
        })?;
        let content = format!("{LAYOUT_VERSION}\0{manifest}");
        let hash = hash(&content);
        Ok(Packages {
            entry: format!("{}-{version}-{UNPINNED}-{hash}", self.name),
            title,
            manifest: Cow::Owned(manifest),
            versions: Versions::Resolved {
                wanted: format!("{} {version}", self.package),
            },
            files: self.files,
        })
    }

    fn manifest_of(&self, version: &Version) -> serde_json::Result<String> {
        let mut manifest: serde_json::Value = serde_json::from_str(self.manifest)?;
        manifest["dependencies"][self.package] = version.as_str().into();
        serde_json::to_string_pretty(&manifest)
    }
}

/// Part of the name of an entry whose packages no lockfile of this crate pins.
const UNPINNED: &str = "unpinned";

fn hash(content: &str) -> String {
    let hash = Uuid::new_v5(&LOCK_NAMESPACE, content.as_bytes()).simple();
    hash.to_string()[..12].to_owned()
}

/// What npm is to make an entry of.
#[derive(Debug, Clone)]
pub(super) struct Packages {
    /// Name of the entry.
    pub(super) entry: String,
    /// For messages.
    pub(super) title: String,
    manifest: Cow<'static, str>,
    pub(super) versions: Versions,
    /// Files without which the entry would be useless.
    pub(super) files: &'static [&'static str],
}

/// Where the versions of all packages come from.
#[derive(Debug, Clone)]
pub(super) enum Versions {
    /// From a lockfile of this crate.
    Locked(&'static str),
    /// From npm, which writes a lockfile: it stays in the entry. `wanted`: the main package and its
    /// version, for messages.
    Resolved { wanted: String },
}

const LOCKFILE: &str = "package-lock.json";

impl Packages {
    /// Writes what npm reads.
    pub(super) fn write_manifests(&self, directory: &Path) -> Result<(), AgentError> {
        let lock = match &self.versions {
            Versions::Locked(lock) => Some((LOCKFILE, *lock)),
            Versions::Resolved { .. } => None,
        };
        let manifest = ("package.json", &*self.manifest);
        for (name, content) in std::iter::once(manifest).chain(lock) {
            let file = directory.join(name);
            fs::write(&file, content).map_err(|error| store("can't write", &file, error))?;
        }
        Ok(())
    }

    /// The packages that must be there after an installation on this platform, as far as that is known
    /// before it.
    pub(super) fn expected(&self) -> Result<Vec<LockedPackage>, AgentError> {
        match &self.versions {
            Versions::Locked(lock) => {
                required(lock.as_bytes()).map_err(|source| AgentError::Lockfile {
                    title: self.title.clone(),
                    source,
                })
            }
            Versions::Resolved { .. } => Ok(Vec::new()),
        }
    }

    /// Checks what npm has installed in `directory`: every package of the lockfile, in its version.
    pub(super) fn check(&self, directory: &Path) -> Result<(), AgentError> {
        let incomplete = |missing| AgentError::Incomplete {
            title: self.title.clone(),
            missing,
        };
        let required = match &self.versions {
            Versions::Locked(_) => self.expected()?,
            Versions::Resolved { .. } => {
                let file = directory.join(LOCKFILE);
                let lock =
                    fs::read(&file).map_err(|_| incomplete(format!("there is no {LOCKFILE}")))?;
                let required = required(&lock)
                    .map_err(|error| incomplete(format!("its {LOCKFILE} is malformed: {error}")))?;
                if let Some(package) = required.iter().find(|package| !package.hashed) {
                    let missing = format!("{} has no hash in its {LOCKFILE}", package.path);
                    return Err(incomplete(missing));
                }
                required
            }
        };
        for package in required {
            package.check(directory).map_err(incomplete)?;
        }
        match self
            .files
            .iter()
            .find(|file| !directory.join(file).is_file())
        {
            Some(file) => Err(incomplete(match &self.versions {
                Versions::Locked(_) => format!("{file} is missing"),
                Versions::Resolved { wanted } => {
                    format!("{wanted} has no {file}, which agentvm needs of it")
                }
            })),
            None => Ok(()),
        }
    }
}

/// The packages of a lockfile that must be there after an installation on this platform.
fn required(lock: &[u8]) -> serde_json::Result<Vec<LockedPackage>> {
    let lock: Lockfile = serde_json::from_slice(lock)?;
    Ok(lock
        .packages
        .into_iter()
        .filter(|(path, package)| !path.is_empty() && package.required())
        .filter_map(|(path, package)| {
            Some(LockedPackage {
                path,
                version: package.version?,
                hashed: package.integrity.is_some(),
            })
        })
        .collect())
}

/// A package and where npm puts it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct LockedPackage {
    /// Relative to the entry, as `node_modules/chalk`.
    pub(super) path: String,
    version: String,
    /// Is checked against a hash.
    hashed: bool,
}

impl LockedPackage {
    /// Has at least begun to arrive.
    pub(super) fn arrived(&self, entry: &Path) -> bool {
        entry.join(&self.path).join("package.json").exists()
    }

    /// Is there in the pinned version, or what is there instead.
    pub(super) fn check(&self, entry: &Path) -> Result<(), String> {
        #[derive(Deserialize)]
        struct Manifest {
            version: String,
        }
        let file = entry.join(&self.path).join("package.json");
        let text = fs::read(&file).map_err(|error| format!("{}: {error}", self.path))?;
        let manifest: Manifest =
            serde_json::from_slice(&text).map_err(|error| format!("{}: {error}", self.path))?;
        if manifest.version == self.version {
            Ok(())
        } else {
            Err(format!(
                "{} is version {} instead of {}",
                self.path, manifest.version, self.version
            ))
        }
    }
}

/// The parts of a lockfile (version 3) that matter here.
#[derive(Debug, Deserialize)]
struct Lockfile {
    /// By path; the one at "" is the entry itself.
    packages: BTreeMap<String, LockEntry>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct LockEntry {
    version: Option<String>,
    integrity: Option<String>,
    /// Comes inside the tarball of another package, under the hash of that one.
    #[serde(default)]
    in_bundle: bool,
    #[serde(default)]
    optional: bool,
    os: Option<OneOrMore>,
    cpu: Option<OneOrMore>,
    libc: Option<OneOrMore>,
}

impl LockEntry {
    /// npm leaves out an optional package that is made for another platform, and goes on without one
    /// that fails. The latter must not pass: what is optional for its author may well be the binary
    /// of this platform.
    fn required(&self) -> bool {
        if self.in_bundle || self.version.is_none() {
            return false;
        }
        let tied = self.os.is_some() || self.cpu.is_some() || self.libc.is_some();
        !self.optional
            || tied
                && allows(self.os.as_ref(), "linux")
                && allows(self.cpu.as_ref(), CPU)
                && allows(self.libc.as_ref(), "glibc")
    }
}

/// What Node calls this processor.
const CPU: &str = if cfg!(target_arch = "x86_64") {
    "x64"
} else {
    "arm64"
};

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum OneOrMore {
    One(String),
    More(Vec<String>),
}

/// As npm reads `os`, `cpu` and `libc`: `["linux"]` or `["!win32"]`.
fn allows(list: Option<&OneOrMore>, this: &str) -> bool {
    let names = match list {
        None => return true,
        Some(OneOrMore::One(name)) => std::slice::from_ref(name),
        Some(OneOrMore::More(names)) => names,
    };
    let mut excluding = names.iter().filter_map(|name| name.strip_prefix('!'));
    if excluding.any(|name| name == this) {
        return false;
    }
    names.iter().all(|name| name.starts_with('!')) || names.iter().any(|name| name == this)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::agents::{amp, claude, codex, opencode, pi, runtime};

    const ALL: [Pinned; 9] = [
        pi::PACKAGES,
        claude::PACKAGES,
        codex::PACKAGES,
        opencode::X64,
        opencode::X64_BASELINE,
        opencode::ARM64,
        amp::PACKAGES,
        runtime::X64,
        runtime::ARM64,
    ];

    fn packages(pinned: &Pinned) -> Vec<(String, Value)> {
        let lock: Value = serde_json::from_str(pinned.lock).unwrap();
        assert_eq!(lock["lockfileVersion"], 3);
        let packages = lock["packages"].as_object().unwrap().clone();
        packages
            .into_iter()
            .filter(|(path, _)| !path.is_empty())
            .collect()
    }

    #[test]
    fn every_package_is_pinned_by_hash_and_none_by_host() {
        for pinned in ALL {
            for (path, package) in packages(&pinned) {
                let bundled = package["inBundle"] == true;
                let hash = package["integrity"].as_str().unwrap_or_default();
                assert!(bundled || hash.starts_with("sha512-"), "{path}");
                assert!(package.get("resolved").is_none(), "{path}");
            }
            assert!(!pinned.lock.contains("://registry."));
        }
    }

    #[test]
    fn the_version_in_an_entrys_name_is_that_of_its_package() {
        for pinned in ALL {
            let path = format!("node_modules/{}", pinned.package);
            let all = packages(&pinned);
            let (_, package) = all.iter().find(|(at, _)| *at == path).unwrap();
            assert_eq!(package["version"], pinned.version);
            let manifest: Value = serde_json::from_str(pinned.manifest).unwrap();
            assert_eq!(manifest["dependencies"][pinned.package], pinned.version);
        }
    }

    #[test]
    fn another_lockfile_is_another_entry() {
        let pinned = pi::PACKAGES;
        let other = Pinned {
            lock: "{}",
            ..pinned
        };
        assert!(pinned.entry().starts_with("pi-0.87.1-"));
        assert_ne!(pinned.entry(), other.entry());
    }

    fn required_paths(lock: &str) -> Vec<String> {
        let required = required(lock.as_bytes()).unwrap();
        required.into_iter().map(|package| package.path).collect()
    }

    #[test]
    fn another_version_is_an_entry_of_its_own_for_which_npm_makes_the_lockfile() {
        let pinned = pi::PACKAGES;
        let version = Version::parse("0.86.0-rc.1").unwrap();
        let packages = pinned.in_version(&version).unwrap();
        assert!(
            packages.entry.starts_with("pi-0.86.0-rc.1-unpinned-"),
            "{packages:?}"
        );
        assert_eq!(packages.title, "pi 0.86.0-rc.1");
        let directory = tempfile::tempdir().unwrap();
        packages.write_manifests(directory.path()).unwrap();
        assert!(!directory.path().join(LOCKFILE).exists());
        let manifest = fs::read(directory.path().join("package.json")).unwrap();
        let manifest: Value = serde_json::from_slice(&manifest).unwrap();
        let mut expected: Value = serde_json::from_str(pinned.manifest).unwrap();
        expected["dependencies"][pinned.package] = "0.86.0-rc.1".into();
        assert_eq!(manifest, expected);
    }

    #[test]
    fn an_optional_package_is_required_only_if_it_is_made_for_this_platform() {
        let lock = r#"{"packages": {
            "": {"version": "1.0.0"},
            "node_modules/plain": {"version": "1.0.0"},
            "node_modules/nice-to-have": {"version": "1.0.0", "optional": true},
            "node_modules/linux": {"version": "1.0.0", "optional": true, "os": ["linux"], "libc": ["glibc"]},
            "node_modules/musl": {"version": "1.0.0", "optional": true, "os": ["linux"], "libc": ["musl"]},
            "node_modules/not-windows": {"version": "1.0.0", "optional": true, "os": ["!win32"]},
            "node_modules/windows": {"version": "1.0.0", "optional": true, "os": "win32"},
            "node_modules/not-linux": {"version": "1.0.0", "optional": true, "os": ["!linux"]},
            "node_modules/plain/node_modules/inside": {"version": "1.0.0", "inBundle": true}
        }}"#;
        assert_eq!(
            required_paths(lock),
            [
                "node_modules/linux",
                "node_modules/not-windows",
                "node_modules/plain"
            ]
        );
    }

    #[test]
    fn a_package_of_another_version_is_noticed() {
        let entry = tempfile::tempdir().unwrap();
        let package = LockedPackage {
            path: "node_modules/a".to_owned(),
            version: "1.0.0".to_owned(),
            hashed: true,
        };
        assert!(!package.arrived(entry.path()));
        fs::create_dir_all(entry.path().join("node_modules/a")).unwrap();
        let manifest = entry.path().join("node_modules/a/package.json");
        fs::write(&manifest, r#"{"version": "1.0.1"}"#).unwrap();
        let problem = package.check(entry.path()).unwrap_err();
        assert_eq!(problem, "node_modules/a is version 1.0.1 instead of 1.0.0");
        fs::write(&manifest, r#"{"version": "1.0.0"}"#).unwrap();
        package.check(entry.path()).unwrap();
    }
}
