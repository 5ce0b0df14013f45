//! What a VM may connect to.

mod rule;

use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use agentvm_guest::net::NetConfig;

use self::rule::Host;
pub use self::rule::Rule;
use super::address::{Block, Denied, Scope, embedded_v4, is_nowhere, lies_inside, scope};
use super::host_address;

/// What holds for what no rule speaks of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Otherwise {
    /// The public internet may be reached.
    #[default]
    Public,
    /// Nothing may.
    None,
    /// Only what is allowed by a rule may.
    Allowlist,
}

/// The option `network`. Deny comes before allow, and allow before the default.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Rules {
    pub otherwise: Otherwise,
    pub allow: Vec<Rule>,
    pub deny: Vec<Rule>,
}

/// The network options of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Policy {
    loopback_exempt_ports: BTreeSet<u16>,
    rules: Rules,
}

/// What the policy says about a destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    Allow(Terms),
    Deny(Reason),
}

/// What a connection that begins with TLS has to name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Terms {
    /// Nothing.
    Anything,
    /// Whatever is not denied.
    NotDenied,
    /// A name that is allowed.
    Allowed,
}

/// Why something is denied.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Reason {
    /// By this rule.
    Rule(Arc<str>),
    /// No rule allows it, and one has to.
    Allowlist,
    /// Nothing is allowed.
    Nothing,
    /// It is not the public internet.
    NotPublic(Scope),
    /// It is an address of the host.
    Host,
    /// It begins like TLS, and for which server can't be read.
    Tls,
    /// Only TCP leaves a VM.
    Protocol,
    /// What it is could not be found out (no descriptors left, for example).
    Unknown,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Rule(text) => text,
            Self::Allowlist => "allowlist",
            Self::Nothing => "none",
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
            Self::Tls => "tls",
            Self::Protocol => "protocol",
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
            rules: Rules::default(),
        }
    }

    /// The same ports under other rules.
    #[must_use]
    pub fn with_rules(&self, rules: Rules) -> Self {
        Self {
            loopback_exempt_ports: self.loopback_exempt_ports.clone(),
            rules,
        }
    }

    #[must_use]
    pub const fn rules(&self) -> &Rules {
        &self.rules
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
        let Rules {
            otherwise,
            allow,
            deny,
        } = &self.rules;
        let by_name = allow
            .iter()
            .any(|rule| rule.is_of_a_name() || rule.host == Host::Any);
        let all = match otherwise {
            Otherwise::Public => false,
            Otherwise::None => true,
            // What a name leads to is known only when it is asked for.
            Otherwise::Allowlist => !by_name,
        };
        let denied = Denied {
            all: all
                || deny
                    .iter()
                    .any(|rule| rule.host == Host::Any && rule.has_all_ports()),
            open: allow.iter().filter_map(Rule::block).collect(),
            also: deny
                .iter()
                .filter(|rule| rule.has_all_ports())
                .filter_map(Rule::block)
                .chain(
                    host.into_iter()
                        .filter(|address| !self.names_exactly(*address, |_| true))
                        .map(Block::one),
                )
                .collect(),
        };
        let (denied_v4, denied_v6) = denied.ranges();
        NetConfig {
            exempt_ports: self.loopback_exempt_ports.iter().copied().collect(),
            denied_v4,
            denied_v6,
        }
    }

    /// Whether this address may be dialled now by who got it as the address of `names`.
    #[must_use]
    pub fn judge<N: AsRef<str>>(&self, destination: SocketAddr, names: &[N]) -> Verdict {
        let (address, port) = (destination.ip(), destination.port());
        // Exactly these two: the guest's rules exempt no other address of 127/8.
        if is_localhost(address) && self.is_exempt(port) {
            return Verdict::Allow(Terms::Anything);
        }
        match self.judge_by_rules(address, port, names) {
            Verdict::Allow(terms) => self.judge_by_host(destination, terms),
            denied @ Verdict::Deny(_) => denied,
        }
    }

    fn judge_by_rules<N: AsRef<str>>(&self, address: IpAddr, port: u16, names: &[N]) -> Verdict {
        let scope = scope(address);
        if scope == Scope::Loopback || is_nowhere(address) {
            return Verdict::Deny(Reason::NotPublic(scope));
        }
        if let Some(rule) = self.denied_address(address, port) {
            return Verdict::Deny(Reason::Rule(rule.text()));
        }
        let Rules {
            otherwise, allow, ..
        } = &self.rules;
        let by_address = allow
            .iter()
            .any(|rule| rule.has_port(port) && rule.opens(address));
        if !by_address && scope != Scope::Public {
            return Verdict::Deny(Reason::NotPublic(scope));
        }
        let any = || {
            let any = |rule: &Rule| rule.host == Host::Any && rule.has_port(port);
            allow.iter().any(any)
        };
        let by_name = match otherwise {
            _ if by_address => false,
            Otherwise::Public => false,
            Otherwise::None => return Verdict::Deny(Reason::Nothing),
            Otherwise::Allowlist => !any(),
        };
        if by_name {
            let judged = names
                .iter()
                .map(|name| self.judge_name_at(name.as_ref(), port));
            let mut reason = Reason::Allowlist;
            for judged in judged {
                match judged {
                    None => return Verdict::Allow(Terms::Allowed),
                    Some(denied) => reason = denied,
                }
            }
            return Verdict::Deny(reason);
        }
        // An address that is known only as that of denied names is theirs. The last one is told.
        let denied: Option<Vec<_>> = names
            .iter()
            .map(|name| self.denied_name(name.as_ref(), port))
            .collect();
        if let Some(rule) = denied.as_deref().and_then(<[_]>::last) {
            return Verdict::Deny(Reason::Rule(rule.text()));
        }
        let looks = self.rules.deny.iter().any(Rule::is_of_a_name);
        Verdict::Allow(if looks {
            Terms::NotDenied
        } else {
            Terms::Anything
        })
    }

    /// An address of the host is opened by nothing but a rule of exactly this address, for its ports.
    fn judge_by_host(&self, destination: SocketAddr, terms: Terms) -> Verdict {
        let address = destination.ip();
        if self.names_exactly(address, |rule| rule.has_port(destination.port())) {
            return Verdict::Allow(terms);
        }
        match host_address::is_ours(address) {
            Ok(false) => Verdict::Allow(terms),
            Ok(true) => Verdict::Deny(Reason::Host),
            Err(error) => {
                tracing::warn!(%address, %error, "can't tell where an address leads");
                Verdict::Deny(Reason::Unknown)
            }
        }
    }

    /// What a connection has said in TLS that it is for.
    pub(super) fn judge_server(
        &self,
        terms: Terms,
        server_name: Option<&str>,
        port: u16,
    ) -> Option<Reason> {
        match (terms, server_name) {
            (Terms::Anything, _) | (Terms::NotDenied, None) => None,
            (Terms::NotDenied, Some(name)) => {
                let denied = self.denied_name(name, port)?;
                Some(Reason::Rule(denied.text()))
            }
            (Terms::Allowed, Some(name)) => self.judge_name_at(name, port),
            // Nobody says which of the names it is for.
            (Terms::Allowed, None) => Some(Reason::Tls),
        }
    }

    /// Why a name is not to be asked for at all. `None`: it may be, for some port.
    #[must_use]
    pub fn judge_name(&self, name: &str) -> Option<Reason> {
        let Rules {
            otherwise,
            allow,
            deny,
        } = &self.rules;
        let denied = deny
            .iter()
            .find(|rule| rule.has_all_ports() && rule.names(name));
        if let Some(rule) = denied {
            return Some(Reason::Rule(rule.text()));
        }
        match otherwise {
            Otherwise::Public => None,
            Otherwise::None => Some(Reason::Nothing),
            Otherwise::Allowlist if allow.iter().any(|rule| rule.names(name)) => None,
            Otherwise::Allowlist => Some(Reason::Allowlist),
        }
    }

    /// The rule that a name on the way to an answer is denied by.
    pub(super) fn denied_alias(&self, name: &str) -> Option<Reason> {
        let mut deny = self.rules.deny.iter();
        let denied = deny.find(|rule| rule.has_all_ports() && rule.names(name))?;
        Some(Reason::Rule(denied.text()))
    }

    /// Why an address is of no use to the VM, on whatever port.
    pub(super) fn denied_answer(&self, address: IpAddr) -> Option<Reason> {
        let mut allow = self.rules.allow.iter();
        let scope = scope(address);
        let nowhere = scope == Scope::Loopback || is_nowhere(address);
        if nowhere || scope != Scope::Public && !allow.any(|rule| rule.opens(address)) {
            return Some(Reason::NotPublic(scope));
        }
        let mut deny = self.rules.deny.iter();
        let denied = deny.find(|rule| rule.has_all_ports() && rule.covers(address))?;
        Some(Reason::Rule(denied.text()))
    }

    /// `None`: it is allowed by a rule, on this port.
    fn judge_name_at(&self, name: &str, port: u16) -> Option<Reason> {
        if let Some(rule) = self.denied_name(name, port) {
            return Some(Reason::Rule(rule.text()));
        }
        let mut allow = self.rules.allow.iter();
        let allowed = allow.any(|rule| rule.has_port(port) && rule.names(name));
        (!allowed).then_some(Reason::Allowlist)
    }

    fn denied_name(&self, name: &str, port: u16) -> Option<&Rule> {
        let mut deny = self.rules.deny.iter();
        deny.find(|rule| rule.has_port(port) && rule.names(name))
    }

    fn denied_address(&self, address: IpAddr, port: u16) -> Option<&Rule> {
        let mut deny = self.rules.deny.iter();
        deny.find(|rule| rule.has_port(port) && (rule.host == Host::Any || rule.covers(address)))
    }

    /// Whether one of some rules is of exactly this address, also by its NAT64 name.
    fn names_exactly(&self, address: IpAddr, is_one: impl Fn(&Rule) -> bool) -> bool {
        let exactly = [Some(address), embedded_v4(address).map(IpAddr::from)];
        let mut exactly = exactly.into_iter().flatten().map(Block::one);
        exactly.any(|block| {
            let mut allow = self.rules.allow.iter();
            allow.any(|rule| rule.block() == Some(block) && is_one(rule))
        })
    }
}

impl Rule {
    /// Whether it is of this address, also by its NAT64 name.
    fn covers(&self, address: IpAddr) -> bool {
        self.block().is_some_and(|block| {
            block.contains(address)
                || embedded_v4(address).is_some_and(|v4| block.contains(v4.into()))
        })
    }

    /// The same for what is to be allowed. What is not public is opened by a network that is not public
    /// as a whole: 0.0.0.0/0 is the internet, and no metadata service.
    fn opens(&self, address: IpAddr) -> bool {
        self.block().is_some_and(|block| match scope(address) {
            Scope::Public => self.covers(address),
            _ => block.contains(address) && lies_inside(block),
        })
    }
}

/// 127.0.0.1 or `::1`.
fn is_localhost(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address == Ipv4Addr::LOCALHOST,
        IpAddr::V6(address) => address == Ipv6Addr::LOCALHOST,
    }
}

#[cfg(test)]
mod tests;
