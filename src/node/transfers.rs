//! What goes on between calls: listings, watches, files on their way in and out.

#![expect(
    clippy::needless_pass_by_value,
    reason = "napi hands arguments over by value"
)]

use std::sync::{Arc, Mutex, PoisonError};

use napi::Env;
use napi::bindgen_prelude::{Buffer, PromiseRaw, Uint8Array};
use napi_derive::napi;
use tokio::sync::{Mutex as AsyncMutex, watch};

use super::error::{aborted, promise};
use super::file_record;
use super::vm::aborting;
use crate::session::{Download, FileRecords, Upload};

/// What a listing, or a watch, tells.
#[napi]
pub struct NativeFileRecords {
    records: Arc<AsyncMutex<Option<FileRecords>>>,
    closed: watch::Sender<bool>,
}

impl NativeFileRecords {
    pub(super) fn new(records: FileRecords) -> Self {
        Self {
            records: Arc::new(AsyncMutex::new(Some(records))),
            closed: watch::Sender::new(false),
        }
    }
}

#[napi]
impl NativeFileRecords {
    /// Returns JSON of an array, of entries or events; `null` at the end.
    #[napi]
    pub fn next<'env>(&self, env: &'env Env) -> napi::Result<PromiseRaw<'env, Option<String>>> {
        let (records, closed) = (Arc::clone(&self.records), self.closed.subscribe());
        promise(env, async move {
            let mut held = records.lock().await;
            let Some(records) = held.as_mut() else {
                return Ok(None);
            };
            let next = tokio::select! {
                next = records.next() => next,
                () = aborting(closed) => Ok(None),
            };
            if !matches!(next, Ok(Some(_))) {
                // It keeps the VM awake.
                held.take();
            }
            drop(held);
            Ok(next?.map(|records| file_record::records(&records)))
        })
    }

    /// Ends it, and a call of [`Self::next`] that waits.
    #[napi]
    pub fn close(&self) {
        self.closed.send_replace(true);
        // Otherwise `next` is just ending, and drops it.
        if let Ok(mut records) = self.records.try_lock() {
            records.take();
        }
    }
}

/// A file of the VM that is read bit by bit.
#[napi]
pub struct NativeDownload {
    download: Arc<AsyncMutex<Option<Download>>>,
    closed: watch::Sender<bool>,
}

impl NativeDownload {
    pub(super) fn new(download: Download) -> Self {
        Self {
            download: Arc::new(AsyncMutex::new(Some(download))),
            closed: watch::Sender::new(false),
        }
    }
}

#[napi]
impl NativeDownload {
    /// Resolves to the next bytes; `null` at the end.
    #[napi]
    pub fn read<'env>(&self, env: &'env Env) -> napi::Result<PromiseRaw<'env, Option<Buffer>>> {
        let (download, closed) = (Arc::clone(&self.download), self.closed.subscribe());
        promise(env, async move {
            let mut held = download.lock().await;
            let Some(download) = held.as_mut() else {
                return Ok(None);
            };
            let chunk = tokio::select! {
                chunk = download.read() => chunk,
                () = aborting(closed) => Ok(Vec::new()),
            };
            if chunk.as_ref().map_or(true, Vec::is_empty) {
                // It keeps the VM awake.
                held.take();
            }
            drop(held);
            let chunk = chunk?;
            Ok((!chunk.is_empty()).then(|| chunk.into()))
        })
    }

    #[napi]
    pub fn close(&self) {
        self.closed.send_replace(true);
        if let Ok(mut download) = self.download.try_lock() {
            download.take();
        }
    }
}

/// A file on its way into the VM.
#[napi]
pub struct NativeUpload {
    upload: Mutex<Option<Arc<Upload>>>,
}

#[napi]
impl NativeUpload {
    /// Resolves when the kernel has taken all of it. One call at a time.
    #[napi]
    pub fn write<'env>(
        &self,
        env: &'env Env,
        bytes: Uint8Array,
    ) -> napi::Result<PromiseRaw<'env, ()>> {
        let upload = self.lock().clone();
        // At once: the caller may change it when this has returned.
        let bytes = bytes.to_vec();
        promise(env, async move {
            let upload = upload.ok_or_else(aborted)?;
            upload.write(bytes).await
        })
    }

    /// Resolves when it has ended, and rejects if it was neither finished nor given up.
    #[napi]
    pub fn gone<'env>(&self, env: &'env Env) -> napi::Result<PromiseRaw<'env, ()>> {
        let gone = self.lock().as_ref().map(|upload| upload.gone());
        promise(env, async move {
            match gone {
                Some(gone) => gone.await,
                None => Ok(()),
            }
        })
    }

    /// Puts the file in its place.
    #[napi]
    pub fn finish<'env>(&self, env: &'env Env) -> napi::Result<PromiseRaw<'env, ()>> {
        let upload = self.lock().take().and_then(Arc::into_inner);
        promise(env, async move {
            let upload = upload.ok_or_else(aborted)?;
            upload.finish().await
        })
    }

    /// Gives it up. Nothing of it is left when this resolves.
    #[napi]
    pub fn abort<'env>(&self, env: &'env Env) -> napi::Result<PromiseRaw<'env, ()>> {
        let upload = self.lock().take().and_then(Arc::into_inner);
        promise(env, async move {
            if let Some(upload) = upload {
                upload.abort().await;
            }
            Ok(())
        })
    }
}

impl NativeUpload {
    pub(super) fn new(upload: Upload) -> Self {
        Self {
            upload: Mutex::new(Some(Arc::new(upload))),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Arc<Upload>>> {
        self.upload.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
