//! What happens to a packet that a program of the VM sends.
//!
//! One table a family, because kernels without IPv6 have no `inet` tables. In each, the filter comes
//! before the redirect, so that it sees the destination that the program asked for.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;

use super::log::GROUP;
use super::nftables::{Family, Rule, Transaction};
use super::{ADDRESS_V4, ADDRESS_V6, Failure, NetConfig, PROXY_PORT, RESOLVER};

const DENIED: &str = "denied";
const EXEMPT: &str = "exempt_ports";
const FILTER: &str = "filter_output";
const REDIRECT: &str = "redirect_output";

const DNS_PORT: u16 = 53;

/// 'mangle' of nft(8): after connection tracking (-200), before [`NAT_PRIORITY`].
const FILTER_PRIORITY: i32 = -150;
/// 'dstnat'
const NAT_PRIORITY: i32 = -100;

/// `logged`: what they refuse is told to the readers of a log. Without that, TCP is left to the proxy,
/// which tells.
pub(super) fn install_v4(config: &NetConfig, logged: bool) -> Result<(), Failure> {
    Rules {
        family: Family::V4,
        // A program may listen on any address of 127/8.
        local: [&[127], &ADDRESS_V4.octets()],
        loopback: &Ipv4Addr::LOCALHOST.octets(),
        proxy: &ADDRESS_V4.octets(),
        resolver: Some(&RESOLVER.octets()),
        exempt_ports: &config.exempt_ports,
        logged,
    }
    .install(denied_v4(config))
}

pub(super) fn install_v6(config: &NetConfig, logged: bool) -> Result<(), Failure> {
    Rules {
        family: Family::V6,
        local: [&Ipv6Addr::LOCALHOST.octets(), &ADDRESS_V6.octets()],
        loopback: &Ipv6Addr::LOCALHOST.octets(),
        proxy: &ADDRESS_V6.octets(),
        resolver: None,
        exempt_ports: &config.exempt_ports,
        logged,
    }
    .install(denied_v6(config))
}

/// Makes others the destinations that installed rules refuse.
pub(super) fn change(socket: &OwnedFd, config: &NetConfig, v6: bool) -> Result<(), Failure> {
    let mut transaction = Transaction::of_existing(Family::V4);
    transaction.refill(DENIED, denied_v4(config));
    transaction.commit_over(socket)?;
    if v6 {
        let mut transaction = Transaction::of_existing(Family::V6);
        transaction.refill(DENIED, denied_v6(config));
        transaction.commit_over(socket)?;
    }
    Ok(())
}

fn denied_v4(config: &NetConfig) -> impl Iterator<Item = (Vec<u8>, Option<Vec<u8>>)> {
    config.denied_v4.iter().map(|range| {
        let after = range.last.to_bits().checked_add(1);
        let after = after.map(|after| after.to_be_bytes().to_vec());
        (range.first.octets().to_vec(), after)
    })
}

fn denied_v6(config: &NetConfig) -> impl Iterator<Item = (Vec<u8>, Option<Vec<u8>>)> {
    config.denied_v6.iter().map(|range| {
        let after = range.last.to_bits().checked_add(1);
        let after = after.map(|after| after.to_be_bytes().to_vec());
        (range.first.octets().to_vec(), after)
    })
}

struct Rules<'a> {
    family: Family,
    /// Addresses, or prefixes of them, that stay inside.
    local: [&'a [u8]; 2],
    loopback: &'a [u8],
    proxy: &'a [u8],
    /// Gets the queries to whatever resolver a program asks. Without one of this family they are
    /// refused like other UDP, and programs go on to the resolver of `resolv.conf`.
    resolver: Option<&'a [u8]>,
    exempt_ports: &'a [u16],
    logged: bool,
}

impl Rules<'_> {
    fn install(
        &self,
        denied: impl Iterator<Item = (Vec<u8>, Option<Vec<u8>>)>,
    ) -> Result<(), Failure> {
        let mut transaction = Transaction::new(self.family);
        transaction.address_set(DENIED, denied);
        transaction.port_set(EXEMPT, self.exempt_ports);
        transaction.output_chain(FILTER, "filter", FILTER_PRIORITY);
        for rule in self.filter() {
            transaction.rule(FILTER, &rule);
        }
        transaction.output_chain(REDIRECT, "nat", NAT_PRIORITY);
        for rule in self.redirect() {
            transaction.rule(REDIRECT, &rule);
        }
        transaction.commit()
    }

    /// Refuses at once what never leaves. A redirected connection, in contrast, is established
    /// before anybody knows whether it leads anywhere.
    fn filter(&self) -> Vec<Rule> {
        let mut rules = vec![self.rule().of_known_connection().accept()];
        rules.extend(self.local.map(|local| self.rule().to(local).accept()));
        if self.resolver.is_some() {
            rules.push(self.rule().udp().port(DNS_PORT).accept());
            rules.push(self.rule().tcp().port(DNS_PORT).accept());
        }
        if self.logged {
            rules.push(self.rule().tcp().any_of(DENIED).log(GROUP).reset());
        }
        rules.push(self.rule().tcp().accept());
        let other = if self.logged {
            self.rule().log(GROUP)
        } else {
            self.rule()
        };
        rules.push(other.unreachable());
        rules
    }

    /// Sees the first packet of each connection that the filter let through.
    fn redirect(&self) -> Vec<Rule> {
        let proxy = (self.proxy, PROXY_PORT);
        let exempt = self.rule().to(self.loopback).tcp().port_any_of(EXEMPT);
        let mut rules = vec![exempt.redirect(proxy)];
        rules.extend(self.local.map(|local| self.rule().to(local).accept()));
        if let Some(address) = self.resolver {
            let resolver = (address, DNS_PORT);
            rules.push(self.rule().udp().port(DNS_PORT).redirect(resolver));
            rules.push(self.rule().tcp().port(DNS_PORT).redirect(resolver));
        }
        rules.push(self.rule().tcp().redirect(proxy));
        rules
    }

    const fn rule(&self) -> Rule {
        Rule::new(self.family)
    }
}
