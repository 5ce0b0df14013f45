//! What the VM's own rules refuse: read from a socket that PID 1 made, as NFLOG writes it.
//!
//! The host does not trust PID 1, which could have handed out another socket and write to it what it
//! likes: all that comes of it is a report. Sources: `linux/netfilter/nfnetlink_log.h`, netlink(7).

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use nix::sys::socket::{MsgFlags, recv};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::denials::Protocol;
use super::proxy::Proxy;
use super::rate::Bucket;

/// The kernel sends at most a page at once.
const CHUNK: usize = 64 * 1024;

/// Reads in a second. The kernel collects packets meanwhile; what it has no room for is counted.
const READS: u32 = 1000;

/// A packet that the rules have refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet {
    pub destination: SocketAddr,
    pub protocol: Protocol,
}

/// What a message of the log holds.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Messages {
    /// Each with its number, where it has one.
    pub packets: Vec<(Option<Packet>, Option<u32>)>,
}

/// Reads a datagram, which anybody may have written. What makes no sense is left out.
#[must_use]
pub fn parse(mut bytes: &[u8]) -> Messages {
    /// `NFULNL_MSG_PACKET` of the subsystem `ulog`.
    const PACKET: u16 = 4 << 8;
    const HEADER: usize = 16;
    /// `struct nfgenmsg`
    const FAMILY_HEADER: usize = 4;
    let mut messages = Messages::default();
    while let Some(length) = ne32(bytes, 0) {
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        let Some(message) = bytes.get(..length).filter(|_| length >= HEADER) else {
            break;
        };
        if ne16(message, 4) == Some(PACKET)
            && let Some(attributes) = message.get(HEADER + FAMILY_HEADER..)
        {
            messages.packets.push(parse_attributes(attributes));
        }
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    messages
}

fn parse_attributes(mut bytes: &[u8]) -> (Option<Packet>, Option<u32>) {
    const PAYLOAD: u16 = 9;
    const NUMBER: u16 = 12;
    const HEADER: usize = 4;
    let (mut packet, mut number) = (None, None);
    while let (Some(length), Some(kind)) = (ne16(bytes, 0), ne16(bytes, 2)) {
        let length = usize::from(length);
        let Some(value) = bytes.get(HEADER..length) else {
            break;
        };
        match kind {
            PAYLOAD => packet = parse_packet(value),
            NUMBER => number = value.first_chunk().copied().map(u32::from_be_bytes),
            _ => {}
        }
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    (packet, number)
}

/// The beginning of an IP packet.
fn parse_packet(packet: &[u8]) -> Option<Packet> {
    let (address, protocol, payload): (IpAddr, u8, usize) = match packet.first()? >> 4 {
        4 => {
            let octets: [u8; 4] = *packet.get(16..)?.first_chunk()?;
            let length = usize::from(packet.first()? & 0xf) * 4;
            (Ipv4Addr::from(octets).into(), *packet.get(9)?, length)
        }
        6 => {
            let octets: [u8; 16] = *packet.get(24..)?.first_chunk()?;
            (Ipv6Addr::from(octets).into(), *packet.get(6)?, 40)
        }
        _ => return None,
    };
    let protocol = match protocol {
        6 => Protocol::Tcp,
        17 => Protocol::Udp,
        _ => Protocol::Other,
    };
    let port = match protocol {
        Protocol::Other => 0,
        _ => u16::from_be_bytes(*packet.get(payload + 2..)?.first_chunk()?),
    };
    Some(Packet {
        destination: SocketAddr::new(address, port),
        protocol,
    })
}

fn ne16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn ne32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// How many packets the kernel had no room for, by the numbers of the others.
#[derive(Debug, Default)]
struct Lost {
    /// Of the packet that is to come.
    next: u32,
    /// Told before it was known how many there were, and of no gap yet.
    told: u64,
}

impl Lost {
    /// The kernel says that there was no room: at least one is missing, and may be the last for long. How
    /// many to tell of.
    const fn overrun(&mut self) -> u64 {
        let more = 1_u64.saturating_sub(self.told);
        self.told += more;
        more
    }

    /// A packet has come. How many before it to tell of. Those that were waiting when others were lost come
    /// after the kernel has said so, and before the gap.
    fn before(&mut self, number: u32) -> u64 {
        let lost = u64::from(number.saturating_sub(self.next));
        self.next = number.wrapping_add(1);
        let known = lost.min(self.told);
        self.told -= known;
        lost - known
    }
}

/// Reports what is refused, as long as the VM runs.
pub(super) async fn serve(socket: OwnedFd, proxy: Arc<Proxy>) {
    // SAFETY: an OwnedFd that nobody replaces or closes while the AsyncFd owns it.
    let socket = unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) };
    let socket = match socket {
        Ok(socket) => socket,
        Err(refused) => {
            let (_, error) = refused.into_parts();
            tracing::warn!(%error, "what a VM's rules refuse is not told");
            return;
        }
    };
    let reads = Bucket::new(READS, READS);
    let mut buffer = vec![0; CHUNK];
    let mut lost = Lost::default();
    loop {
        reads.take().await;
        let received = async {
            let mut ready = socket.readable().await?;
            let received = ready.try_io(|socket| {
                recv(socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT)
                    .map_err(io::Error::from)
            });
            received.unwrap_or_else(|_| Err(io::ErrorKind::WouldBlock.into()))
        };
        match received.await {
            Ok(length) => {
                let messages = parse(buffer.get(..length).unwrap_or_default());
                for (packet, number) in messages.packets {
                    if let Some(number) = number {
                        proxy.report_lost(lost.before(number));
                    }
                    match packet {
                        Some(packet) => proxy.report_packet(packet),
                        None => proxy.report_lost(1),
                    }
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            // The kernel had no room: the number of the next packet tells how many are missing.
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                proxy.report_lost(lost.overrun());
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => {
                tracing::warn!(%error, "what a VM's rules refuse is not told any more");
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let length = u16::try_from(value.len() + 4).expect("short");
        let mut bytes = [&length.to_ne_bytes()[..], &kind.to_ne_bytes(), value].concat();
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn message(kind: u16, attributes: &[u8]) -> Vec<u8> {
        let length = u32::try_from(attributes.len() + 20).expect("short");
        [
            &length.to_ne_bytes()[..],
            &kind.to_ne_bytes(),
            &[0; 10],
            &[2, 0, 0, 1],
            attributes,
        ]
        .concat()
    }

    fn v4(protocol: u8, options: usize) -> Vec<u8> {
        let words = u8::try_from(5 + options).expect("few");
        let mut packet = vec![0; 20];
        packet[0] = 0x40 | words;
        packet[9] = protocol;
        packet[16..20].copy_from_slice(&[10, 0, 0, 1]);
        packet.resize(20 + options * 4, 0);
        packet.extend_from_slice(&[0x80, 0, 1, 0xbb]);
        packet
    }

    fn packet(destination: &str, protocol: Protocol) -> Packet {
        Packet {
            destination: destination.parse().expect("an address with a port"),
            protocol,
        }
    }

    #[test]
    fn a_refused_packet_is_read_with_its_number() {
        let mut v6 = vec![0; 40];
        v6[0] = 0x60;
        v6[6] = 17;
        v6[24..40].copy_from_slice(&Ipv6Addr::LOCALHOST.octets());
        v6.extend_from_slice(&[0, 1, 0, 53]);
        let number = |number: u32| attribute(12, &number.to_be_bytes());
        let bytes = [
            message(0x400, &[attribute(9, &v4(6, 0)), number(0)].concat()),
            message(0x400, &[attribute(9, &v4(17, 2)), number(1)].concat()),
            message(0x400, &[number(2), attribute(9, &v6)].concat()),
            message(0x400, &attribute(9, &v4(1, 0))),
            // NLMSG_DONE
            message(3, &[]),
        ]
        .concat();
        let expected = [
            (Some(packet("10.0.0.1:443", Protocol::Tcp)), Some(0)),
            (Some(packet("10.0.0.1:443", Protocol::Udp)), Some(1)),
            (Some(packet("[::1]:53", Protocol::Udp)), Some(2)),
            (Some(packet("10.0.0.1:0", Protocol::Other)), None),
        ];
        assert_eq!(parse(&bytes).packets, expected);
    }

    #[test]
    fn what_is_lost_is_counted_once() {
        let mut lost = Lost::default();
        assert_eq!(lost.before(0), 0);
        assert_eq!((lost.overrun(), lost.overrun()), (1, 0));
        // These were waiting.
        assert_eq!((lost.before(1), lost.before(2)), (0, 0));
        // 3 to 7 are missing, one of which was told.
        assert_eq!(lost.before(8), 4);
        assert_eq!(lost.before(9), 0);
        // The kernel says so only where somebody reads.
        assert_eq!(lost.before(12), 2);
    }

    #[test]
    fn every_prefix_and_every_flipped_byte_is_read_to_its_end() {
        let attributes = [attribute(9, &v4(6, 1)), attribute(12, &[0; 4])].concat();
        let bytes = message(0x400, &attributes).repeat(2);
        for length in 0..bytes.len() {
            assert!(parse(&bytes[..length]).packets.len() <= 2);
        }
        for at in 0..bytes.len() {
            for value in 0..=u8::MAX {
                let mut changed = bytes.clone();
                changed[at] = value;
                drop(parse(&changed));
            }
        }
    }
}
