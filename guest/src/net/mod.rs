//! The network of a VM, seen from inside: `lo`, rules, and the sockets that the host serves.
//!
//! There is no other device. A program that connects somewhere meets the rules on its way out: what
//! is always denied is refused on the spot, DNS goes to the resolver, every other TCP connection goes
//! to the proxy. Both are sockets made here and served by the host process.

mod link;
mod listeners;
mod log;
mod netlink;
mod nftables;
mod rules;

use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;

use nix::errno::Errno;
use nix::sys::socket::SockProtocol;
use serde::{Deserialize, Serialize};

/// The VM's own address beside 127.0.0.1, source of every connection that leaves. TEST-NET-1
/// (RFC 5737): no network of the world has it.
pub const ADDRESS_V4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);

/// The same for IPv6: `fd`, then `agentvm` in ASCII.
///
/// A unique local address (RFC 4193), because RFC
/// 6724 then sorts IPv4 first wherever a name has both: a redirected connection always succeeds, so
/// programs never fall back from an IPv6 that leads nowhere.
pub const ADDRESS_V6: Ipv6Addr = Ipv6Addr::new(0xfd61, 0x6765, 0x6e74, 0x766d, 0, 0, 0, 1);

/// The resolver of the VM's `resolv.conf`.
pub const RESOLVER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 53);

/// Where the proxy listens on [`ADDRESS_V4`] and [`ADDRESS_V6`]: a privileged port that no program
/// of today uses, so that it is in nobody's way.
pub const PROXY_PORT: u16 = 1;

/// What the host decides about the rules.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetConfig {
    /// Ports of 127.0.0.1 and `::1` that lead to the host's loopback, until the VM ends.
    pub exempt_ports: Vec<u16>,
    /// Destinations that are refused at once, ascending and apart.
    pub denied_v4: Vec<Range<Ipv4Addr>>,
    pub denied_v6: Vec<Range<Ipv6Addr>>,
}

/// Addresses from `first` to `last`, both included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Range<A> {
    pub first: A,
    pub last: A,
}

/// Sockets inside the VM for the host to serve.
#[derive(Debug)]
pub struct NetSockets {
    /// Listens for redirected connections.
    pub tcp4: OwnedFd,
    /// `None` on a kernel without IPv6.
    pub tcp6: Option<OwnedFd>,
    pub dns_udp: OwnedFd,
    pub dns_tcp: OwnedFd,
    /// For [`change`]: netlink's, made by a process that may change the rules, as nobody in the VM may
    /// later.
    pub rules: OwnedFd,
    /// Tells what the rules refuse. `None` on a kernel without NFLOG, where they refuse no TCP.
    pub log: Option<OwnedFd>,
}

/// Which step failed, and how.
pub type Failure = (&'static str, Errno);

/// Sets up the network of this process's fresh net namespace.
pub fn configure(config: &NetConfig) -> Result<NetSockets, Failure> {
    link::up_v4()?;
    // The reader is there before there is anything to read.
    let mut log = log::socket().ok();
    if log.is_some() && rules::install_v4(config, true).is_err() {
        log = None;
    }
    if log.is_none() {
        rules::install_v4(config, false)?;
    }
    let v6 = v6(config, log.is_some());
    Ok(NetSockets {
        tcp4: listeners::proxy_v4()?,
        tcp6: v6,
        dns_udp: listeners::dns_udp()?,
        dns_tcp: listeners::dns_tcp()?,
        rules: netlink::socket(SockProtocol::NetlinkNetFilter)?,
        log,
    })
}

/// Changes what the rules of a VM refuse, to `config`. For the host, which may change what is in
/// namespaces that it has made.
pub fn change(rules: &OwnedFd, config: &NetConfig, v6: bool) -> Result<(), Failure> {
    rules::change(rules, config, v6)
}

/// Not every kernel has IPv6. The route comes last: without the rules, or without a proxy behind
/// them, there is none, and connecting fails with "network unreachable".
fn v6(config: &NetConfig, logged: bool) -> Option<OwnedFd> {
    link::address_v6().ok()?;
    rules::install_v6(config, logged).ok()?;
    let listener = listeners::proxy_v6().ok()?;
    link::route_v6().ok()?;
    Some(listener)
}
