//! What a VM can reach.
//!
//! A VM has no network device but `lo`. The rules in its net namespace (`guest/src/net/`) refuse at
//! once what is never allowed and redirect the rest into sockets that PID 1 made and handed out.
//! Here they are served, in the host process and with the host's network:
//!
//! - the [`proxy`] learns where a redirected connection wanted to go, asks the [`Policy`], dials and
//!   relays;
//! - [`dns`] answers names with what the host's resolvers say.
//!
//! The address that is dialled is what the policy judges, so that a name that resolves to something
//! else the second time gains nothing.

mod address;
mod connection;
pub mod dns;
mod host_address;
mod policy;
mod proxy;
mod relay;
mod sockets;
mod traffic;

use std::io;
use std::sync::Arc;

use agentvm_guest::net::NetSockets;
use tokio::task::JoinSet;

pub use self::address::Scope;
pub use self::connection::Connection;
pub use self::policy::{Policy, Rule, Verdict};
pub use self::traffic::Traffic;

/// The running network of one VM. Dropping it ends every connection and query.
#[derive(Debug)]
pub struct Network {
    /// Aborted with the set, and with each of them what it serves.
    _servers: JoinSet<()>,
    policy: Arc<Policy>,
    traffic: Arc<Traffic>,
}

impl Network {
    /// Starts serving. To be called in the runtime that serves.
    ///
    /// The sockets come from PID 1, which the host does not trust: anything but the expected kinds
    /// of socket is an error.
    pub fn start(sockets: NetSockets, policy: Arc<Policy>) -> io::Result<Self> {
        let tcp4 = sockets::listener(sockets.tcp4, sockets::V4)?;
        let tcp6 = match sockets.tcp6 {
            Some(socket) => Some(sockets::listener(socket, sockets::V6)?),
            None => None,
        };
        let dns_udp = sockets::datagram(sockets.dns_udp)?;
        let dns_tcp = sockets::listener(sockets.dns_tcp, sockets::V4)?;

        let traffic = Arc::new(Traffic::default());
        let mut servers = JoinSet::new();
        let proxy = proxy::Proxy::new(Arc::clone(&policy), Arc::clone(&traffic));
        if let Some(tcp6) = tcp6 {
            servers.spawn(proxy.clone().serve(tcp6));
        }
        servers.spawn(proxy.serve(tcp4));
        let server = Arc::new(dns::Server::new(Arc::clone(&traffic)));
        servers.spawn(dns::serve_udp(dns_udp, Arc::clone(&server)));
        servers.spawn(dns::serve_tcp(dns_tcp, server));
        Ok(Self {
            _servers: servers,
            policy,
            traffic,
        })
    }

    /// Whether this port of the VM's loopback is the host's.
    #[must_use]
    pub fn is_exempt(&self, port: u16) -> bool {
        self.policy.is_exempt(port)
    }

    /// What has gone through it so far.
    #[must_use]
    pub fn traffic(&self) -> &Traffic {
        &self.traffic
    }
}
