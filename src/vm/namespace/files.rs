//! File operations, as requests to PID 1. The long ones answer through a pipe that the host makes.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;

use agentvm_guest::protocol::files::{FileAnswer, FileOp};
use agentvm_guest::protocol::{Account, Request};
use async_trait::async_trait;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use tokio::sync::Semaphore;

use super::control::Answer;
use super::directory::host;
use super::running::{NamespaceVm, regular_file, unexpected};
use crate::pipe::pipe;
use crate::vm::file::Transfers;
use crate::vm::files::{Answers, Change, Files, Stat, Task, Write};
use crate::vm::{GuestPath, Result, User, VmError};

/// Workers of a VM that may be under way at a time: each is a process in it.
const MAX_TASKS: usize = 16;
const MAX_LISTS: usize = 256;
const MAX_WATCHES: usize = 64;

/// Places for tasks.
pub(super) struct Tasks {
    /// Of those that end by themselves.
    short: Arc<Semaphore>,
    lists: Arc<Semaphore>,
    watches: Arc<Semaphore>,
    pub(super) processes: Semaphore,
    transfers: Transfers,
}

impl Default for Tasks {
    fn default() -> Self {
        Self {
            short: Arc::new(Semaphore::new(MAX_TASKS)),
            lists: Arc::new(Semaphore::new(MAX_LISTS)),
            watches: Arc::new(Semaphore::new(MAX_WATCHES)),
            processes: Semaphore::new(1),
            transfers: Transfers::default(),
        }
    }
}

#[async_trait]
impl Files for NamespaceVm {
    async fn stat(&self, path: &GuestPath, follow: bool, user: User) -> Result<Stat> {
        let op = FileOp::Stat {
            path: path.to_bytes(),
            follow,
        };
        match self.file(op, user).await? {
            Answer::File(FileAnswer::Stat(stat)) => Ok(stat),
            other => Err(failure(other, "can't look at", path)),
        }
    }

    async fn change(&self, change: &Change, user: User) -> Result<()> {
        let op = operation(change);
        match self.file(op, user).await? {
            Answer::Done => Ok(()),
            Answer::Failed { errno, .. } => Err(changing_failed(change, errno)),
            other => Err(unexpected(&other)),
        }
    }

    async fn read_link(&self, path: &GuestPath, user: User) -> Result<Vec<u8>> {
        let op = FileOp::ReadLink {
            path: path.to_bytes(),
        };
        match self.file(op, user).await? {
            Answer::File(FileAnswer::Path(target)) => Ok(target),
            other => Err(failure(other, "can't read the link", path)),
        }
    }

    async fn real_path(&self, path: &GuestPath, user: User) -> Result<Vec<u8>> {
        let op = FileOp::RealPath {
            path: path.to_bytes(),
        };
        match self.file(op, user).await? {
            Answer::File(FileAnswer::Path(real)) => Ok(real),
            other => Err(failure(other, "can't resolve", path)),
        }
    }

    async fn open_to_write(
        &self,
        path: &GuestPath,
        how: Write,
        mode: u32,
        user: User,
    ) -> Result<File> {
        const OP: &str = "can't write";
        let how = match how {
            Write::Replace => OFlag::O_TRUNC,
            Write::Append => OFlag::O_APPEND,
            Write::New => OFlag::O_EXCL,
        };
        let id = self.control.next_id();
        let request = Request::Open {
            id,
            path: path.to_bytes(),
            flags: (OFlag::O_WRONLY | OFlag::O_CREAT | how).bits(),
            mode,
            user: self.account(user)?,
        };
        match self.control.call(id, &request, &[]).await? {
            Answer::Opened(descriptor) => regular_file(descriptor, path, OP),
            other => Err(failure(other, OP, path)),
        }
    }

    async fn set_mode_of(
        &self,
        file: &File,
        path: &GuestPath,
        mode: u32,
        user: User,
    ) -> Result<()> {
        let op = FileOp::SetModeOf { mode };
        match self.file_with(op, user, &[file.as_fd()]).await? {
            Answer::Done => Ok(()),
            other => Err(failure(other, "can't change the mode of", path)),
        }
    }

    async fn put_in_place(
        &self,
        file: &File,
        from: &GuestPath,
        to: &GuestPath,
        mode: Option<u32>,
        user: User,
    ) -> Result<()> {
        let op = FileOp::PutInPlace {
            from: from.to_bytes(),
            to: to.to_bytes(),
            mode,
        };
        match self.file_with(op, user, &[file.as_fd()]).await? {
            Answer::Done => Ok(()),
            other => Err(failure(other, "can't write", to)),
        }
    }

    fn transfers(&self) -> &Transfers {
        &self.tasks.transfers
    }

    async fn begin(&self, task: Task, user: User) -> Result<Answers> {
        let user = self.account(user)?;
        let permit = match &task {
            // They end when somebody ends them: one more would wait for that, maybe for itself.
            Task::Watch { path, .. } => {
                let permit = Arc::clone(&self.tasks.watches).try_acquire_owned();
                permit.map_err(|_| VmError::Watch {
                    path: path.as_str().to_owned(),
                    errno: Errno::EMFILE,
                })?
            }
            Task::List {
                path,
                at_leisure: true,
                ..
            } => {
                let permit = Arc::clone(&self.tasks.lists).try_acquire_owned();
                permit.map_err(|_| VmError::Walk {
                    path: path.as_str().to_owned(),
                })?
            }
            Task::List { .. } | Task::RemoveTree(_) | Task::Copy { .. } => {
                let permit = Arc::clone(&self.tasks.short).acquire_owned().await;
                // Nobody closes it.
                permit.map_err(|_| VmError::Ended("it was shut down".to_owned()))?
            }
        };
        let broken = |error| host("can't make a pipe for", Path::new("files"), error);
        let (ours, theirs) = pipe().map_err(broken)?;
        let op = match &task {
            Task::List {
                path,
                recursive,
                skip_unreadable,
                at_leisure: _,
            } => FileOp::List {
                path: path.to_bytes(),
                recursive: *recursive,
                skip_unreadable: *skip_unreadable,
            },
            Task::RemoveTree(path) => FileOp::RemoveTree {
                path: path.to_bytes(),
            },
            Task::Copy {
                from,
                to,
                recursive,
                replace,
            } => FileOp::Copy {
                from: from.to_bytes(),
                to: to.to_bytes(),
                recursive: *recursive,
                replace: *replace,
            },
            Task::Watch { path, recursive } => FileOp::Watch {
                path: path.to_bytes(),
                recursive: *recursive,
            },
        };
        let id = self.control.next_id();
        let request = Request::File { id, user, op };
        let begun = self.control.call(id, &request, &[theirs.as_fd()]).await?;
        if !matches!(begun, Answer::Done) {
            return Err(failure(begun, task.op(), task.path()));
        }
        drop(theirs);
        Answers::new(ours, task, permit)
            .map_err(|error| host("can't read a pipe for", Path::new("files"), error))
    }
}

impl NamespaceVm {
    async fn file(&self, op: FileOp, user: User) -> Result<Answer> {
        self.file_with(op, user, &[]).await
    }

    async fn file_with(
        &self,
        op: FileOp,
        user: User,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<Answer> {
        let user: Account = self.account(user)?;
        let id = self.control.next_id();
        let request = Request::File { id, user, op };
        self.control.call(id, &request, descriptors).await
    }
}

fn operation(change: &Change) -> FileOp {
    match change {
        Change::MakeDirectory {
            path,
            mode,
            parents,
        } => FileOp::MakeDir {
            path: path.to_bytes(),
            mode: *mode,
            parents: *parents,
        },
        Change::Move { from, to, replace } => FileOp::Rename {
            from: from.to_bytes(),
            to: to.to_bytes(),
            replace: *replace,
        },
        Change::Remove(path) => FileOp::Remove {
            path: path.to_bytes(),
        },
        Change::SetMode { path, mode } => FileOp::SetMode {
            path: path.to_bytes(),
            mode: *mode,
        },
        Change::SetOwner {
            path,
            uid,
            gid,
            follow,
        } => FileOp::SetOwner {
            path: path.to_bytes(),
            uid: *uid,
            gid: *gid,
            follow: *follow,
        },
        Change::SetTimes {
            path,
            accessed,
            modified,
            follow,
        } => FileOp::SetTimes {
            path: path.to_bytes(),
            accessed: *accessed,
            modified: *modified,
            follow: *follow,
        },
        Change::Symlink { target, path } => FileOp::Symlink {
            target: target.clone(),
            path: path.to_bytes(),
        },
    }
}

fn changing_failed(change: &Change, errno: Errno) -> VmError {
    let (op, path) = match change {
        Change::Move { from, to, .. } => {
            return VmError::Relocate {
                op: "can't move",
                from: from.as_str().to_owned(),
                to: to.as_str().to_owned(),
                errno,
            };
        }
        Change::MakeDirectory { path, .. } => ("can't make the directory", path),
        Change::Remove(path) => ("can't delete", path),
        Change::SetMode { path, .. } => ("can't change the mode of", path),
        Change::SetOwner { path, .. } => ("can't change the owner of", path),
        Change::SetTimes { path, .. } => ("can't change the times of", path),
        Change::Symlink { path, .. } => ("can't make the link", path),
    };
    VmError::File {
        op,
        path: path.as_str().to_owned(),
        errno,
    }
}

fn failure(answer: Answer, op: &'static str, path: &GuestPath) -> VmError {
    match answer {
        Answer::Failed { errno, .. } => VmError::File {
            op,
            path: path.as_str().to_owned(),
            errno,
        },
        other => unexpected(&other),
    }
}
