//! The environment of a session on disk: needed to resume it, and full of secrets.
//!
//! It lies outside of the database, so that it is never part of a transcript, a copy or a log.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::error::{Code, Error, Result};
use crate::ids::SessionId;

/// Sorted, so that the file does not depend on hash order.
pub(super) type Environment = BTreeMap<String, String>;

fn file(vm_dir: &Path, session: SessionId) -> PathBuf {
    vm_dir.join("env").join(format!("{session}.json"))
}

/// Keeps `environment` with mode 0600 in a directory of mode 0700.
pub(super) async fn save(
    vm_dir: &Path,
    session: SessionId,
    environment: &Environment,
) -> Result<()> {
    let path = file(vm_dir, session);
    // A map of strings: serialising it can't fail.
    let content = serde_json::to_vec(environment).unwrap_or_default();
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

/// Reads what [`save`] kept. `ENV_REQUIRED`: there is nothing.
pub(super) async fn load(vm_dir: &Path, session: SessionId) -> Result<Environment> {
    blocking(file(vm_dir, session), |path| match fs::read(path) {
        Ok(content) => serde_json::from_slice(&content)
            .map(Some)
            .map_err(io::Error::from),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    })
    .await?
    .ok_or_else(|| {
        Error::new(
            Code::EnvRequired,
            format!(
                "session {session} has no kept environment: pass it with resumeSession(sessionId, {{ env }})"
            ),
        )
    })
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
        let environment = Environment::from([("KEY".to_owned(), "secret".to_owned())]);
        save(vm.path(), session, &environment).await.expect("saved");
        assert_eq!(load(vm.path(), session).await.expect("loaded"), environment);
        let mode = |path: &Path| fs::metadata(path).expect("stat").permissions().mode() & 0o777;
        assert_eq!(mode(&file(vm.path(), session)), 0o600);
        assert_eq!(mode(&vm.path().join("env")), 0o700);
        remove(vm.path(), session).await.expect("removed");
        remove(vm.path(), session).await.expect("idempotent");
        let error = load(vm.path(), session).await.expect_err("gone");
        assert_eq!(error.code, Code::EnvRequired);
    }
}
