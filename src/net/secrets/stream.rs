//! The two sides of a connection that is ended here.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use super::super::Traffic;

/// What is read of a program or a server at once.
const TURN: usize = 16 * 1024;

/// The guest's, some of which was read before.
pub(super) struct Guest {
    stream: Fair<TcpStream>,
    read: Vec<u8>,
    /// How much of it was taken.
    taken: usize,
    traffic: Arc<Traffic>,
    /// Whether it is to end as what is relayed does where it is denied.
    denied: Arc<AtomicBool>,
}

impl Guest {
    pub(super) const fn new(
        stream: TcpStream,
        read: Vec<u8>,
        traffic: Arc<Traffic>,
        denied: Arc<AtomicBool>,
    ) -> Self {
        Self {
            stream: Fair::new(stream),
            read,
            taken: 0,
            traffic,
            denied,
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if self.denied.load(Ordering::Relaxed)
            && let Err(error) = self.stream.stream.set_zero_linger()
        {
            tracing::debug!(%error, "a connection is closed that was to be reset");
        }
    }
}

impl AsyncRead for Guest {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let own = &mut *self;
        let rest = &own.read[own.taken..];
        if rest.is_empty() {
            own.read = Vec::new();
            own.taken = 0;
            ready!(Pin::new(&mut own.stream).poll_read(cx, buffer))?;
        } else {
            let length = rest.len().min(buffer.remaining());
            buffer.put_slice(&rest[..length]);
            own.taken += length;
        }
        own.traffic.send(buffer.filled().len() - before);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Guest {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.stream).poll_write(cx, buffer))?;
        self.traffic.receive(written);
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// One that leaves others a turn however much it sends: what hyper makes nothing of, as interim answers or pings, it
/// would read without end.
pub(super) struct Fair<T> {
    stream: T,
    /// In this turn.
    read: usize,
}

impl<T> Fair<T> {
    pub(super) const fn new(stream: T) -> Self {
        Self { stream, read: 0 }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Fair<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.read >= TURN {
            self.read = 0;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let before = buffer.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(cx, buffer);
        self.read = match polled {
            Poll::Ready(_) => self.read + buffer.filled().len() - before,
            Poll::Pending => 0,
        };
        polled
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Fair<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buffer)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, buffers)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
