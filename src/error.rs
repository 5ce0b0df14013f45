//! The one error that leaves this crate: a stable [`Code`], a sentence, and what to do about it.
//!
//! Components have error enums of their own, whose variants carry the failing path or value
//! ([`crate::vm::VmError`], [`crate::store::StoreError`], …); each turns into an [`Error`] at the
//! session layer.

use std::fmt;

use nix::errno::Errno;
use serde_json::Value;

/// Stable, documented identifiers of failures; `error.code` in JavaScript.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Code {
    SessionNotFound,
    SessionBusy,
    AgentUnknown,
    AgentNotInstalled,
    AgentInUse,
    InstallFailed,
    AgentExited,
    AgentProtocol,
    AgentError,
    AgentUnsupported,
    AuthRequired,
    EnvRequired,
    PermissionNotFound,
    ProcessNotFound,
    ShellNotFound,
    VmUnsupported,
    VmBusy,
    VmExited,
    VmLimit,
    NetworkDenied,
    ImageNotFound,
    ImageInvalid,
    ImageUnsupported,
    ImageTooLarge,
    ImageMismatch,
    ImageDenied,
    ImagePullFailed,
    Timeout,
    InvalidArgument,
    SeqAhead,
    ResultTooLarge,
    StoreCorrupt,
    StoreFull,
    ClientClosed,
    Aborted,
    /// The name of an errno, as `ENOENT`: a file operation failed.
    Errno(&'static str),
    /// A defect of agentvm itself, or a host fault that has no code of its own.
    Internal,
}

impl Code {
    /// The errno of a system call of this process.
    #[must_use]
    pub fn from_errno(raw: i32) -> Self {
        Errno::from_raw(raw).into()
    }

    /// The code as JavaScript sees it.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::SessionNotFound => "SESSION_NOT_FOUND",
            Self::SessionBusy => "SESSION_BUSY",
            Self::AgentUnknown => "AGENT_UNKNOWN",
            Self::AgentNotInstalled => "AGENT_NOT_INSTALLED",
            Self::AgentInUse => "AGENT_IN_USE",
            Self::InstallFailed => "INSTALL_FAILED",
            Self::AgentExited => "AGENT_EXITED",
            Self::AgentProtocol => "AGENT_PROTOCOL",
            Self::AgentError => "AGENT_ERROR",
            Self::AgentUnsupported => "AGENT_UNSUPPORTED",
            Self::AuthRequired => "AUTH_REQUIRED",
            Self::EnvRequired => "ENV_REQUIRED",
            Self::PermissionNotFound => "PERMISSION_NOT_FOUND",
            Self::ProcessNotFound => "PROCESS_NOT_FOUND",
            Self::ShellNotFound => "SHELL_NOT_FOUND",
            Self::VmUnsupported => "VM_UNSUPPORTED",
            Self::VmBusy => "VM_BUSY",
            Self::VmExited => "VM_EXITED",
            Self::VmLimit => "VM_LIMIT",
            Self::NetworkDenied => "NETWORK_DENIED",
            Self::ImageNotFound => "IMAGE_NOT_FOUND",
            Self::ImageInvalid => "IMAGE_INVALID",
            Self::ImageUnsupported => "IMAGE_UNSUPPORTED",
            Self::ImageTooLarge => "IMAGE_TOO_LARGE",
            Self::ImageMismatch => "IMAGE_MISMATCH",
            Self::ImageDenied => "IMAGE_DENIED",
            Self::ImagePullFailed => "IMAGE_PULL_FAILED",
            Self::Timeout => "TIMEOUT",
            Self::InvalidArgument => "INVALID_ARGUMENT",
            Self::SeqAhead => "SEQ_AHEAD",
            Self::ResultTooLarge => "RESULT_TOO_LARGE",
            Self::StoreCorrupt => "STORE_CORRUPT",
            Self::StoreFull => "STORE_FULL",
            Self::ClientClosed => "CLIENT_CLOSED",
            Self::Aborted => "ABORTED",
            Self::Errno(name) => name,
            Self::Internal => "INTERNAL",
        }
    }
}

/// `ENOENT` for [`Errno::ENOENT`]; one that files and processes do not meet is `EIO`.
impl From<Errno> for Code {
    fn from(errno: Errno) -> Self {
        macro_rules! names {
            ($($name:ident)*) => {
                match errno { $(Errno::$name => stringify!($name),)* _ => "EIO" }
            };
        }
        Self::Errno(
            names!(EPERM ENOENT ESRCH EINTR EIO ENXIO E2BIG ENOEXEC EBADF ECHILD EAGAIN ENOMEM EACCES EFAULT
        ENOTBLK EBUSY EEXIST EXDEV ENODEV ENOTDIR EISDIR EINVAL ENFILE EMFILE ENOTTY ETXTBSY EFBIG
        ENOSPC ESPIPE EROFS EMLINK EPIPE ERANGE ENAMETOOLONG ENOSYS ENOTEMPTY ELOOP EOVERFLOW
        EDQUOT ESTALE EOPNOTSUPP ETIMEDOUT ECONNREFUSED ECONNRESET ECONNABORTED ENOTCONN EADDRNOTAVAIL
        EPROTO),
        )
    }
}

/// What every fallible call of this crate returns.
///
/// `message` names the thing that failed and ends with the remedy where there is one; `data` is
/// the agent's own error data, unchanged, where an agent reported the failure.
#[derive(Debug, Clone)]
pub struct Error {
    pub code: Code,
    pub message: String,
    pub data: Option<Value>,
}

pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            data: None,
        }
    }

    #[must_use]
    pub fn with_data(mut self, data: Value) -> Self {
        self.data = Some(data);
        self
    }

    /// An argument of a call is wrong; `field` is its name as the caller wrote it.
    pub fn invalid_argument(field: &str, problem: impl fmt::Display) -> Self {
        Self::new(Code::InvalidArgument, format!("{field}: {problem}"))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code.as_str(), self.message)
    }
}

impl std::error::Error for Error {}
