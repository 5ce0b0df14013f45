//! Compiled scripts of an agent, for Node to start it faster: made once and kept beside the agent,
//! instead of in each VM anew.
//!
//! Node's cache holds for one version of Node, one uid and absolute paths, all of which are the same in
//! every VM. It must come from a VM that has run nothing else: it is code that all VMs execute.

use std::fs::DirBuilder;
use std::path::{Component, Path, PathBuf};

use uuid::Uuid;

use super::error::AgentError;
use super::install::{Partial, blocking, lock, open_to_everyone, store, write_synced};

pub(super) const PREFIX: &str = "compile-cache-";

/// Namespace of the version-5 UUIDs that name what a cache is for.
const CACHE_NAMESPACE: Uuid = Uuid::from_u128(0x51c6_2bd4_0c6e_4c0b_9a55_e04d_27f1_8c39);

/// Directory, in an agent's entry, of the cache for a program that this runtime runs.
pub(super) fn name(runtime: &str, program: &Path) -> String {
    let content = format!("{runtime}\0{}", program.display());
    let hash = Uuid::new_v5(&CACHE_NAMESPACE, content.as_bytes()).simple();
    format!("{PREFIX}{}", &hash.to_string()[..12])
}

/// Puts the files of a cache into the entry, unless somebody has done so meanwhile. Paths are relative
/// to the cache.
pub(super) async fn keep(
    root: &Path,
    entry: &str,
    name: &str,
    files: Vec<(PathBuf, Vec<u8>)>,
) -> Result<(), AgentError> {
    let lock = lock(root, entry, |_| {}).await?;
    let place = root.join(entry).join(name);
    let (root, entry) = (root.to_owned(), entry.to_owned());
    blocking(move || {
        if place.exists() {
            return Ok(());
        }
        let partial = Partial::new(&root, &entry, lock)?;
        match write(&partial.path, &files) {
            Ok(()) => partial.publish(&place),
            Err(error) => {
                let error = store("can't write", &partial.path, error);
                partial.remove();
                Err(error)
            }
        }
    })
    .await
}

fn write(directory: &Path, files: &[(PathBuf, Vec<u8>)]) -> std::io::Result<()> {
    for (path, content) in files {
        // They were named by a VM.
        if !path
            .components()
            .all(|part| matches!(part, Component::Normal(_)))
        {
            return Err(std::io::Error::from_raw_os_error(libc::EINVAL));
        }
        let file = directory.join(path);
        if let Some(parent) = file.parent() {
            DirBuilder::new().recursive(true).create(parent)?;
        }
        write_synced(&file, content, 0o644)?;
    }
    open_to_everyone(directory).map(drop)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]
mod tests {
    use std::fs;

    use super::*;

    #[tokio::test]
    async fn a_cache_lies_in_the_entry_and_nothing_of_it_elsewhere() {
        let root = tempfile::tempdir().unwrap();
        let entry = root.path().join("pi-1");
        fs::create_dir(&entry).unwrap();
        let keep = async |name: &'static str, path: &str| {
            keep(
                root.path(),
                "pi-1",
                name,
                vec![(path.into(), b"code".to_vec())],
            )
            .await
        };
        keep("a", "v22-x64/0a1b").await.unwrap();
        assert_eq!(fs::read(entry.join("a/v22-x64/0a1b")).unwrap(), b"code");
        keep("b", "../../escaped").await.unwrap_err();
        keep("c", "/tmp/escaped").await.unwrap_err();
        let left: Vec<_> = fs::read_dir(&entry).unwrap().collect();
        assert_eq!(left.len(), 1);
        assert!(!root.path().join("escaped").exists());
    }

    #[test]
    fn another_runtime_and_another_program_have_other_caches() {
        let name = |runtime, program| name(runtime, Path::new(program));
        assert_ne!(name("node-1", "a/main.js"), name("node-2", "a/main.js"));
        assert_ne!(name("node-1", "a/main.js"), name("node-1", "b/main.js"));
    }
}
