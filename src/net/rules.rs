//! Changes to the rules of a VM that runs.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use agentvm_guest::net::{NetConfig, change};
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockType};
use nix::sys::stat::fstat;

use super::sockets;

/// `SIOCGSKNS` of `linux/sockios.h`: the net namespace of a socket.
const NAMESPACE_OF: libc::c_ulong = 0x894c;

/// Netlink in a VM's net namespace, made by PID 1 while it might change the rules. The kernel asks both
/// who has made a socket and who writes to it: nobody in the VM may any more, and this process may,
/// because the VM's user namespace is its own.
#[derive(Debug)]
pub(super) struct Rules {
    socket: Mutex<OwnedFd>,
    v6: bool,
}

impl Rules {
    pub(super) fn new(socket: OwnedFd, v6: bool) -> io::Result<Self> {
        netlink(&socket)?;
        let socket = Mutex::new(socket);
        Ok(Self { socket, v6 })
    }

    /// In one transaction a family. Waits for the kernel alone. `config` is asked when it is this change's
    /// turn, so that the last of several is the one that stays.
    pub(super) fn change(&self, config: impl FnOnce() -> NetConfig) -> io::Result<()> {
        let socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        // A socket of the host's own namespace would be the host's firewall.
        if is_ours(&socket)? {
            return Err(sockets::unexpected("a socket of this process's namespace"));
        }
        change(&socket, &config(), self.v6)
            .map_err(|(step, errno)| io::Error::other(format!("{step}: {errno}")))
    }
}

/// Whether it is what PID 1 is to make.
pub(super) fn netlink(socket: &OwnedFd) -> io::Result<()> {
    sockets::check(socket, &[AddressFamily::Netlink], SockType::Raw)?;
    if sockets::protocol(socket.as_fd())? == libc::NETLINK_NETFILTER {
        Ok(())
    } else {
        Err(sockets::unexpected("a socket of another protocol"))
    }
}

fn is_ours(socket: &OwnedFd) -> io::Result<bool> {
    // SAFETY: the call takes no argument, and returns a descriptor or -1.
    let namespace = unsafe { libc::ioctl(socket.as_raw_fd(), NAMESPACE_OF) };
    let namespace = Errno::result(namespace)?;
    // SAFETY: the kernel has just installed it for us.
    let namespace = fstat(unsafe { OwnedFd::from_raw_fd(namespace) })?;
    let own = nix::sys::stat::stat("/proc/thread-self/ns/net")?;
    Ok((namespace.st_dev, namespace.st_ino) == (own.st_dev, own.st_ino))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_netlink_of_netfilter_is_taken() {
        let udp = std::net::UdpSocket::bind("127.0.0.1:0").expect("a socket");
        assert!(netlink(&udp.into()).is_err());
        let route = nix::sys::socket::socket(
            AddressFamily::Netlink,
            SockType::Raw,
            nix::sys::socket::SockFlag::SOCK_CLOEXEC,
            nix::sys::socket::SockProtocol::NetlinkRoute,
        );
        assert!(netlink(&route.expect("a socket")).is_err());
    }

    #[test]
    fn the_hosts_own_rules_are_never_changed() {
        let own = nix::sys::socket::socket(
            AddressFamily::Netlink,
            SockType::Raw,
            nix::sys::socket::SockFlag::SOCK_CLOEXEC,
            nix::sys::socket::SockProtocol::NetlinkNetFilter,
        );
        let rules = Rules::new(own.expect("a socket"), false).expect("netlink");
        let config = || unreachable!("nothing is asked for");
        // EPERM for who may not even ask.
        assert!(rules.change(config).is_err());
    }
}
