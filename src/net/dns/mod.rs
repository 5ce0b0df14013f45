//! The resolver of a VM, at 127.0.0.53 inside.
//!
//! Programs of the VM are hostile senders: [`answer_plan`] decides, without doing anything, what a
//! message deserves; only a plain question gets as far as the host's resolvers. The host's
//! `/etc/hosts` and its search domains stay its own.

mod answer;
mod query;
mod upstream;

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

pub use self::query::{Plan, Question, answer_plan};

use self::answer::{answer, encode, refuse};
use self::upstream::Upstream;
use super::denials::{Denials, Protocol, Refused};
use super::names::Names;
use super::policy::{Policy, Reason};
use super::rate::Bucket;
use super::{Traffic, host_address, proxy};

/// Questions of one VM that are being looked up. More wait in the socket's buffer, and are lost
/// where that is full, as DNS over UDP may be.
const MAX_QUESTIONS: usize = 64;

/// DNS connections of one VM. More wait in the listener's backlog.
const MAX_CONNECTIONS: usize = 32;

/// Questions of one VM in a second, after so many at once. More wait as above.
const QUESTIONS_PER_SECOND: u32 = 128;
const QUESTIONS_AT_ONCE: u32 = 256;

/// A DNS connection without a question for this long is closed (RFC 7766, section 6.2.3).
const IDLE: Duration = Duration::from_secs(10);

/// Longer questions do not exist: a name has 255 bytes.
const MAX_UDP_QUESTION: usize = 4096;

const DNS_PORT: u16 = 53;

/// Longest message over TCP: its length has two bytes.
const MAX_TCP_ANSWER: usize = u16::MAX as usize;

/// Answers the questions of one VM.
#[derive(Debug)]
pub(super) struct Server {
    /// As it is now.
    policy: watch::Receiver<Arc<Policy>>,
    names: Arc<Names>,
    denials: Denials,
    upstream: Upstream,
    questions: Arc<Semaphore>,
    rate: Bucket,
    traffic: Arc<Traffic>,
}

impl Server {
    pub(super) fn new(
        policy: watch::Receiver<Arc<Policy>>,
        names: Arc<Names>,
        denials: Denials,
        traffic: Arc<Traffic>,
    ) -> Self {
        Self {
            policy,
            names,
            denials,
            traffic,
            upstream: Upstream::default(),
            questions: Arc::new(Semaphore::new(MAX_QUESTIONS)),
            rate: Bucket::new(QUESTIONS_PER_SECOND, QUESTIONS_AT_ONCE),
        }
    }

    /// The answer to a message, no longer than `limit` (over UDP also no longer than the message
    /// asks for). `None`: the message deserves none.
    async fn answer(&self, message: &[u8], limit: Limit) -> Option<Vec<u8>> {
        self.traffic.send(message.len());
        let answer = self.answer_to(message, limit).await?;
        self.traffic.receive(answer.len());
        Some(answer)
    }

    async fn answer_to(&self, message: &[u8], limit: Limit) -> Option<Vec<u8>> {
        let question = match answer_plan(message) {
            Plan::Ignore => return None,
            Plan::Answer(answer) => return encode(&answer, MAX_TCP_ANSWER),
            Plan::LookUp(question) => question,
        };
        let limit = match limit {
            Limit::Datagram => question.max_datagram(),
            Limit::Stream => MAX_TCP_ANSWER,
        };
        let name = question.plain_name();
        // Before anybody outside hears of it: a name can carry a message.
        let denied = self.policy.borrow().judge_name(&name);
        if let Some(reason) = denied {
            self.report(&name, reason);
            return encode(&refuse(question), limit);
        }
        // A connection to an IPv6 address succeeds inside, whatever the host can reach: programs
        // would not fall back to IPv4.
        let found = if question.asks_for_ipv6() && !host_address::has_ipv6_route() {
            Ok(Vec::new())
        } else {
            self.upstream.look_up(&question).await
        };
        // As it is by now.
        let policy = Arc::clone(&self.policy.borrow());
        let (answer, refused) = answer(question, found, &policy);
        if let Some(reason) = refused {
            self.report(&name, reason);
        }
        let (name, now) = (Arc::from(name), Instant::now());
        for (address, ttl) in answer::addresses(&answer) {
            self.names.record(&name, address, ttl, now);
        }
        encode(&answer, limit)
    }

    fn report(&self, name: &str, reason: Reason) {
        self.denials.report(Refused {
            host: name.to_owned(),
            port: DNS_PORT,
            protocol: Protocol::Dns,
            rule: Some(reason),
        });
    }
}

#[derive(Clone, Copy)]
enum Limit {
    Datagram,
    Stream,
}

pub(super) async fn serve_udp(socket: UdpSocket, server: Arc<Server>) {
    let socket = Arc::new(socket);
    let mut lookups = JoinSet::new();
    let mut buffer = vec![0; MAX_UDP_QUESTION];
    while let Ok(slot) = Arc::clone(&server.questions).acquire_owned().await {
        server.rate.take().await;
        let received = loop {
            tokio::select! {
                received = socket.recv_from(&mut buffer) => break received,
                Some(_) = lookups.join_next() => {}
            }
        };
        match received {
            Ok((len, from)) => {
                let message = buffer[..len].to_vec();
                let (socket, server) = (Arc::clone(&socket), Arc::clone(&server));
                lookups.spawn(async move {
                    if let Some(answer) = server.answer(&message, Limit::Datagram).await
                        && let Err(error) = socket.send_to(&answer, from).await
                    {
                        tracing::debug!(%error, "a DNS answer could not be sent");
                    }
                    drop(slot);
                });
            }
            Err(error) => {
                tracing::error!(%error, "a VM's DNS can't receive any more");
                return;
            }
        }
    }
}

pub(super) async fn serve_tcp(listener: TcpListener, server: Arc<Server>) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    while let Ok(slot) = Arc::clone(&slots).acquire_owned().await {
        let stream = loop {
            tokio::select! {
                accepted = proxy::accept(&listener) => break accepted,
                Some(_) = connections.join_next() => {}
            }
        };
        match stream {
            Ok(stream) => {
                let server = Arc::clone(&server);
                connections.spawn(async move {
                    if let Err(error) = serve_stream(stream, &server).await {
                        tracing::debug!(%error, "a VM's DNS connection ended with an error");
                    }
                    drop(slot);
                });
            }
            Err(error) => {
                tracing::error!(%error, "a VM's DNS can't accept connections any more");
                return;
            }
        }
    }
}

/// One question after the other, each with its length before it.
async fn serve_stream(mut stream: TcpStream, server: &Server) -> io::Result<()> {
    loop {
        let read = tokio::time::timeout(IDLE, read_message(&mut stream));
        let Ok(Some(message)) = read.await.unwrap_or(Ok(None)) else {
            return Ok(());
        };
        let Ok(slot) = server.questions.acquire().await else {
            return Ok(());
        };
        server.rate.take().await;
        let Some(answer) = server.answer(&message, Limit::Stream).await else {
            return Ok(());
        };
        drop(slot);
        let len = u16::try_from(answer.len()).map_err(io::Error::other)?;
        let framed = [&len.to_be_bytes()[..], &answer].concat();
        let written = tokio::time::timeout(IDLE, stream.write_all(&framed));
        written.await??;
    }
}

/// `None` at the end of the stream.
async fn read_message(stream: &mut TcpStream) -> io::Result<Option<Vec<u8>>> {
    let len = match stream.read_u16().await {
        Ok(len) => len,
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut message = vec![0; usize::from(len)];
    stream.read_exact(&mut message).await?;
    Ok(Some(message))
}
