//! What a VM may connect to.

use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, SocketAddr};

use agentvm_guest::net::NetConfig;

use super::address::{Scope, not_public_v4, not_public_v6, scope};
use super::host_address;

/// The network options of a VM: the public internet, and chosen ports of the host's loopback.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    loopback_exempt_ports: BTreeSet<u16>,
}

/// What the policy says about a destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Allow,
    Deny(Rule),
}

/// Why a destination is denied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// It is not the public internet.
    NotPublic(Scope),
    /// It is an address of the host.
    Host,
    /// What it is could not be found out (no descriptors left, for example).
    Unknown,
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotPublic(Scope::Public) => "public",
            Self::NotPublic(Scope::Loopback) => "loopback",
            Self::NotPublic(Scope::Private) => "private",
            Self::NotPublic(Scope::Shared) => "shared",
            Self::NotPublic(Scope::LinkLocal) => "link-local",
            Self::NotPublic(Scope::Metadata) => "metadata",
            Self::NotPublic(Scope::Multicast) => "multicast",
            Self::NotPublic(Scope::Documentation) => "documentation",
            Self::NotPublic(Scope::Reserved) => "reserved",
            Self::Host => "host",
            Self::Unknown => "unknown",
        })
    }
}

impl Policy {
    /// The public internet, and these ports of the host's 127.0.0.1 and `::1`.
    #[must_use]
    pub fn new(loopback_exempt_ports: &[u16]) -> Self {
        Self {
            loopback_exempt_ports: loopback_exempt_ports.iter().copied().collect(),
        }
    }

    pub(super) fn is_exempt(&self, port: u16) -> bool {
        self.loopback_exempt_ports.contains(&port)
    }

    /// The part that the VM's own rules refuse at once. What they let through is judged here again
    /// when it is dialled.
    #[must_use]
    pub fn guest_config(&self) -> NetConfig {
        // Without the host's addresses the refusal only comes a little later, from `judge`.
        let host = host_address::all().unwrap_or_else(|error| {
            tracing::warn!(%error, "can't list the host's addresses");
            Vec::new()
        });
        let denied_v4 = not_public_v4(host.iter().filter_map(|address| match address {
            IpAddr::V4(address) => Some(*address),
            IpAddr::V6(_) => None,
        }));
        let denied_v6 = not_public_v6(
            host.iter().filter_map(|address| match address {
                IpAddr::V4(_) => None,
                IpAddr::V6(address) => Some(*address),
            }),
            &denied_v4,
        );
        NetConfig {
            exempt_ports: self.loopback_exempt_ports.iter().copied().collect(),
            denied_v4,
            denied_v6,
        }
    }

    /// Whether this address may be dialled now.
    #[must_use]
    pub fn judge(&self, destination: SocketAddr) -> Verdict {
        let address = destination.ip();
        // Exactly these two: the guest's rules exempt no other address of 127/8.
        let exempt = is_localhost(address) && self.is_exempt(destination.port());
        match scope(address) {
            Scope::Loopback if exempt => Verdict::Allow,
            Scope::Public => match host_address::is_ours(address) {
                Ok(false) => Verdict::Allow,
                Ok(true) => Verdict::Deny(Rule::Host),
                Err(error) => {
                    tracing::warn!(%destination, %error, "can't tell where an address leads");
                    Verdict::Deny(Rule::Unknown)
                }
            },
            scope => Verdict::Deny(Rule::NotPublic(scope)),
        }
    }
}

/// 127.0.0.1 or `::1`.
fn is_localhost(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address == std::net::Ipv4Addr::LOCALHOST,
        IpAddr::V6(address) => address == std::net::Ipv6Addr::LOCALHOST,
    }
}

/// Reports a refusal. Users will see it as the event `networkDenied`.
pub(super) fn denied(host: &dyn fmt::Display, port: u16, rule: Rule) {
    tracing::info!(%host, port, %rule, "network access denied");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judge(policy: &Policy, destination: &str) -> Verdict {
        policy.judge(destination.parse().expect("an address with a port"))
    }

    #[test]
    fn only_exempt_ports_of_loopback_are_allowed() {
        let policy = Policy::new(&[8080]);
        let loopback = Verdict::Deny(Rule::NotPublic(Scope::Loopback));
        assert_eq!(judge(&policy, "127.0.0.1:8080"), Verdict::Allow);
        assert_eq!(judge(&policy, "[::1]:8080"), Verdict::Allow);
        assert_eq!(judge(&policy, "127.0.0.1:8081"), loopback);
        assert_eq!(judge(&policy, "[::1]:8081"), loopback);
        assert_eq!(judge(&policy, "127.0.0.2:8080"), loopback);
    }

    #[test]
    fn an_exempt_port_opens_no_other_address() {
        let policy = Policy::new(&[80]);
        for destination in ["10.0.0.1:80", "169.254.169.254:80", "[::ffff:127.0.0.1]:80"] {
            assert!(
                matches!(judge(&policy, destination), Verdict::Deny(_)),
                "{destination}"
            );
        }
    }

    #[test]
    fn public_addresses_are_allowed() {
        let policy = Policy::new(&[]);
        assert_eq!(judge(&policy, "1.2.3.4:443"), Verdict::Allow);
        assert_eq!(judge(&policy, "[2606:4700::1]:443"), Verdict::Allow);
    }
}
