//! The host's ends of pipes whose other ends programs have.
//!
//! The kernel lets who reads, writes or closes a pipe wait for who holds its lock, `O_NONBLOCK` or not, and a
//! program holds it for as long as the memory takes to be there that it writes from, which other threads of
//! it can make long. So the runtime only waits for a pipe to be ready; what touches it is done by threads that
//! may wait, one at a time for each end.

use std::future::poll_fn;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::stat::{SFlag, fstat};
use nix::unistd::pipe2;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, Interest, ReadBuf};
use tokio::runtime::Handle;
use tokio::task::JoinHandle;

/// How long the rest of what a program wrote is waited for, when it has ended: what it has left running may keep
/// the pipe locked.
pub const DRAIN: Duration = Duration::from_secs(10);

/// Most that is read or written at once: what a pipe holds unless it was made larger.
const CHUNK: usize = 64 * 1024;

/// A pipe: the end to read from, and the end to write to.
pub fn pipe() -> io::Result<(PipeEnd, PipeEnd)> {
    let (read, write) = pipe2(OFlag::O_CLOEXEC)?;
    Ok((read.into(), write.into()))
}

/// An end that nobody reads or writes: not yet, or not in this process.
#[derive(Debug)]
pub struct PipeEnd {
    fd: ManuallyDrop<OwnedFd>,
    taken: bool,
    runtime: Handle,
}

/// For who closes it where it may wait.
impl From<PipeEnd> for OwnedFd {
    fn from(mut end: PipeEnd) -> Self {
        end.taken = true;
        // SAFETY: `taken` says that it is gone, and nothing uses `end` but its drop.
        unsafe { ManuallyDrop::take(&mut end.fd) }
    }
}

/// To be done in the runtime whose threads close it.
impl From<OwnedFd> for PipeEnd {
    fn from(fd: OwnedFd) -> Self {
        Self {
            fd: ManuallyDrop::new(fd),
            taken: false,
            runtime: Handle::current(),
        }
    }
}

impl AsFd for PipeEnd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for PipeEnd {
    fn drop(&mut self) {
        if !self.taken {
            // SAFETY: it was not taken, and nothing uses `self` after this.
            let fd = unsafe { ManuallyDrop::take(&mut self.fd) };
            self.runtime.spawn_blocking(move || drop(fd));
        }
    }
}

/// An end, with what is being done to it.
#[derive(Debug)]
struct End<T> {
    /// `None` only while it is dropped.
    fd: Option<Arc<AsyncFd<OwnedFd>>>,
    work: Option<JoinHandle<io::Result<T>>>,
    runtime: Handle,
}

impl<T: Send + 'static> End<T> {
    fn new(end: PipeEnd, interest: Interest) -> io::Result<Self> {
        let kind = SFlag::from_bits_truncate(fstat(&end)?.st_mode) & SFlag::S_IFMT;
        if kind != SFlag::S_IFIFO {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a pipe"));
        }
        let flags = OFlag::from_bits_retain(fcntl(&end, FcntlArg::F_GETFL)?);
        fcntl(&end, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        // SAFETY: an OwnedFd that nobody replaces or closes while the AsyncFd owns it.
        let registered = unsafe { AsyncFd::register_with_interest(end.into(), interest) };
        let fd = registered.map_err(|refused| {
            let (fd, error) = refused.into_parts();
            drop(PipeEnd::from(fd));
            error
        })?;
        Ok(Self {
            fd: Some(Arc::new(fd)),
            work: None,
            runtime: Handle::current(),
        })
    }

    fn fd(&self) -> io::Result<&Arc<AsyncFd<OwnedFd>>> {
        self.fd
            .as_ref()
            .ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    fn begin(
        &mut self,
        work: impl FnOnce(&AsyncFd<OwnedFd>) -> io::Result<T> + Send + 'static,
    ) -> io::Result<()> {
        let fd = Arc::clone(self.fd()?);
        self.work = Some(self.runtime.spawn_blocking(move || work(&fd)));
        Ok(())
    }

    /// What has come of the work that is under way. `None`: there is none.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<io::Result<T>>> {
        let Some(work) = &mut self.work else {
            return Poll::Ready(None);
        };
        let done = ready!(Pin::new(work).poll(cx));
        self.work = None;
        Poll::Ready(Some(
            done.unwrap_or_else(|error| Err(io::Error::other(error))),
        ))
    }
}

impl<T> Drop for End<T> {
    fn drop(&mut self) {
        let fd = self.fd.take();
        self.runtime.spawn_blocking(move || drop(fd));
    }
}

/// Reads what a program writes. Nothing that was read is lost where a future is dropped.
#[derive(Debug)]
pub struct Reader {
    end: End<Vec<u8>>,
    /// What was read and not taken yet.
    read: Vec<u8>,
    taken: usize,
}

impl Reader {
    /// To be called in the runtime that reads.
    pub fn new(end: impl Into<PipeEnd>) -> io::Result<Self> {
        Ok(Self {
            end: End::new(end.into(), Interest::READABLE)?,
            read: Vec::new(),
            taken: 0,
        })
    }

    /// What has arrived, as soon as there is something. Empty: the end.
    pub async fn next(&mut self) -> io::Result<Vec<u8>> {
        poll_fn(|cx| self.poll_next(CHUNK, cx)).await
    }

    fn poll_next(&mut self, most: usize, cx: &mut Context<'_>) -> Poll<io::Result<Vec<u8>>> {
        if self.taken < self.read.len() {
            return Poll::Ready(Ok(self.left()));
        }
        loop {
            match ready!(self.end.poll(cx)) {
                Some(Err(error)) if error.kind() == io::ErrorKind::WouldBlock => {}
                Some(read) => return Poll::Ready(read),
                None => {}
            }
            drop(ready!(self.end.fd()?.poll_read_ready(cx))?);
            self.end.begin(move |fd| {
                // Memory for what is there, and none while nothing is.
                let mut read = vec![0; waiting(fd).clamp(1, most)];
                let length = fd.try_io(Interest::READABLE, |fd| {
                    Ok(nix::unistd::read(fd, &mut read)?)
                })?;
                read.truncate(length);
                Ok(read)
            })?;
        }
    }

    /// Takes what was read and not taken yet.
    fn left(&mut self) -> Vec<u8> {
        let left = self.read.split_off(self.taken);
        self.read = Vec::new();
        self.taken = 0;
        left
    }

    /// What is in the pipe now, or was when this was asked for. Not until it is empty: who writes may be
    /// faster than who reads.
    pub async fn rest(&mut self) -> io::Result<Vec<u8>> {
        match poll_fn(|cx| self.end.poll(cx)).await {
            Some(Ok(read)) => self.read.extend(read),
            Some(Err(error)) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
            Some(Err(_)) | None => {}
        }
        self.end.begin(|fd| {
            let mut rest = vec![0; waiting(fd)];
            let mut length = 0;
            while length < rest.len() {
                // The plain call: tokio's would ask its cache whether there is anything to read.
                match nix::unistd::read(fd, &mut rest[length..]) {
                    Ok(0) | Err(_) => break,
                    Ok(read) => length += read,
                }
            }
            rest.truncate(length);
            Ok(rest)
        })?;
        if let Some(read) = poll_fn(|cx| self.end.poll(cx)).await {
            self.read.extend(read?);
        }
        Ok(self.left())
    }
}

/// Bytes in a pipe.
fn waiting(fd: &AsyncFd<OwnedFd>) -> usize {
    let mut waiting: libc::c_int = 0;
    // SAFETY: FIONREAD writes one int. It can't fail on a pipe; if it did, nothing would be there.
    unsafe { libc::ioctl(fd.as_raw_fd(), libc::FIONREAD, &raw mut waiting) };
    usize::try_from(waiting).unwrap_or(0)
}

impl AsyncRead for Reader {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let own = &mut *self;
        if own.taken == own.read.len() {
            own.read = ready!(own.poll_next(buffer.remaining().clamp(1, CHUNK), cx))?;
            own.taken = 0;
        }
        let left = &own.read[own.taken..];
        let length = left.len().min(buffer.remaining());
        buffer.put_slice(&left[..length]);
        own.taken += length;
        Poll::Ready(Ok(()))
    }
}

/// Writes what a program reads.
#[derive(Debug)]
pub struct Writer {
    end: End<usize>,
}

impl Writer {
    /// To be called in the runtime that writes.
    pub fn new(end: impl Into<PipeEnd>) -> io::Result<Self> {
        let end = End::new(end.into(), Interest::WRITABLE)?;
        Ok(Self { end })
    }

    /// Returns when the pipe has taken all of it. Some of it may be written, or be written yet, where the future
    /// is dropped.
    pub async fn write_all(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        // What a call has begun that was given up is none of this one's.
        drop(poll_fn(|cx| self.end.poll(cx)).await);
        while !bytes.is_empty() {
            drop(self.end.fd()?.writable().await?);
            let chunk = bytes[..bytes.len().min(CHUNK)].to_vec();
            self.end.begin(move |fd| {
                fd.try_io(Interest::WRITABLE, |fd| Ok(nix::unistd::write(fd, &chunk)?))
            })?;
            match poll_fn(|cx| self.end.poll(cx)).await {
                Some(Ok(written)) => bytes = bytes.get(written..).unwrap_or_default(),
                Some(Err(error)) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
                Some(Err(_)) | None => {}
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;
    use tokio::time::timeout;

    use super::*;

    fn pipe() -> (OwnedFd, OwnedFd) {
        pipe2(OFlag::O_CLOEXEC).expect("a pipe")
    }

    #[tokio::test]
    async fn only_pipes_are_taken() {
        let file = std::fs::File::open("/dev/null").expect("/dev/null");
        assert!(Reader::new(OwnedFd::from(file)).is_err());
    }

    #[tokio::test]
    async fn what_is_written_is_read_to_its_end() {
        let (read, write) = pipe();
        let (mut reader, mut writer) = (
            Reader::new(read).expect("a reader"),
            Writer::new(write).expect("a writer"),
        );
        let much: Vec<u8> = (0..=250).cycle().take(1_000_000).collect();
        let sent = much.clone();
        let writing = tokio::spawn(async move { writer.write_all(&sent).await });
        let mut all = Vec::new();
        reader.read_to_end(&mut all).await.expect("an end");
        writing.await.expect("a task").expect("written");
        assert!(all == much);
    }

    #[tokio::test]
    async fn a_read_that_is_given_up_loses_nothing() {
        let (read, write) = pipe();
        let mut reader = Reader::new(read).expect("a reader");
        let mut all = Vec::new();
        for byte in 0..100 {
            let mut chunk = [0; 4];
            let waited = timeout(Duration::ZERO, reader.read(&mut chunk)).await;
            if let Ok(length) = waited {
                all.extend_from_slice(&chunk[..length.expect("read")]);
            }
            nix::unistd::write(&write, &[byte]).expect("room");
        }
        all.extend(reader.rest().await.expect("the rest"));
        assert_eq!(all, (0..100).collect::<Vec<_>>());
    }

    #[tokio::test]
    async fn a_write_that_is_given_up_is_none_of_the_next_ones() {
        let (read, write) = pipe();
        let mut writer = Writer::new(write).expect("a writer");
        // More than there is room for.
        let much = vec![b'a'; 1 << 20];
        let given_up = timeout(Duration::from_millis(50), writer.write_all(&much)).await;
        assert!(given_up.is_err());
        let mut reader = Reader::new(read).expect("a reader");
        let writing = tokio::spawn(async move { writer.write_all(b"end").await });
        let mut all = Vec::new();
        reader.read_to_end(&mut all).await.expect("an end");
        writing.await.expect("a task").expect("written");
        assert!(all.ends_with(b"aend"));
    }

    #[tokio::test]
    async fn a_write_that_was_begun_is_not_taken_for_the_next_one() {
        let (read, write) = pipe();
        let mut writer = Writer::new(write).expect("a writer");
        {
            let mut begun = std::pin::pin!(writer.write_all(&[b'a'; 1000]));
            // Until it has begun, and not to its end.
            poll_fn(|cx| {
                drop(begun.as_mut().poll(cx));
                Poll::Ready(())
            })
            .await;
        }
        writer.write_all(b"end").await.expect("written");
        drop(writer);
        let mut all = Vec::new();
        let mut reader = Reader::new(read).expect("a reader");
        reader.read_to_end(&mut all).await.expect("an end");
        assert!(all.ends_with(b"end"), "{} bytes", all.len());
    }

    #[tokio::test]
    async fn the_rest_is_what_is_there() {
        let (read, write) = pipe();
        let mut reader = Reader::new(read).expect("a reader");
        assert_eq!(reader.rest().await.expect("the rest"), b"");
        nix::unistd::write(&write, b"some").expect("room");
        assert_eq!(reader.rest().await.expect("the rest"), b"some");
    }

    #[tokio::test]
    async fn who_reads_no_more_is_a_broken_pipe() {
        let (read, write) = pipe();
        let mut writer = Writer::new(write).expect("a writer");
        drop(read);
        let error = writer.write_all(b"any").await.expect_err("nobody reads");
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }

    #[tokio::test]
    async fn dropping_a_writer_is_the_end() {
        let (read, write) = pipe();
        let mut reader = Reader::new(read).expect("a reader");
        drop(Writer::new(write).expect("a writer"));
        let mut all = Vec::new();
        assert_eq!(reader.read_to_end(&mut all).await.expect("an end"), 0);
    }
}
