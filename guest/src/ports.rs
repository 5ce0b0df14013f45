//! Servers inside the VM, for the host: connections to them, and which ones there are.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsRawFd, OwnedFd};

use agentvm_guest::protocol::{MAX_LISTENERS, PortOp, Reply, RequestId};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockProtocol, SockType, SockaddrIn, SockaddrIn6, connect, socket,
};

use crate::boot::errno_of;

pub(crate) fn answer(id: RequestId, op: PortOp) -> nix::Result<(Reply, Vec<OwnedFd>)> {
    match op {
        PortOp::Connect { port, v6 } => {
            Ok((Reply::Opened { id }, vec![begin_to_connect(port, v6)?]))
        }
        PortOp::Listeners => {
            let listeners = listeners().map_err(|error| errno_of(&error))?;
            Ok((Reply::Listeners { id, listeners }, Vec::new()))
        }
    }
}

/// A connection that is under way. Even on loopback it can take for ever: a server whose backlog is full
/// lets it wait.
fn begin_to_connect(port: u16, v6: bool) -> nix::Result<OwnedFd> {
    let family = if v6 {
        AddressFamily::Inet6
    } else {
        AddressFamily::Inet
    };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(family, SockType::Stream, flags, SockProtocol::Tcp)?;
    let begun = if v6 {
        let address = SocketAddrV6::new(Ipv6Addr::LOCALHOST, port, 0, 0);
        connect(socket.as_raw_fd(), &SockaddrIn6::from(address))
    } else {
        let address = SocketAddrV4::new(Ipv4Addr::LOCALHOST, port);
        connect(socket.as_raw_fd(), &SockaddrIn::from(address))
    };
    match begun {
        Ok(()) | Err(Errno::EINPROGRESS) => Ok(socket),
        Err(errno) => Err(errno),
    }
}

fn listeners() -> io::Result<Vec<SocketAddr>> {
    let mut found = Vec::new();
    for table in ["/proc/self/net/tcp", "/proc/self/net/tcp6"] {
        match File::open(table) {
            Ok(file) => read_table(BufReader::new(file), &mut found)?,
            // A kernel without IPv6.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

/// The kernel lists listening sockets before all others (`tcp_seq_start`), so that nothing is read of
/// the connections, of which a VM may have very many.
fn read_table(table: impl BufRead, found: &mut Vec<SocketAddr>) -> io::Result<()> {
    for line in table.lines().skip(1) {
        match parse(&line?) {
            Some(listener) if found.len() < MAX_LISTENERS => found.push(listener),
            _ => break,
        }
    }
    Ok(())
}

/// `sl local_address rem_address st …`; `None` for one that does not listen (proc(5)).
fn parse(line: &str) -> Option<SocketAddr> {
    const LISTEN: &str = "0A";
    let mut fields = line.split_ascii_whitespace().skip(1);
    let (local, _remote, state) = (fields.next()?, fields.next()?, fields.next()?);
    if state != LISTEN {
        return None;
    }
    let (address, port) = local.split_once(':')?;
    // Words of 32 bits, each printed as a number of this machine although it is in network order.
    let word = |index: usize| {
        let digits = address.get(index * 8..index * 8 + 8)?;
        Some(u32::from_str_radix(digits, 16).ok()?.to_ne_bytes())
    };
    let ip: IpAddr = if address.len() == 8 {
        Ipv4Addr::from(word(0)?).into()
    } else {
        let mut octets = [0; 16];
        for (index, part) in octets.chunks_exact_mut(4).enumerate() {
            part.copy_from_slice(&word(index)?);
        }
        Ipv6Addr::from(octets).into()
    };
    Some(SocketAddr::new(ip, u16::from_str_radix(port, 16).ok()?))
}
