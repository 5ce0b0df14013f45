//! The guest's side of a connection, some of which was read before.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use super::super::Traffic;

pub(super) struct Guest {
    stream: TcpStream,
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
            stream,
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
            && let Err(error) = self.stream.set_zero_linger()
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
