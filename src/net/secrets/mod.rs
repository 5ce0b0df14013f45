//! Secrets that a VM uses and never has.
//!
//! Programs in the VM have a placeholder for each. A TLS connection to a host of a secret is ended here,
//! by an [`Authority`] that only this VM trusts, and goes on in another one that is verified as any
//! client does; in the requests between the two, placeholders become values, in the headers and query
//! parameters that the secret names and nowhere else. Every other connection is relayed as it is.
//!
//! Whether a connection is ended here is decided by the server name that its client asks for, not by
//! its address: who asks for another name, or for none, has a placeholder that is worth nothing.

mod authority;
pub mod fuzzed;
mod http;
mod lingering;
mod placeholder;
mod replace;
mod secret;
mod sightings;
mod stream;
mod upstream;

use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, PoisonError, RwLock};

use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use self::authority::Authority;
use self::replace::Bound;
use self::stream::Guest;
use self::upstream::Upstream;
use super::Traffic;
use super::hello::{ClientHello, Hello, Inspection};
use crate::apart::Apart;
use crate::closing::reset;

pub use self::placeholder::PlaceholderKey;
pub use self::secret::{Secret, SecretOptions, Secrets, Wrong};
pub use self::sightings::{Misdirected, Place, Sightings};

/// Of a `ClientHello`, with post-quantum keys.
const USUAL_HELLO: usize = 2048;

/// What is looked at of a connection that is not ended here.
const LOOKED_AT: usize = 64 * 1024;

/// Connections of a VM to hosts of its secrets at once. Each has memory of this process for what is in
/// flight.
const MAX_CONNECTIONS: usize = 128;

/// Stands between one running VM and the hosts of its secrets.
pub struct Interceptor {
    key: PlaceholderKey,
    bound: RwLock<Arc<Bound>>,
    authority: Authority,
    upstream: Upstream,
    sightings: Arc<Sightings>,
    connections: Semaphore,
    /// Where connections to hosts of secrets are served: what a program sends there takes time from its own VM.
    apart: Apart,
}

/// A TLS connection to a host of a secret that has just begun.
pub(super) struct Begun {
    hello: ClientHello,
    /// What was read of the guest's side.
    read: Vec<u8>,
    server: TcpStream,
    port: u16,
}

impl Begun {
    pub(super) fn new(hello: ClientHello, read: Vec<u8>, server: TcpStream, port: u16) -> Self {
        Self {
            hello,
            read,
            server,
            port,
        }
    }
}

impl Interceptor {
    pub fn new(secrets: &Secrets, key: PlaceholderKey) -> io::Result<Self> {
        Ok(Self {
            bound: RwLock::new(Arc::new(Bound::new(&secrets.get(), &key))),
            key,
            authority: Authority::new().map_err(io::Error::other)?,
            upstream: Upstream::default(),
            sightings: Arc::default(),
            connections: Semaphore::new(MAX_CONNECTIONS),
            apart: Apart::thread("agentvm-secrets"),
        })
    }

    /// Holds for requests from now on. Placeholders of a name stay what they are.
    pub fn set(&self, secrets: &Secrets) {
        let bound = Arc::new(Bound::new(&secrets.get(), &self.key));
        *self.bound.write().unwrap_or_else(PoisonError::into_inner) = bound;
    }

    /// What programs of the VM have instead of the values.
    #[must_use]
    pub fn placeholders(&self) -> Vec<(String, String)> {
        self.bound().placeholders()
    }

    /// Whom the VM has to trust, as PEM.
    #[must_use]
    pub fn authority(&self) -> &str {
        self.authority.pem()
    }

    /// Where placeholders were seen that they are not for.
    #[must_use]
    pub fn sightings(&self) -> &Arc<Sightings> {
        &self.sightings
    }

    fn bound(&self) -> Arc<Bound> {
        let bound = self.bound.read().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(&bound)
    }

    /// Reads of `guest` until it is clear whether this is TLS to a host of a secret: then what it says. A
    /// server that speaks first has its way at once: it is none.
    pub(super) async fn look(
        &self,
        guest: &mut TcpStream,
        server: &TcpStream,
        port: u16,
        read: &mut Vec<u8>,
    ) -> io::Result<Option<ClientHello>> {
        if !self.bound().has_host_at(port) {
            return Ok(None);
        }
        read.reserve(USUAL_HELLO);
        let mut hello = Hello::default();
        loop {
            let before = read.len();
            tokio::select! {
                count = guest.read_buf(read) => if count? == 0 {
                    return Ok(None);
                },
                ready = server.readable() => {
                    ready?;
                    return Ok(None);
                }
            }
            match hello.push(read.get(before..).unwrap_or_default()) {
                Inspection::Incomplete => {}
                Inspection::Tls(hello) if self.is_host(hello, port) => {
                    return Ok(Some(hello.clone()));
                }
                _ => return Ok(None),
            }
        }
    }

    fn is_host(&self, hello: &ClientHello, port: u16) -> bool {
        let name = hello.server_name.as_deref();
        name.is_some_and(|name| self.bound().is_host(name, port))
    }

    /// Looks for placeholders in what a VM sends over a connection that is relayed.
    pub(super) fn watch(self: &Arc<Self>, address: std::net::SocketAddr) -> impl FnMut(&[u8]) {
        let (own, mut left) = (Arc::clone(self), LOOKED_AT);
        move |bytes| {
            let bytes = &bytes[..bytes.len().min(left)];
            left -= bytes.len();
            if bytes.is_empty() {
                return;
            }
            for secret in own.bound().seen_in(bytes) {
                let host = replace::host_header(bytes).unwrap_or_else(|| address.ip().to_string());
                own.sightings
                    .add(secret, host, address.port(), Place::Plaintext);
            }
        }
    }

    /// Ends the guest's connection here and goes on in one of its own, until both have ended. Dropped once
    /// that is `denied`, it resets the guest's.
    pub(super) async fn serve(
        self: Arc<Self>,
        guest: TcpStream,
        begun: Begun,
        traffic: &Arc<Traffic>,
        denied: &Arc<AtomicBool>,
    ) {
        let Begun {
            hello,
            read,
            server,
            port,
        } = begun;
        let name = hello.server_name.clone().unwrap_or_default();
        let own = Arc::clone(&self);
        let Ok(_counted) = own.connections.try_acquire() else {
            tracing::debug!(%name, "too many connections to hosts of secrets: one is reset");
            reset(guest.as_fd());
            return;
        };
        let apart = own.apart.handle();
        let streams = {
            // Here they wake that runtime.
            let _in_it = apart.enter();
            let moved = |stream: TcpStream| TcpStream::from_std(stream.into_std()?);
            moved(guest).and_then(|guest| Ok((guest, moved(server)?)))
        };
        let served = match streams {
            Ok((guest, server)) => {
                let guest = Guest::new(guest, read, Arc::clone(traffic), Arc::clone(denied));
                // Dropped with this future.
                let mut serving = JoinSet::new();
                serving.spawn_on(http::serve(self, guest, server, hello, port), &apart);
                let served = serving.join_next().await;
                served.map_or(Ok(()), |ended| {
                    ended.unwrap_or_else(|error| Err(error.into()))
                })
            }
            Err(error) => Err(error),
        };
        if let Err(error) = served {
            tracing::debug!(%error, %name, "a connection to a host of a secret ended with an error");
        }
    }
}

impl fmt::Debug for Interceptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Interceptor").finish_non_exhaustive()
    }
}
