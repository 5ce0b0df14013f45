//! A registry, in the words of the OCI distribution specification.
//!
//! What it answers is hostile: no more is read than was announced and than the limits allow, and nothing
//! is taken whose digest is another one.

use std::path::{Path, PathBuf};
use std::{env, io};

use reqwest::header::{ACCEPT, AUTHORIZATION, HeaderValue, RANGE, WWW_AUTHENTICATE};
use reqwest::{Client, ClientBuilder, RequestBuilder, Response, StatusCode};
use serde::Deserialize;
use tokio::sync::Mutex;
use tokio::task::JoinSet;

use super::challenge::Challenge;
use super::manifest::Descriptor;
use super::{Digest, ImageError, MAX_DOCUMENT, Reference, Result};
use crate::apart::Apart;

const MANIFESTS: &str = "application/vnd.oci.image.index.v1+json, \
     application/vnd.oci.image.manifest.v1+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, \
     application/vnd.docker.distribution.manifest.v2+json";

/// Where connections to registries are read: hyper reads interim answers without end in one go, as long as they
/// come.
static APART: Apart = Apart::thread("agentvm-images");

/// One repository of a registry.
pub(super) struct Registry<'a> {
    reference: &'a Reference,
    client: Client,
    /// What the registry wants to see, once it has said so.
    authorization: Mutex<Option<HeaderValue>>,
}

impl<'a> Registry<'a> {
    pub(super) fn new(reference: &'a Reference) -> Result<Self> {
        Self::with(reference, Client::builder())
    }

    pub(super) fn with(reference: &'a Reference, client: ClientBuilder) -> Result<Self> {
        // An error: another client has done it.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = if reference.is_loopback() {
            // In plain text, and a proxy may be anywhere.
            client.no_proxy()
        } else {
            client.https_only(true)
        };
        let client = client
            .user_agent(concat!("agentvm/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|error| failed(reference, &error))?;
        Ok(Self {
            reference,
            client,
            authorization: Mutex::default(),
        })
    }

    /// What names it among all registries.
    pub(super) fn repository(&self) -> String {
        let (registry, repository) = (self.reference.registry(), &self.reference.repository);
        format!("{registry}/{repository}")
    }

    /// A manifest or index, whose digest the caller checks.
    pub(super) async fn manifest(&self, wanted: &str) -> Result<Vec<u8>> {
        let url = format!("{}/manifests/{wanted}", self.reference.base());
        let request = || self.client.get(&url).header(ACCEPT, MANIFESTS);
        bounded(self.reference, self.send(request).await?).await
    }

    /// A blob from byte `from` on, unless the answer's status says that it is all of it.
    pub(super) async fn blob(&self, digest: &str, from: u64) -> Result<Response> {
        let url = format!("{}/blobs/{digest}", self.reference.base());
        self.send(|| {
            let request = self.client.get(&url);
            if from == 0 {
                request
            } else {
                request.header(RANGE, format!("bytes={from}-"))
            }
        })
        .await
    }

    pub(super) fn failed(&self, error: &reqwest::Error) -> ImageError {
        failed(self.reference, error)
    }

    pub(super) fn sends_other(&self, wanted: &Digest, found: &Digest) -> ImageError {
        let host = self.reference.host();
        ImageError::Invalid(format!(
            "{host} sends {found} for {wanted}: try again, and tell who runs it if that does not help"
        ))
    }

    pub(super) fn sends_more(&self, blob: &Descriptor) -> ImageError {
        let (host, Descriptor { digest, size, .. }) = (self.reference.host(), blob);
        ImageError::Invalid(format!(
            "{host} sends more than the {size} bytes of {digest}: try again, and tell who runs it if that does not help"
        ))
    }

    pub(super) fn ends(&self, blob: &Descriptor, have: u64) -> ImageError {
        let (host, Descriptor { digest, size, .. }) = (self.reference.host(), blob);
        let reference = self.reference;
        ImageError::Pull(format!(
            "{host} ends {digest} of {reference} after {have} of {size} bytes: try again, which goes on from there"
        ))
    }

    async fn send(&self, request: impl Fn() -> RequestBuilder) -> Result<Response> {
        let known = self.authorization.lock().await.clone();
        let mut answer = self.once(request(), known).await?;
        if answer.status() == StatusCode::UNAUTHORIZED
            && self.is_registry(answer.url())
            && let Some(authorization) = self.authorize(&answer).await?
        {
            answer = self.once(request(), Some(authorization.clone())).await?;
            *self.authorization.lock().await = Some(authorization);
        }
        let (reference, host) = (self.reference, self.reference.host());
        match answer.status() {
            status if status.is_success() => Ok(answer),
            StatusCode::NOT_FOUND => Err(ImageError::NotFound(format!(
                "{host} has no image {reference}, or not all of it: look whether its name and tag are right"
            ))),
            status @ (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) => {
                Err(ImageError::Denied(format!(
                    "{host} refuses {reference} ({status}): there is none of that name, or it needs credentials, which `docker login` or `skopeo login --compat-auth-file ~/.docker/config.json` keeps"
                )))
            }
            StatusCode::TOO_MANY_REQUESTS => Err(ImageError::Pull(format!(
                "{host} was asked too often, for {reference} or others: try again later, or with credentials (`docker login`)"
            ))),
            status => Err(ImageError::Pull(format!(
                "{host} answered {status} for {reference}: try again later"
            ))),
        }
    }

    /// Where a redirect has led is another's, who gets no credentials of this registry's.
    fn is_registry(&self, url: &url::Url) -> bool {
        url::Url::parse(&self.reference.base()).is_ok_and(|own| own.origin() == url.origin())
    }

    async fn once(
        &self,
        request: RequestBuilder,
        authorization: Option<HeaderValue>,
    ) -> Result<Response> {
        let request = match authorization {
            Some(value) => request.header(AUTHORIZATION, value),
            None => request,
        };
        let mut sending = JoinSet::new();
        sending.spawn_on(request.send(), &APART.handle());
        match sending.join_next().await {
            Some(Ok(sent)) => sent.map_err(|error| self.failed(&error)),
            Some(Err(error)) => {
                let problem = io::Error::other(error);
                Err(ImageError::host(
                    "can't ask for",
                    Path::new("an image"),
                    problem,
                ))
            }
            None => Err(ImageError::Pull("nothing was asked for".to_owned())),
        }
    }

    /// What a refusal asks for: a token of the authority that it names, or the credentials themselves.
    async fn authorize(&self, refusal: &Response) -> Result<Option<HeaderValue>> {
        let challenge = refusal
            .headers()
            .get(WWW_AUTHENTICATE)
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default();
        let credentials = credentials(self.reference.registry());
        let (realm, service) = match Challenge::parse(challenge) {
            None => return Ok(None),
            Some(Challenge::Basic) => return Ok(credentials),
            Some(Challenge::Bearer { realm, service }) => (realm, service),
        };
        let scope = format!("repository:{}:pull", self.reference.repository);
        let url = Challenge::authority(&realm, service.as_deref(), &scope).map_err(|problem| {
            let (host, reference) = (self.reference.host(), self.reference);
            ImageError::Pull(format!(
                "{host} {problem}: tell who runs it that {reference} can't be pulled"
            ))
        })?;
        let answer = self
            .once(self.client.get(url.as_str()), credentials)
            .await?;
        if !answer.status().is_success() {
            // The refusal that it follows is what the caller is told.
            return Ok(None);
        }
        let text = bounded(self.reference, answer).await?;
        let token: Token = serde_json::from_slice(&text).map_err(|error| {
            let (host, reference) = (self.reference.host(), self.reference);
            let authority = url.host_str().unwrap_or_default();
            ImageError::Pull(format!(
                "{authority}, which {host} trusts, sends no token for {reference} ({error}): try again later"
            ))
        })?;
        let token = token.token.or(token.access_token);
        Ok(token.and_then(|token| secret(&format!("Bearer {token}"))))
    }
}

pub(super) fn is_loopback(url: &url::Url) -> bool {
    match url.host() {
        Some(url::Host::Domain(name)) => name == "localhost",
        Some(url::Host::Ipv4(address)) => address.is_loopback(),
        Some(url::Host::Ipv6(address)) => address.is_loopback(),
        None => false,
    }
}

#[derive(Deserialize)]
struct Token {
    token: Option<String>,
    /// The name that OAuth has for it.
    access_token: Option<String>,
}

/// A body that is a document.
async fn bounded(reference: &Reference, mut answer: Response) -> Result<Vec<u8>> {
    let mut body = Vec::new();
    while let Some(chunk) = answer
        .chunk()
        .await
        .map_err(|error| failed(reference, &error))?
    {
        if (body.len() + chunk.len()) as u64 > MAX_DOCUMENT {
            return Err(ImageError::TooLarge(format!(
                "a document of {} has more than {MAX_DOCUMENT} bytes: look whether it is an image",
                reference.host()
            )));
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}

fn failed(reference: &Reference, error: &reqwest::Error) -> ImageError {
    // reqwest's own text leaves out what it was.
    let mut problem = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        problem = cause.to_string();
        source = cause.source();
    }
    // An authority or where a redirect leads is another host.
    let asked = error.url().and_then(|url| {
        let host = url.host_str()?;
        Some(
            url.port()
                .map_or_else(|| host.to_owned(), |port| format!("{host}:{port}")),
        )
    });
    let host = asked.unwrap_or_else(|| reference.host().to_owned());
    ImageError::Pull(format!(
        "can't pull {reference} from {host}: {problem}. Look whether this machine reaches {host} (HTTPS_PROXY names a proxy), and try again"
    ))
}

/// What Docker's configuration file has for a registry. Its helper programs are not asked.
fn credentials(registry: &str) -> Option<HeaderValue> {
    #[derive(Deserialize)]
    struct Config {
        #[serde(default)]
        auths: std::collections::BTreeMap<String, Auth>,
    }
    #[derive(Deserialize)]
    struct Auth {
        /// User and password, in Base64: what the header has.
        auth: Option<String>,
    }
    let directory = env::var_os("DOCKER_CONFIG")
        .filter(|own| !own.is_empty())
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".docker")))?;
    let text = std::fs::read(directory.join("config.json")).ok()?;
    let config: Config = serde_json::from_slice(&text)
        .inspect_err(|error| tracing::warn!(%error, "Docker's configuration can't be read"))
        .ok()?;
    let names = match registry {
        "docker.io" => &["https://index.docker.io/v1/", "docker.io"][..],
        own => &[own][..],
    };
    let mut found = names.iter().filter_map(|name| config.auths.get(*name));
    let auth = found.find_map(|own| own.auth.as_ref())?;
    secret(&format!("Basic {auth}"))
}

/// A header that no log shows.
fn secret(text: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(text).ok()?;
    value.set_sensitive(true);
    Some(value)
}
