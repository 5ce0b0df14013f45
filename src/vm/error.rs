//! What can go wrong with a VM, each variant with the thing that failed.

use std::io;
use std::path::PathBuf;

use nix::sys::resource::{Resource, getrlimit};
use serde_json::json;
use thiserror::Error;

use super::Limit;
use super::exec::ExecOutput;
use crate::error::{Code, Error};

#[derive(Debug, Error)]
pub enum VmError {
    /// The host lacks something that isolation needs.
    #[error("this host can't run isolated VMs: {feature} ({detail}). {remedy}")]
    Unsupported {
        feature: String,
        detail: String,
        remedy: String,
    },
    /// A limit that was asked for is one that the host can't enforce.
    #[error("limits.{limit} can't be enforced on this host: {why}. {remedy}")]
    LimitUnsupported {
        limit: Limit,
        why: String,
        remedy: &'static str,
    },
    /// A process was killed, or could not be started, because the VM has met a limit.
    #[error("{what}: the VM has reached its limit {limit}. {remedy}")]
    Limit {
        what: String,
        /// With its value, as `pids (4096)`.
        limit: String,
        remedy: &'static str,
        /// What a killed command had written until then.
        output: Option<Box<ExecOutput>>,
    },
    /// A directory or file of the VM on the host can't be used.
    #[error("{what} {path:?}: {source}{}", host_remedy(.source))]
    Host {
        what: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    /// Another live process has this VM open.
    #[error(
        "VM {key} is open in another process{holder}: a VM runs in one process at a time; close it there first"
    )]
    Busy { key: String, holder: String },
    /// An operation on a path inside the VM failed.
    #[error("{op} {path:?} in the VM: {}", file_problem(.op, *.errno))]
    File {
        op: &'static str,
        path: String,
        errno: nix::errno::Errno,
    },
    /// The process that was doing it has ended without a word. It may be that the VM has.
    #[error(
        "{op} {path:?} in the VM to the end: what did it was stopped or killed by a program of the VM"
    )]
    Interrupted { op: &'static str, path: String },
    /// A path could not be moved or copied to another.
    #[error("{op} {from:?} to {to:?} in the VM: {}", relocation_problem(.op, *.errno))]
    Relocate {
        op: &'static str,
        from: String,
        to: String,
        errno: nix::errno::Errno,
    },
    #[error("can't watch {path:?} in the VM: {}", watch_problem(*.errno))]
    Watch {
        path: String,
        errno: nix::errno::Errno,
    },
    #[error(
        "can't walk {path:?} in the VM: 256 other walks are under way. Read one to its end, or close it"
    )]
    Walk { path: String },
    /// The path is not a regular file.
    #[error("{path:?} in the VM is {found}, not a regular file{}", not_regular_remedy(.found))]
    NotRegular { path: String, found: &'static str },
    /// What has no copy.
    #[error(
        "can't copy {path:?} in the VM: it is {found}, and only files, directories and symlinks are copied. Delete it first, or copy with exec and `cp -a`, which makes another one"
    )]
    Uncopyable { path: String, found: &'static str },
    /// A VM has one image for all its life.
    #[error(
        "VM {key} was made with {} and can't be booted with {}: leave the image out, or destroy() the VM first",
        files(.has.as_ref()), files(.wanted.as_ref())
    )]
    OtherImage {
        key: String,
        /// `None`: the host's programs.
        has: Option<String>,
        wanted: Option<String>,
    },
    /// A directory of the host that can be no VM's root.
    #[error("image.rootfs: {path:?} {problem}")]
    Root { path: PathBuf, problem: String },
    /// The VM's own files have no place in it.
    #[error("{image} can't be booted: {problem}")]
    UnusableImage { image: String, problem: String },
    /// The image has no shell.
    #[error(
        "the VM has no /bin/sh that can be started, which exec runs commands with: its image needs a shell"
    )]
    NoShell,
    /// A program could not be started.
    #[error("can't start {program:?} in the VM: {}", spawn_problem(*.errno))]
    Spawn {
        program: String,
        errno: nix::errno::Errno,
    },
    /// A mount that is not allowed: `mounts[index].field`.
    #[error("mounts[{index}].{field}: {problem}")]
    Mount {
        index: usize,
        field: &'static str,
        problem: String,
    },
    /// What is to be mounted can't be opened on the host.
    #[error("mounts[{index}].hostPath: can't use {path:?} of the host: {}", .errno.desc())]
    MountSource {
        index: usize,
        path: PathBuf,
        errno: nix::errno::Errno,
    },
    /// There is something else in the VM at the place of a mount.
    #[error("can't mount at {path:?} in the VM: {}. {remedy}", .errno.desc())]
    MountPoint {
        path: String,
        errno: nix::errno::Errno,
        remedy: &'static str,
    },
    /// A step of the boot sequence failed inside the guest.
    #[error("VM boot failed at step '{step}': {}", .errno.desc())]
    Boot {
        step: String,
        errno: nix::errno::Errno,
    },
    /// This VM has no such user (an ordinary host user can map only one).
    #[error("{0}")]
    User(String),
    /// The VM ended while the call was under way.
    #[error("the VM ended: {0}")]
    Ended(String),
    /// The VM had ended, noticed or not, before it was told of the call: nothing of the call has
    /// happened, and it can be made again in another VM.
    #[error("the VM ended before the call: {0}")]
    NotSent(String),
    /// A server inside the VM can't be reached.
    #[error("can't connect to port {port} in the VM: {}", connect_problem(*.errno))]
    Connect { port: u16, errno: nix::errno::Errno },
    /// In the VM this port is the host's.
    #[error(
        "port: {0} is in loopbackExemptPorts: in this VM, port {0} of 127.0.0.1 is the host's. Connect to it from the host, or let the server in the VM use another port"
    )]
    ExemptPort(u16),
    /// PID 1 broke the protocol.
    #[error(
        "the VM's PID 1 sent {0}, which it never should: agent.sleep() ends this VM, and the next call boots it anew"
    )]
    Protocol(String),
}

fn files(image: Option<&String>) -> &str {
    image.map_or("the host's programs", |image| image)
}

fn host_remedy(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::EMFILE) => getrlimit(Resource::RLIMIT_NOFILE).map_or_else(
            |_| String::new(),
            |(most, _)| {
                format!(
                    ". This process may have {most} files open, and each running VM takes some: raise that limit (ulimit -n), or let VMs sleep"
                )
            },
        ),
        Some(libc::ENFILE) => {
            ". All processes of the host together have as many files open as they may: as root, raise fs.file-max (sysctl)".to_owned()
        }
        Some(libc::ENOSPC | libc::EDQUOT) => ". Free disk space".to_owned(),
        _ => String::new(),
    }
}

fn file_problem(op: &str, errno: nix::errno::Errno) -> &'static str {
    use nix::errno::Errno;
    match (errno, op) {
        (Errno::ENXIO, _) => {
            "it is a socket, a FIFO that nobody reads, or a device that is not there: only programs in the VM can use such (exec)"
        }
        (Errno::EAGAIN, _) => "a program in the VM has a lease on it (fcntl(2), F_SETLEASE)",
        (Errno::ENOENT, "can't write") => {
            "No such directory. mkdir makes one, and writeFiles makes those that are missing"
        }
        // The guest's: see its `tree`.
        (Errno::E2BIG, _) => {
            "it has more than 16,777,216 entries, or programs in the VM go on making some"
        }
        (Errno::ENOTEMPTY, "can't delete") => {
            "Directory not empty. With { recursive: true } all that is in it is deleted, too"
        }
        (errno, _) => errno.desc(),
    }
}

fn relocation_problem(op: &str, errno: nix::errno::Errno) -> &'static str {
    use nix::errno::Errno;
    match (errno, op) {
        // rename(2), and the guest's copy.
        (Errno::EINVAL, _) => "nothing can be put into itself",
        (Errno::EISDIR, "can't copy") => {
            "Is a directory. With { recursive: true } it is copied with all that is in it"
        }
        (Errno::EXDEV, "can't move") => {
            "they are on different file systems: copy it there, and delete it here"
        }
        (errno, op) => file_problem(op, errno),
    }
}

fn not_regular_remedy(found: &str) -> &'static str {
    match found {
        "a directory" => "",
        _ => ": only programs in the VM can use it (exec)",
    }
}

fn spawn_problem(errno: nix::errno::Errno) -> &'static str {
    match errno {
        // The one thing that has a number of places.
        nix::errno::Errno::ENOSPC => "it has as many terminals as it may (256): close one",
        nix::errno::Errno::ENOENT => {
            "there is no such program, or the interpreter that its first line or ELF header names is missing"
        }
        nix::errno::Errno::E2BIG => {
            "its arguments and environment are larger than the kernel takes (128 KiB for one of them, a quarter of the stack's limit for all)"
        }
        errno => errno.desc(),
    }
}

fn connect_problem(errno: nix::errno::Errno) -> &'static str {
    if errno == nix::errno::Errno::ECONNREFUSED {
        "nothing listens there on 127.0.0.1 or ::1 (waitForPort waits until something does)"
    } else {
        errno.desc()
    }
}

fn watch_problem(errno: nix::errno::Errno) -> &'static str {
    match errno {
        nix::errno::Errno::EMFILE => {
            "it has as many watches as it may (64, or a quarter of the host's fs.inotify.max_user_instances, those of its programs counted): close one"
        }
        nix::errno::Errno::ENOSPC => {
            "there are more directories than it may watch (a quarter of the host's fs.inotify.max_user_watches)"
        }
        errno => errno.desc(),
    }
}

impl VmError {
    /// Of a command that has reached a limit.
    #[must_use]
    pub(super) fn with_output(mut self, written: ExecOutput) -> Self {
        if let Self::Limit { output, .. } = &mut self {
            *output = Some(Box::new(written));
        }
        self
    }
}

impl From<VmError> for Error {
    fn from(error: VmError) -> Self {
        let code = match &error {
            VmError::Boot {
                errno: nix::errno::Errno::ENOSPC | nix::errno::Errno::EDQUOT,
                ..
            }
            | VmError::MountPoint {
                errno: nix::errno::Errno::ENOSPC | nix::errno::Errno::EDQUOT,
                ..
            } => Code::StoreFull,
            VmError::Limit { .. } => Code::VmLimit,
            VmError::LimitUnsupported { .. }
            | VmError::Unsupported { .. }
            | VmError::Boot { .. }
            | VmError::User(_) => Code::VmUnsupported,
            VmError::Host { source, .. }
                if matches!(source.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT)) =>
            {
                Code::StoreFull
            }
            VmError::Host { source, .. } => source
                .raw_os_error()
                .map_or(Code::Internal, Code::from_errno),
            VmError::Busy { .. } => Code::VmBusy,
            VmError::OtherImage { .. } => Code::ImageMismatch,
            VmError::Interrupted { .. } => Code::from(nix::errno::Errno::EINTR),
            VmError::UnusableImage { .. } => Code::ImageInvalid,
            VmError::Root { path, problem } => {
                let problem = format!("\"{}\" {problem}", path.display());
                return Self::invalid_argument("image.rootfs", problem);
            }
            VmError::NoShell => Code::from(nix::errno::Errno::ENOENT),
            VmError::ExemptPort(_) => Code::InvalidArgument,
            VmError::Mount {
                index,
                field,
                problem,
            } => {
                return Self::invalid_argument(
                    &format!("mounts[{index}].{field}"),
                    problem.clone(),
                );
            }
            VmError::File { errno, .. }
            | VmError::Relocate { errno, .. }
            | VmError::Watch { errno, .. }
            | VmError::Spawn { errno, .. }
            | VmError::Connect { errno, .. }
            | VmError::MountSource { errno, .. }
            | VmError::MountPoint { errno, .. } => Code::from(*errno),
            VmError::NotRegular { found, .. } => Code::Errno(if *found == "a directory" {
                "EISDIR"
            } else {
                "EINVAL"
            }),
            VmError::Walk { .. } => Code::from(nix::errno::Errno::EMFILE),
            VmError::Uncopyable { .. } => Code::from(nix::errno::Errno::EINVAL),
            VmError::Ended(_) | VmError::NotSent(_) | VmError::Protocol(_) => Code::VmExited,
        };
        let hint = if matches!(error, VmError::Unsupported { .. } | VmError::Boot { .. })
            && code == Code::VmUnsupported
        {
            ". `npx agentvm doctor` shows what this host has and what it lacks"
        } else {
            ""
        };
        let told = Self::new(code, format!("{error}{hint}"));
        match error {
            VmError::Limit {
                output: Some(output),
                ..
            } => told.with_data(json!({
                "stdout": String::from_utf8_lossy(&output.stdout),
                "stderr": String::from_utf8_lossy(&output.stderr),
            })),
            _ => told,
        }
    }
}
