//! What a VM can reach.
//!
//! A VM has no network device but `lo`. The rules in its net namespace (`guest/src/net/`) refuse at
//! once what is never allowed and redirect the rest into sockets that PID 1 made and handed out.
//! Here they are served, in the host process and with the host's network:
//!
//! - the [`proxy`] learns where a redirected connection wanted to go, asks the [`Policy`], dials and
//!   relays;
//! - [`secrets`] ends TLS to chosen hosts on the way, and puts in what the VM must not have;
//! - [`dns`] answers names with what the host's resolvers say;
//! - the [`log`] tells what the rules refuse.
//!
//! The address that is dialled is what the policy judges, so that a name that resolves to something
//! else the second time gains nothing. An address is a name's if our own resolver has given it out for
//! that name a short while ago (`names`); who speaks TLS must name a server that is allowed as well
//! ([`hello`]). Whatever is refused is reported (`denials`).

mod address;
mod connection;
mod denials;
mod dial;
pub mod dns;
pub mod hello;
mod host_address;
pub mod log;
mod names;
mod policy;
mod proxy;
mod rate;
mod relay;
mod rules;
pub mod secrets;
mod sockets;
mod traffic;

use std::io;
use std::sync::Arc;

use agentvm_guest::net::NetSockets;
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::watch;
use tokio::task::JoinSet;

pub use self::address::Scope;
pub use self::connection::Connection;
pub use self::denials::{Denial, Protocol, Refused};
pub use self::policy::{Otherwise, Policy, Reason, Rule, Rules, Terms, Verdict};
pub use self::traffic::Traffic;

use self::secrets::Interceptor;
use crate::apart::Apart;

/// Where the networks of all VMs are served.
static APART: Apart = Apart::threads("agentvm-net");

/// The running network of one VM. Dropping it ends every connection and query.
#[derive(Debug)]
pub struct Network {
    /// Aborted with the set, and with each of them what it serves.
    servers: JoinSet<()>,
    policy: watch::Sender<Arc<Policy>>,
    /// The one before.
    before: watch::Sender<Arc<Policy>>,
    rules: Arc<rules::Rules>,
    traffic: Arc<Traffic>,
}

impl Network {
    /// Starts serving, in threads that are there for that alone.
    ///
    /// The sockets come from PID 1, which the host does not trust: anything but the expected kinds
    /// of socket is an error.
    pub fn start(
        sockets: NetSockets,
        policy: Arc<Policy>,
        denials: Option<UnboundedSender<Denial>>,
        secrets: Option<Arc<Interceptor>>,
    ) -> io::Result<Self> {
        let apart = APART.handle();
        let _in_it = apart.enter();
        let rules = rules::Rules::new(sockets.rules, sockets.tcp6.is_some())?;
        let tcp4 = sockets::listener(sockets.tcp4, sockets::V4)?;
        let tcp6 = match sockets.tcp6 {
            Some(socket) => Some(sockets::listener(socket, sockets::V6)?),
            None => None,
        };
        let dns_udp = sockets::datagram(sockets.dns_udp)?;
        let dns_tcp = sockets::listener(sockets.dns_tcp, sockets::V4)?;
        if let Some(log) = &sockets.log {
            rules::netlink(log)?;
        }

        let before = watch::Sender::new(Arc::clone(&policy));
        let policy = watch::Sender::new(policy);
        let traffic = Arc::new(Traffic::default());
        let names = Arc::new(names::Names::default());
        let denials = denials::Denials::new(denials);
        let mut servers = JoinSet::new();
        let server = Arc::new(dns::Server::new(
            policy.subscribe(),
            Arc::clone(&names),
            denials.clone(),
            Arc::clone(&traffic),
        ));
        servers.spawn(dns::serve_udp(dns_udp, Arc::clone(&server)));
        servers.spawn(dns::serve_tcp(dns_tcp, server));
        let proxy = Arc::new(proxy::Proxy::new(
            policy.subscribe(),
            before.subscribe(),
            names,
            denials,
            Arc::clone(&traffic),
            secrets,
        ));
        if let Some(log) = sockets.log {
            servers.spawn(log::serve(log, Arc::clone(&proxy)));
        }
        if let Some(tcp6) = tcp6 {
            servers.spawn(Arc::clone(&proxy).serve(tcp6));
        }
        servers.spawn(proxy.serve(tcp4));
        Ok(Self {
            servers,
            policy,
            before,
            rules: Arc::new(rules),
            traffic,
        })
    }

    /// Ends every connection and query, and returns when nobody accepts any more.
    pub async fn end(mut self) {
        self.servers.shutdown().await;
    }

    /// Puts other rules into force: for new connections and questions at once, and connections that are
    /// no longer allowed are reset. What it returns waits for the kernel: it changes what the VM's own
    /// rules refuse, which can be no more than what comes earlier than the verdict here.
    pub fn set_rules(&self, rules: Rules) -> impl FnOnce() -> io::Result<()> + Send + 'static {
        self.policy.send_modify(|policy| {
            let other = Arc::new(policy.with_rules(rules));
            self.before.send_replace(std::mem::replace(policy, other));
        });
        let (own, policy) = (Arc::clone(&self.rules), self.policy.subscribe());
        move || {
            own.change(|| {
                let latest = Arc::clone(&policy.borrow());
                latest.guest_config()
            })
        }
    }

    /// Whether this port of the VM's loopback is the host's.
    #[must_use]
    pub fn is_exempt(&self, port: u16) -> bool {
        self.policy.borrow().is_exempt(port)
    }

    /// What has gone through it so far.
    #[must_use]
    pub fn traffic(&self) -> &Traffic {
        &self.traffic
    }
}
