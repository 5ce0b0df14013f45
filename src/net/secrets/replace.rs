//! Placeholders in a request, and what becomes of them. Who sends it is hostile: however many there are,
//! looking for them takes one look at the text for each secret, and what they become is bounded.

use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hyper::Uri;
use hyper::header::HeaderValue;
use hyper::http::request::Parts;
use memchr::memmem;
use url::form_urlencoded;
use zeroize::{Zeroize as _, Zeroizing};

use super::placeholder::PlaceholderKey;
use super::secret::Secret;
use super::sightings::Place;

/// How many bytes of values a request may get: more than any server takes.
pub const MOST: usize = 64 * 1024;

/// A request would get more values than [`MOST`] has room for.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct TooMany;

/// The secrets of a VM with their placeholders in it.
pub(super) struct Bound {
    secrets: Vec<Placed>,
}

struct Placed {
    secret: Arc<Secret>,
    placeholder: String,
}

impl Bound {
    pub(super) fn new(secrets: &[Arc<Secret>], key: &PlaceholderKey) -> Self {
        let placed = |secret: &Arc<Secret>| Placed {
            placeholder: secret
                .placeholder
                .clone()
                .unwrap_or_else(|| key.placeholder(&secret.name)),
            secret: Arc::clone(secret),
        };
        Self {
            secrets: secrets.iter().map(placed).collect(),
        }
    }

    pub(super) fn placeholders(&self) -> Vec<(String, String)> {
        let own = self.secrets.iter();
        own.map(|own| (own.secret.name.clone(), own.placeholder.clone()))
            .collect()
    }

    pub(super) fn has_host_at(&self, port: u16) -> bool {
        let mut hosts = self.secrets.iter().flat_map(|own| &own.secret.hosts);
        hosts.any(|host| host.port == port)
    }

    pub(super) fn is_host(&self, name: &str, port: u16) -> bool {
        self.secrets.iter().any(|own| own.secret.is_for(name, port))
    }

    /// Names of the secrets whose placeholders are in `bytes`.
    pub(super) fn seen_in(&self, bytes: &[u8]) -> Vec<String> {
        let own = self.secrets.iter();
        own.filter(|own| memmem::find(bytes, own.placeholder.as_bytes()).is_some())
            .map(|own| own.secret.name.clone())
            .collect()
    }

    /// Names of the secrets whose placeholders are anywhere in the head of a request.
    pub(super) fn seen_in_head(&self, parts: &Parts) -> Vec<(String, Place)> {
        let mut seen = Vec::new();
        self.scan(parts.uri.to_string().as_bytes(), &mut seen, Place::Url);
        for value in parts.headers.values() {
            match decoded_basic(value.as_bytes()) {
                Some(decoded) => self.scan(&decoded, &mut seen, Place::Header),
                None => self.scan(value.as_bytes(), &mut seen, Place::Header),
            }
        }
        seen
    }

    fn scan(&self, bytes: &[u8], seen: &mut Vec<(String, Place)>, place: Place) {
        seen.extend(self.seen_in(bytes).into_iter().map(|name| (name, place)));
    }

    /// Puts values where they go in a request to this host. Returns where placeholders were left.
    pub(super) fn replace(
        &self,
        host: &str,
        port: u16,
        parts: &mut Parts,
    ) -> Result<Vec<(String, Place)>, TooMany> {
        let mut found = Found::default();
        for (name, value) in &mut parts.headers {
            let goes = |secret: &Secret| secret.is_for(host, port) && secret.headers.contains(name);
            if let Some(replaced) = self.header(value, goes, &mut found) {
                *value = replaced;
            }
        }
        if let Some(uri) = self.uri(host, port, &parts.uri, &mut found) {
            parts.uri = uri;
        }
        if found.is_full {
            return Err(TooMany);
        }
        Ok(found.left)
    }

    fn header(
        &self,
        value: &HeaderValue,
        goes: impl Fn(&Secret) -> bool,
        found: &mut Found,
    ) -> Option<HeaderValue> {
        let replaced = match decoded_basic(value.as_bytes()) {
            Some(decoded) => {
                let text = self.text(&decoded, goes, Placed::value, found, Place::Header)?;
                let mut encoded = Zeroizing::new("Basic ".to_owned());
                // Room for all of it: growing would leave copies.
                encoded.reserve_exact(text.len().div_ceil(3) * 4);
                STANDARD.encode_string(&*text, &mut encoded);
                Zeroizing::new(encoded.as_bytes().to_vec())
            }
            None => self.text(value.as_bytes(), goes, Placed::value, found, Place::Header)?,
        };
        // Of a header's bytes and of a value that can stand in one.
        let mut replaced = HeaderValue::from_bytes(&replaced).ok()?;
        // HTTP/2 keeps it out of its tables, and no debug output shows it.
        replaced.set_sensitive(true);
        Some(replaced)
    }

    fn uri(&self, host: &str, port: u16, uri: &Uri, found: &mut Found) -> Option<Uri> {
        let whole = uri.path_and_query()?.as_str();
        let (path, query) = whole.split_once('?').unwrap_or((whole, ""));
        self.scan(path.as_bytes(), &mut found.left, Place::Url);
        // There may be as many pieces as bytes, and each would be looked through for each secret.
        let shortest = self.secrets.iter().map(|own| own.placeholder.len()).min()?;
        Search::of(&self.secrets, query.as_bytes()).next_from(0)?;
        let mut is_replaced = false;
        let mut text = Zeroizing::new(Vec::with_capacity(whole.len() * 2));
        text.extend_from_slice(path.as_bytes());
        for (index, piece) in query.split('&').enumerate() {
            append(&mut text, if index == 0 { b"?" } else { b"&" });
            if piece.len() < shortest {
                append(&mut text, piece.as_bytes());
                continue;
            }
            let name = form_urlencoded::parse(piece.as_bytes()).next();
            let name = name.map(|(name, _)| name).unwrap_or_default();
            let goes = |secret: &Secret| {
                secret.is_for(host, port) && secret.query.iter().any(|own| *own == *name)
            };
            match self.text(
                piece.as_bytes(),
                goes,
                Placed::encoded_value,
                found,
                Place::Url,
            ) {
                Some(replaced) => {
                    is_replaced = true;
                    append(&mut text, &replaced);
                }
                None => append(&mut text, piece.as_bytes()),
            }
        }
        if !is_replaced {
            return None;
        }
        let mut parts = uri.clone().into_parts();
        parts.path_and_query = Some(text.as_slice().try_into().ok()?);
        Uri::from_parts(parts).ok()
    }

    /// `None`: there is nothing to replace. In one go, so that no value is searched for placeholders.
    fn text(
        &self,
        text: &[u8],
        goes: impl Fn(&Secret) -> bool,
        value: impl Fn(&Placed) -> Zeroizing<String>,
        found: &mut Found,
        place: Place,
    ) -> Option<Zeroizing<Vec<u8>>> {
        let mut replaced: Option<Zeroizing<Vec<u8>>> = None;
        let mut done = 0;
        let mut search = Search::of(&self.secrets, text);
        while let Some((at, own)) = search.next_from(done) {
            let whole = replaced.get_or_insert_with(Zeroizing::default);
            append(whole, &text[done..at]);
            done = at + own.placeholder.len();
            if goes(&own.secret) {
                let value = value(own);
                if !found.takes(value.len()) {
                    return None;
                }
                append(whole, value.as_bytes());
            } else {
                found.left.push((own.secret.name.clone(), place));
                append(whole, &text[at..done]);
            }
        }
        let mut whole = replaced?;
        append(&mut whole, &text[done..]);
        (*whole != text).then_some(whole)
    }
}

/// What was found in a request.
#[derive(Default)]
struct Found {
    /// Placeholders that are not for where they are.
    left: Vec<(String, Place)>,
    /// Bytes of values.
    values: usize,
    is_full: bool,
}

impl Found {
    /// Whether there is room for a value.
    fn takes(&mut self, length: usize) -> bool {
        self.values += length;
        self.is_full |= self.values > MOST;
        !self.is_full
    }
}

/// The placeholders in a text in their order, each looked for once.
struct Search<'a> {
    text: &'a [u8],
    /// Where each is next.
    next: Vec<(usize, &'a Placed)>,
}

impl<'a> Search<'a> {
    fn of(secrets: &'a [Placed], text: &'a [u8]) -> Self {
        let next = secrets.iter().filter_map(|own| own.next_in(text, 0));
        Self {
            text,
            next: next.collect(),
        }
    }

    /// The first that begins at `from` or later. `from` never goes back.
    fn next_from(&mut self, from: usize) -> Option<(usize, &'a Placed)> {
        let text = self.text;
        self.next.retain_mut(|(at, own)| {
            if *at < from {
                let Some((next, _)) = own.next_in(text, from) else {
                    return false;
                };
                *at = next;
            }
            true
        });
        self.next.iter().copied().min_by_key(|(at, _)| *at)
    }
}

impl Placed {
    fn next_in(&self, text: &[u8], from: usize) -> Option<(usize, &Self)> {
        let at = memmem::find(text.get(from..)?, self.placeholder.as_bytes())?;
        Some((from + at, self))
    }

    fn value(&self) -> Zeroizing<String> {
        self.secret.value.clone()
    }

    fn encoded_value(&self) -> Zeroizing<String> {
        let value = self.secret.value.as_bytes();
        // Never to grow, which would leave a copy.
        let mut text = Zeroizing::new(String::with_capacity(value.len() * 3));
        text.extend(form_urlencoded::byte_serialize(value));
        text
    }
}

/// Without leaving a copy where the text has outgrown its place.
fn append(text: &mut Zeroizing<Vec<u8>>, more: &[u8]) {
    if text.capacity() - text.len() < more.len() {
        let mut grown = Vec::with_capacity((text.len() + more.len()) * 2);
        grown.extend_from_slice(text);
        std::mem::replace(&mut **text, grown).zeroize();
    }
    text.extend_from_slice(more);
}

/// User and password of a header `Basic …` (RFC 7617).
fn decoded_basic(value: &[u8]) -> Option<Vec<u8>> {
    let (scheme, encoded) = value.split_at_checked("Basic ".len())?;
    if !scheme.eq_ignore_ascii_case(b"Basic ") {
        return None;
    }
    STANDARD.decode(encoded.trim_ascii()).ok()
}

/// The host that a request over a plain connection names.
pub(super) fn host_header(bytes: &[u8]) -> Option<String> {
    let mut lines = bytes.split(|byte| *byte == b'\n');
    let value = lines.find_map(|line| {
        let (name, value) = line.split_at_checked("host:".len())?;
        name.eq_ignore_ascii_case(b"host:").then_some(value)
    })?;
    let value = std::str::from_utf8(value).ok()?.trim();
    let name = value.rsplit_once(':').map_or(value, |(name, _)| name);
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
    (!name.is_empty() && name.bytes().all(is_plain)).then(|| name.to_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use hyper::Request;

    use super::super::secret::SecretOptions;
    use super::*;

    const A: &str = "placeholder-of-aaaa";
    const B: &str = "placeholder-of-bbbb";

    /// A's value goes to a.example, B's to b.example and a.example's header x-b.
    fn bound() -> Bound {
        let secret = |name: &str, hosts: &[&str], headers: Option<&[&str]>, placeholder: &str| {
            let owned = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect();
            let options = SecretOptions {
                value: format!("value+of/{name}").into(),
                hosts: owned(hosts),
                headers: headers.map(owned),
                query: vec!["key".to_owned()],
                placeholder: Some(placeholder.to_owned()),
            };
            Arc::new(Secret::new(name, options).expect("a secret"))
        };
        let secrets = [
            secret("A", &["a.example"], None, A),
            secret("B", &["b.example", "a.example"], Some(&["x-b"]), B),
        ];
        Bound::new(&secrets, &PlaceholderKey::generate().expect("randomness"))
    }

    fn replaced(
        host: &str,
        request: hyper::http::request::Builder,
    ) -> (Parts, Vec<(String, Place)>) {
        let (mut parts, ()) = request.body(()).expect("a request").into_parts();
        let left = bound().replace(host, 443, &mut parts);
        (parts, left.expect("few values"))
    }

    #[test]
    fn a_value_goes_into_its_headers_at_its_hosts() {
        for (host, header, value, expected, is_left) in [
            ("a.example", "x-api-key", A.to_owned(), "value+of/A", false),
            (
                "a.example",
                "authorization",
                format!("Bearer {A}"),
                "Bearer value+of/A",
                false,
            ),
            ("a.example", "x-other", A.to_owned(), A, true),
            ("b.example", "x-api-key", A.to_owned(), A, true),
            (
                "a.example",
                "x-b",
                format!("{A};{B};{B}"),
                "placeholder-of-aaaa;value+of/B;value+of/B",
                true,
            ),
            ("a.example", "x-b", "nothing".to_owned(), "nothing", false),
        ] {
            let (parts, left) = replaced(host, Request::get("/").header(header, value));
            assert_eq!(parts.headers[header], expected, "{host} {header}");
            assert_eq!(!left.is_empty(), is_left, "{host} {header}");
        }
    }

    #[test]
    fn placeholders_are_found_in_their_order_side_by_side_and_in_each_other() {
        let secret = |name: &str, placeholder: &str| Placed {
            secret: Arc::clone(&bound().secrets[usize::from(name == "B")].secret),
            placeholder: placeholder.to_owned(),
        };
        let secrets = [secret("A", "abab"), secret("B", "babb")];
        let found = |text: &str| {
            let mut search = Search::of(&secrets, text.as_bytes());
            let mut from = 0;
            std::iter::from_fn(|| {
                let (at, own) = search.next_from(from)?;
                from = at + own.placeholder.len();
                Some(format!("{at}{}", own.secret.name))
            })
            .collect::<Vec<_>>()
            .join(" ")
        };
        assert_eq!(found("ababababb"), "0A 4A");
        assert_eq!(found("babbabab abab"), "0B 4A 9A");
        assert_eq!(found("ababb"), "0A");
        assert_eq!(found("aba"), "");
    }

    #[test]
    fn more_values_than_a_server_takes_are_refused() {
        let head = |count: usize| {
            let request = Request::get("/").header("x-api-key", A.repeat(count));
            let (mut parts, ()) = request.body(()).expect("a request").into_parts();
            bound().replace("a.example", 443, &mut parts)
        };
        let most = MOST / "value+of/A".len();
        assert_eq!(head(most), Ok(Vec::new()));
        assert_eq!(head(most + 1), Err(TooMany));
    }

    #[test]
    fn a_replaced_header_is_sensitive() {
        let (parts, _) = replaced("a.example", Request::get("/").header("x-api-key", A));
        assert!(parts.headers["x-api-key"].is_sensitive());
        assert!(!format!("{parts:?}").contains("value+of"));
    }

    #[test]
    fn basic_authorization_is_looked_into() {
        let basic = |text: &str| format!("Basic {}", STANDARD.encode(text));
        let header = basic(&format!("user:{A}"));
        let (parts, left) = replaced(
            "a.example",
            Request::get("/").header("authorization", &header),
        );
        assert_eq!(parts.headers["authorization"], basic("user:value+of/A"));
        assert_eq!(left, []);
        let (parts, left) = replaced(
            "b.example",
            Request::get("/").header("authorization", &header),
        );
        assert_eq!(parts.headers["authorization"], header);
        assert_eq!(left, [("A".to_owned(), Place::Header)]);
    }

    #[test]
    fn a_value_goes_into_its_query_parameters_encoded() {
        for (uri, expected, is_left) in [
            (
                format!("/v1?a=1&key={A}&b"),
                "/v1?a=1&key=value%2Bof%2FA&b",
                false,
            ),
            (
                format!("/v1?other={A}"),
                "/v1?other=placeholder-of-aaaa",
                true,
            ),
            (format!("/{A}?key=1"), "/placeholder-of-aaaa?key=1", true),
            (
                format!("https://a.example/?key={A}"),
                "https://a.example/?key=value%2Bof%2FA",
                false,
            ),
            ("/v1".to_owned(), "/v1", false),
            ("/v1?".to_owned(), "/v1?", false),
        ] {
            let (parts, left) = replaced("a.example", Request::get(&uri));
            assert_eq!(parts.uri, expected, "{uri}");
            assert_eq!(!left.is_empty(), is_left, "{uri}");
        }
    }

    #[test]
    fn the_host_of_a_plain_request_is_found() {
        for (text, host) in [
            (
                "GET / HTTP/1.1\r\nHost: A.example:80\r\n\r\n",
                Some("a.example"),
            ),
            ("GET / HTTP/1.1\r\nX: y\r\n\r\n", None),
            ("host: a b\r\n", None),
        ] {
            assert_eq!(host_header(text.as_bytes()).as_deref(), host);
        }
    }
}
