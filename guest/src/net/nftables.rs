//! nftables objects as netlink requests: a transaction with one table, its sets, chains and rules.
//! Sources: `linux/netfilter/nf_tables.h`, `linux/netfilter/nfnetlink.h`, nft(8).

use std::os::fd::OwnedFd;

use nix::sys::socket::SockProtocol;

use super::Failure;
use super::netlink::{self, Attributes, Batch};

const SUBSYSTEM: u16 = 10;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;

const NEW_TABLE: u16 = SUBSYSTEM << 8;
const NEW_CHAIN: u16 = (SUBSYSTEM << 8) | 3;
const NEW_RULE: u16 = (SUBSYSTEM << 8) | 6;
const NEW_SET: u16 = (SUBSYSTEM << 8) | 9;
const NEW_ELEMENTS: u16 = (SUBSYSTEM << 8) | 0xc;
const DELETE_ELEMENTS: u16 = (SUBSYSTEM << 8) | 0xe;

const CREATE: i32 = libc::NLM_F_CREATE;
const APPEND: i32 = libc::NLM_F_CREATE | libc::NLM_F_APPEND;

/// `NFTA_LIST_ELEM` and `NFTA_DATA_VALUE`.
const ELEMENT: u16 = 1;
const VALUE: u16 = 1;

/// The 16-byte registers of the rules' machine: the verdict, and two to work with.
const VERDICT: u32 = 0;
const FIRST: u32 = 1;
const SECOND: u32 = 2;

/// Name of the only table.
const TABLE: &str = "agentvm";

/// Elements of a set in one request: an attribute's length has 16 bits. An even number, so that both ends of
/// an interval are in the same one.
const ELEMENTS_IN_REQUEST: usize = 1000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    V4,
    V6,
}

impl Family {
    /// `NFPROTO_*`
    const fn number(self) -> u8 {
        match self {
            Self::V4 => 2,
            Self::V6 => 10,
        }
    }

    const fn address_len(self) -> u8 {
        match self {
            Self::V4 => 4,
            Self::V6 => 16,
        }
    }

    /// Where the destination is in the packet's header.
    const fn destination(self) -> u32 {
        match self {
            Self::V4 => 16,
            Self::V6 => 24,
        }
    }

    /// Port unreachable, as ICMP and `ICMPv6` number it: the sender's error is `ECONNREFUSED`.
    const fn port_unreachable(self) -> u8 {
        match self {
            Self::V4 => 3,
            Self::V6 => 4,
        }
    }

    /// How nft(8) prints addresses of this family.
    const fn address_type(self) -> u32 {
        match self {
            Self::V4 => 7,
            Self::V6 => 8,
        }
    }
}

/// Changes to a table of the VM: all of them come into force at once, or nothing. Only large sets are filled
/// later, in steps: what is sent at once has to fit into a socket's buffer.
pub(super) struct Transaction {
    batch: Batch,
    later: Vec<Batch>,
    family: Family,
    sets: u32,
}

impl Transaction {
    /// Of a table that is made.
    pub(super) fn new(family: Family) -> Self {
        let mut transaction = Self::of_existing(family);
        transaction.request("make a table", (NEW_TABLE, CREATE), |table| {
            table.text(1, TABLE);
        });
        transaction
    }

    pub(super) fn of_existing(family: Family) -> Self {
        Self {
            batch: begin(),
            later: Vec::new(),
            family,
            sets: 0,
        }
    }

    /// A set of address intervals: first address, and the address after the last one, if any.
    pub(super) fn address_set(
        &mut self,
        name: &str,
        intervals: impl Iterator<Item = (Vec<u8>, Option<Vec<u8>>)>,
    ) {
        const INTERVAL: u32 = 4;
        let key = (self.family.address_type(), self.family.address_len());
        self.set(name, INTERVAL, key, &interval_elements(intervals));
    }

    /// Puts other intervals into a set.
    pub(super) fn refill(
        &mut self,
        name: &str,
        intervals: impl Iterator<Item = (Vec<u8>, Option<Vec<u8>>)>,
    ) {
        self.request("empty a set", (DELETE_ELEMENTS, 0), |list| {
            list.text(1, TABLE);
            list.text(2, name);
        });
        self.fill(name, &interval_elements(intervals));
    }

    pub(super) fn port_set(&mut self, name: &str, ports: &[u16]) {
        const PORT: u32 = 13;
        let elements = ports.iter().map(|port| (port.to_be_bytes().to_vec(), 0));
        self.set(name, 0, (PORT, 2), &elements.collect::<Vec<_>>());
    }

    fn set(
        &mut self,
        name: &str,
        flags: u32,
        (key_type, key_len): (u32, u8),
        elements: &[(Vec<u8>, u32)],
    ) {
        self.sets += 1;
        let id = self.sets;
        self.request("make a set", (NEW_SET, CREATE), |set| {
            set.text(1, TABLE);
            set.text(2, name);
            set.be32(3, flags);
            set.be32(4, key_type);
            set.be32(5, key_len.into());
            set.be32(10, id);
        });
        self.fill(name, elements);
    }

    fn fill(&mut self, name: &str, elements: &[(Vec<u8>, u32)]) {
        let header = self.header();
        let add = |batch: &mut Batch, elements: &[(Vec<u8>, u32)]| {
            batch.request("fill a set", (NEW_ELEMENTS, CREATE), &header, |list| {
                list.text(1, TABLE);
                list.text(2, name);
                list.nested(3, |list| {
                    for (key, flags) in elements {
                        list.nested(ELEMENT, |element| {
                            element.nested(1, |data| data.bytes(VALUE, key));
                            if *flags != 0 {
                                element.be32(3, *flags);
                            }
                        });
                    }
                });
            });
        };
        let mut parts = elements.chunks(ELEMENTS_IN_REQUEST);
        if let Some(first) = parts.next() {
            add(&mut self.batch, first);
        }
        self.later.extend(parts.map(|elements| {
            let mut batch = begin();
            add(&mut batch, elements);
            batch
        }));
    }

    /// A chain on the way of everything that a program of this VM sends.
    pub(super) fn output_chain(&mut self, name: &str, kind: &str, priority: i32) {
        const LOCAL_OUT: u32 = 3;
        self.request("make a chain", (NEW_CHAIN, CREATE), |chain| {
            chain.text(1, TABLE);
            chain.text(3, name);
            chain.nested(4, |hook| {
                hook.be32(1, LOCAL_OUT);
                hook.be32(2, priority.cast_unsigned());
            });
            chain.text(7, kind);
        });
    }

    pub(super) fn rule(&mut self, chain: &str, rule: &Rule) {
        self.request("add a rule", (NEW_RULE, APPEND), |attributes| {
            attributes.text(1, TABLE);
            attributes.text(2, chain);
            attributes.nested_bytes(4, &rule.expressions);
        });
    }

    pub(super) fn commit(self) -> Result<(), Failure> {
        let socket = netlink::socket(SockProtocol::NetlinkNetFilter)?;
        self.commit_over(&socket)
    }

    pub(super) fn commit_over(self, socket: &OwnedFd) -> Result<(), Failure> {
        for mut batch in std::iter::once(self.batch).chain(self.later) {
            batch.bracket("commit a transaction", BATCH_END, &bracket_header());
            batch.send_over(socket)?;
        }
        Ok(())
    }

    fn request(
        &mut self,
        step: &'static str,
        kind: (u16, i32),
        fill: impl FnOnce(&mut Attributes<'_>),
    ) {
        let header = self.header();
        self.batch.request(step, kind, &header, fill);
    }

    /// `struct nfgenmsg`
    const fn header(&self) -> [u8; 4] {
        [self.family.number(), 0, 0, 0]
    }
}

fn begin() -> Batch {
    let mut batch = Batch::new();
    batch.bracket("begin a transaction", BATCH_BEGIN, &bracket_header());
    batch
}

fn interval_elements(
    intervals: impl Iterator<Item = (Vec<u8>, Option<Vec<u8>>)>,
) -> Vec<(Vec<u8>, u32)> {
    const INTERVAL_END: u32 = 1;
    let elements = intervals.flat_map(|(first, after)| {
        let end = after.map(|after| (after, INTERVAL_END));
        std::iter::once((first, 0)).chain(end)
    });
    elements.collect()
}

/// `struct nfgenmsg` around a transaction names the subsystem.
const fn bracket_header() -> [u8; 4] {
    let [high, low] = SUBSYSTEM.to_be_bytes();
    [0, 0, high, low]
}

/// Conditions, then what happens where all of them hold.
pub(super) struct Rule {
    family: Family,
    expressions: Vec<u8>,
}

impl Rule {
    pub(super) const fn new(family: Family) -> Self {
        Self {
            family,
            expressions: Vec::new(),
        }
    }

    /// Connections whose first packet was let through, and errors about them.
    pub(super) fn of_known_connection(self) -> Self {
        const CT_STATE: u32 = 0;
        const NOT_EQUAL: u32 = 1;
        // Bits of NF_CT_STATE_BIT: established, related.
        let states = 0b110_u32.to_ne_bytes();
        self.expression("ct", |ct| {
            ct.be32(1, FIRST);
            ct.be32(2, CT_STATE);
        })
        .expression("bitwise", |bitwise| {
            bitwise.be32(1, FIRST);
            bitwise.be32(2, FIRST);
            bitwise.be32(3, 4);
            bitwise.nested(4, |mask| mask.bytes(VALUE, &states));
            bitwise.nested(5, |xor| xor.bytes(VALUE, &[0; 4]));
        })
        .compare(NOT_EQUAL, &[0; 4])
    }

    pub(super) fn tcp(self) -> Self {
        self.protocol(6)
    }

    pub(super) fn udp(self) -> Self {
        self.protocol(17)
    }

    fn protocol(self, number: u8) -> Self {
        const L4_PROTOCOL: u32 = 16;
        self.expression("meta", |meta| {
            meta.be32(1, FIRST);
            meta.be32(2, L4_PROTOCOL);
        })
        .equals(&[number])
    }

    /// Destinations that begin with these bytes: an address, or a prefix of whole bytes.
    pub(super) fn to(self, prefix: &[u8]) -> Self {
        let len = u32::try_from(prefix.len()).unwrap_or(u32::MAX);
        self.load_destination(len).equals(prefix)
    }

    pub(super) fn any_of(self, set: &str) -> Self {
        let len = self.family.address_len().into();
        self.load_destination(len).in_set(set)
    }

    /// Ports of TCP and of UDP are in the same place.
    pub(super) fn port(self, port: u16) -> Self {
        self.load_port().equals(&port.to_be_bytes())
    }

    pub(super) fn port_any_of(self, set: &str) -> Self {
        self.load_port().in_set(set)
    }

    pub(super) fn accept(self) -> Self {
        const ACCEPT: u32 = 1;
        self.expression("immediate", |immediate| {
            immediate.be32(1, VERDICT);
            immediate.nested(2, |data| {
                data.nested(2, |verdict| verdict.be32(1, ACCEPT));
            });
        })
    }

    /// Copies the packet to a group of readers, and goes on.
    pub(super) fn log(self, group: u16) -> Self {
        self.expression("log", |log| log.bytes(1, &group.to_be_bytes()))
    }

    pub(super) fn reset(self) -> Self {
        const TCP_RESET: u32 = 1;
        self.expression("reject", |reject| {
            reject.be32(1, TCP_RESET);
            reject.bytes(2, &[0]);
        })
    }

    pub(super) fn unreachable(self) -> Self {
        const ICMP_UNREACHABLE: u32 = 0;
        let code = self.family.port_unreachable();
        self.expression("reject", |reject| {
            reject.be32(1, ICMP_UNREACHABLE);
            reject.bytes(2, &[code]);
        })
    }

    pub(super) fn redirect(self, (address, port): (&[u8], u16)) -> Self {
        const DESTINATION: u32 = 1;
        let family = self.family.number().into();
        self.immediate(FIRST, address)
            .immediate(SECOND, &port.to_be_bytes())
            .expression("nat", |nat| {
                nat.be32(1, DESTINATION);
                nat.be32(2, family);
                nat.be32(3, FIRST);
                nat.be32(5, SECOND);
            })
    }

    fn load_destination(self, len: u32) -> Self {
        const NETWORK_HEADER: u32 = 1;
        let offset = self.family.destination();
        self.load(NETWORK_HEADER, offset, len)
    }

    fn load_port(self) -> Self {
        const TRANSPORT_HEADER: u32 = 2;
        self.load(TRANSPORT_HEADER, 2, 2)
    }

    fn load(self, base: u32, offset: u32, len: u32) -> Self {
        self.expression("payload", |payload| {
            payload.be32(1, FIRST);
            payload.be32(2, base);
            payload.be32(3, offset);
            payload.be32(4, len);
        })
    }

    fn in_set(self, name: &str) -> Self {
        self.expression("lookup", |lookup| {
            lookup.text(1, name);
            lookup.be32(2, FIRST);
        })
    }

    fn equals(self, value: &[u8]) -> Self {
        const EQUAL: u32 = 0;
        self.compare(EQUAL, value)
    }

    fn compare(self, operation: u32, value: &[u8]) -> Self {
        self.expression("cmp", |cmp| {
            cmp.be32(1, FIRST);
            cmp.be32(2, operation);
            cmp.nested(3, |data| data.bytes(VALUE, value));
        })
    }

    fn immediate(self, register: u32, value: &[u8]) -> Self {
        self.expression("immediate", |immediate| {
            immediate.be32(1, register);
            immediate.nested(2, |data| data.bytes(VALUE, value));
        })
    }

    fn expression(mut self, name: &str, fill: impl FnOnce(&mut Attributes<'_>)) -> Self {
        Attributes::at_end_of(&mut self.expressions).nested(ELEMENT, |expression| {
            expression.text(1, name);
            expression.nested(2, fill);
        });
        self
    }
}
