//! A connection to a server inside the VM, over a socket that PID 1 made.
//!
//! PID 1 may keep a duplicate, and with it share the socket's flags and options: it could let calls block
//! that must not. So every call here says by itself that it does not wait (`MSG_DONTWAIT`). It waits all the same
//! for who is just sending on the duplicate, and for their memory: so the runtime only waits for the socket to be
//! ready, and what touches it is done by threads that may wait.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use nix::errno::Errno;
use nix::sys::socket::{
    MsgFlags, Shutdown, SockType, SockaddrStorage, getpeername, getsockopt, recv, send, setsockopt,
    shutdown, sockopt,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::sockets;
use crate::closing::Closing;

/// Most that one read gives.
const CHUNK: usize = 256 * 1024;

/// An established TCP connection. Both directions may be used at the same time. Dropping it before both
/// have ended resets it.
#[derive(Debug)]
pub struct Connection {
    socket: Arc<Socket>,
    /// Bytes that the kernel has taken.
    taken: AtomicU64,
}

/// Closed as [`Closing`] does, when nothing is done with it any more.
#[derive(Debug)]
struct Socket {
    /// `None` only while it is dropped.
    fd: Option<AsyncFd<OwnedFd>>,
    /// What was written is still to arrive.
    is_over: AtomicBool,
    closing: Arc<Closing>,
}

impl Connection {
    /// Waits until a connection that PID 1 has begun is established. Anything but a TCP socket is an error.
    /// `closing`: of its VM.
    pub async fn establish(socket: OwnedFd, closing: Arc<Closing>) -> io::Result<Self> {
        let socket = Arc::new(Socket::new(socket, closing)?);
        loop {
            let mut ready = socket.fd()?.writable().await?;
            let is_connected = blocking(&socket, |socket| {
                let error = getsockopt(socket.get_ref(), sockopt::SocketError)?;
                if error != 0 {
                    return Err(io::Error::from_raw_os_error(error));
                }
                match getpeername::<SockaddrStorage>(socket.as_raw_fd()) {
                    Ok(_) => {}
                    // Told of readiness too early.
                    Err(Errno::ENOTCONN) => return Ok(false),
                    Err(errno) => return Err(errno.into()),
                }
                // Whoever writes has decided what goes into one segment.
                setsockopt(socket.get_ref(), sockopt::TcpNoDelay, &true)?;
                Ok(true)
            });
            if is_connected.await? {
                break;
            }
            ready.clear_ready();
        }
        Ok(Self {
            socket,
            taken: AtomicU64::new(0),
        })
    }

    /// What has arrived, `most` bytes of it and 256 KiB, as soon as there is something. Empty: the server has
    /// ended its direction. What comes while the future is dropped may be lost.
    pub async fn read(&self, most: usize) -> io::Result<Vec<u8>> {
        loop {
            drop(self.socket.fd()?.readable().await?);
            let received = blocking(&self.socket, move |socket| {
                // Nothing is held while there is nothing to read.
                let mut chunk = vec![0; most.clamp(1, CHUNK)];
                let length = socket.try_io(Interest::READABLE, |socket| {
                    Ok(recv(
                        socket.as_raw_fd(),
                        &mut chunk,
                        MsgFlags::MSG_DONTWAIT,
                    )?)
                })?;
                chunk.truncate(length);
                chunk.shrink_to_fit();
                Ok(chunk)
            });
            match received.await {
                Err(error) if is_to_be_repeated(&error) => {}
                received => return received,
            }
        }
    }

    /// Returns when the kernel has taken all of it, which is when the server reads fast enough.
    pub async fn write(&self, bytes: Vec<u8>) -> io::Result<()> {
        let bytes = Arc::new(bytes);
        let mut from = 0;
        while from < bytes.len() {
            drop(self.socket.fd()?.writable().await?);
            let bytes = Arc::clone(&bytes);
            let sent = blocking(&self.socket, move |socket| {
                let rest = bytes.get(from..).unwrap_or_default();
                let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
                socket.try_io(Interest::WRITABLE, |socket| {
                    Ok(send(socket.as_raw_fd(), rest, flags)?)
                })
            });
            match sent.await {
                Ok(length) => {
                    from += length;
                    self.taken.fetch_add(length as u64, Ordering::Relaxed);
                }
                Err(error) if is_to_be_repeated(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// How many bytes of what was written the kernel has taken.
    pub fn taken(&self) -> u64 {
        self.taken.load(Ordering::Relaxed)
    }

    /// Ends this direction; the other goes on.
    pub async fn shutdown_write(&self) -> io::Result<()> {
        let ended = blocking(&self.socket, |socket| {
            Ok(shutdown(socket.as_raw_fd(), Shutdown::Write)?)
        });
        ended.await
    }

    /// For a connection whose two directions have ended: what was written still arrives.
    pub fn close(self) {
        self.socket.is_over.store(true, Ordering::Relaxed);
    }
}

impl Socket {
    fn new(socket: OwnedFd, closing: Arc<Closing>) -> io::Result<Self> {
        let check = || {
            sockets::check(&socket, &[sockets::V4, sockets::V6], SockType::Stream)?;
            check_protocol(&socket)
        };
        if let Err(error) = check() {
            closing.reset(socket);
            return Err(error);
        }
        // SAFETY: an OwnedFd that nobody replaces or closes while the AsyncFd owns it.
        match unsafe { AsyncFd::register(socket) } {
            Ok(fd) => Ok(Self {
                fd: Some(fd),
                is_over: AtomicBool::new(false),
                closing,
            }),
            Err(refused) => {
                let (socket, error) = refused.into_parts();
                closing.reset(socket);
                Err(error)
            }
        }
    }

    fn fd(&self) -> io::Result<&AsyncFd<OwnedFd>> {
        (self.fd.as_ref()).ok_or_else(|| io::ErrorKind::NotConnected.into())
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let Some(socket) = self.fd.take().map(AsyncFd::into_inner) else {
            return;
        };
        if *self.is_over.get_mut() {
            self.closing.close(socket);
        } else {
            self.closing.reset(socket);
        }
    }
}

/// Does what may wait for PID 1.
async fn blocking<T: Send + 'static>(
    socket: &Arc<Socket>,
    work: impl FnOnce(&AsyncFd<OwnedFd>) -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let socket = Arc::clone(socket);
    let working = tokio::task::spawn_blocking(move || work(socket.fd()?));
    working.await.map_err(io::Error::other)?
}

fn is_to_be_repeated(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
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
        connection.write(b"ping".to_vec()).await.expect("written");
        let mut asked = [0; 4];
        server.read_exact(&mut asked).expect("read");
        assert_eq!(&asked, b"ping");
        server.write_all(b"pong").expect("written");
        assert_eq!(connection.read(CHUNK).await.expect("read"), b"pong");
        connection.shutdown_write().await.expect("ended");
        assert_eq!(server.read(&mut asked).expect("read"), 0);
        drop(server);
        assert_eq!(connection.read(CHUNK).await.expect("read"), b"");
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
        let slow = tokio::time::timeout(Duration::from_millis(50), connection.read(CHUNK)).await;
        assert!(slow.is_err(), "nothing was sent");
        // More than the buffers take, of a server that does not read.
        let much = vec![0; 64 << 20];
        let full = tokio::time::timeout(Duration::from_millis(200), connection.write(much)).await;
        assert!(full.is_err(), "nobody reads");
        server.write_all(b"!").expect("written");
        assert_eq!(connection.read(CHUNK).await.expect("read"), b"!");
    }

    #[tokio::test]
    async fn closing_does_not_wait_for_a_server_that_does_not_read() {
        for reset in [true, false] {
            let (server, ours, kept) = pair();
            let connection = Connection::establish(ours, Closing::new())
                .await
                .expect("established");
            let much = vec![0; 64 << 20];
            let full = tokio::time::timeout(Duration::from_millis(50), connection.write(much));
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
