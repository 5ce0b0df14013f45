//! A TLS server on loopback that says what it was asked, and the authority that has signed for it.

use std::convert::Infallible;
use std::fmt::Write as _;
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::body::{Body, Bytes, Frame, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode, Version, rt, server};
use hyper_util::rt::TokioIo;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::ServerConfig;
use rustls::crypto::ring;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_rustls::TlsAcceptor;

/// The authority of servers.
pub(super) struct Pki(CertifiedIssuer<'static, KeyPair>);

impl Pki {
    pub(super) fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    /// Has this process trust it, and nobody else. In a child, before it has threads.
    pub(super) fn trust(&self, directory: &Path) {
        self.name_in("SSL_CERT_FILE", directory);
    }

    /// Names its file in a variable. As [`Self::trust`].
    pub(super) fn name_in(&self, variable: &str, directory: &Path) {
        let path = directory.join(variable);
        std::fs::write(&path, self.0.pem()).unwrap();
        // SAFETY: nothing else runs.
        unsafe { std::env::set_var(variable, path) };
    }

    pub(super) fn config(&self, protocols: &[&str]) -> ServerConfig {
        let key = KeyPair::generate().unwrap();
        let names = ["localhost", "other.localhost", "site.example"];
        let names = names.map(str::to_owned).to_vec();
        let params = CertificateParams::new(names).unwrap();
        let certificate = params.signed_by(&key, &self.0).unwrap();
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], key)
            .unwrap();
        config.alpn_protocols = protocols.iter().map(|p| p.as_bytes().to_vec()).collect();
        config
    }
}

pub(super) struct Server {
    pub(super) port: u16,
    /// Heads of requests so far.
    pub(super) seen: Arc<Mutex<Vec<String>>>,
    /// Requests to `/hang` that are open.
    pub(super) hanging: watch::Receiver<usize>,
}

impl Server {
    pub(super) async fn start(pki: &Pki, protocols: &[&str]) -> Self {
        Self::at("127.0.0.1:0", pki.config(protocols)).await
    }

    pub(super) async fn at(address: &str, config: ServerConfig) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let (hanging_sender, hanging) = watch::channel(0);
        let seen = Arc::default();
        let service = Arc::new(Service {
            seen: Arc::clone(&seen),
            hanging: hanging_sender,
            acknowledged: Semaphore::new(0),
        });
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                stream.set_nodelay(true).unwrap();
                let (acceptor, service) = (acceptor.clone(), Arc::clone(&service));
                tokio::spawn(async move {
                    let Ok(stream) = acceptor.accept(stream).await else {
                        return;
                    };
                    let is_h2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
                    let answer = service_fn(move |request| {
                        let service = Arc::clone(&service);
                        async move { Ok::<_, Infallible>(service.answer(request).await) }
                    });
                    let stream = TokioIo::new(stream);
                    if is_h2 {
                        let server = server::conn::http2::Builder::new(Spawn);
                        drop(server.serve_connection(stream, answer).await);
                    } else {
                        let mut server = server::conn::http1::Builder::new();
                        server.header_read_timeout(None).max_headers(1000);
                        let served = server.serve_connection(stream, answer).with_upgrades();
                        drop(served.await);
                    }
                });
            }
        });
        Self {
            port,
            seen,
            hanging,
        }
    }

    pub(super) fn url(&self, path: &str) -> String {
        format!("https://localhost:{}{path}", self.port)
    }

    /// The last request's head.
    pub(super) fn last(&self) -> String {
        self.seen
            .lock()
            .unwrap()
            .last()
            .cloned()
            .unwrap_or_default()
    }
}

struct Service {
    seen: Arc<Mutex<Vec<String>>>,
    hanging: watch::Sender<usize>,
    acknowledged: Semaphore,
}

impl Service {
    async fn answer(self: &Arc<Self>, mut request: Request<Incoming>) -> Response<Pieces> {
        let head = head(&request);
        self.seen.lock().unwrap().push(head.clone());
        let path = request.uri().path().to_owned();
        match &*path {
            // A piece, and the next when the one before was acknowledged.
            "/stream" => {
                let (sender, body) = Pieces::new();
                let own = Arc::clone(self);
                tokio::spawn(async move {
                    for piece in ["one\n", "two\n", "three\n"] {
                        if sender.send(piece.into()).await.is_err() {
                            return;
                        }
                        own.acknowledged.acquire().await.unwrap().forget();
                    }
                });
                Response::new(body)
            }
            "/acknowledge" => {
                self.acknowledged.add_permits(1);
                Response::new(Pieces::of(String::new()))
            }
            "/count" => {
                let mut count = 0;
                let mut body = request.into_body();
                while let Some(frame) = http_body_util::BodyExt::frame(&mut body).await {
                    if let Ok(frame) = frame {
                        count += frame.data_ref().map_or(0, Bytes::len);
                    }
                }
                Response::new(Pieces::of(count.to_string()))
            }
            "/much" => {
                let (sender, body) = Pieces::new();
                tokio::spawn(async move {
                    let piece = "x".repeat(1 << 16);
                    for _ in 0..1024 {
                        if sender.send(piece.clone()).await.is_err() {
                            return;
                        }
                    }
                });
                Response::new(body)
            }
            "/hang" => {
                let hanging = Hanging(self.hanging.clone());
                hanging.0.send_modify(|hanging| *hanging += 1);
                tokio::time::sleep(Duration::from_mins(10)).await;
                drop(hanging);
                Response::new(Pieces::of(String::new()))
            }
            "/upgrade" => {
                let upgraded = hyper::upgrade::on(&mut request);
                tokio::spawn(async move {
                    let mut stream = TokioIo::new(upgraded.await.unwrap());
                    let mut buffer = [0; 1024];
                    while let Ok(count @ 1..) = stream.read(&mut buffer).await {
                        stream.write_all(&buffer[..count]).await.unwrap();
                    }
                });
                let response = Response::builder().status(StatusCode::SWITCHING_PROTOCOLS);
                let response = response
                    .header("connection", "upgrade")
                    .header("upgrade", "echo");
                response.body(Pieces::of(String::new())).unwrap()
            }
            // At once, whatever is still to come of the request.
            "/refused" => {
                let response = Response::builder().status(StatusCode::PAYLOAD_TOO_LARGE);
                response.body(Pieces::of("too large".to_owned())).unwrap()
            }
            _ => Response::new(Pieces::of(head)),
        }
    }
}

fn head(request: &Request<Incoming>) -> String {
    let version = if request.version() == Version::HTTP_2 {
        "h2"
    } else {
        "h1"
    };
    let mut head = format!("{version} {} {}\n", request.method(), request.uri());
    for (name, value) in request.headers() {
        writeln!(head, "{name}: {}", value.to_str().unwrap()).unwrap();
    }
    head
}

struct Hanging(watch::Sender<usize>);

impl Drop for Hanging {
    fn drop(&mut self) {
        self.0.send_modify(|hanging| *hanging -= 1);
    }
}

/// A body of pieces as they come.
struct Pieces(mpsc::Receiver<String>);

impl Pieces {
    fn new() -> (mpsc::Sender<String>, Self) {
        let (sender, receiver) = mpsc::channel(1);
        (sender, Self(receiver))
    }

    fn of(text: String) -> Self {
        let (sender, body) = Self::new();
        sender.try_send(text).unwrap();
        body
    }
}

impl Body for Pieces {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let piece = self.0.poll_recv(cx);
        piece.map(|piece| piece.map(|piece| Ok(Frame::data(piece.into()))))
    }
}

#[derive(Clone)]
struct Spawn;

impl<F: Future<Output = ()> + Send + 'static> rt::Executor<F> for Spawn {
    fn execute(&self, task: F) {
        tokio::spawn(task);
    }
}
