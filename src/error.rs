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
    ImageInUse,
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
            Self::ImageInUse => "IMAGE_IN_USE",
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
        let message = message.into();
        let message = match code {
            // Words of an agent or a model.
            Code::AgentError | Code::AgentExited | Code::AgentProtocol | Code::AuthRequired => {
                message
            }
            _ => readable(message),
        };
        Self {
            code,
            message,
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

/// Characters of a name or path that a message has.
const LONGEST: usize = 200;

/// A message in which the middle is left out of what is in quotes, or is one word, and too long to be
/// read: paths and names are as long as their giver likes. `lib/errors.ts` has the same.
fn readable(message: String) -> String {
    if message.len() <= LONGEST {
        return message;
    }
    let mut told = String::with_capacity(message.len());
    for line in message.split_inclusive('\n') {
        let mut rest = line;
        // Each quote is paired once: some messages are as long as an agent likes.
        let mut may_be_quoted = true;
        while !rest.is_empty() {
            let quoted = may_be_quoted.then(|| in_quotes(rest)).flatten();
            may_be_quoted &= quoted.is_some() || !rest.starts_with('"');
            let (part, more) = rest.split_at(quoted.unwrap_or_else(|| word(rest)));
            push_short(&mut told, part);
            rest = more;
        }
    }
    told
}

fn push_short(told: &mut String, part: &str) {
    let length = part.chars().count();
    if length <= LONGEST {
        told.push_str(part);
    } else {
        told.extend(part.chars().take(LONGEST / 2));
        told.push('…');
        told.extend(part.chars().skip(length - LONGEST / 2));
    }
}

/// The length of a word at the start of a text, or of the one character that is none.
fn word(text: &str) -> usize {
    let is_between = |c: char| c.is_whitespace() || c == '"';
    match text.find(is_between) {
        Some(0) => text.chars().next().map_or(0, char::len_utf8),
        end => end.unwrap_or(text.len()),
    }
}

/// The length of what is in quotes at the start of a line, as `{:?}` writes it.
fn in_quotes(line: &str) -> Option<usize> {
    let inner = line.strip_prefix('"')?;
    let mut is_escaped = false;
    for (at, c) in inner.char_indices() {
        match c {
            '"' if !is_escaped => return Some(at + 2),
            _ => is_escaped = c == '\\' && !is_escaped,
        }
    }
    None
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code.as_str(), self.message)
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(text: String) -> String {
        Error::new(Code::Internal, text).message
    }

    #[test]
    fn the_middle_of_a_long_name_is_left_out_and_nothing_else() {
        let (a, b, ab) = (
            "a".repeat(99),
            "b".repeat(99),
            "a".repeat(2000) + &"b".repeat(2000),
        );
        assert_eq!(
            message(format!(
                "can't read {ab:?} in the VM: {}",
                "it is not there. ".repeat(30)
            )),
            format!(
                "can't read \"{a}…{b}\" in the VM: {}",
                "it is not there. ".repeat(30)
            )
        );
        assert_eq!(
            message(format!("env.{ab}: x")).chars().count(),
            201 + " x".len()
        );
        let spaces = format!("a b \\\" {ab} c");
        assert_eq!(message(format!("{spaces:?}")).chars().count(), 201);
        assert!(message(format!("{:?}", "é".repeat(300))).starts_with("\"é"));
    }

    #[test]
    fn what_is_no_name_is_told_as_a_whole() {
        let words = "a word, ".repeat(100);
        for text in [
            words.clone(),
            format!("a lone \" and {words}"),
            format!("\"{words}\n{words}\""),
            format!("{:?}", "a".repeat(198)),
        ] {
            assert_eq!(message(text.clone()), text);
        }
        let whole = format!("the model said {:?}", "a".repeat(1000));
        assert_eq!(Error::new(Code::AgentError, &whole).message, whole);
    }
}
