//! What a session needs for a resume and is full of secrets: its environment and its MCP servers.
//!
//! It lies outside of the database, so that it is never part of a transcript, a copy or a log.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::mcp::McpServer;
use crate::error::{Code, Error, Result};
use crate::ids::SessionId;

/// Sorted, so that the file does not depend on hash order.
pub(super) type Environment = BTreeMap<String, String>;

/// What is kept of a session in the file.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Secrets {
    pub(super) env: Environment,
    #[serde(default)]
    pub(super) mcp_servers: Vec<McpServer>,
}

/// The file of today, or the one of a session from before it had MCP servers.
#[derive(Deserialize)]
#[serde(untagged)]
enum Kept {
    Secrets(Secrets),
    Environment(Environment),
}

fn file(vm_dir: &Path, session: SessionId) -> PathBuf {
    vm_dir.join("env").join(format!("{session}.json"))
}

/// Keeps `secrets` with mode 0600 in a directory of mode 0700.
pub(super) async fn save(vm_dir: &Path, session: SessionId, secrets: &Secrets) -> Result<()> {
    let path = file(vm_dir, session);
    // Maps with string keys: serialising them can't fail.
    let content = serde_json::to_vec(secrets).unwrap_or_default();
    blocking(path, move |path| {
        let directory = path.parent().unwrap_or(path);
        match DirBuilder::new().mode(0o700).create(directory) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        // Written beside and renamed: a crash leaves the old file or the new one.
        let partial = path.with_extension("partial");
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&partial)?;
        file.write_all(&content)?;
        file.sync_all()?;
        fs::rename(&partial, path)
    })
    .await
}

/// Reads what [`save`] kept; `None`: there is nothing.
pub(super) async fn load(vm_dir: &Path, session: SessionId) -> Result<Option<Secrets>> {
    let kept = blocking(file(vm_dir, session), |path| match fs::read(path) {
        Ok(content) => serde_json::from_slice(&content)
            .map(Some)
            .map_err(io::Error::from),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    });
    Ok(kept.await?.map(|kept| match kept {
        Kept::Secrets(secrets) => secrets,
        Kept::Environment(env) => Secrets {
            env,
            ..Secrets::default()
        },
    }))
}

pub(super) async fn remove(vm_dir: &Path, session: SessionId) -> Result<()> {
    blocking(file(vm_dir, session), |path| match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    })
    .await
}

async fn blocking<T: Send + 'static>(
    path: PathBuf,
    work: impl FnOnce(&Path) -> io::Result<T> + Send + 'static,
) -> Result<T> {
    let failed = |path: &Path, error: &io::Error| {
        let code = match error.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT) => Code::StoreFull,
            Some(raw) => Code::from_errno(raw),
            None => Code::StoreCorrupt,
        };
        Error::new(
            code,
            format!("the session's environment file {}: {error}", path.display()),
        )
    };
    let worked =
        tokio::task::spawn_blocking(move || work(&path).map_err(|error| failed(&path, &error)));
    worked
        .await
        .unwrap_or_else(|error| Err(Error::new(Code::Internal, error.to_string())))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[tokio::test]
    async fn only_the_owner_can_read_what_is_kept() {
        let vm = tempfile::tempdir().expect("a directory");
        let session = SessionId::generate();
        let secrets = Secrets {
            env: Environment::from([("KEY".to_owned(), "secret".to_owned())]),
            ..Secrets::default()
        };
        save(vm.path(), session, &secrets).await.expect("saved");
        let kept = load(vm.path(), session).await.expect("loaded");
        assert_eq!(kept, Some(secrets));
        let mode = |path: &Path| fs::metadata(path).expect("stat").permissions().mode() & 0o777;
        assert_eq!(mode(&file(vm.path(), session)), 0o600);
        assert_eq!(mode(&vm.path().join("env")), 0o700);
        remove(vm.path(), session).await.expect("removed");
        remove(vm.path(), session).await.expect("idempotent");
        assert_eq!(load(vm.path(), session).await.expect("readable"), None);
    }

    #[tokio::test]
    async fn a_file_with_the_environment_alone_is_read_as_such() {
        let vm = tempfile::tempdir().expect("a directory");
        let session = SessionId::generate();
        fs::create_dir(vm.path().join("env")).expect("made");
        fs::write(file(vm.path(), session), r#"{"env":"dev","KEY":"x"}"#).expect("written");
        let kept = load(vm.path(), session)
            .await
            .expect("loaded")
            .expect("kept");
        assert_eq!(kept.env["env"], "dev");
        assert_eq!(kept.env["KEY"], "x");
    }
}
