//! Serves the connections that the VM's rules redirect.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit};
use nix::sys::socket::{SockaddrIn, SockaddrIn6, getsockopt, setsockopt, sockopt};
use tokio::io::Interest;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::Traffic;
use super::policy::{Policy, Verdict, denied};
use super::relay::relay;

/// Connections of one VM at a time, where this process may have many descriptors. More wait in the
/// listener's backlog, as at a busy server.
const MAX_CONNECTIONS: usize = 1024;

/// Descriptors of a connection: the guest's side and the server's.
const DESCRIPTORS: usize = 2;

/// How long accepting rests when the process or the host has no descriptor or memory left: trying
/// again at once would only keep a core busy.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(100);

#[derive(Clone)]
pub(super) struct Proxy {
    policy: Arc<Policy>,
    slots: Arc<Semaphore>,
    traffic: Arc<Traffic>,
}

impl Proxy {
    pub(super) fn new(policy: Arc<Policy>, traffic: Arc<Traffic>) -> Self {
        Self {
            policy,
            slots: Arc::new(Semaphore::new(max_connections(descriptor_limit()))),
            traffic,
        }
    }

    pub(super) async fn serve(self, listener: TcpListener) {
        let mut connections = JoinSet::new();
        while let Ok(slot) = Arc::clone(&self.slots).acquire_owned().await {
            let guest = tokio::select! {
                accepted = accept(&listener) => accepted,
                Some(_) = connections.join_next() => continue,
            };
            match guest {
                Ok(guest) => {
                    let Ok(share) = of_all_vms().acquire().await else {
                        return; // it is never closed
                    };
                    let policy = Arc::clone(&self.policy);
                    let traffic = Arc::clone(&self.traffic);
                    connections.spawn(async move {
                        connect(guest, &policy, &traffic).await;
                        drop((slot, share));
                    });
                }
                Err(error) => {
                    tracing::error!(%error, "a VM's proxy can't accept connections any more");
                    return;
                }
            }
        }
    }
}

/// A quarter of the process's descriptors for one VM at most: what a VM opens must not leave the host
/// program without.
fn max_connections(descriptors: usize) -> usize {
    // Each of the two listeners keeps one for what it will accept next.
    const FEWEST: usize = 16;
    (descriptors / 4 / DESCRIPTORS).clamp(FEWEST, MAX_CONNECTIONS)
}

/// Connections of all VMs together: they get half of the process's descriptors.
fn of_all_vms() -> &'static Semaphore {
    static SLOTS: OnceLock<Semaphore> = OnceLock::new();
    SLOTS.get_or_init(|| Semaphore::new((descriptor_limit() / 2 / DESCRIPTORS).max(1)))
}

fn descriptor_limit() -> usize {
    // Node has raised its soft limit to the hard one.
    let limit = getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(soft, _)| soft);
    usize::try_from(limit)
        .unwrap_or(usize::MAX)
        .min(Semaphore::MAX_PERMITS)
}

/// The next connection. An error means that there will be none.
pub(super) async fn accept(listener: &TcpListener) -> io::Result<TcpStream> {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return Ok(stream),
            Err(error) => match error.raw_os_error() {
                Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM) => {
                    tracing::warn!(%error, "a VM's connections have to wait");
                    tokio::time::sleep(EXHAUSTED_PAUSE).await;
                }
                // The listener itself.
                Some(libc::EBADF | libc::EINVAL | libc::ENOTSOCK | libc::EOPNOTSUPP) | None => {
                    return Err(error);
                }
                // A connection that was gone before it was accepted: accept(2), "Error handling".
                Some(_) => {}
            },
        }
    }
}

/// Connects the guest to where it wanted, or resets it.
async fn connect(mut guest: TcpStream, policy: &Policy, traffic: &Traffic) {
    if let Err(error) = try_connect(&mut guest, policy, traffic).await {
        tracing::debug!(%error, "a VM's connection ended with an error");
        // The guest's program sees a connection reset, not an orderly end of a stream.
        if let Err(error) = guest.set_zero_linger() {
            tracing::debug!(%error, "can't reset a connection");
        }
    }
}

async fn try_connect(guest: &mut TcpStream, policy: &Policy, traffic: &Traffic) -> io::Result<()> {
    let destination = original_destination(guest)?;
    if let Verdict::Deny(rule) = policy.judge(destination) {
        denied(&destination.ip(), destination.port(), rule);
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    // As long as it takes: a program that gives up resets its side.
    let mut server = tokio::select! {
        dialled = dial(destination) => dialled?,
        gone = guest.ready(Interest::ERROR) => {
            gone?;
            return Err(io::ErrorKind::ConnectionReset.into());
        }
    };
    // Both programs have already decided what goes into one segment.
    guest.set_nodelay(true)?;
    server.set_nodelay(true)?;
    // A server that vanished without a word must not hold a connection for ever.
    setsockopt(&server, sockopt::KeepAlive, &true)?;
    let relayed = relay(guest, &mut server, traffic).await;
    if relayed.is_err() {
        server.set_zero_linger()?;
    }
    relayed
}

/// On the host's loopback, also by its other address: programs of the VM that ask for `localhost` use
/// `::1` and do not fall back, because their connection has already succeeded, while many servers
/// listen on 127.0.0.1 only.
async fn dial(destination: SocketAddr) -> io::Result<TcpStream> {
    let other: IpAddr = match destination.ip() {
        address if !address.is_loopback() => return TcpStream::connect(destination).await,
        IpAddr::V4(_) => Ipv6Addr::LOCALHOST.into(),
        IpAddr::V6(_) => Ipv4Addr::LOCALHOST.into(),
    };
    let refused = match TcpStream::connect(destination).await {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => error,
        result => return result,
    };
    let dialled = TcpStream::connect((other, destination.port())).await;
    dialled.map_err(|_| refused)
}

/// Where the guest's program wanted to connect, as connection tracking of its namespace knows it.
/// Nothing in the VM can forge that.
fn original_destination(guest: &TcpStream) -> io::Result<SocketAddr> {
    if guest.local_addr()?.is_ipv4() {
        let address = SockaddrIn::from(getsockopt(guest, sockopt::OriginalDst)?);
        Ok(SocketAddrV4::from(address).into())
    } else {
        let address = SockaddrIn6::from(getsockopt(guest, sockopt::Ip6tOriginalDst)?);
        Ok(SocketAddrV6::from(address).into())
    }
}
