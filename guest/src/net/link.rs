//! `lo`, its addresses, and the route by which everything leaves. Source: rtnetlink(7).

use std::net::Ipv4Addr;

use nix::sys::socket::SockProtocol;

use super::netlink::{Attributes, Batch};
use super::{ADDRESS_V4, ADDRESS_V6, Failure};

/// `lo` is the first device of every net namespace.
const LOOPBACK_INDEX: u32 = 1;

const CREATE: i32 = libc::NLM_F_CREATE | libc::NLM_F_EXCL;

/// Brings `lo` up (the kernel then gives it 127.0.0.1 and, where it has IPv6, `::1`), adds
/// [`ADDRESS_V4`] and sends everything through `lo`.
///
/// The route names a source: a redirected connection without one is established, but no data flows.
pub(super) fn up_v4() -> Result<(), Failure> {
    let mut batch = Batch::new();
    let up = libc::IFF_UP.cast_unsigned();
    // struct ifinfomsg
    let link = [
        [0; 4],
        LOOPBACK_INDEX.to_ne_bytes(),
        up.to_ne_bytes(),
        up.to_ne_bytes(),
    ]
    .concat();
    batch.request("bring lo up", (libc::RTM_NEWLINK, 0), &link, |_| {});
    let address = Ipv4Addr::octets(&ADDRESS_V4);
    add_address(
        &mut batch,
        "add an IPv4 address to lo",
        libc::AF_INET,
        &address,
    );
    // struct rtmsg
    let route = [
        family(libc::AF_INET),
        0,
        0,
        0,
        libc::RT_TABLE_MAIN,
        libc::RTPROT_STATIC,
        libc::RT_SCOPE_LINK,
        libc::RTN_UNICAST,
        0,
        0,
        0,
        0,
    ];
    add_route(&mut batch, "add the IPv4 route", &route, &address);
    batch.send(SockProtocol::NetlinkRoute)
}

pub(super) fn address_v6() -> Result<(), Failure> {
    let mut batch = Batch::new();
    let step = "add an IPv6 address to lo";
    add_address(&mut batch, step, libc::AF_INET6, &ADDRESS_V6.octets());
    batch.send(SockProtocol::NetlinkRoute)
}

/// Of type 'local': the kernel makes any other IPv6 route over `lo` one that rejects
/// (`ip6_route_info_create`).
pub(super) fn route_v6() -> Result<(), Failure> {
    let mut batch = Batch::new();
    let route = [
        family(libc::AF_INET6),
        0,
        0,
        0,
        libc::RT_TABLE_MAIN,
        libc::RTPROT_STATIC,
        libc::RT_SCOPE_UNIVERSE,
        libc::RTN_LOCAL,
        0,
        0,
        0,
        0,
    ];
    add_route(
        &mut batch,
        "add the IPv6 route",
        &route,
        &ADDRESS_V6.octets(),
    );
    batch.send(SockProtocol::NetlinkRoute)
}

fn add_address(batch: &mut Batch, step: &'static str, of: i32, address: &[u8]) {
    let prefix = u8::try_from(address.len() * 8).unwrap_or(u8::MAX);
    // Without duplicate address detection, which would keep the address unusable for a while.
    let flags = u8::try_from(libc::IFA_F_NODAD).unwrap_or(0);
    let [a, b, c, d] = LOOPBACK_INDEX.to_ne_bytes();
    // struct ifaddrmsg
    let header = [
        family(of),
        prefix,
        flags,
        libc::RT_SCOPE_UNIVERSE,
        a,
        b,
        c,
        d,
    ];
    let kind = (libc::RTM_NEWADDR, CREATE);
    batch.request(step, kind, &header, |attributes| {
        attributes.bytes(libc::IFA_LOCAL, address);
        attributes.bytes(libc::IFA_ADDRESS, address);
    });
}

fn add_route(batch: &mut Batch, step: &'static str, header: &[u8; 12], source: &[u8]) {
    let fill = |attributes: &mut Attributes<'_>| {
        attributes.ne32(libc::RTA_OIF, LOOPBACK_INDEX);
        attributes.bytes(libc::RTA_PREFSRC, source);
    };
    batch.request(step, (libc::RTM_NEWROUTE, CREATE), header, fill);
}

/// Address families are 8 bits in rtnetlink's headers.
fn family(family: i32) -> u8 {
    u8::try_from(family).unwrap_or(0)
}
