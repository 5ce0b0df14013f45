//! What puts values into requests, in the form that the fuzz targets give it some.

use std::sync::Arc;

use hyper::Request;
use hyper::header::HeaderValue;

use super::PlaceholderKey;
use super::replace::Bound;
use super::secret::{Secret, SecretOptions};

pub use super::replace::MOST;

pub const HOST: &str = "a.example";
pub const PLACEHOLDER: &str = "placeholder-of-a";
pub const VALUE: &str = "the value+of/a";
/// Where the value goes.
pub const HEADER: &str = "x-api-key";
pub const QUERY: &str = "key";

/// Target and headers of a request.
pub type Head = (String, Vec<(String, Vec<u8>)>);

/// One secret.
pub struct Replacing(Bound);

impl Replacing {
    /// `None`: the system has no randomness to give.
    #[must_use]
    pub fn new() -> Option<Self> {
        let options = SecretOptions {
            value: VALUE.to_owned().into(),
            hosts: vec![HOST.to_owned()],
            headers: Some(vec![HEADER.to_owned()]),
            query: vec![QUERY.to_owned()],
            placeholder: Some(PLACEHOLDER.to_owned()),
        };
        let secret = Arc::new(Secret::new("A", options).ok()?);
        Some(Self(Bound::new(&[secret], &PlaceholderKey::generate()?)))
    }

    /// The request as it goes to `host`. `None`: it is none, or is refused.
    #[must_use]
    pub fn sent_to(&self, host: &str, target: &[u8], headers: &[(&[u8], &[u8])]) -> Option<Head> {
        let mut request = Request::builder().uri(target);
        for (name, value) in headers {
            request = request.header(*name, HeaderValue::from_bytes(value).ok()?);
        }
        let (mut parts, ()) = request.body(()).ok()?.into_parts();
        self.0.replace(host, 443, &mut parts).ok()?;
        let headers = parts.headers.iter();
        let headers = headers.map(|(name, value)| (name.to_string(), value.as_bytes().to_vec()));
        Some((parts.uri.to_string(), headers.collect()))
    }
}
