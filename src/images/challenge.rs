//! What a registry asks for when it refuses: the `WWW-Authenticate` header (RFC 9110, 11.6.1).

use super::registry::is_loopback;

/// The first challenge of a header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Challenge {
    /// The credentials themselves.
    Basic,
    /// A token of an authority.
    Bearer {
        realm: String,
        service: Option<String>,
    },
}

impl Challenge {
    /// `None`: another scheme, or no challenge.
    #[must_use]
    pub fn parse(header: &str) -> Option<Self> {
        let (scheme, rest) = header.trim_start().split_once(' ').unwrap_or((header, ""));
        if scheme.trim_end().eq_ignore_ascii_case("basic") {
            return Some(Self::Basic);
        }
        if !scheme.eq_ignore_ascii_case("bearer") {
            return None;
        }
        let (mut realm, mut service) = (None, None);
        let mut rest = rest;
        while let Some((name, value, after)) = parameter(rest) {
            let known = match name {
                name if name.eq_ignore_ascii_case("realm") => &mut realm,
                name if name.eq_ignore_ascii_case("service") => &mut service,
                _ => &mut None,
            };
            // Who says it twice means the first.
            known.get_or_insert(value);
            rest = after;
        }
        Some(Self::Bearer {
            realm: realm?,
            service,
        })
    }

    /// Where a token of `scope` is asked for. `Err`: no address, or one that credentials would be read on
    /// the way to.
    pub fn authority(realm: &str, service: Option<&str>, scope: &str) -> Result<url::Url, String> {
        let mut url =
            url::Url::parse(realm).map_err(|error| format!("names no authority: {error}"))?;
        let is_private = url.scheme() == "https" || (url.scheme() == "http" && is_loopback(&url));
        if !is_private {
            return Err(format!("names an authority without TLS: {realm}"));
        }
        if let Some(service) = service {
            url.query_pairs_mut().append_pair("service", service);
        }
        url.query_pairs_mut().append_pair("scope", scope);
        Ok(url)
    }
}

/// Name, value and what follows of `name="value", …`.
fn parameter(text: &str) -> Option<(&str, String, &str)> {
    let text = text.trim_start_matches([' ', '\t', ',']);
    let (name, rest) = text.split_once('=')?;
    let rest = rest.trim_start();
    let Some(quoted) = rest.strip_prefix('"') else {
        let end = rest.find(',').unwrap_or(rest.len());
        let (value, after) = rest.split_at(end);
        return Some((name.trim(), value.trim().to_owned(), after));
    };
    let mut value = String::new();
    let mut characters = quoted.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => {
                let after = quoted.get(at + 1..).unwrap_or_default();
                return Some((name.trim(), value, after));
            }
            '\\' => value.extend(characters.next().map(|(_, escaped)| escaped)),
            other => value.push(other),
        }
    }
    // A string without an end says nothing that could be relied on.
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bearer(realm: &str, service: Option<&str>) -> Challenge {
        Challenge::Bearer {
            realm: realm.to_owned(),
            service: service.map(str::to_owned),
        }
    }

    #[test]
    fn a_challenge_names_its_authority() {
        for (header, challenge) in [
            (
                r#"Bearer realm="https://a.b/token",service="a.b",scope="repository:c:pull,push""#,
                Some(bearer("https://a.b/token", Some("a.b"))),
            ),
            (
                r#"bearer  scope="a,realm=x" , Realm = "https://a.b/\"t" , service=plain"#,
                Some(bearer("https://a.b/\"t", Some("plain"))),
            ),
            (r#"Bearer realm="1",realm="2""#, Some(bearer("1", None))),
            (r#"Basic realm="registry""#, Some(Challenge::Basic)),
            ("Basic", Some(Challenge::Basic)),
            (r#"Bearer realm="open"#, None),
            (r#"Bearer service="a.b""#, None),
            (r#"Digest realm="x""#, None),
            ("", None),
        ] {
            assert_eq!(Challenge::parse(header), challenge, "{header}");
        }
    }

    #[test]
    fn no_credentials_go_where_they_could_be_read() {
        let scope = "repository:a:pull";
        for realm in [
            "https://a.b/t?x=1",
            "http://127.0.0.1:5000/t",
            "http://localhost/t",
        ] {
            let url = Challenge::authority(realm, Some("s"), scope).expect(realm);
            assert!(url.as_str().starts_with(realm), "{url}");
            assert!(
                url.as_str()
                    .ends_with("service=s&scope=repository%3Aa%3Apull"),
                "{url}"
            );
        }
        for realm in ["http://a.b/t", "ftp://localhost/t", "file:///t", "t", ""] {
            assert!(Challenge::authority(realm, None, scope).is_err(), "{realm}");
        }
    }
}
