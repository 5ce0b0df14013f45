//! A program on a terminal, and the host's end of that terminal.
//!
//! The end is one open file that PID 1 may have kept a descriptor of. A PID 1 that is not ours any more can
//! take what is to be read, and make calls on it block. So no worker of the async runtime reads or writes
//! it: a thread of its own does. Such a PID 1 can keep that thread, for good, and nobody else: nobody waits
//! for it without end.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use tokio::sync::{mpsc, oneshot, watch};

use super::{Command, Exit, Result, VmError};

/// What is read at once, and how many of these wait to be taken.
const CHUNK: usize = 32 * 1024;
const CHUNKS: usize = 2;

/// Most that is read after the end of the program: more than the kernel holds of a terminal, and an end to
/// what a background process goes on writing.
const LAST: usize = 256 * 1024;

/// Most that is written at once.
const PIECE: usize = 4096;

/// How long the thread has to hand over what is there when it is asked to end: it is not asked to wait for
/// anything then.
const LAST_WORD: Duration = Duration::from_secs(5);

/// How often a terminal is looked at that no program has open: one may open it again. It is not hung up
/// for that: a program that is about to exit closes it first, and would hear of it (SIGHUP).
const AGAIN: u8 = 50; // ms

/// Of the thread, which calls nothing deep.
const STACK: usize = 128 * 1024;

/// In characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    pub cols: u16,
    pub rows: u16,
}

/// A started program and its terminal. Dropping it hangs up.
#[derive(Debug)]
pub struct Terminal {
    /// Pid as seen inside the VM; also its session, whose terminal it is.
    pub pid: u32,
    pub end: TerminalEnd,
    /// As that of [`super::Process`].
    pub exit: watch::Receiver<Option<Exit>>,
}

#[async_trait]
pub trait Terminals: Send + Sync {
    /// Starts a program as leader of a session that a new terminal controls, which is its stdin, stdout and
    /// stderr.
    async fn spawn_on_terminal(&self, command: &Command, size: Size) -> Result<Terminal>;
}

/// What a program on a terminal has written, and the way to it.
#[derive(Debug)]
pub struct TerminalEnd {
    pub output: mpsc::Receiver<Vec<u8>>,
    pub input: TerminalInput,
}

/// The way to a program on a terminal. Clones are the same.
#[derive(Debug, Clone)]
pub struct TerminalInput {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    todo: Mutex<Todo>,
    /// Wakes the thread.
    wake: EventFd,
    /// That it is asked to end.
    finished: watch::Sender<bool>,
}

/// And who is told when the terminal has taken all of it.
type Input = (Vec<u8>, oneshot::Sender<io::Result<()>>);

/// What the thread is to do.
#[derive(Debug, Default)]
struct Todo {
    input: VecDeque<Input>,
    resize: Option<Size>,
    /// Read what is there, and end.
    finish: bool,
    /// It does not look here any more.
    ended: bool,
}

impl TerminalEnd {
    /// Takes over a terminal's master.
    pub(super) fn new(master: OwnedFd) -> Result<Self> {
        let failed = |error: io::Error| VmError::Host {
            what: "can't attend to",
            path: Path::new("a terminal").to_owned(),
            source: error,
        };
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let wake = EventFd::from_flags(flags).map_err(|errno| failed(errno.into()))?;
        let shared = Arc::new(Shared {
            todo: Mutex::default(),
            wake,
            finished: watch::Sender::new(false),
        });
        let (sender, output) = mpsc::channel(CHUNKS);
        let relay = Relay {
            master: Some(File::from(master)),
            shared: Arc::clone(&shared),
            output: sender,
            is_open: true,
            read: None,
            input: None,
            written: 0,
        };
        std::thread::Builder::new()
            .name("agentvm-tty".to_owned())
            .stack_size(STACK)
            .spawn(move || relay.run())
            .map_err(failed)?;
        let input = TerminalInput { shared };
        Ok(Self { output, input })
    }

    /// The next output. `None`: there is no more.
    pub async fn next(&mut self) -> Option<Vec<u8>> {
        let is_finishing = self.input.shared.todo().finish;
        let chunk = if is_finishing {
            let last = tokio::time::timeout(LAST_WORD, self.output.recv());
            last.await.unwrap_or_else(|_| {
                tracing::warn!("a terminal's thread does not end: its VM keeps it in a call");
                None
            })
        } else {
            self.output.recv().await
        };
        // There is room for another one.
        self.input.shared.wake();
        chunk
    }
}

impl Drop for TerminalEnd {
    fn drop(&mut self) {
        self.input.finish();
    }
}

impl TerminalInput {
    /// In the order of the calls. Resolves when the terminal has taken all of it.
    pub fn write(&self, data: Vec<u8>) -> impl Future<Output = io::Result<()>> + Send + use<> {
        let (done, written) = oneshot::channel();
        let mut todo = self.shared.todo();
        if todo.ended || todo.finish {
            drop(done);
        } else {
            todo.input.push_back((data, done));
        }
        drop(todo);
        self.shared.wake();
        let mut finished = self.shared.finished.subscribe();
        async move {
            // An error: the thread has ended, and what it was to write with it.
            let over = async {
                drop(finished.wait_for(|finished| *finished).await);
                tokio::time::sleep(LAST_WORD).await;
            };
            let broken = || Err(ErrorKind::BrokenPipe.into());
            tokio::select! {
                biased;
                written = written => written.unwrap_or_else(|_| broken()),
                () = over => broken(),
            }
        }
    }

    /// Before what is written next. Programs are told by SIGWINCH.
    pub fn resize(&self, size: Size) {
        self.shared.todo().resize = Some(size);
        self.shared.wake();
    }

    /// Hangs up, once what is there has been read. What is not written yet fails.
    pub fn finish(&self) {
        let mut todo = self.shared.todo();
        todo.finish = true;
        todo.input.clear();
        drop(todo);
        self.shared.finished.send_replace(true);
        self.shared.wake();
    }
}

impl Shared {
    fn todo(&self) -> MutexGuard<'_, Todo> {
        self.todo.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        // It fails only when the counter is full, which wakes as well.
        let _ = self.wake.write(1);
    }
}

/// The thread between a terminal and the rest of the process.
struct Relay {
    /// `None`: it is hung up.
    master: Option<File>,
    shared: Arc<Shared>,
    output: mpsc::Sender<Vec<u8>>,
    /// Whether a program has it open.
    is_open: bool,
    /// Waits for room.
    read: Option<Vec<u8>>,
    /// What is being written: nobody else's any more, since a program that has read it may be gone before
    /// this thread knows that it has written it.
    input: Option<Input>,
    /// Of that.
    written: usize,
}

impl Relay {
    fn run(mut self) {
        while self.master.is_some() {
            let (resize, finish, has_input) = {
                let mut todo = self.shared.todo();
                let has_input = self.input.is_some() || !todo.input.is_empty();
                (todo.resize.take(), todo.finish, has_input)
            };
            if let Some(size) = resize {
                self.resize(size);
            }
            if finish {
                self.read_last();
                break;
            }
            self.hand_on();
            if self.turn(has_input).is_err() {
                break;
            }
        }
        let mut todo = self.shared.todo();
        todo.ended = true;
        // Dropped, they fail.
        todo.input.clear();
        drop(todo);
        self.input = None;
        self.master = None;
        if let Some(chunk) = self.read.take() {
            // Fails when nobody is there to take it.
            drop(self.output.blocking_send(chunk));
        }
    }

    /// Waits for something to do on the terminal and does it.
    fn turn(&mut self, has_input: bool) -> io::Result<()> {
        let Some(master) = &self.master else {
            return Ok(());
        };
        let mut wanted = PollFlags::empty();
        wanted.set(PollFlags::POLLIN, self.read.is_none());
        wanted.set(PollFlags::POLLOUT, has_input);
        let mut ready = [
            PollFd::new(self.shared.wake.as_fd(), PollFlags::POLLIN),
            PollFd::new(master.as_fd(), wanted),
        ];
        // A hang-up would be reported though nobody asked: who takes nothing now, waits for the call.
        let count = if wanted.is_empty() || !self.is_open {
            1
        } else {
            2
        };
        let (long, now) = if self.is_open {
            (PollTimeout::NONE, None)
        } else {
            (PollTimeout::from(AGAIN), Some(PollTimeout::ZERO))
        };
        let mut polled = poll(&mut ready[..count], long);
        if let (Ok(_), Some(now)) = (polled, now) {
            polled = poll(&mut ready, now);
        }
        match polled {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let is = |index: usize, flags: PollFlags| {
            ready[index]
                .revents()
                .is_some_and(|found| found.intersects(flags))
        };
        let over = PollFlags::POLLHUP | PollFlags::POLLERR;
        let (woken, readable) = (is(0, PollFlags::POLLIN), is(1, PollFlags::POLLIN));
        let (writable, hung_up) = (is(1, PollFlags::POLLOUT), is(1, over));
        if woken {
            // It is not blocking, and nobody else reads it.
            let _ = self.shared.wake.read();
        }
        if writable && !hung_up {
            self.write();
        }
        self.is_open = !hung_up || readable;
        if readable && self.read.is_none() {
            match self.read_some() {
                Err(error) if error.raw_os_error() == Some(libc::EIO) => self.is_open = false,
                read => self.read = read?,
            }
            self.hand_on();
        }
        Ok(())
    }

    fn hand_on(&mut self) {
        if let Some(chunk) = self.read.take()
            && let Err(mpsc::error::TrySendError::Full(chunk)) = self.output.try_send(chunk)
        {
            self.read = Some(chunk);
        }
    }

    /// What there is, up to a chunk.
    fn read_some(&mut self) -> io::Result<Option<Vec<u8>>> {
        let Some(master) = &mut self.master else {
            return Ok(None);
        };
        let mut chunk = vec![0; CHUNK];
        let mut length = 0;
        // The kernel gives a page at most at once.
        while length < CHUNK {
            match master.read(&mut chunk[length..]) {
                Ok(0) => break,
                Ok(read) => length += read,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if length == 0 && error.kind() != ErrorKind::WouldBlock => {
                    // EIO: no program has the terminal open.
                    return Err(error);
                }
                Err(_) => break,
            }
        }
        chunk.truncate(length);
        chunk.shrink_to_fit();
        Ok((length > 0).then_some(chunk))
    }

    fn read_last(&mut self) {
        let mut length = 0;
        loop {
            if let Some(chunk) = self.read.take() {
                length += chunk.len();
                if self.output.blocking_send(chunk).is_err() {
                    return;
                }
            }
            let Some(master) = &self.master else { return };
            let mut ready = [PollFd::new(master.as_fd(), PollFlags::POLLIN)];
            let polled = poll(&mut ready, PollTimeout::ZERO);
            let found = ready[0].revents().unwrap_or(PollFlags::empty());
            if length >= LAST || polled.is_err() || !found.contains(PollFlags::POLLIN) {
                return;
            }
            match self.read_some() {
                Ok(Some(chunk)) => self.read = Some(chunk),
                Ok(None) | Err(_) => return,
            }
        }
    }

    fn write(&mut self) {
        let Some(master) = &mut self.master else {
            return;
        };
        loop {
            let next = || self.shared.todo().input.pop_front();
            let Some((data, done)) = self.input.take().or_else(next) else {
                return;
            };
            let total = data.len();
            let rest = &data[self.written.min(total)..];
            let rest = &rest[..rest.len().min(PIECE)];
            let result = if rest.is_empty() {
                Ok(0)
            } else {
                master.write(rest)
            };
            match result {
                Ok(written) if self.written + written >= total => {
                    self.written = 0;
                    // Fails when nobody waits for it.
                    drop(done.send(Ok(())));
                }
                Ok(written) => {
                    self.written += written;
                    self.input = Some((data, done));
                    if written == 0 {
                        return;
                    }
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {
                    self.input = Some((data, done));
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.input = Some((data, done));
                    return;
                }
                Err(error) => {
                    self.written = 0;
                    drop(done.send(Err(error)));
                }
            }
        }
    }

    fn resize(&self, size: Size) {
        let Some(master) = &self.master else { return };
        let size = libc::winsize {
            ws_row: size.rows,
            ws_col: size.cols,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        // SAFETY: TIOCSWINSZ reads the struct. It can't fail on a terminal.
        unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::FromRawFd;

    use nix::fcntl::{F_SETFL, OFlag, fcntl};
    use tokio::time::timeout;

    use super::*;

    /// Nothing here takes so long, unless it hangs.
    const LONG: Duration = Duration::from_secs(30);

    /// Both ends of a terminal on which bytes go as they are.
    fn terminal() -> (OwnedFd, File) {
        let master = File::options()
            .read(true)
            .write(true)
            .open("/dev/ptmx")
            .expect("/dev/ptmx");
        // SAFETY: ioctls on an int and a flag, the last of which opens a descriptor; tcgetattr and
        // tcsetattr on a struct of integers.
        let slave = unsafe {
            let unlock: libc::c_int = 0;
            libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &raw const unlock);
            let flags = libc::O_RDWR | libc::O_NOCTTY;
            let slave = libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags);
            let mut settings: libc::termios = std::mem::zeroed();
            libc::tcgetattr(slave, &raw mut settings);
            libc::cfmakeraw(&raw mut settings);
            libc::tcsetattr(slave, libc::TCSANOW, &raw const settings);
            File::from_raw_fd(slave)
        };
        let nonblocking = F_SETFL(OFlag::O_RDWR | OFlag::O_NONBLOCK);
        fcntl(&master, nonblocking).expect("a flag");
        (master.into(), slave)
    }

    #[tokio::test]
    async fn bytes_go_both_ways_in_their_order() {
        let (master, mut slave) = terminal();
        let mut end = TerminalEnd::new(master).expect("a thread");
        slave.write_all(b"to you").expect("room");
        let chunk = timeout(LONG, end.next()).await.expect("in time");
        assert_eq!(chunk.as_deref(), Some(&b"to you"[..]));
        let written = [b"one ".to_vec(), b"two".to_vec()].map(|data| end.input.write(data));
        for written in written {
            timeout(LONG, written)
                .await
                .expect("in time")
                .expect("taken");
        }
        let mut read = [0; 7];
        slave.read_exact(&mut read).expect("what was written");
        assert_eq!(&read, b"one two");
    }

    #[tokio::test]
    async fn what_is_there_at_the_end_is_read_and_then_nothing_more_is_written() {
        let (master, mut slave) = terminal();
        let mut end = TerminalEnd::new(master).expect("a thread");
        slave.write_all(b"last").expect("room");
        end.input.finish();
        let mut seen = Vec::new();
        while let Some(chunk) = timeout(LONG, end.next()).await.expect("in time") {
            seen.extend(chunk);
        }
        assert_eq!(seen, b"last");
        let late = timeout(LONG, end.input.write(b"x".to_vec())).await;
        assert!(late.expect("in time").is_err());
        // Hung up: what is left reads the end, or EIO.
        assert!(matches!(slave.read(&mut [0]), Ok(0) | Err(_)));
    }

    #[tokio::test]
    async fn a_terminal_that_nobody_has_open_can_be_opened_again_until_it_is_hung_up() {
        let (master, slave) = terminal();
        let again = master.try_clone().expect("a duplicate");
        let mut end = TerminalEnd::new(master).expect("a thread");
        drop(slave);
        let short = Duration::from_millis(200);
        assert!(timeout(short, end.next()).await.is_err());
        // SAFETY: opens a descriptor.
        let mut slave = unsafe {
            let flags = libc::O_RDWR | libc::O_NOCTTY;
            File::from_raw_fd(libc::ioctl(again.as_raw_fd(), libc::TIOCGPTPEER, flags))
        };
        slave.write_all(b"again").expect("room");
        let chunk = timeout(LONG, end.next()).await.expect("in time");
        assert_eq!(chunk.as_deref(), Some(&b"again"[..]));
        drop(slave);
        end.input.finish();
        assert_eq!(timeout(LONG, end.next()).await.expect("in time"), None);
    }

    /// A PID 1 that is not ours any more has a duplicate.
    #[tokio::test]
    async fn a_terminal_that_is_made_to_block_keeps_nobody_but_its_thread() {
        let (master, slave) = terminal();
        let theirs = master.try_clone().expect("a duplicate");
        let mut end = TerminalEnd::new(master).expect("a thread");
        fcntl(&theirs, F_SETFL(OFlag::O_RDWR)).expect("a flag");
        // More than the terminal holds, which nobody reads.
        let written = end.input.write(vec![0; 1 << 20]);
        tokio::pin!(written);
        let short = Duration::from_millis(200);
        assert!(timeout(short, written.as_mut()).await.is_err());
        assert!(timeout(short, end.next()).await.is_err());
        end.input.finish();
        assert!(timeout(LONG, written).await.expect("in time").is_err());
        let ended = timeout(LONG, async { while end.next().await.is_some() {} });
        ended.await.expect("in time");
        drop((slave, theirs));
    }
}
