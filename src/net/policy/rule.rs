//! What a rule of the options `network.allow` and `network.deny` says.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use crate::net::address::{self, Block};

/// A host, or many, and their ports: `host[:port[-port]]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    pub(super) host: Host,
    /// Both ends included.
    ports: (u16, u16),
    /// As it was written.
    text: Arc<str>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Host {
    Any,
    /// In lower case, without a dot at its end.
    Name(String),
    /// What is below this name, at any depth: `.example.com`.
    Below(String),
    Block(Block),
}

const ALL_PORTS: (u16, u16) = (1, u16::MAX);

/// A name has no more (RFC 1035).
const MAX_NAME: usize = 253;
const MAX_LABEL: usize = 63;

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Rule {
    /// An error says what is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (host, ports) = split(text)?;
        Ok(Self {
            host: parse_host(host)?,
            ports: ports.map_or(Ok(ALL_PORTS), parse_ports)?,
            text: text.into(),
        })
    }

    /// Of an address or a network, not of names.
    #[must_use]
    pub const fn is_of_addresses(&self) -> bool {
        matches!(self.host, Host::Block(_))
    }

    pub(super) fn text(&self) -> Arc<str> {
        Arc::clone(&self.text)
    }

    pub(super) fn has_port(&self, port: u16) -> bool {
        let (first, last) = self.ports;
        first <= port && port <= last
    }

    pub(super) fn has_all_ports(&self) -> bool {
        self.ports == ALL_PORTS
    }

    /// Whether it is of names, of which `*` is all.
    pub(super) fn names(&self, name: &str) -> bool {
        match &self.host {
            Host::Any => true,
            Host::Name(own) => own == name,
            Host::Below(suffix) => name.len() > suffix.len() && name.ends_with(suffix.as_str()),
            Host::Block(_) => false,
        }
    }

    pub(super) const fn is_of_a_name(&self) -> bool {
        matches!(self.host, Host::Name(_) | Host::Below(_))
    }

    pub(super) const fn block(&self) -> Option<Block> {
        match self.host {
            Host::Block(block) => Some(block),
            _ => None,
        }
    }
}

/// The host, and the text of its ports.
fn split(text: &str) -> Result<(&str, Option<&str>), String> {
    if text.is_empty() {
        return Err("must not be empty".to_owned());
    }
    if text.contains("://") {
        return Err("is a URL: a rule is host[:port[-port]]".to_owned());
    }
    if let Some(rest) = text.strip_prefix('[') {
        let (host, rest) = rest.split_once(']').ok_or("has no closing bracket")?;
        if !host.contains(':') {
            return Err("has brackets, which are for IPv6 addresses".to_owned());
        }
        return match rest.strip_prefix(':') {
            Some(ports) => Ok((host, Some(ports))),
            None if rest.is_empty() => Ok((host, None)),
            None => Err(format!(
                "has {rest:?} after its bracket, where only a port may be"
            )),
        };
    }
    match text.split_once(':') {
        // An IPv6 address without brackets has no port.
        Some((_, rest)) if rest.contains(':') => Ok((text, None)),
        Some((host, ports)) => Ok((host, Some(ports))),
        None => Ok((text, None)),
    }
}

fn parse_ports(text: &str) -> Result<(u16, u16), String> {
    let port = |text: &str| {
        let digits = text.bytes().all(|byte| byte.is_ascii_digit());
        let port = text.parse::<u16>().ok().filter(|port| digits && *port > 0);
        port.ok_or_else(|| format!("has the port {text:?}, which is no number from 1 to 65535"))
    };
    let Some((first, last)) = text.split_once('-') else {
        let only = port(text)?;
        return Ok((only, only));
    };
    let (first, last) = (port(first)?, port(last)?);
    if first > last {
        return Err(format!(
            "has ports that end before they begin: {first}-{last}"
        ));
    }
    Ok((first, last))
}

fn parse_host(host: &str) -> Result<Host, String> {
    if host == "*" {
        return Ok(Host::Any);
    }
    if let Some((address, prefix)) = host.split_once('/') {
        let Ok(address) = address.parse::<IpAddr>() else {
            return Err(format!(
                "has a path, or {address:?} is no address to have a prefix"
            ));
        };
        let digits = prefix.bytes().all(|byte| byte.is_ascii_digit());
        let prefix = prefix.parse::<u32>().ok().filter(|_| digits);
        let prefix = prefix.filter(|prefix| *prefix <= address::bits(address));
        let prefix = prefix.ok_or_else(|| {
            let most = address::bits(address);
            format!("has a prefix that is no number from 0 to {most}")
        })?;
        let block = Block::new(address, prefix);
        if block.first() != address {
            let first = block.first();
            return Err(format!(
                "has bits beyond its prefix: write {first}/{prefix}"
            ));
        }
        return check_block(block).map(Host::Block);
    }
    if let Ok(address) = host.parse::<IpAddr>() {
        return check_block(Block::one(address)).map(Host::Block);
    }
    if host.contains(':') {
        return Err(format!("has {host:?}, which is no IPv6 address"));
    }
    match host.strip_prefix("*.") {
        Some(name) => Ok(Host::Below(format!(".{}", parse_name(name)?))),
        None => parse_name(host).map(Host::Name),
    }
}

/// What no rule can open, and none has to deny.
fn check_block(block: Block) -> Result<Block, String> {
    let loopback = [
        Block::new(Ipv4Addr::new(127, 0, 0, 0).into(), 8),
        Block::one(Ipv6Addr::LOCALHOST.into()),
    ];
    if loopback.iter().any(|own| own.contains_block(block)) {
        return Err(
            "is loopback: ports of the host's are opened by loopbackExemptPorts, and the VM's own \
             are always there"
                .to_owned(),
        );
    }
    if let IpAddr::V6(first) = block.first()
        && let Some(v4) = first.to_ipv4_mapped()
    {
        return Err(format!("is an IPv4 address in IPv6 form: write {v4}"));
    }
    if address::NOWHERE.iter().any(|own| own.contains_block(block)) {
        return Err("is no address that anything can be reached at".to_owned());
    }
    Ok(block)
}

fn parse_name(text: &str) -> Result<String, String> {
    if text.contains('*') {
        return Err(
            "has a * that is not all of its first label: *.example.com is what there is".to_owned(),
        );
    }
    let complete = text.strip_suffix('.').unwrap_or(text);
    // Also what IDN says.
    let name = match url::Host::parse(complete) {
        Ok(url::Host::Domain(name)) => name,
        Ok(url::Host::Ipv4(address)) => {
            return Err(format!("is an address in an unusual form: write {address}"));
        }
        Ok(url::Host::Ipv6(_)) | Err(_) => return Err("is no host name".to_owned()),
    };
    let fits = |label: &str| {
        (1..=MAX_LABEL).contains(&label.len())
            && label
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
    };
    if name.len() > MAX_NAME || !name.split('.').all(fits) {
        return Err("is no host name".to_owned());
    }
    if name == "localhost" || name.ends_with(".localhost") {
        return Err(
            "is the VM itself: ports of the host's loopback are opened by loopbackExemptPorts"
                .to_owned(),
        );
    }
    Ok(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(text: &str) -> Rule {
        Rule::parse(text).expect(text)
    }

    #[test]
    fn a_rule_is_shown_as_it_was_written() {
        for text in [
            "*",
            "*:443",
            "Example.com",
            "*.example.com:8000-8080",
            "1.2.3.4",
            "10.0.0.0/8:5432",
            "2606:4700::1",
            "[2606:4700::1]:443",
            "[2606:4700::/32]:443",
            "fc00::/7",
        ] {
            assert_eq!(rule(text).to_string(), text);
        }
    }

    #[test]
    fn names_are_compared_as_dns_does() {
        assert!(rule("API.Example.COM.").names("api.example.com"));
        assert!(!rule("example.com").names("api.example.com"));
        assert!(rule("bücher.example").names("xn--bcher-kva.example"));
        assert!(rule("*.bücher.example").names("a.b.xn--bcher-kva.example"));
        assert!(rule("_dmarc.example.com").names("_dmarc.example.com"));
    }

    #[test]
    fn a_wildcard_is_what_is_below_a_name_at_any_depth_and_not_the_name() {
        let below = rule("*.example.com");
        for (name, expected) in [
            ("a.example.com", true),
            ("a.b.example.com", true),
            ("example.com", false),
            (".example.com", false),
            ("badexample.com", false),
            ("a.example.com.evil.test", false),
        ] {
            assert_eq!(below.names(name), expected, "{name}");
        }
    }

    #[test]
    fn ports_are_one_or_a_range_or_all() {
        for (text, port, expected) in [
            ("a.test:443", 443, true),
            ("a.test:443", 80, false),
            ("a.test:80-443", 80, true),
            ("a.test:80-443", 443, true),
            ("a.test:80-443", 444, false),
            ("[2606::1]:22", 22, true),
            ("a.test", 65535, true),
        ] {
            assert_eq!(rule(text).has_port(port), expected, "{text}");
        }
    }

    #[test]
    fn a_wrong_rule_says_what_is_wrong() {
        for (text, problem) in [
            ("", "empty"),
            ("https://example.com", "URL"),
            ("example.com/path", "path"),
            ("example.com:", "port"),
            ("example.com:0", "port"),
            ("example.com:+1", "port"),
            ("example.com:65536", "port"),
            ("example.com:443-80", "end before"),
            ("*example.com", "first label"),
            ("a.*.com", "first label"),
            ("*.", "host name"),
            ("*.*", "first label"),
            ("a..b", "host name"),
            ("a b", "host name"),
            ("user@example.com", "host name"),
            ("10.0.0.1/8", "write 10.0.0.0/8"),
            ("10.0.0.0/33", "from 0 to 32"),
            ("10.0.0.0/+8", "from 0 to 32"),
            ("[::1", "bracket"),
            ("[10.0.0.1]:80", "brackets"),
            ("[2606::1]x", "after its bracket"),
            ("2606::g:1", "no IPv6"),
            ("2130706433", "write 127.0.0.1"),
            ("0x7f000001", "write 127.0.0.1"),
            ("0177.0.0.1", "write 127.0.0.1"),
            ("1.2.3", "write 1.2.0.3"),
            ("127.0.0.1:80", "loopbackExemptPorts"),
            ("127.1.0.0/16", "loopbackExemptPorts"),
            ("::1", "loopbackExemptPorts"),
            ("localhost:80", "loopbackExemptPorts"),
            ("app.localhost", "loopbackExemptPorts"),
            ("::ffff:10.0.0.1", "write 10.0.0.1"),
            ("0.0.0.0", "no address"),
            ("::", "no address"),
        ] {
            let found = Rule::parse(text).expect_err(text);
            assert!(found.contains(problem), "{text}: {found}");
        }
        let long = format!("{}.test", "a".repeat(64));
        assert!(Rule::parse(&long).is_err());
    }
}
