//! Which addresses are the public internet, and what the others are.
//! Sources: the IANA special-purpose address registries (RFC 6890 and its successors).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::LazyLock;

use agentvm_guest::net::Range;

/// What kind of place an address is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
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
        // AS112, to which questions for private addresses are delegated.
        (
            Ipv6Addr::new(0x2620, 0x4f, 0x8000, 0, 0, 0, 0, 0),
            48,
            Scope::Reserved,
        ),
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
    let bits = u128::from(address.to_bits());
    V4.iter()
        .find(|(network, prefix, _)| bits_v4(*network, *prefix).contains(bits))
        .map_or(Scope::Public, |(_, _, scope)| *scope)
}

fn scope_v6(address: Ipv6Addr) -> Scope {
    if let Some(embedded) = embedded_v4(address.into()) {
        return scope_v4(embedded);
    }
    let bits = address.to_bits();
    let within = |(network, prefix)| bits_v6(network, prefix).contains(bits);
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

/// The IPv4 address that a NAT64 address stands for.
pub(super) fn embedded_v4(address: IpAddr) -> Option<Ipv4Addr> {
    let IpAddr::V6(address) = address else {
        return None;
    };
    let nat64 = bits_v6(NAT64.0, NAT64.1).contains(address.to_bits());
    let [.., a, b, c, d] = address.octets();
    nat64.then(|| Ipv4Addr::new(a, b, c, d))
}

/// Where nothing is, and what a kernel may take for itself: "this network", and IPv6 addresses that
/// are IPv4 ones in another form.
pub(super) const NOWHERE: [Block; 2] = [
    Block::V4(bits_v4(Ipv4Addr::UNSPECIFIED, 8)),
    Block::V6(bits_v6(Ipv6Addr::UNSPECIFIED, 64)),
];

pub(super) fn is_nowhere(address: IpAddr) -> bool {
    NOWHERE.iter().any(|block| block.contains(address))
}

/// Whether all of a network is not public.
pub(super) fn lies_inside(block: Block) -> bool {
    static NOT_PUBLIC: LazyLock<[Vec<Bits>; 2]> =
        LazyLock::new(|| [not_public_v4(), not_public_v6()]);
    let [v4, v6] = &*NOT_PUBLIC;
    let (ranges, own) = match block {
        Block::V4(own) => (v4, own),
        Block::V6(own) => (v6, own),
    };
    ranges
        .iter()
        .any(|range| range.contains(own.first) && range.contains(own.last))
}

/// Bits of an address of this family.
pub(super) const fn bits(address: IpAddr) -> u32 {
    match address {
        IpAddr::V4(_) => 32,
        IpAddr::V6(_) => 128,
    }
}

/// A network: an address and a prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Block {
    V4(Bits),
    V6(Bits),
}

impl Block {
    pub(super) const fn new(address: IpAddr, prefix: u32) -> Self {
        match address {
            IpAddr::V4(address) => Self::V4(bits_v4(address, prefix)),
            IpAddr::V6(address) => Self::V6(bits_v6(address, prefix)),
        }
    }

    pub(super) const fn one(address: IpAddr) -> Self {
        Self::new(address, bits(address))
    }

    pub(super) fn first(&self) -> IpAddr {
        match self {
            Self::V4(bits) => v4(bits.first).into(),
            Self::V6(bits) => Ipv6Addr::from_bits(bits.first).into(),
        }
    }

    pub(super) fn contains(&self, address: IpAddr) -> bool {
        self.contains_block(Self::one(address))
    }

    pub(super) fn contains_block(&self, other: Self) -> bool {
        match (self, other) {
            (Self::V4(own), Self::V4(other)) | (Self::V6(own), Self::V6(other)) => {
                own.contains(other.first) && own.contains(other.last)
            }
            _ => false,
        }
    }
}

/// What a VM's own rules refuse.
pub(super) struct Denied {
    /// Whatever is not open, and not only what is not public.
    pub(super) all: bool,
    /// Not to be refused. Of a network that is public in part, only that part.
    pub(super) open: Vec<Block>,
    /// To be refused, open or not.
    pub(super) also: Vec<Block>,
}

impl Denied {
    /// Ascending and apart.
    pub(super) fn ranges(&self) -> (Vec<Range<Ipv4Addr>>, Vec<Range<Ipv6Addr>>) {
        let (inside_v4, inside_v6) = (not_public_v4(), not_public_v6());
        let (mut open_v4, mut open_v6) = (Vec::new(), Vec::new());
        for block in &self.open {
            let inside = lies_inside(*block);
            match block {
                Block::V4(own) if inside => open_v4.push(*own),
                Block::V4(own) => {
                    let public = subtract(vec![*own], &inside_v4);
                    open_v6.extend(public.iter().map(Bits::nat64));
                    open_v4.extend(public);
                }
                Block::V6(own) if inside => open_v6.push(*own),
                Block::V6(own) => open_v6.extend(subtract(vec![*own], &inside_v6)),
            }
        }
        let (mut also_v4, mut also_v6) = (Vec::new(), Vec::new());
        for block in NOWHERE.iter().chain([&LOOPBACK]).chain(&self.also) {
            match block {
                Block::V4(own) => {
                    also_v4.push(*own);
                    also_v6.push(own.nat64());
                }
                Block::V6(own) => also_v6.push(*own),
            }
        }
        let base = |inside: Vec<Bits>, last| {
            if self.all {
                vec![Bits { first: 0, last }]
            } else {
                inside
            }
        };
        let denied_v4 = subtract(base(inside_v4, u32::MAX.into()), &merge(open_v4));
        let denied_v6 = subtract(base(inside_v6, u128::MAX), &merge(open_v6));
        let denied_v4 = merge([denied_v4, also_v4].concat());
        let denied_v6 = merge([denied_v6, also_v6].concat());
        let ranges_v4 = denied_v4.iter().map(|bits| Range {
            first: v4(bits.first),
            last: v4(bits.last),
        });
        let ranges_v6 = denied_v6.iter().map(|bits| Range {
            first: Ipv6Addr::from_bits(bits.first),
            last: Ipv6Addr::from_bits(bits.last),
        });
        (ranges_v4.collect(), ranges_v6.collect())
    }
}

const LOOPBACK: Block = Block::V4(bits_v4(Ipv4Addr::new(127, 0, 0, 0), 8));

/// The IPv4 addresses that are not public.
fn not_public_v4() -> Vec<Bits> {
    let ranges = V4
        .iter()
        .map(|(network, prefix, _)| bits_v4(*network, *prefix));
    merge(ranges.collect())
}

/// The IPv6 addresses that are not public, with the NAT64 names of the IPv4 ones.
fn not_public_v6() -> Vec<Bits> {
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
        .chain(not_public_v4().into_iter().map(|bits| bits.nat64()));
    merge(ranges.collect())
}

/// A range of addresses of one family as numbers, both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Bits {
    first: u128,
    last: u128,
}

impl Bits {
    const fn contains(&self, bits: u128) -> bool {
        self.first <= bits && bits <= self.last
    }

    /// Of IPv4 addresses.
    const fn nat64(&self) -> Self {
        let prefix = NAT64.0.to_bits();
        Self {
            first: prefix | self.first,
            last: prefix | self.last,
        }
    }
}

const fn bits_v4(network: Ipv4Addr, prefix: u32) -> Bits {
    let host = match u32::MAX.checked_shr(prefix) {
        Some(host) => host,
        None => 0,
    };
    let first = network.to_bits() & !host;
    Bits {
        first: first as u128,
        last: (first | host) as u128,
    }
}

const fn bits_v6(network: Ipv6Addr, prefix: u32) -> Bits {
    let host = match u128::MAX.checked_shr(prefix) {
        Some(host) => host,
        None => 0,
    };
    let first = network.to_bits() & !host;
    Bits {
        first,
        last: first | host,
    }
}

fn v4(bits: u128) -> Ipv4Addr {
    u32::try_from(bits).map_or(Ipv4Addr::BROADCAST, Ipv4Addr::from_bits)
}

/// Ascending, and joined where they overlap or touch: nftables refuses intervals that overlap.
fn merge(mut ranges: Vec<Bits>) -> Vec<Bits> {
    ranges.sort_by_key(|range| range.first);
    let mut merged: Vec<Bits> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match merged.last_mut() {
            Some(before) if range.first <= before.last.saturating_add(1) => {
                before.last = before.last.max(range.last);
            }
            _ => merged.push(range),
        }
    }
    merged
}

/// What of `ranges` is in none of `holes`; both are ascending and apart.
fn subtract(ranges: Vec<Bits>, holes: &[Bits]) -> Vec<Bits> {
    let mut left = Vec::with_capacity(ranges.len());
    for Bits { mut first, last } in ranges {
        let mut rest = true;
        for hole in holes {
            if hole.last < first {
                continue;
            }
            if hole.first > last {
                break;
            }
            if hole.first > first {
                left.push(Bits {
                    first,
                    last: hole.first - 1,
                });
            }
            if hole.last >= last {
                rest = false;
                break;
            }
            first = hole.last + 1;
        }
        if rest {
            left.push(Bits { first, last });
        }
    }
    left
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

    fn denied(also: &[IpAddr]) -> (Vec<Range<Ipv4Addr>>, Vec<Range<Ipv6Addr>>) {
        let denied = Denied {
            all: false,
            open: Vec::new(),
            also: also.iter().copied().map(Block::one).collect(),
        };
        denied.ranges()
    }

    fn is_denied(address: IpAddr) -> bool {
        let (v4, v6) = denied(&[]);
        match address {
            IpAddr::V4(address) => v4
                .iter()
                .any(|range| range.first <= address && address <= range.last),
            IpAddr::V6(address) => v6
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
        let host = ["10.1.2.3", "5.6.7.8", "2600::1"].map(|text| text.parse().expect("an address"));
        let (v4, v6) = denied(&host);
        let own = host[1];
        assert!(
            v4.iter()
                .any(|range| range.first == own && range.last == own)
        );
        assert!(v4.is_sorted_by(|a, b| a.last < b.first), "{v4:?}");
        assert!(v6.is_sorted_by(|a, b| a.last < b.first), "{v6:?}");
        let embedded: Ipv6Addr = "64:ff9b::5.6.7.8".parse().expect("an address");
        assert!(v6.iter().any(|range| range.first == embedded));
    }

    #[test]
    fn what_is_taken_out_of_ranges_leaves_what_is_beside_it() {
        type Pairs = &'static [(u128, u128)];
        let bits = |(first, last)| Bits { first, last };
        let cases: [(Pairs, Pairs); 6] = [
            (&[], &[(10, 20), (30, 40)]),
            (&[(0, 50)], &[]),
            (
                &[(12, 13), (15, 15)],
                &[(10, 11), (14, 14), (16, 20), (30, 40)],
            ),
            (&[(5, 10), (20, 30)], &[(11, 19), (31, 40)]),
            (&[(15, 35)], &[(10, 14), (36, 40)]),
            (&[(21, 29), (41, u128::MAX)], &[(10, 20), (30, 40)]),
        ];
        for (holes, expected) in cases {
            let holes: Vec<_> = holes.iter().copied().map(bits).collect();
            let ranges = vec![bits((10, 20)), bits((30, 40))];
            let expected: Vec<_> = expected.iter().copied().map(bits).collect();
            assert_eq!(subtract(ranges, &holes), expected);
        }
    }
}
