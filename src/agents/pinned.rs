//! Packages as a lockfile of this crate pins them.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde::Deserialize;
use uuid::Uuid;

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
        let hash = Uuid::new_v5(&LOCK_NAMESPACE, content.as_bytes()).simple();
        let hash = &hash.to_string()[..12];
        format!("{}-{}-{hash}", self.name, self.version)
    }

    /// For messages.
    pub(super) fn title(&self) -> String {
        format!("{} {}", self.name, self.version)
    }

    /// The packages that must be there after an installation on this platform.
    pub(super) fn required(&self) -> serde_json::Result<Vec<LockedPackage>> {
        let lock: Lockfile = serde_json::from_str(self.lock)?;
        Ok(lock
            .packages
            .into_iter()
            .filter(|(path, package)| !path.is_empty() && package.required())
            .filter_map(|(path, package)| {
                let version = package.version?;
                Some(LockedPackage { path, version })
            })
            .collect())
    }
}

/// A package and where npm puts it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct LockedPackage {
    /// Relative to the entry, as `node_modules/chalk`.
    pub(super) path: String,
    version: String,
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
    use crate::agents::{pi, runtime};

    const ALL: [Pinned; 3] = [pi::PACKAGES, runtime::X64, runtime::ARM64];

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

    fn required(lock: &'static str) -> Vec<String> {
        let pinned = Pinned {
            lock,
            ..pi::PACKAGES
        };
        let required = pinned.required().unwrap();
        required.into_iter().map(|package| package.path).collect()
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
            required(lock),
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
