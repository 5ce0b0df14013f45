//! Whole files of the VM, in and out.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use nix::errno::Errno;
use tokio::sync::Semaphore;

use super::{GuestPath, Open, Result, User, Vm, VmError};

/// Largest file that is read or written as one buffer: what a `Uint8Array` holds on every platform.
pub const MAX_BUFFER: u64 = 2 << 30;

/// Blocking transfers at a time, of all VMs: each has a thread.
static TRANSFERS: Semaphore = Semaphore::const_new(64);

/// Of one VM, whose programs may keep a file locked that is written.
const MAX_TRANSFERS: usize = 8;

/// What one VM may have under way of these.
#[derive(Debug, Clone)]
pub struct Transfers(Arc<Semaphore>);

impl Default for Transfers {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(MAX_TRANSFERS)))
    }
}

impl Transfers {
    /// Does what may wait for a disk, or for programs of the VM, on a thread for it.
    pub(crate) async fn blocking<T: Send + 'static>(
        &self,
        op: &'static str,
        path: &GuestPath,
        work: impl FnOnce() -> std::io::Result<T> + Send + 'static,
    ) -> Result<T> {
        let failed = |errno| VmError::File {
            op,
            path: path.as_str().to_owned(),
            errno,
        };
        self.on_a_thread(work)
            .await
            .map_err(|error| failed(Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))))
    }

    /// The same with the failure as it is. Dropping the future leaves the work to end by itself.
    pub(crate) async fn on_a_thread<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> std::io::Result<T> + Send + 'static,
    ) -> std::io::Result<T> {
        // Nobody closes it.
        let own = Arc::clone(&self.0).acquire_owned().await.ok();
        on_a_thread(move || {
            let done = work();
            drop(own);
            done
        })
        .await
    }
}

/// Reads a regular file.
pub async fn read(vm: &dyn Vm, path: &GuestPath, user: User) -> Result<Vec<u8>> {
    let file = vm.open(path, Open::Read, user).await?;
    read_range(vm, file, path, 0, None).await
}

/// Reads of a file that was opened at `path` what it holds from `offset` on, `length` bytes at most.
pub async fn read_range(
    vm: &dyn Vm,
    file: File,
    path: &GuestPath,
    offset: u64,
    length: Option<u64>,
) -> Result<Vec<u8>> {
    let reading = vm.transfers().blocking("can't read", path, move || {
        let length = length.unwrap_or(u64::MAX);
        let size = file.metadata()?.len().saturating_sub(offset).min(length);
        if size > MAX_BUFFER {
            return Err(Errno::EFBIG.into());
        }
        // Zeroed pages of the kernel's: nobody writes them twice.
        let mut content = vec![0; usize::try_from(size).unwrap_or(0)];
        let filled = fill(&file, &mut content, offset)?;
        content.truncate(filled);
        // It may have grown meanwhile, and files of /sys say that they are empty.
        let mut more = [0; 4096];
        while (content.len() as u64) < length {
            let at = offset.saturating_add(content.len() as u64);
            let left = usize::try_from(length - content.len() as u64).unwrap_or(usize::MAX);
            let wanted = left.min(more.len());
            let filled = fill(&file, &mut more[..wanted], at)?;
            if filled == 0 {
                break;
            }
            content.extend_from_slice(&more[..filled]);
            if content.len() as u64 > MAX_BUFFER {
                return Err(Errno::EFBIG.into());
            }
        }
        Ok(content)
    });
    reading.await
}

/// Reads until the buffer is full, or the file ends. Returns how much there was.
pub(crate) fn fill(file: &File, buffer: &mut [u8], offset: u64) -> std::io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        // No file is longer than the kernel can say.
        let Some(at) = offset
            .checked_add(filled as u64)
            .filter(|at| i64::try_from(*at).is_ok())
        else {
            break;
        };
        match file.read_at(&mut buffer[filled..], at) {
            Ok(0) => break,
            Ok(length) => filled += length,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// What one step copies, and how much of that at once.
const STEP: u64 = 16 << 20;
const BUFFER: usize = 1 << 20;

/// Copies some of a file from `offset` on to where another is written. Returns how much; 0 at its end.
pub(crate) fn copy_some(from: &File, offset: u64, mut into: &File) -> std::io::Result<u64> {
    let mut buffer = vec![0; BUFFER];
    let mut copied = 0;
    while copied < STEP {
        let filled = fill(from, &mut buffer, offset + copied)?;
        if filled == 0 {
            break;
        }
        into.write_all(&buffer[..filled])?;
        copied += filled as u64;
    }
    Ok(copied)
}

/// Makes a file, or replaces what it holds.
pub async fn write(vm: &dyn Vm, path: &GuestPath, content: Vec<u8>, user: User) -> Result<()> {
    let file = vm.open(path, Open::Write, user).await?;
    write_opened(vm, file, path, content).await
}

/// Fills a file that was opened, and is empty, at `path`.
pub async fn write_opened(
    vm: &dyn Vm,
    mut file: File,
    path: &GuestPath,
    content: Vec<u8>,
) -> Result<()> {
    let writing = (vm.transfers()).blocking("can't write", path, move || file.write_all(&content));
    writing.await
}

/// Does what may wait for a disk on a thread for it. Dropping the future leaves the work to end by itself.
pub(crate) async fn on_a_thread<T: Send + 'static>(
    work: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> std::io::Result<T> {
    // Nobody closes it.
    let place = TRANSFERS.acquire().await.ok();
    let done = tokio::task::spawn_blocking(move || {
        let done = work();
        drop(place);
        done
    });
    done.await
        .unwrap_or_else(|_panicked_or_stopping| Err(Errno::EIO.into()))
}
