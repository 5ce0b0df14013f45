//! Serves the connections that the VM's rules redirect.

use std::io;
use std::net::{SocketAddr, SocketAddrV4, SocketAddrV6};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit};
use nix::sys::socket::{SockaddrIn, SockaddrIn6, getsockopt, setsockopt, sockopt};
use tokio::io::Interest;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

use super::Traffic;
use super::address::{Scope, scope};
use super::denials::{Denials, Protocol, Refused};
use super::dial::dial;
use super::hello::{ClientHello, Inspection};
use super::log::Packet;
use super::names::Names;
use super::policy::{Policy, Reason, Terms, Verdict};
use super::rate::Bucket;
use super::relay::relay;
use super::secrets::{Begun, Interceptor};

/// Connections of one VM at a time, where this process may have many descriptors. More wait in the
/// listener's backlog, as at a busy server.
const MAX_CONNECTIONS: usize = 1024;

/// Descriptors of a connection: the guest's side and the server's.
const DESCRIPTORS: usize = 2;

/// How long accepting rests when the process or the host has no descriptor or memory left: trying
/// again at once would only keep a core busy.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(100);

/// New connections of one VM in a second, after so many at once. More wait in the backlog.
const NEW_PER_SECOND: u32 = 256;
const NEW_AT_ONCE: u32 = 1024;

/// Other addresses of a name that are tried for one connection.
const MAX_OTHERS: usize = 3;

pub(super) struct Proxy {
    /// As it is now.
    policy: watch::Receiver<Arc<Policy>>,
    /// As it was before the last change.
    before: watch::Receiver<Arc<Policy>>,
    names: Arc<Names>,
    denials: Denials,
    slots: Arc<Semaphore>,
    rate: Bucket,
    traffic: Arc<Traffic>,
    /// Of a VM that has secrets.
    secrets: Option<Arc<Interceptor>>,
}

impl Proxy {
    pub(super) fn new(
        policy: watch::Receiver<Arc<Policy>>,
        before: watch::Receiver<Arc<Policy>>,
        names: Arc<Names>,
        denials: Denials,
        traffic: Arc<Traffic>,
        secrets: Option<Arc<Interceptor>>,
    ) -> Self {
        Self {
            secrets,
            policy,
            before,
            names,
            denials,
            slots: Arc::new(Semaphore::new(max_connections(descriptor_limit()))),
            rate: Bucket::new(NEW_PER_SECOND, NEW_AT_ONCE),
            traffic,
        }
    }

    pub(super) async fn serve(self: Arc<Self>, listener: TcpListener) {
        let mut connections = JoinSet::new();
        while let Ok(slot) = Arc::clone(&self.slots).acquire_owned().await {
            self.rate.take().await;
            let guest = loop {
                tokio::select! {
                    accepted = accept(&listener) => break accepted,
                    Some(_) = connections.join_next() => {}
                }
            };
            match guest {
                Ok(guest) => {
                    let Ok(share) = of_all_vms().acquire().await else {
                        return; // it is never closed
                    };
                    let proxy = Arc::clone(&self);
                    connections.spawn(async move {
                        proxy.connect(guest).await;
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

/// What a connection is judged by, as long as it lasts.
struct Judged {
    destination: SocketAddr,
    /// For which the address was given out when the connection was made.
    names: Vec<Arc<str>>,
    /// What it has begun with, once that is clear.
    begun: OnceLock<Inspection>,
}

impl Judged {
    /// Whether it is allowed, or why it is not.
    fn judge(&self, policy: &Policy) -> Result<(), Reason> {
        match policy.judge(self.destination, &self.names) {
            Verdict::Deny(reason) => Err(reason),
            Verdict::Allow(terms) => match self.begun.get() {
                Some(begun) => self.judge_begun(policy, terms, begun),
                None => Ok(()),
            },
        }
    }

    fn judge_begun(&self, policy: &Policy, terms: Terms, begun: &Inspection) -> Result<(), Reason> {
        let denied = match begun {
            Inspection::Tls(hello) => {
                let port = self.destination.port();
                policy.judge_server(terms, hello.server_name.as_deref(), port)
            }
            Inspection::Malformed if terms != Terms::Anything => Some(Reason::Tls),
            _ => None,
        };
        denied.map_or(Ok(()), Err)
    }

    /// Who is meant, for who reads about it.
    fn host(&self) -> String {
        if let Some(Inspection::Tls(ClientHello {
            server_name: Some(name),
            ..
        })) = self.begun.get()
        {
            return name.clone();
        }
        match self.names.last() {
            Some(name) => name.to_string(),
            None => self.destination.ip().to_string(),
        }
    }
}

/// A connection that is ended here, because it is to a host of a secret.
struct Intercepted {
    begun: Begun,
    judged: Judged,
    changes: watch::Receiver<Arc<Policy>>,
}

impl Proxy {
    /// Connects the guest to where it wanted, or resets it.
    async fn connect(&self, mut guest: TcpStream) {
        match self.try_connect(&mut guest).await {
            Ok(None) => {}
            Ok(Some(intercepted)) => self.intercept(guest, *intercepted).await,
            Err(error) => {
                tracing::debug!(%error, "a VM's connection ended with an error");
                // The guest's program sees a connection reset, not an orderly end of a stream.
                if let Err(error) = guest.set_zero_linger() {
                    tracing::debug!(%error, "can't reset a connection");
                }
            }
        }
    }

    /// Connects and relays; or returns a connection that is not relayed.
    async fn try_connect(&self, guest: &mut TcpStream) -> io::Result<Option<Box<Intercepted>>> {
        // Before the verdict, so that a change after it is one.
        let mut changes = self.policy.clone();
        let policy = Arc::clone(&changes.borrow_and_update());
        let judged = self.judged(original_destination(guest)?);
        if let Err(reason) = judged.judge(&policy) {
            return Err(self.deny(&judged, reason));
        }
        // What else is tried meanwhile counts as connections, too.
        let mut spare = None;
        let others = || {
            let others = self.others(&judged);
            let more = u32::try_from(others.len().div_ceil(DESCRIPTORS)).unwrap_or(u32::MAX);
            let own = self.slots.try_acquire_many(more).ok();
            spare = own.zip(of_all_vms().try_acquire_many(more).ok());
            spare.as_ref().map(|_| others).unwrap_or_default()
        };
        // As long as it takes: a program that gives up resets its side.
        let (mut server, destination) = tokio::select! {
            dialled = dial(judged.destination, others) => dialled?,
            gone = guest.ready(Interest::ERROR) => {
                gone?;
                return Err(io::ErrorKind::ConnectionReset.into());
            }
        };
        drop(spare);
        let judged = if destination == judged.destination {
            judged
        } else {
            self.judged(destination)
        };
        // Both programs have already decided what goes into one segment.
        guest.set_nodelay(true)?;
        server.set_nodelay(true)?;
        // A server that vanished without a word must not hold a connection for ever.
        setsockopt(&server, sockopt::KeepAlive, &true)?;
        let mut read = Vec::new();
        let passed = tokio::select! {
            // First: what was allowed when it was dialled may be no longer.
            biased;
            denied = self.denied_later(&judged, &mut changes) => Err(denied),
            passed = self.pass(guest, &mut server, &judged, &mut read) => passed,
        };
        match passed {
            Ok(None) => Ok(None),
            Ok(Some(hello)) => Ok(Some(Box::new(Intercepted {
                begun: Begun::new(hello, read, server, destination.port()),
                judged,
                changes,
            }))),
            Err(error) => {
                server.set_zero_linger()?;
                Err(error)
            }
        }
    }

    fn judged(&self, destination: SocketAddr) -> Judged {
        Judged {
            destination,
            names: self.names.of(destination.ip(), Instant::now()),
            begun: OnceLock::new(),
        }
    }

    /// Where else what was asked for may be: at other public addresses of its name, as far as they are allowed.
    fn others(&self, judged: &Judged) -> Vec<SocketAddr> {
        let (address, port) = (judged.destination.ip(), judged.destination.port());
        if scope(address) != Scope::Public {
            return Vec::new();
        }
        let policy = Arc::clone(&self.policy.borrow());
        let mut others = self.names.instead_of(address, Instant::now());
        others.retain(|other| scope(*other) == Scope::Public);
        // What does not answer may be all of IPv6.
        others.sort_by_key(|other| other.is_ipv6() == address.is_ipv6());
        let others = others.into_iter().map(|other| SocketAddr::new(other, port));
        let allowed = others.filter(|other| self.judged(*other).judge(&policy).is_ok());
        allowed.take(MAX_OTHERS).collect()
    }

    /// Relays to the end, unless the guest says hello to a host of a secret. `read`: what was read by then.
    async fn pass(
        &self,
        guest: &mut TcpStream,
        server: &mut TcpStream,
        judged: &Judged,
        read: &mut Vec<u8>,
    ) -> io::Result<Option<ClientHello>> {
        let judge = |begun: Inspection| {
            judged.begun.get_or_init(|| begun);
            // By the rules of this moment.
            let policy = Arc::clone(&self.policy.borrow());
            let verdict = judged.judge(&policy);
            verdict.map_err(|reason| self.deny(judged, reason))
        };
        if let Some(secrets) = &self.secrets {
            let port = judged.destination.port();
            if let Some(hello) = secrets.look(guest, server, port, read).await? {
                judge(Inspection::Tls(hello.clone()))?;
                return Ok(Some(hello));
            }
        }
        let secrets = self.secrets.as_ref();
        let mut watch = secrets.map(|secrets| secrets.watch(judged.destination));
        let see = |bytes: &[u8]| {
            if let Some(watch) = &mut watch {
                watch(bytes);
            }
        };
        let read = std::mem::take(read);
        relay(guest, server, &self.traffic, read, judge, see).await?;
        Ok(None)
    }

    async fn intercept(&self, guest: TcpStream, intercepted: Intercepted) {
        let Intercepted {
            begun,
            judged,
            mut changes,
        } = intercepted;
        let Some(secrets) = self.secrets.clone() else {
            return;
        };
        let is_denied = Arc::new(AtomicBool::new(false));
        tokio::select! {
            biased;
            // To the server, TLS that ends without a word is an error anyway.
            () = async {
                self.denied_later(&judged, &mut changes).await;
                is_denied.store(true, Ordering::Relaxed);
            } => {}
            () = secrets.serve(guest, begun, &self.traffic, &is_denied) => {}
        }
    }

    /// Waits until the connection is no longer allowed.
    async fn denied_later(
        &self,
        judged: &Judged,
        changes: &mut watch::Receiver<Arc<Policy>>,
    ) -> io::Error {
        while changes.changed().await.is_ok() {
            let policy = Arc::clone(&changes.borrow_and_update());
            if let Err(reason) = judged.judge(&policy) {
                return self.deny(judged, reason);
            }
        }
        // The VM has ended, and this task with it.
        std::future::pending().await
    }

    fn deny(&self, judged: &Judged, reason: Reason) -> io::Error {
        self.denials.report(Refused {
            host: judged.host(),
            port: judged.destination.port(),
            protocol: Protocol::Tcp,
            rule: Some(reason),
        });
        io::ErrorKind::PermissionDenied.into()
    }

    /// The VM's own rules have refused a packet.
    pub(super) fn report_packet(&self, packet: Packet) {
        let Packet {
            destination,
            protocol,
        } = packet;
        let judged = self.judged(destination);
        let denied = |policy: &watch::Receiver<Arc<Policy>>| {
            let policy = Arc::clone(&policy.borrow());
            judged.judge(&policy).err()
        };
        // It was refused some time ago, maybe by other rules.
        let reason = match (
            denied(&self.policy).or_else(|| denied(&self.before)),
            protocol,
        ) {
            (Some(reason), Protocol::Tcp)
            | (Some(reason @ (Reason::NotPublic(_) | Reason::Host)), _) => reason,
            (None, Protocol::Tcp) => Reason::Unknown,
            // No rule would let it out.
            _ => Reason::Protocol,
        };
        self.denials.report(Refused {
            host: judged.host(),
            port: destination.port(),
            protocol,
            rule: Some(reason),
        });
    }

    pub(super) fn report_lost(&self, count: u64) {
        if count > 0 {
            self.denials.report_lost(count);
        }
    }
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
