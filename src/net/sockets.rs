//! Sockets that PID 1 handed out, checked before they are used.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockType, getsockopt, sockopt};
use tokio::net::{TcpListener, UdpSocket};

pub(super) const V4: AddressFamily = AddressFamily::Inet;
pub(super) const V6: AddressFamily = AddressFamily::Inet6;

pub(super) fn listener(socket: OwnedFd, family: AddressFamily) -> io::Result<TcpListener> {
    check(&socket, &[family], SockType::Stream)?;
    if !getsockopt(&socket, sockopt::AcceptConn)? {
        return Err(unexpected("a socket that does not listen"));
    }
    let listener = std::net::TcpListener::from(socket);
    listener.set_nonblocking(true)?;
    TcpListener::from_std(listener)
}

pub(super) fn datagram(socket: OwnedFd) -> io::Result<UdpSocket> {
    check(&socket, &[V4], SockType::Datagram)?;
    let socket = std::net::UdpSocket::from(socket);
    socket.set_nonblocking(true)?;
    UdpSocket::from_std(socket)
}

/// A descriptor of something else is no socket to `getsockopt` (`ENOTSOCK`). It waits for nobody who uses the socket.
pub(super) fn check(
    socket: &OwnedFd,
    families: &[AddressFamily],
    kind: SockType,
) -> io::Result<()> {
    if getsockopt(socket, sockopt::SockType)? != kind {
        return Err(unexpected("a socket of another type"));
    }
    let family = number(socket.as_fd(), libc::SO_DOMAIN)?;
    if !families.iter().any(|known| *known as i32 == family) {
        return Err(unexpected("a socket of another family"));
    }
    Ok(())
}

/// Its number, as `IPPROTO_TCP`.
pub(super) fn protocol(socket: BorrowedFd<'_>) -> io::Result<libc::c_int> {
    number(socket, libc::SO_PROTOCOL)
}

fn number(socket: BorrowedFd<'_>, option: libc::c_int) -> io::Result<libc::c_int> {
    let mut number: libc::c_int = 0;
    let mut size: libc::socklen_t = 4;
    // SAFETY: the kernel writes at most `size` bytes to the integer, and the size.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            (&raw mut number).cast(),
            &raw mut size,
        )
    };
    Errno::result(result)?;
    Ok(number)
}

pub(super) fn unexpected(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_sockets_of_the_expected_kind_are_taken() {
        let file = || OwnedFd::from(std::fs::File::open("/dev/null").expect("/dev/null"));
        let udp = || OwnedFd::from(std::net::UdpSocket::bind("127.0.0.1:0").expect("a socket"));
        let tcp = || OwnedFd::from(std::net::TcpListener::bind("127.0.0.1:0").expect("a socket"));
        let unix = || OwnedFd::from(std::os::unix::net::UnixDatagram::unbound().expect("a socket"));
        assert!(listener(tcp(), V4).is_ok());
        assert!(datagram(udp()).is_ok());
        assert!(listener(tcp(), V6).is_err());
        for other in [file(), udp(), unix()] {
            assert!(listener(other, V4).is_err());
        }
        for other in [file(), tcp(), unix()] {
            assert!(datagram(other).is_err());
        }
    }

    #[tokio::test]
    async fn a_connected_socket_is_no_listener() {
        let server = std::net::TcpListener::bind("127.0.0.1:0").expect("a socket");
        let address = server.local_addr().expect("an address");
        let client = std::net::TcpStream::connect(address).expect("a connection");
        assert!(listener(client.into(), V4).is_err());
    }
}
