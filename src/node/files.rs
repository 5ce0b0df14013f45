//! File operations, listings, watches and transfers of `NativeVm`.

#![expect(
    clippy::needless_pass_by_value,
    reason = "napi hands arguments over by value"
)]
#![expect(
    clippy::unused_self,
    reason = "methods, as the calls that they check arguments for"
)]

use std::path::PathBuf;

use napi::Env;
use napi::bindgen_prelude::{Buffer, Either, PromiseRaw, ToNapiValue, Uint8Array};
use napi_derive::napi;
use serde::de::DeserializeOwned;

use super::error::{promise, rejection};
use super::file_options::{
    Milliseconds, Mode, RawCopy, RawDelete, RawList, RawMkdir, RawMove, RawOwner, RawRead, RawStat,
    RawTimes, RawUpload, RawUserOnly, RawWatch, RawWrite,
};
use super::file_record;
use super::options::parse;
use super::transfers::{NativeDownload, NativeFileRecords, NativeUpload};
use super::vm::{NativeAbort, NativeVm, aborting, unless_aborted};
use crate::error::{Code, Error, Result};
use crate::session::{VmHandle, WriteOptions};
use crate::vm::files::{Change, DIRECTORY_MODE, Task};
use crate::vm::{GuestPath, User};

/// Bytes where a path is not UTF-8.
type RawPath = Either<String, Uint8Array>;

fn bytes(raw: RawPath) -> Vec<u8> {
    match raw {
        Either::A(text) => text.into_bytes(),
        Either::B(bytes) => bytes.to_vec(),
    }
}

fn path(field: &str, bytes: Vec<u8>) -> Result<GuestPath> {
    GuestPath::from_bytes(bytes).map_err(|problem| Error::invalid_argument(field, problem))
}

fn host_path(field: &str, path: String) -> Result<PathBuf> {
    if path.is_empty() || path.contains('\0') {
        let problem = "a path must be neither empty nor contain a NUL byte";
        return Err(Error::invalid_argument(field, problem));
    }
    Ok(path.into())
}

/// Throws what a call about the file at a path would reject with for its arguments.
fn check<O: DeserializeOwned>(file: RawPath, options: &str) -> napi::Result<()> {
    let checked = parse::<O>(options).and_then(|_| path("path", bytes(file)));
    checked.map(drop).map_err(rejection)
}

impl NativeVm {
    /// A call about the file at a path.
    fn at<'env, O, T, F>(
        &self,
        env: &'env Env,
        file: RawPath,
        options: String,
        call: impl FnOnce(VmHandle, GuestPath, O) -> F + Send + 'static,
    ) -> napi::Result<PromiseRaw<'env, T>>
    where
        O: DeserializeOwned + Send,
        T: ToNapiValue + Send + 'static,
        F: Future<Output = Result<T>> + Send,
    {
        // At once: the caller may change the bytes when the call has returned.
        let (handle, file) = (self.handle.clone(), bytes(file));
        promise(env, async move {
            let options = parse(&options)?;
            call(handle, path("path", file)?, options).await
        })
    }

    /// A [`Change`] of the file at a path.
    fn change_at<'env, O: DeserializeOwned + Send>(
        &self,
        env: &'env Env,
        file: RawPath,
        options: String,
        change: impl FnOnce(GuestPath, O) -> Result<(Change, User)> + Send + 'static,
    ) -> napi::Result<PromiseRaw<'env, ()>> {
        self.at(env, file, options, |vm, path, options: O| {
            let change = change(path, options);
            async move {
                let (change, user) = change?;
                vm.change_file(&change, user).await
            }
        })
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
        self.at(
            env,
            file,
            options,
            |vm, path, options: RawRead| async move {
                let read = vm.read_file_range(&path, options.range(), options.user.user());
                read.await.map(Buffer::from)
            },
        )
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
        // At once: the caller may change it, or give its memory away, when this has returned.
        let content = content.to_vec();
        self.at(
            env,
            file,
            options,
            move |vm, path, options: RawWrite| async move {
                let options = WriteOptions {
                    mode: options.mode.map(|Mode(mode)| mode),
                    append: options.append,
                    parents,
                    user: options.user.user(),
                };
                vm.write_file_with(&path, content, options).await
            },
        )
    }

    /// Returns JSON.
    #[napi(ts_args_type = "file: string | Uint8Array, options: string")]
    pub fn stat<'env>(
        &self,
        env: &'env Env,
        file: RawPath,
        options: String,
    ) -> napi::Result<PromiseRaw<'env, String>> {
        self.at(
            env,
            file,
            options,
            |vm, path, options: RawStat| async move {
                let stat = vm.stat(&path, options.follow_symlinks, options.user.user());
                Ok(file_record::stat(&stat.await?))
            },
        )
    }

    #[napi(ts_args_type = "file: string | Uint8Array, options: string")]
    pub fn exists<'env>(
        &self,
        env: &'env Env,
        file: RawPath,
        options: String,
    ) -> napi::Result<PromiseRaw<'env, bool>> {
        self.at(env, file, options, |vm, path, options: RawUserOnly| async move {
            vm.exists(&path, options.user.user()).await
        })
    }

    #[napi(ts_args_type = "directory: string | Uint8Array, options: string")]
    pub fn mkdir<'env>(
        &self,
        env: &'env Env,
        directory: RawPath,
        options: String,
    ) -> napi::Result<PromiseRaw<'env, ()>> {
        self.change_at(env, directory, options, |path, options: RawMkdir| {
            let mode = options.mode.map_or(DIRECTORY_MODE, |Mode(mode)| mode);
            let parents = options.recursive;
            Ok((
                Change::MakeDirectory {
                    path,
                    mode,
                    parents,
                },
                options.user.user(),
            ))
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
        let (handle, from, to) = (self.handle.clone(), bytes(from), bytes(to));
        promise(env, async move {
            let options: RawMove = parse(&options)?;
            let (from, to, replace) = (path("from", from)?, path("to", to)?, options.overwrite);
            let change = Change::Move { from, to, replace };
            handle.change_file(&change, options.user.user()).await
        })
    }

    #[napi(
        ts_args_type = "from: string | Uint8Array, to: string | Uint8Array, options: string, abort: NativeAbort"
    )]
    pub fn copy<'env>(
        &self,
        env: &'env Env,
        from: RawPath,
        to: RawPath,
        options: String,
        abort: &NativeAbort,
    ) -> napi::Result<PromiseRaw<'env, ()>> {
        let (to, abort) = (bytes(to), abort.signal());
        self.at(
            env,
            from,
            options,
            |vm, from, options: RawCopy| async move {
                let copy = Task::Copy {
                    from,
                    to: path("to", to)?,
                    recursive: options.recursive,
                    replace: options.overwrite,
                };
                unless_aborted(abort, vm.do_files(copy, options.user.user())).await
            },
        )
    }

    #[napi(ts_args_type = "file: string | Uint8Array, options: string")]
    pub fn utimes<'env>(
        &self,
        env: &'env Env,
        file: RawPath,
        options: String,
    ) -> napi::Result<PromiseRaw<'env, ()>> {
        self.change_at(env, file, options, |path, options: RawTimes| {
            let change = Change::SetTimes {
                path,
                accessed: options.atime_ms.map(|Milliseconds(time)| time),
                modified: options.mtime_ms.map(|Milliseconds(time)| time),
                follow: options.follow_symlinks,
            };
            Ok((change, options.user.user()))
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
        self.change_at(env, file, options, move |path, options: RawUserOnly| {
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
        self.change_at(env, file, options, |path, options: RawOwner| {
            let change = Change::SetOwner {
                path,
                uid: options.uid.map(u32::from),
                gid: options.gid.map(u32::from),
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
        let target = bytes(target);
        self.change_at(env, file, options, |path, options: RawUserOnly| {
            if target.is_empty() || target.contains(&0) {
                let problem = "must be neither empty nor contain a NUL byte";
                return Err(Error::invalid_argument("target", problem));
            }
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
        self.at(
            env,
            file,
            options,
            |vm, path, options: RawUserOnly| async move {
                let target = vm.read_link(&path, options.user.user());
                target.await.map(Buffer::from)
            },
        )
    }

    #[napi(ts_args_type = "file: string | Uint8Array, options: string")]
    pub fn realpath<'env>(
        &self,
        env: &'env Env,
        file: RawPath,
        options: String,
    ) -> napi::Result<PromiseRaw<'env, Buffer>> {
        self.at(
            env,
            file,
            options,
            |vm, path, options: RawUserOnly| async move {
                let real = vm.real_path(&path, options.user.user());
                real.await.map(Buffer::from)
            },
        )
    }

    #[napi(ts_args_type = "file: string | Uint8Array, options: string, abort: NativeAbort")]
    pub fn delete<'env>(
        &self,
        env: &'env Env,
        file: RawPath,
        options: String,
        abort: &NativeAbort,
    ) -> napi::Result<PromiseRaw<'env, ()>> {
        let abort = abort.signal();
        self.at(
            env,
            file,
            options,
            |vm, path, options: RawDelete| async move {
                let RawDelete {
                    user,
                    recursive,
                    force,
                } = options;
                let deleted = delete(&vm, path, recursive, user.user());
                match unless_aborted(abort, deleted).await {
                    Err(error) if force && error.code == Code::Errno("ENOENT") => Ok(()),
                    deleted => deleted,
                }
            },
        )
    }

    /// For who lists later.
    #[napi(ts_args_type = "directory: string | Uint8Array, options: string")]
    pub fn check_list(&self, directory: RawPath, options: String) -> napi::Result<()> {
        check::<RawList>(directory, &options)
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
        let abort = abort.signal();
        self.at(
            env,
            directory,
            options,
            |vm, path, options: RawList| async move {
                let list = Task::List {
                    path,
                    recursive: options.recursive,
                    skip_unreadable: options.skip_unreadable,
                    at_leisure: options.at_leisure,
                };
                let listing = vm.file_records(list, options.user.user());
                unless_aborted(abort, listing)
                    .await
                    .map(NativeFileRecords::new)
            },
        )
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
        let abort = abort.signal();
        self.at(
            env,
            file,
            options,
            |vm, path, options: RawWatch| async move {
                let watch = vm.watch_files(path, options.recursive, options.user.user());
                unless_aborted(abort, watch)
                    .await
                    .map(NativeFileRecords::new)
            },
        )
    }

    /// For who reads later.
    #[napi(ts_args_type = "file: string | Uint8Array, options: string")]
    pub fn check_download(&self, file: RawPath, options: String) -> napi::Result<()> {
        check::<RawRead>(file, &options)
    }

    #[napi(ts_args_type = "file: string | Uint8Array, options: string")]
    pub fn open_download<'env>(
        &self,
        env: &'env Env,
        file: RawPath,
        options: String,
    ) -> napi::Result<PromiseRaw<'env, NativeDownload>> {
        self.at(
            env,
            file,
            options,
            |vm, path, options: RawRead| async move {
                let download = vm.download(path, options.range(), options.user.user());
                download.await.map(NativeDownload::new)
            },
        )
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
        let abort = abort.signal();
        self.at(
            env,
            file,
            options,
            |vm, path, options: RawUserOnly| async move {
                let to = host_path("destination", to)?;
                unless_aborted(abort, vm.download_to(path, &to, options.user.user())).await
            },
        )
    }

    #[napi(ts_args_type = "file: string | Uint8Array, options: string")]
    pub fn open_upload<'env>(
        &self,
        env: &'env Env,
        file: RawPath,
        options: String,
    ) -> napi::Result<PromiseRaw<'env, NativeUpload>> {
        self.at(
            env,
            file,
            options,
            |vm, path, options: RawUpload| async move {
                let mode = options.mode.map(|Mode(mode)| mode);
                let upload = vm.upload(path, mode, options.user.user());
                upload.await.map(NativeUpload::new)
            },
        )
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
        let abort = aborting(abort.signal());
        self.at(
            env,
            file,
            options,
            |vm, path, options: RawUpload| async move {
                let (from, user) = (host_path("source", from)?, options.user.user());
                let mode = options.mode.map(|Mode(mode)| mode);
                vm.upload_from(&from, path, mode, user, abort).await
            },
        )
    }
}

async fn delete(handle: &VmHandle, path: GuestPath, recursive: bool, user: User) -> Result<()> {
    if recursive {
        handle.do_files(Task::RemoveTree(path), user).await
    } else {
        handle.change_file(&Change::Remove(path), user).await
    }
}
