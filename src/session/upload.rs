//! Files that are brought into a VM bit by bit, and are there when they are whole.
//!
//! They are written under another name, beside their own, and renamed. What ends an upload early removes
//! it: a task does that, also when nobody asks for the upload any more, and an end of the VM waits for it.

use std::fs::File;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use uuid::Uuid;

use super::client::VmHandle;
use super::files::{Held, parent};
use super::host_file;
use crate::error::{Code, Error, Result};
use crate::vm::files::{Change, Event, FILE_MODE, Record, Write as How};
use crate::vm::{DynVm, GuestPath, User, VmError, file};

/// A file on its way into a VM. Dropping it gives it up.
pub struct Upload {
    steps: mpsc::Sender<Step>,
    /// Why there are no more steps.
    failure: Arc<OnceLock<Error>>,
    /// Without a sender when it has ended.
    ended: watch::Receiver<()>,
    task: JoinHandle<()>,
}

enum Step {
    Write(Source, oneshot::Sender<Result<u64>>),
    Finish(oneshot::Sender<Result<u64>>),
}

enum Source {
    Bytes(Vec<u8>),
    /// From so far on.
    File(Arc<File>, u64),
}

struct Receiver {
    file: Arc<File>,
    temporary: GuestPath,
    path: GuestPath,
    mode: Option<u32>,
    user: User,
    held: Held,
}

impl VmHandle {
    /// Begins an upload to `path`. What is there, a symlink too, is replaced when it is finished.
    /// `mode`: permissions; by default those of any new file.
    pub async fn upload(&self, path: GuestPath, mode: Option<u32>, user: User) -> Result<Upload> {
        // Brought to its end, though whoever asked gives up: nobody else would know of the file.
        let handle = self.clone();
        let beginning = tokio::spawn(async move { handle.begin_upload(path, mode, user).await });
        beginning.await.unwrap_or_else(|error| {
            let problem = format!("an upload's beginning ended: {error}");
            Err(Error::new(Code::Internal, problem))
        })
    }

    async fn begin_upload(&self, path: GuestPath, mode: Option<u32>, user: User) -> Result<Upload> {
        let temporary = temporary(&path)?;
        let settings = self.open()?;
        let awake = self.machine.awake_to_make(settings).await;
        self.open()?;
        let open = |vm: DynVm| {
            let temporary = &temporary;
            let mode = mode.unwrap_or(FILE_MODE);
            let path = &path;
            async move {
                let opened = vm.open_to_write(temporary, How::New, mode, user);
                opened.await.map_err(|error| at(path, error))
            }
        };
        let (vm, file) = self.machine.begin(settings, open).await?;
        let receiver = Receiver {
            file: Arc::new(file),
            temporary,
            path,
            mode,
            user,
            held: Held::new(vm, self, awake),
        };
        // One step waits at most: each is asked for when the one before is done.
        let (steps, asked) = mpsc::channel(1);
        let failure = Arc::default();
        let told = Arc::clone(&failure);
        let (ending, ended) = watch::channel(());
        let task = tokio::spawn(async move {
            receiver.receive(asked, told).await;
            drop(ending);
        });
        Ok(Upload {
            steps,
            failure,
            ended,
            task,
        })
    }

    /// Copies a file of the host into the VM, unless `abort` resolves first. Whatever it fails for,
    /// nothing of it is left then.
    pub async fn upload_from(
        &self,
        from: &Path,
        path: GuestPath,
        mode: Option<u32>,
        user: User,
        abort: impl Future<Output = ()> + Send,
    ) -> Result<()> {
        tokio::pin!(abort);
        let exposure = self.machine.exposure(self.open()?);
        let opened = host_file::on_a_thread({
            let from = from.to_owned();
            move || host_file::open(&exposure, &from)
        });
        let source = opened
            .await
            .map_err(|refused| host_file::failed("read", from, refused))?;
        let source = Arc::new(source);
        let upload = self.upload(path, mode, user).await?;
        let mut position = 0;
        loop {
            let part = Source::File(Arc::clone(&source), position);
            let copied = tokio::select! {
                copied = upload.step(|done| Step::Write(part, done)) => copied,
                () = &mut abort => Err(Error::new(Code::Aborted, "the upload was aborted")),
            };
            match copied {
                Ok(0) => return upload.finish().await,
                Ok(copied) => position += copied,
                Err(error) => {
                    upload.abort().await;
                    return Err(error);
                }
            }
        }
    }
}

/// What the name of a file on its way begins with.
const TEMPORARY: &[u8] = b".agentvm-upload-";

/// What a watch tells of files on their way: nothing before they are there.
pub(super) fn told(record: Record) -> Option<Record> {
    let is_temporary = |path: &[u8]| {
        let name = path.rsplit(|byte| *byte == b'/').next();
        name.is_some_and(|name| name.starts_with(TEMPORARY))
    };
    match record {
        Record::Event(
            Event::Created { ref path, .. }
            | Event::Modified { ref path }
            | Event::Attributes { ref path, .. }
            | Event::Deleted { ref path, .. },
        ) if is_temporary(path) => None,
        Record::Event(Event::Moved {
            from,
            path,
            directory,
        }) if is_temporary(&from) => Some(Record::Event(Event::Created { path, directory })),
        record => Some(record),
    }
}

fn temporary(path: &GuestPath) -> Result<GuestPath> {
    let name = path.as_bytes().rsplit(|byte| *byte == b'/').next();
    let directory = parent(path).filter(|_| !matches!(name, None | Some(b"" | b"." | b"..")));
    let Some(directory) = directory else {
        let problem = format!("{:?} names a directory, not a file", path.as_str());
        return Err(Error::new(Code::Errno("EISDIR"), problem));
    };
    let name = Uuid::now_v7().simple().to_string();
    GuestPath::from_bytes([directory.as_bytes(), TEMPORARY, name.as_bytes()].concat())
        .map_err(|problem| Error::invalid_argument("path", problem))
}

/// A failure in words of the path that the caller knows.
fn at(path: &GuestPath, error: VmError) -> VmError {
    match error {
        VmError::File { errno, .. } => VmError::File {
            op: "can't write",
            path: path.as_str().to_owned(),
            errno,
        },
        error => error,
    }
}

impl Upload {
    /// Writes what comes next. Resolves when the kernel has taken it.
    pub async fn write(&self, bytes: Vec<u8>) -> Result<()> {
        let bytes = Source::Bytes(bytes);
        self.step(|done| Step::Write(bytes, done)).await.map(drop)
    }

    /// Puts the file in its place.
    pub async fn finish(self) -> Result<()> {
        self.step(Step::Finish).await?;
        // So that its VM may sleep when this has returned.
        let _ = self.task.await;
        Ok(())
    }

    /// Resolves when it has ended, and fails if it was ended by something else than its caller.
    pub fn gone(&self) -> impl Future<Output = Result<()>> + Send + use<> {
        let (mut ended, failure) = (self.ended.clone(), Arc::clone(&self.failure));
        async move {
            // Nothing is ever sent.
            let _ = ended.changed().await;
            failure.get().map_or(Ok(()), |error| Err(error.clone()))
        }
    }

    /// Gives it up. When this returns, nothing of it is left.
    pub async fn abort(self) {
        drop(self.steps);
        let _ = self.task.await;
    }

    async fn step(&self, step: impl FnOnce(oneshot::Sender<Result<u64>>) -> Step) -> Result<u64> {
        let (done, result) = oneshot::channel();
        if self.steps.send(step(done)).await.is_ok()
            && let Ok(result) = result.await
        {
            return result;
        }
        let failure = self.failure.get().cloned();
        Err(failure.unwrap_or_else(|| Error::new(Code::Aborted, "the upload was given up")))
    }
}

impl Receiver {
    async fn receive(self, mut steps: mpsc::Receiver<Step>, failure: Arc<OnceLock<Error>>) {
        loop {
            let step = tokio::select! {
                biased;
                ended = self.held.ended() => {
                    let _ = failure.set(ended);
                    break;
                }
                step = steps.recv() => step,
            };
            let (result, done, last) = match step {
                None => break,
                Some(Step::Write(source, done)) => (self.write(source).await, done, false),
                Some(Step::Finish(done)) => (self.finish().await.map(|()| 0), done, true),
            };
            match result {
                Ok(_) if last => {
                    let _ = done.send(result);
                    return;
                }
                Ok(_) => {
                    let _ = done.send(result);
                }
                Err(error) => {
                    let _ = failure.set(error.clone());
                    self.remove().await;
                    let _ = done.send(Err(error));
                    return;
                }
            }
        }
        self.remove().await;
    }

    async fn write(&self, source: Source) -> Result<u64> {
        let into = Arc::clone(&self.file);
        let transfers = self.held.vm.transfers();
        let write = transfers.blocking("can't write", &self.path, move || match source {
            Source::Bytes(bytes) => {
                std::io::Write::write_all(&mut &*into, &bytes)?;
                Ok(bytes.len() as u64)
            }
            Source::File(from, position) => file::copy_some(&from, position, &into),
        });
        self.held.until_the_end(write).await
    }

    async fn finish(&self) -> Result<()> {
        let (from, to) = (&self.temporary, &self.path);
        let put = (self.held.vm).put_in_place(&self.file, from, to, self.mode, self.user);
        let put = async { put.await.map_err(|error| at(to, error)) };
        self.held.until_the_end(put).await
    }

    async fn remove(&self) {
        let change = Change::Remove(self.temporary.clone());
        let removed = self.held.vm.change(&change, self.user).await;
        if let Err(error) = removed {
            tracing::debug!(%error, "what is left of an upload stays");
        }
    }
}
