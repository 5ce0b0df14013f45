//! Whole files of the VM, in and out.

use std::fs::File;
use std::io::{Read, Write};

use nix::errno::Errno;

use super::{GuestPath, Open, Result, User, Vm, VmError};

/// Largest file that is read or written as one buffer: what a `Uint8Array` holds on every platform.
pub const MAX_BUFFER: u64 = 2 << 30;

/// Reads a regular file.
pub async fn read(vm: &dyn Vm, path: &GuestPath, user: User) -> Result<Vec<u8>> {
    read_opened(vm.open(path, Open::Read, user).await?, path).await
}

/// Reads a file that was opened at `path`.
pub async fn read_opened(mut file: File, path: &GuestPath) -> Result<Vec<u8>> {
    blocking("can't read", path, move || {
        let size = file.metadata()?.len();
        if size > MAX_BUFFER {
            return Err(Errno::EFBIG.into());
        }
        let mut content = Vec::with_capacity(usize::try_from(size).unwrap_or(0));
        // The file may grow while it is read.
        (&mut file).take(MAX_BUFFER + 1).read_to_end(&mut content)?;
        if content.len() as u64 > MAX_BUFFER {
            return Err(Errno::EFBIG.into());
        }
        Ok(content)
    })
    .await
}

/// Makes a file, or replaces what it holds.
pub async fn write(vm: &dyn Vm, path: &GuestPath, content: Vec<u8>, user: User) -> Result<()> {
    write_opened(vm.open(path, Open::Write, user).await?, path, content).await
}

/// Fills a file that was opened, and is empty, at `path`.
pub async fn write_opened(mut file: File, path: &GuestPath, content: Vec<u8>) -> Result<()> {
    blocking("can't write", path, move || file.write_all(&content)).await
}

async fn blocking<T: Send + 'static>(
    op: &'static str,
    path: &GuestPath,
    work: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> Result<T> {
    let failed = |errno| VmError::File {
        op,
        path: path.as_str().to_owned(),
        errno,
    };
    match tokio::task::spawn_blocking(work).await {
        Ok(Ok(done)) => Ok(done),
        Ok(Err(error)) => Err(failed(Errno::from_raw(
            error.raw_os_error().unwrap_or(libc::EIO),
        ))),
        Err(_panicked_or_stopping) => Err(failed(Errno::EIO)),
    }
}
