//! A connection to a server inside the VM, over a socket that PID 1 made.
//!
//! PID 1 may keep a duplicate, and with it share the socket's flags and options: it could let calls block
//! that must not. So every call here says by itself that it does not wait (`MSG_DONTWAIT`), and the
//! socket is closed as [`Closing`] does.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use nix::sys::socket::{
    MsgFlags, Shutdown, SockType, getpeername, getsockopt, recv, send, setsockopt, shutdown,
    sockopt,
};
use tokio::io::unix::AsyncFd;

use super::sockets;
use crate::closing::Closing;

/// Most that one read gives.
const CHUNK: usize = 256 * 1024;

/// An established TCP connection. Both directions may be used at the same time. Dropping it before both
/// have ended resets it.
#[derive(Debug)]
pub struct Connection {
    /// `None` only while it is dropped.
    socket: Option<AsyncFd<OwnedFd>>,
    closing: Arc<Closing>,
}

impl Connection {
    /// Waits until a connection that PID 1 has begun is established. Anything but a TCP socket is an error.
    /// `closing`: of its VM.
    pub async fn establish(socket: OwnedFd, closing: Arc<Closing>) -> io::Result<Self> {
        let check = || {
            sockets::check(&socket, &[sockets::V4, sockets::V6], SockType::Stream)?;
            check_protocol(&socket)
        };
        if let Err(error) = check() {
            closing.close(socket);
            return Err(error);
        }
        let connection = Self {
            // SAFETY: an OwnedFd that nobody replaces or closes while the AsyncFd owns it.
            socket: Some(unsafe { AsyncFd::register(socket) }?),
            closing,
        };
        let socket = connection.socket()?;
        loop {
            let mut ready = socket.writable().await?;
            let error = getsockopt(socket.get_ref(), sockopt::SocketError)?;
            if error != 0 {
                return Err(io::Error::from_raw_os_error(error));
            }
            match getpeername::<nix::sys::socket::SockaddrStorage>(socket.as_raw_fd()) {
                Ok(_) => break,
                // Told of readiness too early.
                Err(nix::errno::Errno::ENOTCONN) => ready.clear_ready(),
                Err(errno) => return Err(errno.into()),
            }
        }
        // Whoever writes has decided what goes into one segment.
        setsockopt(socket.get_ref(), sockopt::TcpNoDelay, &true)?;
        Ok(connection)
    }

    /// What has arrived, 256 KiB at most, as soon as there is something. Empty: the server has
    /// ended its direction.
    pub async fn read(&self) -> io::Result<Vec<u8>> {
        let socket = self.socket()?;
        loop {
            let mut ready = socket.readable().await?;
            // Nothing is held while there is nothing to read.
            let mut chunk = vec![0; CHUNK];
            let received = ready.try_io(|socket| {
                recv(socket.as_raw_fd(), &mut chunk, MsgFlags::MSG_DONTWAIT)
                    .map_err(io::Error::from)
            });
            match received {
                Ok(Ok(length)) => {
                    chunk.truncate(length);
                    chunk.shrink_to_fit();
                    return Ok(chunk);
                }
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Err(error),
                Err(_would_block) => {}
            }
        }
    }

    /// Returns when the kernel has taken all of it, which is when the server reads fast enough.
    pub async fn write(&self, mut bytes: &[u8]) -> io::Result<()> {
        let socket = self.socket()?;
        while !bytes.is_empty() {
            let mut ready = socket.writable().await?;
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            let sent = ready
                .try_io(|socket| send(socket.as_raw_fd(), bytes, flags).map_err(io::Error::from));
            match sent {
                Ok(Ok(length)) => bytes = bytes.get(length..).unwrap_or_default(),
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Err(error),
                Err(_would_block) => {}
            }
        }
        Ok(())
    }

    /// Ends this direction; the other goes on.
    pub fn shutdown_write(&self) -> io::Result<()> {
        Ok(shutdown(self.socket()?.as_raw_fd(), Shutdown::Write)?)
    }

    /// For a connection whose two directions have ended: what was written still arrives.
    pub fn close(mut self) {
        self.release(false);
    }

    fn socket(&self) -> io::Result<&AsyncFd<OwnedFd>> {
        self.socket
            .as_ref()
            .ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    fn release(&mut self, reset: bool) {
        let Some(socket) = self.socket.take().map(AsyncFd::into_inner) else {
            return;
        };
        if reset {
            sockets::reset(socket.as_fd());
        }
        self.closing.close(socket);
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.release(true);
    }
}

fn check_protocol(socket: &OwnedFd) -> io::Result<()> {
    // Multipath TCP and SCTP are streams as well.
    if sockets::protocol(socket.as_fd())? == libc::IPPROTO_TCP {
        Ok(())
    } else {
        Err(sockets::unexpected("a socket of another protocol"))
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};
    use std::net::{Ipv4Addr, TcpListener, TcpStream};
    use std::time::{Duration, Instant};

    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    use nix::libc::linger;
    use nix::sys::socket::{SockFlag, socket};

    use super::*;

    /// A server's end of a connection, ours, and the duplicate of it that PID 1 has kept.
    fn pair() -> (TcpStream, OwnedFd, TcpStream) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a listener");
        let address = listener.local_addr().expect("an address");
        let kept = TcpStream::connect(address).expect("a connection");
        let (server, _) = listener.accept().expect("a connection");
        let ours = kept.try_clone().expect("a duplicate").into();
        (server, ours, kept)
    }

    /// As a compromised PID 1 does at any time.
    fn let_it_block(socket: &TcpStream) {
        fcntl(socket, FcntlArg::F_SETFL(OFlag::empty())).expect("F_SETFL");
    }

    #[tokio::test]
    async fn only_tcp_is_taken() {
        let multipath = socket(
            sockets::V4,
            SockType::Stream,
            SockFlag::SOCK_CLOEXEC,
            nix::sys::socket::SockProtocol::Sctp,
        );
        let others = [
            Some(OwnedFd::from(File::open("/dev/null").expect("/dev/null"))),
            Some(
                std::net::UdpSocket::bind("127.0.0.1:0")
                    .expect("UDP")
                    .into(),
            ),
            Some(
                std::os::unix::net::UnixStream::pair()
                    .expect("a pair")
                    .0
                    .into(),
            ),
            // Not every kernel has it.
            multipath.ok(),
        ];
        for other in others.into_iter().flatten() {
            assert!(Connection::establish(other, Closing::new()).await.is_err());
        }
    }

    #[tokio::test]
    async fn a_socket_that_listens_is_never_established() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a listener");
        let establishing = Connection::establish(listener.into(), Closing::new());
        // It has no events, or it fails: it is no connection in any case.
        let ended = tokio::time::timeout(Duration::from_millis(100), establishing).await;
        assert!(!matches!(ended, Ok(Ok(_))));
    }

    #[tokio::test]
    async fn bytes_go_both_ways_until_both_have_ended() {
        let (mut server, ours, _kept) = pair();
        let connection = Connection::establish(ours, Closing::new())
            .await
            .expect("established");
        connection.write(b"ping").await.expect("written");
        let mut asked = [0; 4];
        server.read_exact(&mut asked).expect("read");
        assert_eq!(&asked, b"ping");
        server.write_all(b"pong").expect("written");
        assert_eq!(connection.read().await.expect("read"), b"pong");
        connection.shutdown_write().expect("ended");
        assert_eq!(server.read(&mut asked).expect("read"), 0);
        drop(server);
        assert_eq!(connection.read().await.expect("read"), b"");
        connection.close();
    }

    // On one thread, which a call that blocks would keep from ever finishing.
    #[tokio::test]
    async fn a_socket_that_was_made_to_block_does_not_block() {
        let (mut server, ours, kept) = pair();
        let connection = Connection::establish(ours, Closing::new())
            .await
            .expect("established");
        let_it_block(&kept);
        let slow = tokio::time::timeout(Duration::from_millis(50), connection.read()).await;
        assert!(slow.is_err(), "nothing was sent");
        // More than the buffers take, of a server that does not read.
        let much = vec![0; 64 << 20];
        let full = tokio::time::timeout(Duration::from_millis(200), connection.write(&much)).await;
        assert!(full.is_err(), "nobody reads");
        server.write_all(b"!").expect("written");
        assert_eq!(connection.read().await.expect("read"), b"!");
    }

    #[tokio::test]
    async fn closing_does_not_wait_for_a_server_that_does_not_read() {
        for reset in [true, false] {
            let (server, ours, kept) = pair();
            let connection = Connection::establish(ours, Closing::new())
                .await
                .expect("established");
            let much = vec![0; 64 << 20];
            let full = tokio::time::timeout(Duration::from_millis(50), connection.write(&much));
            assert!(full.await.is_err(), "nobody reads");
            let minutes = linger {
                l_onoff: 1,
                l_linger: 600,
            };
            setsockopt(&kept, sockopt::Linger, &minutes).expect("SO_LINGER");
            drop(kept);
            let began = Instant::now();
            if reset {
                drop(connection);
            } else {
                connection.close();
            }
            assert!(began.elapsed() < Duration::from_secs(10));
            drop(server);
        }
    }

    #[tokio::test]
    async fn dropping_resets_the_server() {
        let (mut server, ours, kept) = pair();
        let connection = Connection::establish(ours, Closing::new())
            .await
            .expect("established");
        drop(kept);
        drop(connection);
        let error = server.read(&mut [0]).expect_err("a reset");
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    }
}
