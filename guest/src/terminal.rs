//! Terminals: a pseudo-terminal of the VM's own devpts, and a program that it controls.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use agentvm_guest::protocol::{Account, TerminalSpec, USER_ID};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;

use crate::process::{Launch, SpawnError, Starting};

/// The group `tty` on every Linux.
pub(crate) const TTY_GROUP: u32 = 5;

/// The program, and the terminal's other end.
pub(crate) fn start(spec: TerminalSpec) -> Result<(Starting, OwnedFd), SpawnError> {
    let (master, slave) = pair(&spec)?;
    let stdio = [slave.try_clone(), slave.try_clone(), Ok(slave)];
    let mut descriptors = Vec::new();
    for descriptor in stdio {
        descriptors.push(descriptor.map_err(|error| crate::boot::errno_of(&error))?);
    }
    let stdio = <[OwnedFd; 3]>::try_from(descriptors).map_err(|_| Errno::EBADF)?;
    let mut launch = Launch::new(spec.argv, spec.env, spec.cwd, spec.user, stdio)?;
    launch.control_terminal();
    Ok((launch.start()?, master))
}

fn pair(spec: &TerminalSpec) -> nix::Result<(OwnedFd, OwnedFd)> {
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
    let master = open("/dev/pts/ptmx", flags, Mode::empty())?;
    let unlock: libc::c_int = 0;
    // SAFETY: TIOCSPTLCK reads one int.
    Errno::result(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &raw const unlock) })?;
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: TIOCGPTPEER takes flags by value and opens a descriptor.
    let slave = unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags) };
    let slave: RawFd = Errno::result(slave)?;
    // SAFETY: the kernel has just returned this descriptor.
    let slave = unsafe { OwnedFd::from_raw_fd(slave) };
    let size = libc::winsize {
        ws_row: spec.rows,
        ws_col: spec.cols,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: TIOCSWINSZ reads the struct.
    Errno::result(unsafe { libc::ioctl(slave.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) })?;
    erase_characters(&slave)?;
    if spec.user == Account::User && nix::unistd::geteuid().is_root() {
        // As login(1) does, with the mode that devpts has given it.
        nix::unistd::fchown(&slave, Some(USER_ID.into()), Some(TTY_GROUP.into()))?;
    }
    Ok((master, slave))
}

/// Makes a backspace in a line that the kernel edits erase a character, not a byte of one.
fn erase_characters(slave: &OwnedFd) -> nix::Result<()> {
    // SAFETY: a struct of integers.
    let mut settings: libc::termios = unsafe { std::mem::zeroed() };
    // SAFETY: tcgetattr writes the struct.
    Errno::result(unsafe { libc::tcgetattr(slave.as_raw_fd(), &raw mut settings) })?;
    settings.c_iflag |= libc::IUTF8;
    // SAFETY: tcsetattr reads the struct.
    Errno::result(unsafe {
        libc::tcsetattr(slave.as_raw_fd(), libc::TCSANOW, &raw const settings)
    })?;
    Ok(())
}
