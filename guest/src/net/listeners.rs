//! The sockets that the host serves.

use std::net::{SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrIn, SockaddrIn6, SockaddrLike, bind,
    listen, socket,
};

use super::{ADDRESS_V4, ADDRESS_V6, Failure, PROXY_PORT, RESOLVER};

const DNS_PORT: u16 = 53;

pub(super) fn proxy_v4() -> Result<OwnedFd, Failure> {
    let address = SocketAddrV4::new(ADDRESS_V4, PROXY_PORT);
    let address = SockaddrIn::from(address);
    listening(AddressFamily::Inet, &address).map_err(|errno| ("listen for the proxy", errno))
}

pub(super) fn proxy_v6() -> Result<OwnedFd, Failure> {
    let address = SocketAddrV6::new(ADDRESS_V6, PROXY_PORT, 0, 0);
    let address = SockaddrIn6::from(address);
    listening(AddressFamily::Inet6, &address).map_err(|errno| ("listen for the proxy", errno))
}

pub(super) fn dns_tcp() -> Result<OwnedFd, Failure> {
    let address = SockaddrIn::from(SocketAddrV4::new(RESOLVER, DNS_PORT));
    listening(AddressFamily::Inet, &address).map_err(|errno| ("listen for DNS", errno))
}

pub(super) fn dns_udp() -> Result<OwnedFd, Failure> {
    let address = SockaddrIn::from(SocketAddrV4::new(RESOLVER, DNS_PORT));
    bound(AddressFamily::Inet, SockType::Datagram, &address)
        .map_err(|errno| ("bind the socket of DNS", errno))
}

fn listening(family: AddressFamily, address: &dyn SockaddrLike) -> nix::Result<OwnedFd> {
    let socket = bound(family, SockType::Stream, address)?;
    listen(&socket, Backlog::MAXCONN)?;
    Ok(socket)
}

fn bound(
    family: AddressFamily,
    kind: SockType,
    address: &dyn SockaddrLike,
) -> nix::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(family, kind, flags, None)?;
    bind(socket.as_raw_fd(), address)?;
    Ok(socket)
}
