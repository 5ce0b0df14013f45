//! The files of a VM. What is open of them keeps the VM awake.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use nix::errno::Errno;
use tokio::sync::watch;

use super::awake::Awake;
use super::client::{VmHandle, closed_error};
use super::host_file::{self, NewFile, on_host};
use super::upload::told;
use crate::closing::Closing;
use crate::error::{Code, Error, Result};
use crate::host_path::Exposure;
use crate::vm::files::{
    Answers, Change, DIRECTORY_MODE, FILE_MODE, Record, Stat, Task, Write as How,
};
use crate::vm::{DynVm, GuestPath, Open, User, VmError, file};

/// Which part of a file is read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ReadRange {
    pub offset: u64,
    /// `None`: to its end.
    pub length: Option<u64>,
}

/// How a file is written as a whole.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WriteOptions {
    /// Permissions, as they are to be. `None`: those that it has, or of a new file.
    pub mode: Option<u32>,
    /// Behind what it holds.
    pub append: bool,
    /// Make directories that are missing.
    pub parents: bool,
    pub user: User,
}

/// Records of one batch.
const BATCH: usize = 8192;

/// Bytes that a download reads at once.
const CHUNK: u64 = 512 * 1024;

/// Something that is under way in a VM, and keeps it awake.
pub(super) struct Held {
    pub(super) vm: DynVm,
    pub(super) handle: VmHandle,
    pub(super) awake: Awake,
    closed: watch::Receiver<bool>,
}

impl Held {
    pub(super) fn new(vm: DynVm, handle: &VmHandle, awake: Awake) -> Self {
        Self {
            vm,
            awake,
            closed: handle.client.closed(),
            handle: handle.clone(),
        }
    }

    /// What `work` comes to, unless the VM or the client is ended first.
    pub(super) async fn until_the_end<T: Send>(
        &self,
        work: impl Future<Output = Result<T, VmError>> + Send,
    ) -> Result<T> {
        tokio::select! {
            biased;
            ended = self.ended() => Err(ended),
            done = work => self.handle.machine.outcome(&self.vm, done).await,
        }
    }

    /// Resolves when the VM, or the client, is being ended.
    pub(super) async fn ended(&self) -> Error {
        let mut closed = self.closed.clone();
        tokio::select! {
            biased;
            () = self.awake.ending() => self.handle.machine.was_ended(),
            _ = closed.wait_for(|closed| *closed) => closed_error(),
        }
    }
}

impl VmHandle {
    /// Reads a regular file, at most [`file::MAX_BUFFER`] bytes of it.
    pub async fn read_file(&self, path: &GuestPath, user: User) -> Result<Vec<u8>> {
        self.read_file_range(path, ReadRange::default(), user).await
    }

    pub async fn read_file_range(
        &self,
        path: &GuestPath,
        ReadRange { offset, length }: ReadRange,
        user: User,
    ) -> Result<Vec<u8>> {
        let (settings, _awake) = self.awake().await?;
        let open = |vm: DynVm| async move { vm.open(path, Open::Read, user).await };
        let (vm, file) = self.machine.begin(settings, open).await?;
        let content = file::read_range(&*vm, file, path, offset, length).await;
        self.machine.outcome(&vm, content).await
    }

    /// Makes a file, or replaces what it holds.
    pub async fn write_file(&self, path: &GuestPath, content: Vec<u8>, user: User) -> Result<()> {
        let options = WriteOptions {
            user,
            ..WriteOptions::default()
        };
        self.write_file_with(path, content, options).await
    }

    pub async fn write_file_with(
        &self,
        path: &GuestPath,
        content: Vec<u8>,
        options: WriteOptions,
    ) -> Result<()> {
        let (settings, _awake) = self.awake().await?;
        let open = |vm: DynVm| async move { open_to_write(&vm, path, options).await };
        let (vm, file) = self.machine.begin(settings, open).await?;
        let written = file::write_opened(&*vm, file, path, content).await;
        self.machine.outcome(&vm, written).await
    }

    /// Of what a symlink at `path` leads to, with `follow`.
    pub async fn stat(&self, path: &GuestPath, follow: bool, user: User) -> Result<Stat> {
        let (settings, _awake) = self.awake().await?;
        let stat = |vm: DynVm| async move { vm.stat(path, follow, user).await };
        Ok(self.machine.begin(settings, stat).await?.1)
    }

    /// Whether there is something at a path, or where its symlinks lead.
    pub async fn exists(&self, path: &GuestPath, user: User) -> Result<bool> {
        match self.stat(path, true, user).await {
            Ok(_) => Ok(true),
            Err(Error {
                code: Code::Errno("ENOENT" | "ENOTDIR"),
                ..
            }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    pub async fn change_file(&self, change: &Change, user: User) -> Result<()> {
        let (settings, _awake) = self.awake().await?;
        let change = |vm: DynVm| async move { vm.change(change, user).await };
        self.machine.begin(settings, change).await.map(|_| ())
    }

    /// What a symlink holds.
    pub async fn read_link(&self, path: &GuestPath, user: User) -> Result<Vec<u8>> {
        let (settings, _awake) = self.awake().await?;
        let read = |vm: DynVm| async move { vm.read_link(path, user).await };
        Ok(self.machine.begin(settings, read).await?.1)
    }

    /// The path without symlinks, `.` and `..` in it.
    pub async fn real_path(&self, path: &GuestPath, user: User) -> Result<Vec<u8>> {
        let (settings, _awake) = self.awake().await?;
        let resolve = |vm: DynVm| async move { vm.real_path(path, user).await };
        Ok(self.machine.begin(settings, resolve).await?.1)
    }

    /// Does a [`Task`] that tells nothing. Dropping the future ends it somewhere in between.
    pub async fn do_files(&self, task: Task, user: User) -> Result<()> {
        let mut records = self.file_records(task, user).await?;
        while records.next().await?.is_some() {}
        Ok(())
    }

    /// Begins a [`Task`], and tells what it tells.
    pub async fn file_records(&self, task: Task, user: User) -> Result<FileRecords> {
        let (settings, awake) = self.awake().await?;
        let begin = |vm: DynVm| {
            let task = task.clone();
            async move { vm.begin(task, user).await }
        };
        // It may wait for others to end.
        let beginning = self.machine.begin(settings, begin);
        let (vm, answers) = tokio::select! {
            begun = beginning => begun?,
            () = awake.ending() => return Err(self.machine.was_ended()),
        };
        let held = Held::new(vm, self, awake);
        Ok(FileRecords {
            answers,
            failed: None,
            held,
        })
    }

    /// The same for a [`Task::Watch`], once it is in force: what happens from then on is told.
    pub async fn watch_files(
        &self,
        path: GuestPath,
        recursive: bool,
        user: User,
    ) -> Result<FileRecords> {
        let watch = Task::Watch { path, recursive };
        let mut records = self.file_records(watch, user).await?;
        let first = records.held.until_the_end(records.answers.next()).await?;
        match first {
            Some(Record::Watching) => Ok(records),
            _ => Err(VmError::Protocol("no watch where one was asked for".to_owned()).into()),
        }
    }

    /// Opens a file to be read bit by bit.
    pub async fn download(
        &self,
        path: GuestPath,
        ReadRange { offset, length }: ReadRange,
        user: User,
    ) -> Result<Download> {
        let (settings, awake) = self.awake().await?;
        let open = |vm: DynVm| {
            let path = path.clone();
            async move { vm.open(&path, Open::Read, user).await }
        };
        let (vm, file) = self.machine.begin(settings, open).await?;
        Ok(Download {
            file: Opened {
                file: Some(Arc::new(file)),
                closing: Closing::new(),
            },
            path,
            position: offset,
            left: length.unwrap_or(u64::MAX),
            held: Held::new(vm, self, awake),
        })
    }

    /// Copies a file of the VM to one of the host, which is replaced when all of it has arrived.
    pub async fn download_to(&self, path: GuestPath, to: &Path, user: User) -> Result<()> {
        let exposure = self.machine.exposure(self.open()?);
        let download = self.download(path, ReadRange::default(), user).await?;
        download.save(exposure, to).await
    }
}

async fn open_to_write(
    vm: &DynVm,
    path: &GuestPath,
    options: WriteOptions,
) -> Result<File, VmError> {
    let how = if options.append {
        How::Append
    } else {
        How::Replace
    };
    let WriteOptions { mode, user, .. } = options;
    let new_mode = mode.unwrap_or(FILE_MODE);
    let open = || vm.open_to_write(path, how, new_mode, user);
    let opened = match open().await {
        Err(VmError::File {
            errno: Errno::ENOENT,
            ..
        }) if options.parents => {
            if let Some(parent) = parent(path) {
                let make = Change::MakeDirectory {
                    path: parent,
                    mode: DIRECTORY_MODE,
                    parents: true,
                };
                vm.change(&make, user).await?;
            }
            open().await
        }
        opened => opened,
    }?;
    if let Some(mode) = mode {
        vm.set_mode_of(&opened, path, mode, user).await?;
    }
    Ok(opened)
}

/// The directory that a path's last name is in.
pub(super) fn parent(path: &GuestPath) -> Option<GuestPath> {
    let bytes = path.as_bytes();
    let end = bytes.iter().rposition(|byte| *byte != b'/')?;
    let slash = bytes[..=end].iter().rposition(|byte| *byte == b'/')?;
    GuestPath::from_bytes(bytes[..=slash].to_vec()).ok()
}

/// What a [`Task`] tells, batch by batch. Dropping it ends the task.
pub struct FileRecords {
    answers: Answers,
    /// What came after the last batch.
    failed: Option<VmError>,
    held: Held,
}

impl FileRecords {
    /// The next records, as soon as there are some. `None` at the end. Dropping the future loses
    /// nothing.
    pub async fn next(&mut self) -> Result<Option<Vec<Record>>> {
        let Self {
            answers,
            failed,
            held,
        } = self;
        held.until_the_end(async {
            if let Some(failed) = failed.take() {
                return Err(failed);
            }
            let first = loop {
                match answers.next().await?.map(told) {
                    None => return Ok(None),
                    Some(None) => {}
                    Some(Some(first)) => break first,
                }
            };
            let mut batch = vec![first];
            while batch.len() < BATCH {
                match answers.ready() {
                    Ok(Some(record)) => batch.extend(told(record)),
                    Ok(None) => break,
                    Err(error) => {
                        *failed = Some(error);
                        break;
                    }
                }
            }
            Ok(Some(batch))
        })
        .await
    }
}

/// A file of the VM that is read bit by bit.
pub struct Download {
    file: Opened,
    path: GuestPath,
    position: u64,
    left: u64,
    held: Held,
}

/// A file that may be deleted when the last descriptor of it is closed, which takes as long as it is large.
struct Opened {
    /// `None` only while it is dropped.
    file: Option<Arc<File>>,
    closing: Arc<Closing>,
}

impl Opened {
    fn get(&self) -> Result<Arc<File>> {
        let gone = || Error::new(Code::Internal, "a file that is being closed is read");
        self.file.clone().ok_or_else(gone)
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        // Otherwise a thread that reads it has the last.
        if let Some(last) = self.file.take().and_then(Arc::into_inner) {
            self.closing.close(last.into());
        }
    }
}

impl Download {
    /// The next bytes; none at the end.
    pub async fn read(&mut self) -> Result<Vec<u8>> {
        let (file, position) = (self.file.get()?, self.position);
        let length = usize::try_from(self.left.min(CHUNK)).unwrap_or(0);
        let transfers = self.held.vm.transfers();
        let read = transfers.blocking("can't read", &self.path, move || {
            let mut chunk = vec![0; length];
            let filled = file::fill(&file, &mut chunk, position)?;
            chunk.truncate(filled);
            Ok(chunk)
        });
        let chunk = self.held.until_the_end(read).await?;
        self.position += chunk.len() as u64;
        self.left -= chunk.len() as u64;
        Ok(chunk)
    }

    async fn save(mut self, exposure: Exposure, to: &Path) -> Result<()> {
        let place = to.to_owned();
        let opened = host_file::on_a_thread(move || NewFile::beside(&exposure, &place));
        let saved = opened
            .await
            .map_err(|refused| host_file::failed("write", to, refused))?;
        let saved = Arc::new(saved);
        loop {
            let (from, into) = (self.file.get()?, Arc::clone(&saved));
            let position = self.position;
            let transfers = self.held.vm.transfers();
            let copying =
                transfers.on_a_thread(move || file::copy_some(&from, position, into.file()));
            let copied = self.held.until_the_end(async { Ok(copying.await) });
            match copied.await? {
                Ok(0) => break,
                Ok(length) => self.position += length,
                Err(error) => return Err(on_host("write", to, &error)),
            }
        }
        let keeping = file::on_a_thread(move || {
            // Nothing copies any more.
            let saved = Arc::into_inner(saved).ok_or(Errno::EBUSY)?;
            saved.keep()
        });
        keeping.await.map_err(|error| on_host("write", to, &error))
    }
}
