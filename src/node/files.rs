//! File operations, listings, watches and transfers of `NativeVm`.

#![expect(
    clippy::needless_pass_by_value,
    reason = "napi hands arguments over by value"
)]

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use napi::Env;
use napi::bindgen_prelude::{Buffer, Either, PromiseRaw, Uint8Array};
use napi_derive::napi;
use serde::Deserialize;
use tokio::sync::{Mutex as AsyncMutex, watch};

use super::argument::{MAX_SAFE, Whole};
use super::error::{aborted, promise};
use super::file_record;
use super::options::{RawUser, parse};
use super::vm::{NativeAbort, NativeVm, aborting};
use crate::error::{Code, Error, Result};
use crate::session::{Download, FileRecords, ReadRange, Upload, VmHandle, WriteOptions};
use crate::vm::files::{Change, DIRECTORY_MODE, Task};
use crate::vm::{GuestPath, User};

/// Bytes where a path is not UTF-8.
type RawPath = Either<String, Uint8Array>;

/// At once: the caller may change the bytes when the call has returned.
fn path(field: &str, raw: RawPath) -> Result<GuestPath> {
    let bytes = match raw {
        Either::A(text) => text.into_bytes(),
        Either::B(bytes) => bytes.to_vec(),
    };
    GuestPath::from_bytes(bytes).map_err(|problem| Error::invalid_argument(field, problem))
}

fn host_path(field: &str, path: String) -> Result<PathBuf> {
    if path.is_empty() || path.contains('\0') {
        let problem = "a path must be neither empty nor contain a NUL byte";
        return Err(Error::invalid_argument(field, problem));
    }
    Ok(path.into())
}

type Mode = Whole<0, 0o7777>;

fn mode(given: Option<&Mode>) -> Option<u32> {
    // In the range of permissions, as parsed.
    given.and_then(|mode| u32::try_from(mode.0).ok())
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct RawUserOnly {
    user: RawUser,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct RawRead {
    user: RawUser,
    offset: Option<Whole<0, MAX_SAFE>>,
    length: Option<Whole<0, MAX_SAFE>>,
}

impl RawRead {
    fn range(&self) -> ReadRange {
        ReadRange {
            offset: self.offset.map_or(0, |offset| offset.0),
            length: self.length.map(|length| length.0),
        }
    }
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct RawWrite {
    user: RawUser,
    mode: Option<Mode>,
    append: bool,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct RawUpload {
    user: RawUser,
    mode: Option<Mode>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct RawMkdir {
    user: RawUser,
    mode: Option<Mode>,
    recursive: bool,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct RawTree {
    user: RawUser,
    recursive: bool,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct RawStat {
    user: RawUser,
    follow_symlinks: bool,
}

impl Default for RawStat {
    fn default() -> Self {
        Self {
            user: RawUser::default(),
            follow_symlinks: true,
        }
    }
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct RawDelete {
    user: RawUser,
    recursive: bool,
    force: bool,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct RawMove {
    user: RawUser,
    overwrite: bool,
}

impl Default for RawMove {
    fn default() -> Self {
        Self {
            user: RawUser::default(),
            overwrite: true,
        }
    }
}

const MAX_ID: u64 = u32::MAX as u64 - 1;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct RawOwner {
    user: RawUser,
    uid: Option<Whole<0, MAX_ID>>,
    gid: Option<Whole<0, MAX_ID>>,
    follow_symlinks: bool,
}

impl Default for RawOwner {
    fn default() -> Self {
        Self {
            user: RawUser::default(),
            uid: None,
            gid: None,
            follow_symlinks: true,
        }
    }
}

#[napi]
impl NativeVm {
    #[napi(ts_args_type = "file: string | Uint8Array, options: string")]
    pub fn read_file<'env>(
        &self,
        env: &'env Env,
        file: RawPath,
        options: String,
    ) -> napi::Result<PromiseRaw<'env, Buffer>> {
        let (handle, file) = (self.handle.clone(), path("path", file));
        promise(env, async move {
            let options: RawRead = parse(&options)?;
            let (file, user) = (file?, options.user.user());
            let read = handle.read_file_range(&file, options.range(), user);
            read.await.map(Buffer::from)
        })
    }

    /// `parents`: make directories that are missing.
    #[napi(
        ts_args_type = "file: string | Uint8Array, content: Uint8Array, parents: boolean, options: string"
    )]
    pub fn write_file<'env>(
        &self,
        env: &'env Env,
        file: RawPath,
        content: Uint8Array,
        parents: bool,
        options: String,
    ) -> napi::Result<PromiseRaw<'env, ()>> {
        let (handle, file) = (self.handle.clone(), path("path", file));
        // At once: the caller may change it, or give its memory away, when this has returned.
        let content = content.to_vec();
        promise(env, async move {
            let options: RawWrite = parse(&options)?;
            let options = WriteOptions {
                mode: mode(options.mode.as_ref()),
                append: options.append,
                parents,
                user: options.user.user(),
            };
            handle.write_file_with(&file?, content, options).await
        })
    }

    /// Returns JSON.
    #[napi(ts_args_type = "file: string | Uint8Array, options: string")]
    pub fn stat<'env>(
        &self,
        env: &'env Env,
        file: RawPath,
        options: String,
    ) -> napi::Result<PromiseRaw<'env, String>> {
        let (handle, file) = (self.handle.clone(), path("path", file));
        promise(env, async move {
            let options: RawStat = parse(&options)?;
            let (file, user) = (file?, options.user.user());
            let stat = handle.stat(&file, options.follow_symlinks, user);
            Ok(file_record::stat(&stat.await?))
        })
    }

    #[napi(ts_args_type = "file: string | Uint8Array, options: string")]
    pub fn exists<'env>(
        &self,
        env: &'env Env,
        file: RawPath,
        options: String,
    ) -> napi::Result<PromiseRaw<'env, bool>> {
        let (handle, file) = (self.handle.clone(), path("path", file));
        promise(env, async move {
            let options: RawUserOnly = parse(&options)?;
            handle.exists(&file?, options.user.user()).await
        })
    }

    #[napi(ts_args_type = "directory: string | Uint8Array, options: string")]
    pub fn mkdir<'env>(
        &self,
        env: &'env Env,
        directory: RawPath,
        options: String,
    ) -> napi::Result<PromiseRaw<'env, ()>> {
        let directory = path("path", directory);
        self.change_file(env, move || {
            let options: RawMkdir = parse(&options)?;
            let change = Change::MakeDirectory {
                path: directory?,
                mode: mode(options.mode.as_ref()).unwrap_or(DIRECTORY_MODE),
                parents: options.recursive,
            };
            Ok((change, options.user.user()))
        })
    }

    #[napi(
        js_name = "move",
        ts_args_type = "from: string | Uint8Array, to: string | Uint8Array, options: string"
    )]
    pub fn move_file<'env>(
        &self,
        env: &'env Env,
        from: RawPath,
        to: RawPath,
        options: String,
    ) -> napi::Result<PromiseRaw<'env, ()>> {
        let (from, to) = (path("from", from), path("to", to));
        self.change_file(env, move || {
            let options: RawMove = parse(&options)?;
            let (from, to, replace) = (from?, to?, options.overwrite);
            Ok((Change::Move { from, to, replace }, options.user.user()))
        })
    }

    #[napi(ts_args_type = "file: string | Uint8Array, mode: number, options: string")]
    pub fn chmod<'env>(
        &self,
        env: &'env Env,
        file: RawPath,
        mode: u32,
        options: String,
    ) -> napi::Result<PromiseRaw<'env, ()>> {
        let path = path("path", file);
        self.change_file(env, move || {
            let options: RawUserOnly = parse(&options)?;
            let path = path?;
            Ok((Change::SetMode { path, mode }, options.user.user()))
        })
    }

    #[napi(ts_args_type = "file: string | Uint8Array, options: string")]
    pub fn chown<'env>(
        &self,
        env: &'env Env,
        file: RawPath,
        options: String,
    ) -> napi::Result<PromiseRaw<'env, ()>> {
        let path = path("path", file);
        self.change_file(env, move || {
            let options: RawOwner = parse(&options)?;
            let id = |id: Option<Whole<0, MAX_ID>>| id.and_then(|id| u32::try_from(id.0).ok());
            let change = Change::SetOwner {
                path: path?,
                uid: id(options.uid),
                gid: id(options.gid),
                follow: options.follow_symlinks,
            };
            Ok((change, options.user.user()))
        })
    }

    #[napi(
        ts_args_type = "target: string | Uint8Array, file: string | Uint8Array, options: string"
    )]
    pub fn symlink<'env>(
        &self,
        env: &'env Env,
        target: RawPath,
        file: RawPath,
        options: String,
    ) -> napi::Result<PromiseRaw<'env, ()>> {
        let path = path("path", file);
        let target = match target {
            Either::A(text) => text.into_bytes(),
            Either::B(bytes) => bytes.to_vec(),
        };
        self.change_file(env, move || {
            let options: RawUserOnly = parse(&options)?;
            if target.is_empty() || target.contains(&0) {
                let problem = "must be neither empty nor contain a NUL byte";
                return Err(Error::invalid_argument("target", problem));
            }
            let path = path?;
            Ok((Change::Symlink { target, path }, options.user.user()))
        })
    }

    #[napi(ts_args_type = "file: string | Uint8Array, options: string")]
    pub fn readlink<'env>(
        &self,
        env: &'env Env,
        file: RawPath,
        options: String,
    ) -> napi::Result<PromiseRaw<'env, Buffer>> {
        let (handle, file) = (self.handle.clone(), path("path", file));
        promise(env, async move {
            let options: RawUserOnly = parse(&options)?;
            let target = handle.read_link(&file?, options.user.user()).await?;
            Ok(target.into())
        })
    }

    #[napi(ts_args_type = "file: string | Uint8Array, options: string")]
    pub fn realpath<'env>(
        &self,
        env: &'env Env,
        file: RawPath,
        options: String,
    ) -> napi::Result<PromiseRaw<'env, Buffer>> {
        let (handle, file) = (self.handle.clone(), path("path", file));
        promise(env, async move {
            let options: RawUserOnly = parse(&options)?;
            let real = handle.real_path(&file?, options.user.user()).await?;
            Ok(real.into())
        })
    }

    #[napi(ts_args_type = "file: string | Uint8Array, options: string, abort: NativeAbort")]
    pub fn delete<'env>(
        &self,
        env: &'env Env,
        file: RawPath,
        options: String,
        abort: &NativeAbort,
    ) -> napi::Result<PromiseRaw<'env, ()>> {
        let (handle, file) = (self.handle.clone(), path("path", file));
        let abort = abort.signal();
        promise(env, async move {
            let options: RawDelete = parse(&options)?;
            let file = file?;
            let deleted = tokio::select! {
                deleted = delete(&handle, file, options.recursive, options.user.user()) => deleted,
                () = aborting(abort) => return Err(aborted()),
            };
            match deleted {
                Err(error) if options.force && error.code == Code::Errno("ENOENT") => Ok(()),
                deleted => deleted,
            }
        })
    }

    /// Lists a directory.
    #[napi(ts_args_type = "directory: string | Uint8Array, options: string, abort: NativeAbort")]
    pub fn list<'env>(
        &self,
        env: &'env Env,
        directory: RawPath,
        options: String,
        abort: &NativeAbort,
    ) -> napi::Result<PromiseRaw<'env, NativeFileRecords>> {
        let (handle, path) = (self.handle.clone(), path("path", directory));
        let abort = abort.signal();
        promise(env, async move {
            let RawTree { user, recursive } = parse(&options)?;
            let path = path?;
            let records = tokio::select! {
                begun = handle.file_records(Task::List { path, recursive }, user.user()) => begun?,
                () = aborting(abort) => return Err(aborted()),
            };
            Ok(NativeFileRecords::new(records))
        })
    }

    /// Resolves when the watch is in force.
    #[napi(ts_args_type = "file: string | Uint8Array, options: string, abort: NativeAbort")]
    pub fn watch<'env>(
        &self,
        env: &'env Env,
        file: RawPath,
        options: String,
        abort: &NativeAbort,
    ) -> napi::Result<PromiseRaw<'env, NativeFileRecords>> {
        let (handle, path) = (self.handle.clone(), path("path", file));
        let abort = abort.signal();
        promise(env, async move {
            let RawTree { user, recursive } = parse(&options)?;
            let records = tokio::select! {
                begun = handle.watch_files(path?, recursive, user.user()) => begun?,
                () = aborting(abort) => return Err(aborted()),
            };
            Ok(NativeFileRecords::new(records))
        })
    }

    #[napi(ts_args_type = "file: string | Uint8Array, options: string")]
    pub fn open_download<'env>(
        &self,
        env: &'env Env,
        file: RawPath,
        options: String,
    ) -> napi::Result<PromiseRaw<'env, NativeDownload>> {
        let (handle, path) = (self.handle.clone(), path("path", file));
        promise(env, async move {
            let options: RawRead = parse(&options)?;
            let download = handle.download(path?, options.range(), options.user.user());
            Ok(NativeDownload {
                download: Arc::new(AsyncMutex::new(Some(download.await?))),
                closed: watch::Sender::new(false),
            })
        })
    }

    #[napi(
        ts_args_type = "file: string | Uint8Array, to: string, options: string, abort: NativeAbort"
    )]
    pub fn download_to<'env>(
        &self,
        env: &'env Env,
        file: RawPath,
        to: String,
        options: String,
        abort: &NativeAbort,
    ) -> napi::Result<PromiseRaw<'env, ()>> {
        let (handle, path) = (self.handle.clone(), path("path", file));
        let abort = abort.signal();
        promise(env, async move {
            let options: RawUserOnly = parse(&options)?;
            let to = host_path("destination", to)?;
            tokio::select! {
                done = handle.download_to(path?, &to, options.user.user()) => done,
                () = aborting(abort) => Err(aborted()),
            }
        })
    }

    #[napi(ts_args_type = "file: string | Uint8Array, options: string")]
    pub fn open_upload<'env>(
        &self,
        env: &'env Env,
        file: RawPath,
        options: String,
    ) -> napi::Result<PromiseRaw<'env, NativeUpload>> {
        let (handle, path) = (self.handle.clone(), path("path", file));
        promise(env, async move {
            let options: RawUpload = parse(&options)?;
            let mode = mode(options.mode.as_ref());
            let upload = handle.upload(path?, mode, options.user.user()).await?;
            Ok(NativeUpload {
                upload: Mutex::new(Some(Arc::new(upload))),
            })
        })
    }

    #[napi(
        ts_args_type = "from: string, file: string | Uint8Array, options: string, abort: NativeAbort"
    )]
    pub fn upload_from<'env>(
        &self,
        env: &'env Env,
        from: String,
        file: RawPath,
        options: String,
        abort: &NativeAbort,
    ) -> napi::Result<PromiseRaw<'env, ()>> {
        let (handle, path) = (self.handle.clone(), path("path", file));
        let abort = abort.signal();
        promise(env, async move {
            let options: RawUpload = parse(&options)?;
            let (from, user) = (host_path("source", from)?, options.user.user());
            let mode = mode(options.mode.as_ref());
            let upload = handle.upload_from(&from, path?, mode, user, aborting(abort));
            upload.await
        })
    }
}

impl NativeVm {
    fn change_file<'env>(
        &self,
        env: &'env Env,
        change: impl FnOnce() -> Result<(Change, User)> + Send + 'static,
    ) -> napi::Result<PromiseRaw<'env, ()>> {
        let handle = self.handle.clone();
        promise(env, async move {
            let (change, user) = change()?;
            handle.change_file(&change, user).await
        })
    }
}

async fn delete(handle: &VmHandle, path: GuestPath, recursive: bool, user: User) -> Result<()> {
    if recursive {
        handle.delete_tree(path, user).await
    } else {
        handle.change_file(&Change::Remove(path), user).await
    }
}

/// What a listing, or a watch, tells.
#[napi]
pub struct NativeFileRecords {
    records: Arc<AsyncMutex<Option<FileRecords>>>,
    closed: watch::Sender<bool>,
}

impl NativeFileRecords {
    fn new(records: FileRecords) -> Self {
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
    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Arc<Upload>>> {
        self.upload.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
