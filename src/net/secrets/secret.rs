//! A secret as its owner describes it, parsed once.

use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};

use hyper::header::{HeaderName, HeaderValue};
use rustls::pki_types::DnsName;
use url::Host as UrlHost;
use zeroize::Zeroizing;

/// Where a key usually is: for most services, for Anthropic, for Google.
const DEFAULT_HEADERS: [&str; 3] = ["authorization", "x-api-key", "x-goog-api-key"];

/// What decides where a request goes and how long it is.
const NEVER: [&str; 9] = [
    "connection",
    "content-length",
    "expect",
    "host",
    "keep-alive",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

const HTTPS: u16 = 443;

/// Of a VM.
const MAX_SECRETS: usize = 64;

/// What servers take as a header is less.
const MAX_VALUE: usize = 32 * 1024;

/// A shorter one could be met by chance.
const MIN_PLACEHOLDER: usize = 16;
const MAX_PLACEHOLDER: usize = 256;

/// What is wrong with a secret, without its value.
#[derive(Debug, PartialEq, Eq)]
pub struct Wrong {
    /// As `KEY.hosts[0]`.
    pub field: String,
    pub problem: &'static str,
}

/// No program would work with a placeholder in these, or it would not trust the VM's authority.
const RESERVED: [&str; 15] = [
    "PATH",
    "HOME",
    "USER",
    "LOGNAME",
    "SHELL",
    "PWD",
    "TMPDIR",
    "LANG",
    "NODE_OPTIONS",
    "NODE_EXTRA_CA_CERTS",
    "SSL_CERT_FILE",
    "GIT_SSL_CAINFO",
    "REQUESTS_CA_BUNDLE",
    "CARGO_HTTP_CAINFO",
    "DENO_CERT",
];

/// What [`Secret::new`] takes.
pub struct SecretOptions {
    pub value: Zeroizing<String>,
    pub hosts: Vec<String>,
    pub headers: Option<Vec<String>>,
    pub query: Vec<String>,
    pub placeholder: Option<String>,
}

/// A value, and where it may go.
pub struct Secret {
    pub(super) name: String,
    pub(super) value: Zeroizing<String>,
    pub(super) hosts: Vec<Host>,
    pub(super) headers: Vec<HeaderName>,
    pub(super) query: Vec<String>,
    pub(super) placeholder: Option<String>,
}

impl Secret {
    /// `name`: of the environment variable that has the placeholder.
    pub fn new(name: &str, options: SecretOptions) -> Result<Self, Wrong> {
        let wrong = |field: &str, problem| {
            Err(Wrong {
                field: format!("{name}{field}"),
                problem,
            })
        };
        // Any other is lost in a shell.
        let begins = name.starts_with(|first: char| first.is_ascii_alphabetic() || first == '_');
        let is_of_name = |letter: char| letter.is_ascii_alphanumeric() || letter == '_';
        if !begins || !name.chars().all(is_of_name) {
            let problem = "is no name of an environment variable: it has ASCII letters, digits and _, \
                           and begins with none of the digits";
            return wrong("", problem);
        }
        if RESERVED.contains(&name) || name.starts_with("LD_") {
            return wrong("", "is a variable that programs need for something else");
        }
        let value = options.value;
        if value.is_empty() {
            return wrong(".value", "must not be empty");
        }
        if value.len() > MAX_VALUE {
            return wrong(".value", "must have 32 KiB at most");
        }
        if !value.is_ascii()
            || HeaderValue::from_str(&value).is_err()
            || value.trim().len() != value.len()
        {
            return wrong(
                ".value",
                "must be text that can stand in a header: ASCII, without line breaks, without space at \
                 its start and end",
            );
        }
        if options.hosts.is_empty() {
            return wrong(
                ".hosts",
                "must name the hosts that get the value, one at least",
            );
        }
        let mut hosts = Vec::new();
        for (index, host) in options.hosts.iter().enumerate() {
            match Host::parse(host) {
                Ok(host) => hosts.push(host),
                Err(problem) => return wrong(&format!(".hosts[{index}]"), problem),
            }
        }
        let names = options
            .headers
            .unwrap_or_else(|| DEFAULT_HEADERS.map(str::to_owned).to_vec());
        let mut headers = Vec::new();
        for (index, header) in names.iter().enumerate() {
            let field = format!(".headers[{index}]");
            match HeaderName::from_bytes(header.as_bytes()) {
                Ok(header) if NEVER.contains(&header.as_str()) => {
                    return wrong(&field, "is a header of the connection, which has no secret");
                }
                Ok(header) => headers.push(header),
                Err(_) => return wrong(&field, "is not a name of a header"),
            }
        }
        if let Some(index) = options.query.iter().position(String::is_empty) {
            let field = format!(".query[{index}]");
            return wrong(&field, "is not a name of a query parameter");
        }
        if headers.is_empty() && options.query.is_empty() {
            return wrong(
                ".headers",
                "must name a header, where query names no parameter either",
            );
        }
        if let Some(placeholder) = &options.placeholder {
            let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
            if !placeholder.bytes().all(is_plain)
                || !(MIN_PLACEHOLDER..=MAX_PLACEHOLDER).contains(&placeholder.len())
            {
                return wrong(
                    ".placeholder",
                    "must have 16 to 256 letters, digits, \"-\", \".\", \"_\" or \"~\"",
                );
            }
        }
        Ok(Self {
            name: name.to_owned(),
            value,
            hosts,
            headers,
            query: options.query,
            placeholder: options.placeholder,
        })
    }

    pub(super) fn is_for(&self, name: &str, port: u16) -> bool {
        self.hosts.iter().any(|host| host.is(name, port))
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Secret")
            .field("name", &self.name)
            .field("hosts", &self.hosts)
            .finish_non_exhaustive()
    }
}

/// A server by its name: `api.example.com`, or `*.example.com` for every name below.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Host {
    name: String,
    below: bool,
    pub(super) port: u16,
}

impl Host {
    fn parse(text: &str) -> Result<Self, &'static str> {
        if text.contains('/') {
            return Err("is a URL: a host is name[:port]");
        }
        let (name, port) = match text.rsplit_once(':') {
            Some((name, port)) if !name.contains(':') => {
                let port = port.parse().ok().filter(|port| *port != 0);
                (
                    name,
                    port.ok_or("has no port between 1 and 65535 after its colon")?,
                )
            }
            _ => (text, HTTPS),
        };
        let (name, below) = match name.strip_prefix("*.") {
            Some(name) => (name, true),
            None => (name, false),
        };
        if name.contains(['*', '/', '@', '?', '#', '%', ' ']) {
            return Err(
                "must be a name as \"api.example.com\" or \"*.example.com\", with a port after a \
                        colon where it is not 443",
            );
        }
        let name = match UrlHost::parse(name.strip_suffix('.').unwrap_or(name)) {
            Ok(UrlHost::Domain(name)) => name,
            Ok(UrlHost::Ipv4(_) | UrlHost::Ipv6(_)) => {
                return Err("must be a name: TLS asks for no server by its address");
            }
            Err(_) if text.contains("::") => {
                return Err("must be a name: TLS asks for no server by its address");
            }
            Err(_) => return Err("is not a name of a host"),
        };
        if DnsName::try_from(&*name).is_err() {
            return Err("is not a name of a host");
        }
        if below && !name.contains('.') {
            return Err(
                "must have two parts after \"*.\": nobody owns all names of a top-level domain",
            );
        }
        Ok(Self { name, below, port })
    }

    /// `name`: in lower case, without a dot at its end.
    fn is(&self, name: &str, port: u16) -> bool {
        let is_name = if self.below {
            name.strip_suffix(&*self.name)
                .and_then(|rest| rest.strip_suffix('.'))
                .is_some_and(|rest| !rest.is_empty())
        } else {
            name == self.name
        };
        is_name && port == self.port
    }
}

/// The secrets of a VM, which may be exchanged while it runs. Clones share them.
#[derive(Clone, Default)]
pub struct Secrets(Arc<RwLock<Arc<[Arc<Secret>]>>>);

impl Secrets {
    /// Refuses secrets that can't be told apart.
    pub fn new(secrets: Vec<Secret>) -> Result<Self, Wrong> {
        let wrong = |secret: &Secret, field: &str, problem| {
            Err(Wrong {
                field: format!("{}{field}", secret.name),
                problem,
            })
        };
        for (index, secret) in secrets.iter().enumerate() {
            if index >= MAX_SECRETS {
                return wrong(secret, "", "is one too many: a VM has 64 secrets at most");
            }
            let Some(placeholder) = secret.placeholder.as_deref() else {
                continue;
            };
            if secrets
                .iter()
                .any(|other| overlap(&other.value, placeholder))
            {
                return wrong(
                    secret,
                    ".placeholder",
                    "must not be a value, or a part of one",
                );
            }
            let others = secrets
                .iter()
                .enumerate()
                .filter(|(other, _)| *other != index);
            if others
                .filter_map(|(_, other)| other.placeholder.as_deref())
                .any(|other| overlap(other, placeholder))
            {
                return wrong(
                    secret,
                    ".placeholder",
                    "must not be another secret's, or a part of it",
                );
            }
        }
        let secrets: Vec<_> = secrets.into_iter().map(Arc::new).collect();
        Ok(Self(Arc::new(RwLock::new(secrets.into()))))
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.get().is_empty()
    }

    /// Exchanges them for those of `other`, here and in every clone.
    pub fn set(&self, other: &Self) {
        let secrets = other.get();
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = secrets;
    }

    /// The same, to be exchanged apart.
    #[must_use]
    pub fn apart(&self) -> Self {
        Self(Arc::new(RwLock::new(self.get())))
    }

    /// Whether what is exchanged in one is exchanged in the other.
    #[must_use]
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    pub(super) fn get(&self) -> Arc<[Arc<Secret>]> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }
}

impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.get().iter()).finish()
    }
}

fn overlap(one: &str, other: &str) -> bool {
    one.contains(other) || other.contains(one)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(hosts: &[&str]) -> SecretOptions {
        SecretOptions {
            value: "the-real-one".to_owned().into(),
            hosts: hosts.iter().map(|host| (*host).to_owned()).collect(),
            headers: None,
            query: Vec::new(),
            placeholder: None,
        }
    }

    fn secret(hosts: &[&str]) -> Result<Secret, Wrong> {
        Secret::new("KEY", options(hosts))
    }

    #[test]
    fn a_host_is_a_name_or_all_names_below_one() {
        let secret =
            secret(&["API.example.com.", "*.wild.example", "localhost:8443"]).expect("valid");
        for (name, port, is) in [
            ("api.example.com", 443, true),
            ("api.example.com", 8443, false),
            ("xapi.example.com", 443, false),
            ("a.api.example.com", 443, false),
            ("a.wild.example", 443, true),
            ("a.b.wild.example", 443, true),
            ("wild.example", 443, false),
            ("notwild.example", 443, false),
            ("localhost", 8443, true),
        ] {
            assert_eq!(secret.is_for(name, port), is, "{name}:{port}");
        }
    }

    #[test]
    fn a_name_of_another_alphabet_is_its_ascii_form() {
        let secret = secret(&["bücher.example"]).expect("valid");
        assert!(secret.is_for("xn--bcher-kva.example", 443));
    }

    #[test]
    fn wrong_hosts_are_refused() {
        for host in [
            "",
            "*",
            "*.com",
            "a.*.example",
            "https://api.example.com",
            "api.example.com/v1",
            "1.2.3.4",
            "0x7f.1",
            "::1",
            "[::1]:443",
            "api.example.com:0",
            "api.example.com:70000",
            "api.example.com:",
            "a b.example",
            "user@api.example.com",
        ] {
            let wrong = secret(&[host]).expect_err(host);
            assert_eq!(wrong.field, "KEY.hosts[0]", "{host}");
        }
        assert_eq!(secret(&[]).expect_err("no host").field, "KEY.hosts");
    }

    #[test]
    fn what_cannot_stand_in_a_header_is_no_value() {
        for value in ["", "a\n", "a\r\nx: y", " a", "a ", "a\0", "ä"] {
            let options = SecretOptions {
                value: value.to_owned().into(),
                ..options(&["a.example"])
            };
            let wrong = Secret::new("KEY", options).expect_err("no value");
            assert_eq!(wrong.field, "KEY.value", "{value:?}");
        }
    }

    #[test]
    fn a_name_is_one_that_a_shell_takes() {
        for name in ["", "A B", "x-y", "1A", "a=b", "a\0", "Ä"] {
            let wrong = Secret::new(name, options(&["a.example"])).expect_err(name);
            assert_eq!(wrong.field, name);
        }
        assert!(Secret::new("_a1", options(&["a.example"])).is_ok());
    }

    #[test]
    fn headers_of_the_connection_have_no_secret() {
        for (header, field) in [("Host", "headers[0]"), ("a b", "headers[0]")] {
            let options = SecretOptions {
                headers: Some(vec![header.to_owned()]),
                ..options(&["a.example"])
            };
            let wrong = Secret::new("KEY", options).expect_err(header);
            assert_eq!(wrong.field, format!("KEY.{field}"));
        }
    }

    #[test]
    fn placeholders_can_be_told_apart() {
        let named = |name: &str, placeholder: &str| {
            let options = SecretOptions {
                placeholder: Some(placeholder.to_owned()),
                ..options(&["a.example"])
            };
            Secret::new(name, options)
        };
        assert!(named("A", "short").is_err());
        assert!(named("A", "sk-ant-not the key").is_err());
        let pair = |one: &str, other: &str| {
            let secrets = vec![named("A", one), named("B", other)];
            Secrets::new(secrets.into_iter().collect::<Result<_, _>>()?)
        };
        assert!(pair("sk-ant-placeholder-a", "sk-ant-placeholder-b").is_ok());
        let wrong = pair("sk-ant-placeholder", "sk-ant-placeholder-b").expect_err("a part");
        assert_eq!(wrong.field, "A.placeholder");
        let wrong = pair("xx-the-real-one-xx", "sk-ant-placeholder-b").expect_err("the value");
        assert_eq!(wrong.field, "A.placeholder");
    }

    #[test]
    fn a_value_is_in_no_debug_output() {
        let secrets = Secrets::new(vec![secret(&["a.example"]).expect("valid")]).expect("valid");
        let shown = format!("{secrets:?}");
        assert!(
            shown.contains("KEY") && !shown.contains("the-real-one"),
            "{shown}"
        );
    }
}
