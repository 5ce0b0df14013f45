//! Terminals: PID 1 makes them in the VM's own devpts and hands out the other end.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use agentvm_guest::protocol::{Request, TerminalSpec};
use async_trait::async_trait;
use nix::fcntl::{F_SETFL, OFlag, fcntl};

use super::control::{Answer, Received};
use super::running::NamespaceVm;
use crate::vm::{Command, Result, Size, Terminal, TerminalEnd, Terminals, Vm, VmError};

/// `DEVPTS_SUPER_MAGIC` of `linux/magic.h`.
const DEVPTS: i64 = 0x1cd1;

/// `/dev/ptmx` on every Linux.
const PTMX: (u64, u64) = (5, 2);

#[async_trait]
impl Terminals for NamespaceVm {
    async fn spawn_on_terminal(&self, command: &Command, size: Size) -> Result<Terminal> {
        let bytes = |text: &String| text.clone().into_bytes();
        let spec = TerminalSpec {
            argv: command.argv.iter().map(bytes).collect(),
            env: self.environment(command),
            cwd: command.cwd.to_bytes(),
            user: self.account(command.user)?,
            rows: size.rows,
            cols: size.cols,
        };
        let id = self.control.next_id();
        let spec = Box::new(spec);
        let request = Request::Terminal { id, spec };
        match self.control.call(id, &request, &[]).await? {
            Answer::Spawned(child) => {
                let master = child
                    .terminal
                    .filter(|terminal| is_master(terminal.as_fd()));
                let master = master.map(Received::take).ok_or_else(|| {
                    VmError::Protocol("no terminal where one was asked for".to_owned())
                });
                match master.and_then(TerminalEnd::new) {
                    Ok(end) => Ok(Terminal {
                        pid: child.pid,
                        end,
                        exit: child.exit,
                    }),
                    Err(error) => {
                        // Nobody will ever attend to it.
                        self.kill(child.pid).await?;
                        Err(error)
                    }
                }
            }
            answer => Err(self.not_started(command, answer)),
        }
    }
}

/// Whatever PID 1 hands out, only a terminal's master is read and written: any other thing could be of
/// the host, or of a kind that the host has no business with.
fn is_master(descriptor: BorrowedFd<'_>) -> bool {
    let (Ok(stat), Ok(statfs)) = (
        nix::sys::stat::fstat(descriptor),
        nix::sys::statfs::fstatfs(descriptor),
    ) else {
        return false;
    };
    let device = (
        nix::sys::stat::major(stat.st_rdev),
        nix::sys::stat::minor(stat.st_rdev),
    );
    let is_device = stat.st_mode & libc::S_IFMT == libc::S_IFCHR && device == PTMX;
    let is_devpts = statfs.filesystem_type().0 == DEVPTS;
    if !(is_device && is_devpts) {
        tracing::debug!(fd = descriptor.as_raw_fd(), "not a terminal's master");
        return false;
    }
    fcntl(descriptor, F_SETFL(OFlag::O_RDWR | OFlag::O_NONBLOCK)).is_ok()
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::{FromRawFd, OwnedFd};

    use super::*;

    fn open(path: &str) -> OwnedFd {
        File::options()
            .read(true)
            .write(true)
            .open(path)
            .expect(path)
            .into()
    }

    #[test]
    fn nothing_else_is_taken_for_a_terminals_master() {
        let ptmx = open("/dev/ptmx");
        // SAFETY: TIOCSPTLCK reads one int, and TIOCGPTPEER opens a descriptor.
        let slave = unsafe {
            let unlock: libc::c_int = 0;
            libc::ioctl(ptmx.as_raw_fd(), libc::TIOCSPTLCK, &raw const unlock);
            let flags = libc::O_RDWR | libc::O_NOCTTY;
            OwnedFd::from_raw_fd(libc::ioctl(ptmx.as_raw_fd(), libc::TIOCGPTPEER, flags))
        };
        let (pipe, _other) = nix::unistd::pipe().expect("a pipe");
        let file = tempfile::tempfile().expect("a file");
        for (name, descriptor) in [
            ("the other end", slave),
            ("a device", open("/dev/null")),
            ("a pipe", pipe),
            ("a file", file.into()),
        ] {
            assert!(!is_master(descriptor.as_fd()), "{name}");
        }
    }
}
