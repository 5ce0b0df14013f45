//! Which addresses are the public internet, and what the others are.
//! Sources: the IANA special-purpose address registries (RFC 6890 and its successors).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use agentvm_guest::net::Range;

/// What kind of place an address is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// The public internet.
    Public,
    Loopback,
    /// Private networks: RFC 1918, unique local IPv6.
    Private,
    /// The shared space of carrier-grade NAT (RFC 6598): also overlay networks, also metadata.
    Shared,
    /// Also where clouds serve metadata and credentials.
    LinkLocal,
    /// A cloud's metadata service at an address that looks public.
    Metadata,
    Multicast,
    Documentation,
    /// Everything else that is no public unicast.
    Reserved,
}

/// Networks that are not public, most specific first where they overlap.
const V4: [(Ipv4Addr, u32, Scope); 18] = {
    const fn at(a: u8, b: u8, c: u8) -> Ipv4Addr {
        Ipv4Addr::new(a, b, c, 0)
    }
    [
        (at(0, 0, 0), 8, Scope::Reserved),
        (at(10, 0, 0), 8, Scope::Private),
        (at(100, 64, 0), 10, Scope::Shared),
        (at(127, 0, 0), 8, Scope::Loopback),
        // Azure's virtual public address of the host's agent.
        (Ipv4Addr::new(168, 63, 129, 16), 32, Scope::Metadata),
        (at(169, 254, 0), 16, Scope::LinkLocal),
        (at(172, 16, 0), 12, Scope::Private),
        (at(192, 0, 0), 24, Scope::Reserved),
        (at(192, 0, 2), 24, Scope::Documentation),
        (at(192, 31, 196), 24, Scope::Reserved),
        (at(192, 52, 193), 24, Scope::Reserved),
        (at(192, 88, 99), 24, Scope::Reserved),
        (at(192, 168, 0), 16, Scope::Private),
        (at(198, 18, 0), 15, Scope::Reserved),
        (at(198, 51, 100), 24, Scope::Documentation),
        (at(203, 0, 113), 24, Scope::Documentation),
        (at(224, 0, 0), 4, Scope::Multicast),
        (at(240, 0, 0), 4, Scope::Reserved),
    ]
};

/// What is not public within global unicast, `2000::/3`.
const V6: [(Ipv6Addr, u32, Scope); 5] = {
    const fn at(a: u16, b: u16) -> Ipv6Addr {
        Ipv6Addr::new(a, b, 0, 0, 0, 0, 0, 0)
    }
    [
        // Protocol assignments; Teredo, whose addresses hold an IPv4 address, is one of them.
        (at(0x2001, 0), 23, Scope::Reserved),
        (at(0x2001, 0xdb8), 32, Scope::Documentation),
        // 6to4: holds an IPv4 address.
        (at(0x2002, 0), 16, Scope::Reserved),
        (at(0x2620, 0x4f), 48, Scope::Reserved),
        (at(0x3fff, 0), 20, Scope::Documentation),
    ]
};

const GLOBAL_UNICAST: (Ipv6Addr, u32) = (Ipv6Addr::new(0x2000, 0, 0, 0, 0, 0, 0, 0), 3);

/// Hosts without IPv4 reach it through these addresses (RFC 6052), which end in the IPv4 address.
const NAT64: (Ipv6Addr, u32) = (Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, 0, 0), 96);

pub(super) fn scope(address: IpAddr) -> Scope {
    match address {
        IpAddr::V4(address) => scope_v4(address),
        IpAddr::V6(address) => scope_v6(address),
    }
}

fn scope_v4(address: Ipv4Addr) -> Scope {
    V4.iter()
        .find(|(network, prefix, _)| bits_v4(*network, *prefix).contains(address.to_bits()))
        .map_or(Scope::Public, |(_, _, scope)| *scope)
}

fn scope_v6(address: Ipv6Addr) -> Scope {
    let bits = address.to_bits();
    let within = |(network, prefix)| bits_v6(network, prefix).contains(bits);
    if within(NAT64) {
        return scope_v4(embedded_v4(address));
    }
    if let Some((_, _, scope)) = V6
        .iter()
        .find(|(network, prefix, _)| within((*network, *prefix)))
    {
        return *scope;
    }
    if within(GLOBAL_UNICAST) {
        Scope::Public
    } else if address.is_loopback() {
        Scope::Loopback
    } else if address.is_unique_local() {
        Scope::Private
    } else if address.is_unicast_link_local() {
        Scope::LinkLocal
    } else if address.is_multicast() {
        Scope::Multicast
    } else {
        Scope::Reserved
    }
}

/// The IPv4 addresses that are not public, and `also`.
pub(super) fn not_public_v4(also: impl Iterator<Item = Ipv4Addr>) -> Vec<Range<Ipv4Addr>> {
    let ranges = V4
        .iter()
        .map(|(network, prefix, _)| bits_v4(*network, *prefix))
        .chain(also.map(|address| bits_v4(address, 32)));
    merge(ranges.collect())
        .into_iter()
        .map(|bits| Range {
            first: Ipv4Addr::from_bits(bits.first),
            last: Ipv4Addr::from_bits(bits.last),
        })
        .collect()
}

/// The IPv6 addresses that are not public, and `also`; `not_public_v4` by their NAT64 names.
pub(super) fn not_public_v6(
    also: impl Iterator<Item = Ipv6Addr>,
    not_public_v4: &[Range<Ipv4Addr>],
) -> Vec<Range<Ipv6Addr>> {
    let nat64 = bits_v6(NAT64.0, NAT64.1);
    let global = bits_v6(GLOBAL_UNICAST.0, GLOBAL_UNICAST.1);
    let outside = [
        (0, nat64.first - 1),
        (nat64.last + 1, global.first - 1),
        (global.last + 1, u128::MAX),
    ];
    let ranges = outside
        .into_iter()
        .map(|(first, last)| Bits { first, last })
        .chain(
            V6.iter()
                .map(|(network, prefix, _)| bits_v6(*network, *prefix)),
        )
        .chain(also.map(|address| bits_v6(address, 128)))
        .chain(not_public_v4.iter().map(|range| Bits {
            first: nat64.first | u128::from(range.first.to_bits()),
            last: nat64.first | u128::from(range.last.to_bits()),
        }));
    merge(ranges.collect())
        .into_iter()
        .map(|bits| Range {
            first: Ipv6Addr::from_bits(bits.first),
            last: Ipv6Addr::from_bits(bits.last),
        })
        .collect()
}

const fn embedded_v4(address: Ipv6Addr) -> Ipv4Addr {
    let [.., a, b, c, d] = address.octets();
    Ipv4Addr::new(a, b, c, d)
}

/// A range of addresses as numbers, both ends included.
#[derive(Clone, Copy)]
struct Bits<N> {
    first: N,
    last: N,
}

impl<N: Copy + Ord> Bits<N> {
    fn contains(&self, bits: N) -> bool {
        self.first <= bits && bits <= self.last
    }
}

fn bits_v4(network: Ipv4Addr, prefix: u32) -> Bits<u32> {
    let first = network.to_bits();
    let host = u32::MAX.checked_shr(prefix).unwrap_or(0);
    let last = first | host;
    Bits { first, last }
}

fn bits_v6(network: Ipv6Addr, prefix: u32) -> Bits<u128> {
    let first = network.to_bits();
    let host = u128::MAX.checked_shr(prefix).unwrap_or(0);
    let last = first | host;
    Bits { first, last }
}

/// Ascending, and joined where they overlap: nftables refuses intervals that do.
fn merge<N: Copy + Ord>(mut ranges: Vec<Bits<N>>) -> Vec<Bits<N>> {
    ranges.sort_by_key(|range| range.first);
    let mut merged: Vec<Bits<N>> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match merged.last_mut() {
            Some(before) if range.first <= before.last => {
                before.last = before.last.max(range.last);
            }
            _ => merged.push(range),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    const PUBLIC: [&str; 12] = [
        "1.1.1.1",
        "9.255.255.255",
        "11.0.0.0",
        "100.63.255.255",
        "100.128.0.0",
        "172.15.255.255",
        "172.32.0.0",
        "223.255.255.255",
        "2001:4860:4860::8888",
        "2606:4700::1",
        "64:ff9b::1.1.1.1",
        "2a00::1",
    ];

    const NOT_PUBLIC: [(&str, Scope); 34] = [
        ("0.0.0.0", Scope::Reserved),
        ("0.1.2.3", Scope::Reserved),
        ("10.0.0.1", Scope::Private),
        ("100.64.0.1", Scope::Shared),
        ("100.100.100.200", Scope::Shared),
        ("127.0.0.1", Scope::Loopback),
        ("127.9.9.9", Scope::Loopback),
        ("168.63.129.16", Scope::Metadata),
        ("169.254.169.254", Scope::LinkLocal),
        ("172.16.0.1", Scope::Private),
        ("172.31.255.255", Scope::Private),
        ("192.0.0.192", Scope::Reserved),
        ("192.0.2.1", Scope::Documentation),
        ("192.168.1.1", Scope::Private),
        ("198.19.0.1", Scope::Reserved),
        ("203.0.113.7", Scope::Documentation),
        ("224.0.0.251", Scope::Multicast),
        ("255.255.255.255", Scope::Reserved),
        ("::", Scope::Reserved),
        ("::1", Scope::Loopback),
        ("::10.0.0.1", Scope::Reserved),
        ("::ffff:1.1.1.1", Scope::Reserved),
        ("::ffff:10.0.0.1", Scope::Reserved),
        ("64:ff9b::10.0.0.1", Scope::Private),
        ("64:ff9b::169.254.169.254", Scope::LinkLocal),
        ("64:ff9b:1::1", Scope::Reserved),
        ("2001::1", Scope::Reserved),
        ("2001:db8::1", Scope::Documentation),
        ("2002:a00:1::1", Scope::Reserved),
        ("fd00:ec2::254", Scope::Private),
        ("fe80::1", Scope::LinkLocal),
        ("fec0::1", Scope::Reserved),
        ("ff02::1", Scope::Multicast),
        ("5f00::1", Scope::Reserved),
    ];

    fn is_denied(address: IpAddr) -> bool {
        let v4 = not_public_v4(std::iter::empty());
        match address {
            IpAddr::V4(address) => v4
                .iter()
                .any(|range| range.first <= address && address <= range.last),
            IpAddr::V6(address) => not_public_v6(std::iter::empty(), &v4)
                .iter()
                .any(|range| range.first <= address && address <= range.last),
        }
    }

    #[test]
    fn public_addresses_are_public_and_not_in_the_guests_set() {
        for text in PUBLIC {
            let address = text.parse().expect("an address");
            assert_eq!(scope(address), Scope::Public, "{text}");
            assert!(!is_denied(address), "{text}");
        }
    }

    #[test]
    fn what_is_not_public_is_named_and_in_the_guests_set() {
        for (text, expected) in NOT_PUBLIC {
            let address = text.parse().expect("an address");
            assert_eq!(scope(address), expected, "{text}");
            assert!(is_denied(address), "{text}");
        }
    }

    #[test]
    fn the_guests_set_is_ascending_and_apart_with_addresses_of_the_host_in_it() {
        let host = ["10.1.2.3", "5.6.7.8"].map(|text| text.parse().expect("an address"));
        let v4 = not_public_v4(host.into_iter());
        assert!(
            v4.iter()
                .any(|range| range.first == host[1] && range.last == host[1])
        );
        assert!(v4.is_sorted_by(|a, b| a.last < b.first), "{v4:?}");
        let v6 = not_public_v6(["2600::1".parse().expect("an address")].into_iter(), &v4);
        assert!(v6.is_sorted_by(|a, b| a.last < b.first), "{v6:?}");
        let embedded: Ipv6Addr = "64:ff9b::5.6.7.8".parse().expect("an address");
        assert!(v6.iter().any(|range| range.first == embedded));
    }
}
