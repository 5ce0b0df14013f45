//! What the rules refuse, told to whoever reads a socket: NFLOG, in a group of this net namespace.
//! Sources: `linux/netfilter/nfnetlink_log.h`, `nfnetlink_log.c`.

use std::os::fd::OwnedFd;

use nix::sys::socket::SockProtocol;

use super::Failure;
use super::netlink::{self, Batch};

/// Of the rules, and of the socket.
pub(super) const GROUP: u16 = 1;

/// `NFULNL_MSG_CONFIG` of the subsystem `ulog`.
const CONFIGURE: u16 = (4 << 8) | 1;

/// Of each packet: what says where it was going.
const COPIED: u32 = 64;

/// Hundredths of a second for which packets are collected.
const DELAY: u32 = 1;

/// Fails where the kernel has no NFLOG.
pub(super) fn socket() -> Result<OwnedFd, Failure> {
    const BIND: u8 = 1;
    const COPY_PACKET: u8 = 2;
    const NUMBERED: u16 = 1;
    let socket = netlink::socket(SockProtocol::NetlinkNetFilter)?;
    let mut batch = Batch::new();
    // struct nfgenmsg
    let [high, low] = GROUP.to_be_bytes();
    let header = [0, 0, high, low];
    batch.request("bind to a log", (CONFIGURE, 0), &header, |log| {
        log.bytes(1, &[BIND]);
        let [a, b, c, d] = COPIED.to_be_bytes();
        log.bytes(2, &[a, b, c, d, COPY_PACKET, 0]);
        log.be32(4, DELAY);
        log.bytes(6, &NUMBERED.to_be_bytes());
    });
    batch.send_over(&socket)?;
    Ok(socket)
}
