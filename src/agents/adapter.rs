//! Our ACP adapters: copied from the npm package into the agent's entry, where Node finds the agent's
//! packages from them.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use uuid::Uuid;

use super::error::AgentError;
use super::install::{Partial, blocking, lock, open_to_everyone, store, write_synced};

/// What Node runs.
pub(super) const MAIN: &str = "main.js";

/// Of the names of adapters in the store.
pub(super) const PREFIX: &str = "adapter-";

/// Where the build puts the adapter of this directory below `adapters/`. `package`: root of our npm
/// package.
pub(super) fn dist(package: &Path, directory: &str) -> PathBuf {
    package.join("adapters").join(directory).join("dist")
}

/// Namespace of the version-5 UUIDs that name an adapter's content.
const ADAPTER_NAMESPACE: Uuid = Uuid::from_u128(0x7b4c_02d7_95ee_4f0f_a6c1_58e9_0d33_b1f2);

/// Makes sure that the adapter in `dist` lies in the entry, and returns its directory's name there.
///
/// The name is derived from the content: another build is another directory, and a VM that runs on
/// the old one keeps it.
pub(super) async fn ensure(
    root: &Path,
    entry: &str,
    agent: &'static str,
    dist: PathBuf,
) -> Result<String, AgentError> {
    let build = dist.clone();
    let name = blocking(move || name(agent, &build)).await?;
    if root.join(entry).join(&name).join(MAIN).exists() {
        return Ok(name);
    }
    // What is copied is what is named, though another build may have come meanwhile.
    let adapter = blocking(move || Adapter::read(agent, &dist)).await?;
    let name = adapter.name();
    let place = root.join(entry).join(&name);
    let lock = lock(root, entry, |_| {}).await?;
    let (root, entry) = (root.to_owned(), entry.to_owned());
    blocking(move || {
        if place.join(MAIN).exists() {
            return Ok(());
        }
        let partial = Partial::new(&root, &entry, lock)?;
        match adapter.write(&partial.path) {
            Ok(()) => partial.publish(&place),
            Err(error) => {
                let error = store("can't copy the adapter to", &partial.path, error);
                partial.remove();
                Err(error)
            }
        }
    })
    .await?;
    Ok(name)
}

/// Name of the adapter in `dist`. It is read again only when a file of it has changed: in a checkout it
/// may be built again under a process that runs.
pub(super) fn name(agent: &'static str, dist: &Path) -> Result<String, AgentError> {
    /// By build.
    static NAMES: Mutex<BTreeMap<PathBuf, (Vec<Stamp>, String)>> = Mutex::new(BTreeMap::new());
    let names = || NAMES.lock().unwrap_or_else(PoisonError::into_inner);
    let mut stamps = Vec::new();
    // Before it is read: what changes under the reader has other stamps next time. A build that is not
    // there is the reader's to tell.
    let complete = stamp(dist, &mut stamps).is_ok();
    if let Some((known, name)) = names().get(dist)
        && complete
        && *known == stamps
    {
        return Ok(name.clone());
    }
    let name = Adapter::read(agent, dist)?.name();
    if complete {
        names().insert(dist.to_owned(), (stamps, name.clone()));
    }
    Ok(name)
}

/// What tells a file from another one that is written in its place.
#[derive(Debug, PartialEq, Eq)]
struct Stamp {
    path: PathBuf,
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

fn stamp(directory: &Path, stamps: &mut Vec<Stamp>) -> io::Result<()> {
    for found in fs::read_dir(directory)? {
        let path = found?.path();
        let data = fs::metadata(&path)?;
        if data.is_dir() {
            stamp(&path, stamps)?;
        } else {
            stamps.push(Stamp {
                inode: data.ino(),
                bytes: data.len(),
                modified: (data.mtime(), data.mtime_nsec()),
                changed: (data.ctime(), data.ctime_nsec()),
                path,
            });
        }
    }
    Ok(())
}

/// A built adapter, in memory: a few small scripts.
#[derive(Debug, Default)]
struct Adapter {
    /// By path relative to the adapter, in a fixed order.
    files: Vec<(PathBuf, Vec<u8>)>,
}

impl Adapter {
    fn read(agent: &'static str, dist: &Path) -> Result<Self, AgentError> {
        let mut adapter = Self::default();
        match adapter.read_directory(dist, Path::new("")) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(store("can't read the adapter", dist, error));
            }
            _ => {}
        }
        if adapter
            .files
            .iter()
            .any(|(path, _)| path == Path::new(MAIN))
        {
            adapter.files.sort();
            Ok(adapter)
        } else {
            Err(AgentError::AdapterMissing {
                agent,
                path: dist.to_owned(),
            })
        }
    }

    fn read_directory(&mut self, directory: &Path, relative: &Path) -> io::Result<()> {
        for found in fs::read_dir(directory)? {
            let found = found?;
            let relative = relative.join(found.file_name());
            if found.file_type()?.is_dir() {
                self.read_directory(&found.path(), &relative)?;
            } else {
                self.files.push((relative, fs::read(found.path())?));
            }
        }
        Ok(())
    }

    fn name(&self) -> String {
        use std::os::unix::ffi::OsStrExt;
        let mut content = Vec::new();
        for (path, bytes) in &self.files {
            // Length-prefixed, so that no two adapters read the same.
            for part in [path.as_os_str().as_bytes(), bytes] {
                content.extend_from_slice(&(part.len() as u64).to_le_bytes());
                content.extend_from_slice(part);
            }
        }
        let hash = Uuid::new_v5(&ADAPTER_NAMESPACE, &content).simple();
        format!("{PREFIX}{}", &hash.to_string()[..12])
    }

    fn write(&self, directory: &Path) -> io::Result<()> {
        for (path, bytes) in &self.files {
            let file = directory.join(path);
            if let Some(parent) = file.parent() {
                DirBuilder::new().recursive(true).create(parent)?;
            }
            write_synced(&file, bytes, 0o644)?;
        }
        open_to_everyone(directory)?;
        Ok(())
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn dist(main: &str) -> tempfile::TempDir {
        let dist = tempfile::tempdir().unwrap();
        fs::create_dir(dist.path().join("acp")).unwrap();
        fs::write(dist.path().join("acp/lines.js"), "export {}").unwrap();
        fs::write(dist.path().join(MAIN), main).unwrap();
        dist
    }

    async fn copied(root: &Path, dist: &Path) -> Result<String, AgentError> {
        fs::create_dir_all(root.join("pi-1")).unwrap();
        ensure(root, "pi-1", "pi", dist.to_owned()).await
    }

    #[tokio::test]
    async fn an_adapter_is_copied_once_and_readable_by_everyone() {
        let (root, dist) = (tempfile::tempdir().unwrap(), dist("1"));
        let name = copied(root.path(), dist.path()).await.unwrap();
        let place = root.path().join("pi-1").join(&name);
        assert_eq!(fs::read(place.join("acp/lines.js")).unwrap(), b"export {}");
        for (path, mode) in [("", 0o755), (MAIN, 0o644), ("acp", 0o755)] {
            let data = fs::metadata(place.join(path)).unwrap();
            assert_eq!(data.permissions().mode() & 0o7777, mode, "{path}");
        }
        let made = fs::metadata(&place).unwrap().modified().unwrap();
        assert_eq!(copied(root.path(), dist.path()).await.unwrap(), name);
        assert_eq!(fs::metadata(&place).unwrap().modified().unwrap(), made);
    }

    #[tokio::test]
    async fn another_build_lies_beside_the_one_that_may_be_in_use() {
        let root = tempfile::tempdir().unwrap();
        let first = copied(root.path(), dist("1").path()).await.unwrap();
        let second = copied(root.path(), dist("2").path()).await.unwrap();
        assert_ne!(first, second);
        for (name, content) in [(first, "1"), (second, "2")] {
            let main = root.path().join("pi-1").join(name).join(MAIN);
            assert_eq!(fs::read_to_string(main).unwrap(), content);
        }
    }

    #[tokio::test]
    async fn a_build_that_changes_under_a_running_process_is_noticed() {
        let (root, dist) = (tempfile::tempdir().unwrap(), dist("1"));
        let first = copied(root.path(), dist.path()).await.unwrap();
        assert_eq!(copied(root.path(), dist.path()).await.unwrap(), first);
        fs::write(dist.path().join(MAIN), "second").unwrap();
        let second = copied(root.path(), dist.path()).await.unwrap();
        assert_ne!(first, second);
        let main = root.path().join("pi-1").join(second).join(MAIN);
        assert_eq!(fs::read_to_string(main).unwrap(), "second");
    }

    #[tokio::test]
    async fn many_at_once_make_one_copy() {
        let (root, dist) = (tempfile::tempdir().unwrap(), dist("1"));
        let mut copies = tokio::task::JoinSet::new();
        for _ in 0..8 {
            let (root, dist) = (root.path().to_owned(), dist.path().to_owned());
            copies.spawn(async move { copied(&root, &dist).await });
        }
        let mut names = Vec::new();
        for copied in copies.join_all().await {
            names.push(copied.unwrap());
        }
        names.dedup();
        assert_eq!(names.len(), 1);
        let left: Vec<_> = fs::read_dir(root.path().join("pi-1")).unwrap().collect();
        assert_eq!(left.len(), 1);
    }

    #[tokio::test]
    async fn a_missing_build_is_named_with_the_remedy() {
        let root = tempfile::tempdir().unwrap();
        let nowhere = root.path().join("adapters/pi/dist");
        let error = copied(root.path(), &nowhere).await.unwrap_err();
        let error = crate::error::Error::from(error);
        assert_eq!(error.code, crate::error::Code::InstallFailed);
        assert!(error.message.contains("npm run build"), "{error}");
        assert!(error.message.contains("adapters/pi/dist"), "{error}");
    }
}
