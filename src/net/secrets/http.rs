//! HTTP between two TLS connections that are one to both their ends.
//!
//! Each connection of the guest has one of its own to the server, which speaks the same version of HTTP:
//! what the server chooses of what the guest offers is what the guest is told. Nothing is kept, repeated
//! or shared, bodies pass as they come, and the end of either connection is the end of the other.

use std::convert::Infallible;
use std::error::Error as _;
use std::io;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::Duration;

use http_body_util::{Either, Full};
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONTENT_LENGTH, CONTENT_TYPE, HOST, HeaderValue, TRANSFER_ENCODING, UPGRADE};
use hyper::http::request::Parts;
use hyper::http::uri::Authority;
use hyper::http::uri::Scheme;
use hyper::service::service_fn;
use hyper::upgrade::OnUpgrade;
use hyper::{Request, Response, StatusCode, Uri, Version, client, rt, server};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::sync::{Mutex as AsyncMutex, Notify, oneshot};
use tokio::task::JoinSet;
use tokio_rustls::{TlsAcceptor, client as tls_client, server as tls_server};

use super::Interceptor;
use super::lingering::Lingering;
use super::replace::TooMany;
use super::stream::{Fair, Guest};
use crate::net::hello::ClientHello;

const H2: &[u8] = b"h2";
const HTTP_1_1: &[u8] = b"http/1.1";

const CHUNKED: &str = "chunked";

/// Lines of the head of a request or an answer, which HTTP/1.1 counts and HTTP/2 weighs.
const MAX_LINES: usize = 512;

/// What HTTP/2 has under way of one stream and of a connection: the 64 KiB of its specification are less than
/// is in flight to a distant server.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 2 << 20;

/// What is kept of one stream for who does not read: 2 MiB of a connection.
const SEND_BUFFER: usize = CONNECTION_WINDOW as usize / MAX_STREAMS as usize;

/// What a server has for its part of TLS. Nobody looks at the guest meanwhile, and connections are few.
const HANDSHAKE: Duration = Duration::from_secs(30);

/// Interim answers to one request.
const MAX_INTERIM: u32 = 100;

/// Of the head of a request: more than any server takes.
const MAX_HEADERS: u32 = 64 * 1024;

/// Requests at once over one connection, of which each has memory of this process for its head. Clients expect a
/// hundred (RFC 9113, section 6.5.2).
const MAX_STREAMS: u32 = 100;

type GuestTls = tls_server::TlsStream<Guest>;
type ServerTls = tls_client::TlsStream<TcpStream>;
type Answer = Either<Incoming, Full<Bytes>>;

/// Why a request of HTTP/2 has no answer. Its stream is reset for the reason of the source.
#[derive(Debug, thiserror::Error)]
enum Unanswered {
    /// Its client may send it again.
    #[error("no server has seen it")]
    Unseen(#[source] h2::Error),
    #[error("its server failed")]
    Failed(#[source] hyper::Error),
}

/// Answers of our own.
struct Refusal(StatusCode, String);

pub(super) async fn serve(
    interceptor: Arc<Interceptor>,
    guest: Guest,
    server: TcpStream,
    hello: ClientHello,
    port: u16,
) -> io::Result<()> {
    let ClientHello {
        server_name,
        protocols,
    } = hello;
    let name = server_name.ok_or_else(|| io::Error::other("its client names no server"))?;
    // Neither side may speak anything else here.
    let is_http = |protocol: &&Vec<u8>| [H2, HTTP_1_1].contains(&&***protocol);
    let offered: Vec<_> = protocols.iter().filter(is_http).cloned().collect();
    if offered.is_empty() && !protocols.is_empty() {
        return Err(io::Error::other(
            "its client speaks no HTTP that is known here",
        ));
    }
    let connecting = interceptor.upstream.connect(server, &name, offered.clone());
    let connected = tokio::time::timeout(HANDSHAKE, connecting).await;
    let connected = connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
    let spoken = match &connected {
        Ok(server) => server.get_ref().1.alpn_protocol().map(<[u8]>::to_vec),
        Err(_) => offered.first().cloned(),
    };
    let is_h2 = spoken.as_deref() == Some(H2);
    let config = interceptor.authority.server(&name, spoken);
    let config = config.map_err(io::Error::other)?;
    let guest = TlsAcceptor::from(config).accept(guest).await?;
    let exchange = Arc::new(Exchange {
        interceptor,
        name,
        port,
    });
    match connected {
        Ok(server) if is_h2 => exchange.serve_h2(guest, server).await,
        Ok(server) => exchange.serve_h1(guest, server).await,
        Err(error) => exchange.tell(guest, is_h2, &error).await,
    }
}

/// The requests of one connection.
struct Exchange {
    interceptor: Arc<Interceptor>,
    /// What the client has asked for in TLS.
    name: String,
    port: u16,
}

impl Exchange {
    async fn serve_h1(self: Arc<Self>, guest: GuestTls, server: ServerTls) -> io::Result<()> {
        let (sender, connection) = client::conn::http1::Builder::new()
            .preserve_header_case(true)
            .max_headers(MAX_LINES)
            .handshake::<_, Incoming>(TokioIo::new(Fair::new(server)))
            .await
            .map_err(io::Error::other)?;
        let sender = Arc::new(AsyncMutex::new(sender));
        let no_http = NoHttp::default();
        let interim = Arc::new(Interim::default());
        let upgraded: Arc<Mutex<Option<(OnUpgrade, OnUpgrade)>>> = Arc::default();
        let service = service_fn(|request| {
            let (exchange, sender) = (Arc::clone(&self), Arc::clone(&sender));
            let (no_http, upgraded) = (no_http.clone(), Arc::clone(&upgraded));
            let interim = Arc::clone(&interim);
            async move {
                let mut request = match exchange.prepare(request) {
                    Ok(request) => request,
                    Err(refusal) => return Ok(refusal.answer()),
                };
                to_origin_form(request.uri_mut());
                let guest = hyper::upgrade::on(&mut request);
                let mut sender = sender.lock().await;
                interim.begin(&mut request);
                let answered = match sender.ready().await {
                    Ok(()) => sender.send_request(request).await,
                    Err(error) => Err(error),
                };
                let mut response = match answered {
                    Ok(response) => response,
                    Err(error) => match no_http.why(&error) {
                        Some(why) => return Ok(exchange.unreadable(&why)),
                        None => return Err(error),
                    },
                };
                if response.status() == StatusCode::SWITCHING_PROTOCOLS {
                    let server = hyper::upgrade::on(&mut response);
                    *upgraded.lock().unwrap_or_else(PoisonError::into_inner) =
                        Some((guest, server));
                }
                Ok::<_, hyper::Error>(response.map(Either::Left))
            }
        });
        let mut serving = pin!(
            server::conn::http1::Builder::new()
                .preserve_header_case(true)
                .max_buf_size(MAX_HEADERS as usize)
                .max_headers(MAX_LINES)
                .auto_date_header(false)
                .header_read_timeout(None)
                .serve_connection(TokioIo::new(guest), service)
                .with_upgrades()
        );
        let is_upgraded = || {
            let upgraded = upgraded.lock().unwrap_or_else(PoisonError::into_inner);
            upgraded.is_some()
        };
        let mut connection = Connection::new(connection.with_upgrades());
        let served = loop {
            tokio::select! {
                served = &mut serving => break served,
                () = interim.too_many.notified() => {
                    let why = format!("more than {MAX_INTERIM} interim answers");
                    no_http.0.get_or_init(|| why);
                    connection.close();
                    serving.as_mut().graceful_shutdown();
                }
                ended = connection.end(), if connection.is_open() => {
                    no_http.note(ended);
                    connection.close();
                    // What it has answered last may be that it is upgraded.
                    tokio::select! {
                        biased;
                        served = &mut serving => break served,
                        () = std::future::ready(()) => {}
                    }
                    if !is_upgraded() {
                        // After the answer that is under way, if there is one.
                        serving.as_mut().graceful_shutdown();
                    }
                }
            }
        };
        let pair = upgraded
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let Some((guest, server)) = pair.filter(|_| served.is_ok()) else {
            return served.map_err(io::Error::other);
        };
        if connection.is_open() {
            connection.end().await.map_err(io::Error::other)?;
        }
        let (guest, server) = tokio::try_join!(guest, server).map_err(io::Error::other)?;
        tokio::io::copy_bidirectional(&mut TokioIo::new(guest), &mut TokioIo::new(server)).await?;
        Ok(())
    }

    async fn serve_h2(self: Arc<Self>, guest: GuestTls, server: ServerTls) -> io::Result<()> {
        let (_tasks, executor) = Tasks::new();
        let (sender, connection) = client::conn::http2::Builder::new(executor.clone())
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_header_list_size(MAX_HEADERS)
            .max_send_buf_size(SEND_BUFFER)
            .handshake::<_, Lingering>(TokioIo::new(Fair::new(server)))
            .await
            .map_err(io::Error::other)?;
        let no_http = NoHttp::default();
        let service = service_fn(|request: Request<Incoming>| {
            let exchange = Arc::clone(&self);
            let (no_http, sender) = (no_http.clone(), sender.clone());
            let (answered, answer) = oneshot::channel();
            let request = request.map(|body| Lingering::new(body, answer));
            async move {
                let answer = exchange.ask(request, sender, &no_http).await;
                if let Ok(answer) = &answer {
                    let _ = answered.send(answer.status());
                }
                answer
            }
        });
        let mut serving = pin!(
            server::conn::http2::Builder::new(executor)
                .initial_stream_window_size(STREAM_WINDOW)
                .initial_connection_window_size(CONNECTION_WINDOW)
                .max_header_list_size(MAX_HEADERS)
                .max_concurrent_streams(MAX_STREAMS)
                .max_send_buf_size(SEND_BUFFER)
                .auto_date_header(false)
                .serve_connection(TokioIo::new(guest), service)
        );
        let mut connection = Connection::new(connection);
        loop {
            tokio::select! {
                served = &mut serving => return served.map_err(io::Error::other),
                ended = connection.end(), if connection.is_open() => {
                    no_http.note(ended);
                    connection.close();
                    serving.as_mut().graceful_shutdown();
                }
            }
        }
    }

    /// Sends a request of HTTP/2.
    async fn ask(
        &self,
        request: Request<Lingering>,
        mut sender: client::conn::http2::SendRequest<Lingering>,
        no_http: &NoHttp,
    ) -> Result<Response<Answer>, Unanswered> {
        let request = match self.prepare(request) {
            Ok(request) => request,
            Err(refusal) => return Ok(refusal.answer()),
        };
        let answered = match sender.ready().await {
            Ok(()) => sender.send_request(request).await,
            Err(error) => Err(error),
        };
        let error = match answered {
            Ok(response) => return Ok(response.map(Either::Left)),
            Err(error) => error,
        };
        if let Some(why) = no_http.why(&error) {
            return Ok(self.unreadable(&why));
        }
        if error.is_canceled() || error.is_closed() {
            return Err(Unanswered::Unseen(h2::Reason::REFUSED_STREAM.into()));
        }
        Err(Unanswered::Failed(error))
    }

    /// Answers what is asked with why the server could not be.
    async fn tell(&self, guest: GuestTls, is_h2: bool, error: &io::Error) -> io::Result<()> {
        let Self { name, port, .. } = self;
        tracing::warn!(%name, port, %error, "can't connect to a host of a secret");
        let text = format!("agentvm: can't make a TLS connection to {name}:{port}: {error}\n");
        let asked = Notify::new();
        let service = service_fn(|request: Request<Incoming>| {
            if is_h2 {
                let (answered, answer) = oneshot::channel();
                drop(Lingering::new(request.into_body(), answer));
                let _ = answered.send(StatusCode::BAD_GATEWAY);
            }
            asked.notify_one();
            let refusal = Refusal(StatusCode::BAD_GATEWAY, text.clone());
            async move { Ok::<_, Infallible>(refusal.answer()) }
        });
        let guest = TokioIo::new(guest);
        let told = if is_h2 {
            let (_tasks, executor) = Tasks::new();
            let serving = server::conn::http2::Builder::new(executor);
            let mut serving = pin!(serving.serve_connection(guest, service));
            tokio::select! {
                served = &mut serving => served,
                // The next connection may find the server well.
                () = asked.notified() => {
                    serving.as_mut().graceful_shutdown();
                    serving.await
                }
            }
        } else {
            let mut serving = server::conn::http1::Builder::new();
            serving.header_read_timeout(None).keep_alive(false);
            serving.serve_connection(guest, service).await
        };
        told.map_err(io::Error::other)
    }

    /// Tells the guest of an answer that is none.
    fn unreadable(&self, why: &str) -> Response<Answer> {
        let Self { name, port, .. } = self;
        tracing::warn!(%name, port, why, "a host of a secret answers with what is no HTTP");
        let text = format!("agentvm: the answer of {name}:{port} can't be read: {why}\n");
        Refusal(StatusCode::BAD_GATEWAY, text).answer()
    }

    /// What the server is sent for a request of the guest.
    fn prepare<B>(&self, request: Request<B>) -> Result<Request<B>, Refusal> {
        let (mut parts, body) = request.into_parts();
        let bound = self.interceptor.bound();
        let sightings = &self.interceptor.sightings;
        // A tunnel would lead past this, and an answer to the others has all that was sent. Some servers
        // don't mind how a method is written.
        let refused = ["CONNECT", "TRACE", "TRACK"];
        let method = parts.method.as_str();
        if refused
            .iter()
            .any(|refused| method.eq_ignore_ascii_case(refused))
        {
            let text = format!("agentvm: {} is not passed on\n", parts.method);
            return Err(Refusal(StatusCode::METHOD_NOT_ALLOWED, text));
        }
        let one_host = || {
            let text = "agentvm: a request has one host\n".to_owned();
            Refusal(StatusCode::BAD_REQUEST, text)
        };
        let authority = match asked_for(&parts) {
            Some(authority) if self.is_own(&authority) => authority,
            Some(authority) => {
                for (secret, place) in bound.seen_in_head(&parts) {
                    sightings.add(secret, authority.host().to_owned(), self.port, place);
                }
                let text = format!("agentvm: this connection is to {} alone\n", self.name);
                return Err(Refusal(StatusCode::MISDIRECTED_REQUEST, text));
            }
            None => return Err(one_host()),
        };
        // The length of the body is said anew, once, from how it was read.
        let mut codings = parts.headers.get_all(TRANSFER_ENCODING).into_iter();
        if let Some(coding) = codings.next() {
            let is_chunked = coding.as_bytes().eq_ignore_ascii_case(CHUNKED.as_bytes());
            if !is_chunked || codings.next().is_some() {
                let text = "agentvm: the only transfer coding that is known here is chunked\n";
                return Err(Refusal(StatusCode::NOT_IMPLEMENTED, text.to_owned()));
            }
            let chunked = HeaderValue::from_static(CHUNKED);
            parts.headers.insert(TRANSFER_ENCODING, chunked);
            parts.headers.remove(CONTENT_LENGTH);
        }
        // The other version's upgrade, which is for no server of this one's connection.
        let mut upgrades = parts.headers.get_all(UPGRADE).into_iter();
        let is_h2c = |to: &HeaderValue| {
            let mut protocols = to.as_bytes().split(|byte| *byte == b',');
            protocols.any(|protocol| protocol.trim_ascii().eq_ignore_ascii_case(b"h2c"))
        };
        if upgrades.any(is_h2c) {
            parts.headers.remove(UPGRADE);
            parts.headers.remove("http2-settings");
        }
        // What names it in its target only, which is sent without.
        if parts.version != Version::HTTP_2 && !parts.headers.contains_key(HOST) {
            let host = HeaderValue::from_str(authority.as_str()).map_err(|_| one_host())?;
            parts.headers.insert(HOST, host);
        }
        // What names its host in a header only, as HTTP/2 may.
        if parts.version == Version::HTTP_2 && parts.uri.authority().is_none() {
            let mut uri = std::mem::take(&mut parts.uri).into_parts();
            uri.scheme = Some(Scheme::HTTPS);
            uri.authority = Some(authority);
            parts.uri = Uri::from_parts(uri).map_err(|_| one_host())?;
        }
        let left = bound
            .replace(&self.name, self.port, &mut parts)
            .map_err(|TooMany| {
                let text = "agentvm: more placeholders than a server takes values\n".to_owned();
                Refusal(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, text)
            })?;
        for (secret, place) in left {
            sightings.add(secret, self.name.clone(), self.port, place);
        }
        Ok(Request::from_parts(parts, body))
    }

    fn is_own(&self, authority: &Authority) -> bool {
        let host = authority.host();
        let host = host.strip_suffix('.').unwrap_or(host);
        host.eq_ignore_ascii_case(&self.name) && port_of(authority) == Some(self.port)
    }
}

/// `None`: it has one that can't be read, or a user before its host.
fn port_of(authority: &Authority) -> Option<u16> {
    let port = authority.as_str().strip_prefix(authority.host())?;
    match port.strip_prefix(':') {
        None | Some("") => Some(443),
        Some(_) => authority.port_u16(),
    }
}

/// The one host that all parts of a request agree on.
fn asked_for(parts: &Parts) -> Option<Authority> {
    let mut hosts = parts.headers.get_all(HOST).into_iter();
    let header = match hosts.next() {
        Some(host) => Some(Authority::try_from(host.as_bytes()).ok()?),
        None => None,
    };
    if hosts.next().is_some() {
        return None;
    }
    match (parts.uri.authority(), header) {
        (Some(uri), Some(header)) if *uri != header => None,
        (Some(uri), _) => Some(uri.clone()),
        (None, header) => header,
    }
}

/// As servers want it, also of a client that took this for a proxy.
fn to_origin_form(uri: &mut Uri) {
    if uri.authority().is_some() {
        let path = uri.path_and_query().cloned();
        *uri = path.map_or_else(Uri::default, Uri::from);
    }
}

impl Refusal {
    fn answer(self) -> Response<Answer> {
        let Self(status, text) = self;
        let mut response = Response::new(Either::Right(Full::new(text.into())));
        *response.status_mut() = status;
        let plain = HeaderValue::from_static("text/plain; charset=utf-8");
        response.headers_mut().insert(CONTENT_TYPE, plain);
        response
    }
}

/// The connection to a server, until it has ended: what waits for it then hears of it, as it is dropped.
struct Connection<F>(Option<Pin<Box<F>>>);

impl<F: Future> Connection<F> {
    fn new(connection: F) -> Self {
        Self(Some(Box::pin(connection)))
    }

    fn is_open(&self) -> bool {
        self.0.is_some()
    }

    async fn end(&mut self) -> F::Output {
        match &mut self.0 {
            Some(connection) => connection.await,
            None => std::future::pending().await,
        }
    }

    fn close(&mut self) {
        self.0 = None;
    }
}

/// Interim answers (103 and its like) to the request that is under way, which nobody is told.
#[derive(Default)]
struct Interim {
    count: AtomicU32,
    too_many: Notify,
}

impl Interim {
    fn begin<B>(self: &Arc<Self>, request: &mut Request<B>) {
        self.count.store(0, Ordering::Relaxed);
        let own = Arc::clone(self);
        hyper::ext::on_informational(request, move |_answer| {
            if own.count.fetch_add(1, Ordering::Relaxed) == MAX_INTERIM {
                own.too_many.notify_one();
            }
        });
    }
}

/// Why what a server sends is no HTTP, if that ended its connection. Its requests may hear of the end alone.
#[derive(Clone, Default)]
struct NoHttp(Arc<OnceLock<String>>);

impl NoHttp {
    fn note(&self, ended: hyper::Result<()>) {
        if let Err(error) = ended
            && let Some(why) = why_no_http(&error)
        {
            self.0.get_or_init(|| why);
        }
    }

    /// Why a request got no answer, if it is that.
    fn why(&self, error: &hyper::Error) -> Option<String> {
        why_no_http(error).or_else(|| self.0.get().cloned())
    }
}

fn why_no_http(error: &hyper::Error) -> Option<String> {
    let Some(cause) = error.source() else {
        let is_an_end = error.is_canceled()
            || error.is_closed()
            || error.is_incomplete_message()
            || error.is_user();
        return (!is_an_end).then(|| error.to_string());
    };
    let is_no_http = match cause.downcast_ref::<h2::Error>() {
        // What the server has reset itself is passed on as that.
        Some(cause) => cause.is_library(),
        None => error.is_parse(),
    };
    is_no_http.then(|| format!("{error}: {cause}"))
}

/// What HTTP/2 does beside its connection, which ends with it.
struct Tasks {
    _set: Arc<Mutex<JoinSet<()>>>,
}

#[derive(Clone)]
struct Spawn(Weak<Mutex<JoinSet<()>>>);

impl Tasks {
    fn new() -> (Self, Spawn) {
        let set = Arc::default();
        let spawn = Spawn(Arc::downgrade(&set));
        (Self { _set: set }, spawn)
    }
}

impl<F> rt::Executor<F> for Spawn
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    fn execute(&self, task: F) {
        if let Some(set) = self.0.upgrade() {
            let mut set = set.lock().unwrap_or_else(PoisonError::into_inner);
            while set.try_join_next().is_some() {}
            set.spawn(async {
                task.await;
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_that_can_not_be_read_is_none() {
        for (authority, port) in [
            ("a.test", Some(443)),
            ("a.test:", Some(443)),
            ("a.test:8443", Some(8443)),
            ("[::1]:8443", Some(8443)),
            ("a.test:99999", None),
            ("user@a.test", None),
        ] {
            let authority: Authority = authority.parse().expect("an authority");
            assert_eq!(port_of(&authority), port, "{authority}");
        }
    }
}
