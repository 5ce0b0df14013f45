//! The addresses of the host itself, whose services a VM must not reach, public or not.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use super::address::embedded_v4;

/// Every address of every interface, as it is now.
pub(super) fn all() -> io::Result<Vec<IpAddr>> {
    let addresses = nix::ifaddrs::getifaddrs()?.filter_map(|interface| {
        let address = interface.address?;
        if let Some(v4) = address.as_sockaddr_in() {
            return Some(v4.ip().into());
        }
        address.as_sockaddr_in6().map(|v6| v6.ip().into())
    });
    Ok(addresses.collect())
}

/// Whether `address` leads to this host at this moment.
///
/// The routes are asked as well as the interfaces, because a host can route whole networks to itself:
/// then the kernel chooses the destination or loopback as source. A second address of an interface,
/// in contrast, is reached from its first one. A NAT64 leads to what its address stands for.
pub(super) fn is_ours(address: IpAddr) -> io::Result<bool> {
    if let Some(v4) = embedded_v4(address)
        && is_ours(v4.into())?
    {
        return Ok(true);
    }
    match source_towards(address) {
        Ok(source) if source == address || source.is_loopback() => Ok(true),
        Ok(_) => Ok(all()?.contains(&address)),
        Err(error) if is_no_route(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Whether the host has a way to the public IPv6 internet.
pub(super) fn has_ipv6_route() -> bool {
    // Any address there would do; nothing is sent to it.
    const SOMEWHERE: Ipv6Addr = Ipv6Addr::new(0x2600, 0, 0, 0, 0, 0, 0, 0);
    source_towards(SOMEWHERE.into()).is_ok()
}

/// Connecting a UDP socket looks up the route and sends nothing.
fn source_towards(address: IpAddr) -> io::Result<IpAddr> {
    const ANY_PORT: u16 = 9;
    let unbound: SocketAddr = match address {
        IpAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        IpAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(unbound)?;
    socket.connect((address, ANY_PORT))?;
    Ok(socket.local_addr()?.ip())
}

/// No such network, no such family, or a route that forbids: whoever dials will be told.
fn is_no_route(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(
            libc::ENETUNREACH
                | libc::EHOSTUNREACH
                | libc::EACCES
                | libc::EADDRNOTAVAIL
                | libc::EAFNOSUPPORT
                | libc::EINVAL
                | libc::EPERM
        )
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_address_of_an_interface_is_ours() {
        // A link-local address needs its interface to be reached, and is never dialled.
        let is_link_local =
            |address: &IpAddr| matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local());
        let all = all().expect("interfaces");
        assert!(all.contains(&Ipv4Addr::LOCALHOST.into()), "{all:?}");
        for address in all.into_iter().filter(|address| !is_link_local(address)) {
            assert!(is_ours(address).expect("a lookup"), "{address}");
            if let IpAddr::V4(v4) = address {
                let [a, b, c, d] = v4.octets();
                let nat64 = format!("64:ff9b::{a:02x}{b:02x}:{c:02x}{d:02x}");
                let nat64 = nat64.parse().expect("an address");
                assert!(is_ours(nat64).expect("a lookup"), "{nat64}");
            }
        }
    }

    #[test]
    fn an_address_of_somebody_else_is_not_ours() {
        assert!(!is_ours(Ipv4Addr::new(1, 2, 3, 4).into()).expect("a lookup"));
        let v6 = Ipv6Addr::new(0x2606, 0x4700, 0, 0, 0, 0, 0, 1);
        assert!(!is_ours(v6.into()).expect("a lookup"));
        let nat64 = Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, 0x102, 0x304);
        assert!(!is_ours(nat64.into()).expect("a lookup"));
    }
}
