//! One agent process's pipes as typed requests and answers.

use std::collections::HashMap;
use std::io;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use serde::Serialize;
use serde_json::value::RawValue;
use thiserror::Error;
use tokio::sync::{Notify, mpsc, oneshot, watch};

use super::line::{Line, LineError, LineReader};
use super::message::{Message, RpcError, too_complex};
use crate::pipe::{self, PipeEnd};

/// Lines on their way to the agent. An agent that reads none of them makes the next writer wait.
const OUTGOING: usize = 16;

/// Bytes of a request's id and of its method, both of which an answer repeats, and one that waits keeps.
const MAX_ID: usize = 1024;
const MAX_METHOD: usize = 256;

/// Receives what the agent says on its own.
///
/// Called by the one reading task, in order: the next line
/// is not read before the call returns, which is how a slow consumer pushes back on the agent.
/// `Break` ends the connection.
#[async_trait]
pub trait Handler: Send + Sync + 'static {
    /// `line` is the whole message, `params` a part of it.
    async fn notification(
        &self,
        line: &str,
        method: &str,
        params: Option<&RawValue>,
    ) -> ControlFlow<()>;

    /// To be answered with [`Connection::respond`], now or later.
    async fn request(&self, connection: &Connection, request: Request<'_>) -> ControlFlow<()>;

    /// The answer to a request of this method came, an error is `None`; whoever waits for it is woken
    /// after this. What is handled from now on was sent after it.
    fn answered(&self, _method: &str, _result: Option<&RawValue>) {}

    /// A line that is no JSON-RPC message, or an answer to nothing.
    async fn stray(&self, line: &[u8]) -> ControlFlow<()>;
}

/// A request of the agent.
#[derive(Debug)]
pub struct Request<'a> {
    pub id: &'a RawValue,
    pub method: &'a str,
    pub params: Option<&'a RawValue>,
    /// The whole message.
    pub line: &'a str,
}

/// Why nothing more comes from the agent.
#[derive(Debug, Clone, Error)]
pub enum Closed {
    #[error("it closed its output")]
    Eof,
    #[error("its output broke the protocol: {0}")]
    Protocol(String),
    #[error("its output can't be read: {0}")]
    Io(String),
    #[error("the connection was ended")]
    Ended,
}

/// Why a request has no result.
#[derive(Debug, Clone, Error)]
pub enum RequestError {
    /// The agent answered with an error.
    #[error("{0}")]
    Rpc(RpcError),
    /// There will be no answer.
    #[error("{0}")]
    Closed(Closed),
}

/// The client's side of a connection; cheap to clone. Dropping the last clone closes the agent's
/// stdin.
#[derive(Clone)]
pub struct Connection {
    outgoing: mpsc::Sender<Vec<u8>>,
    shared: Arc<Shared>,
}

struct Shared {
    next_id: AtomicU64,
    /// Fires when nobody wants to hear the agent any more.
    ended: Notify,
    /// Fires when the agent's stdin is to be closed.
    input_closed: Notify,
    state: Mutex<State>,
    closed: watch::Sender<Option<Closed>>,
}

#[derive(Default)]
struct State {
    pending: HashMap<u64, Waiting>,
    closed: Option<Closed>,
}

/// A request that waits for its answer.
struct Waiting {
    method: Box<str>,
    answered: oneshot::Sender<Result<Box<RawValue>, RequestError>>,
}

/// A request, or without `id` a notification.
#[derive(Serialize)]
struct Call<'a, P> {
    jsonrpc: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<u64>,
    method: &'a str,
    params: &'a P,
}

#[derive(Serialize)]
struct Answer<'a> {
    jsonrpc: &'static str,
    id: &'a RawValue,
    #[serde(skip_serializing_if = "Option::is_none")]
    result: Option<&'a RawValue>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<&'a RpcError>,
}

impl Connection {
    /// Takes over the pipes of an agent. Lines of more than `limit` bytes end the
    /// connection.
    pub fn start(
        stdin: impl Into<PipeEnd>,
        stdout: impl Into<PipeEnd>,
        limit: usize,
        handler: Arc<dyn Handler>,
    ) -> io::Result<Self> {
        let stdin = pipe::Writer::new(stdin)?;
        let stdout = pipe::Reader::new(stdout)?;
        let (outgoing, lines) = mpsc::channel(OUTGOING);
        let connection = Self {
            outgoing,
            shared: Arc::new(Shared {
                next_id: AtomicU64::new(1),
                ended: Notify::new(),
                input_closed: Notify::new(),
                state: Mutex::default(),
                closed: watch::Sender::new(None),
            }),
        };
        let shared = Arc::clone(&connection.shared);
        tokio::spawn(async move {
            tokio::select! {
                () = write(stdin, lines) => {}
                () = shared.input_closed.notified() => {}
            }
        });
        // The reader must not keep the agent's stdin open: that is how an agent is told to end.
        let (outgoing, shared) = (connection.outgoing.downgrade(), connection.shared.clone());
        tokio::spawn(async move {
            let mut reading = Reading {
                shared: Arc::clone(&shared),
                closed: Closed::Ended,
            };
            reading.closed = tokio::select! {
                closed = read(stdout, limit, &*handler, &outgoing, &shared) => closed,
                () = shared.ended.notified() => Closed::Ended,
            };
        });
        Ok(connection)
    }

    /// Sends a request and waits for its answer, however long that takes.
    pub async fn request(
        &self,
        method: &str,
        params: &(impl Serialize + Sync),
    ) -> Result<Box<RawValue>, RequestError> {
        self.start_request(method, params).await.wait().await
    }

    /// Sends a request; what is sent from now on reaches the agent after it. A caller that drops the
    /// result loses the answer, nothing else.
    pub async fn start_request(
        &self,
        method: &str,
        params: &(impl Serialize + Sync),
    ) -> PendingAnswer {
        let id = self.shared.next_id.fetch_add(1, Ordering::Relaxed);
        let (answered, answer) = oneshot::channel();
        {
            let mut state = self.shared.state();
            // Once closed, nobody would take it out again.
            if state.closed.is_none() {
                let method = method.into();
                state.pending.insert(id, Waiting { method, answered });
            }
        }
        let pending = PendingAnswer {
            answer,
            forget: Forget {
                shared: Arc::clone(&self.shared),
                id,
            },
        };
        self.send(&Call {
            jsonrpc: "2.0",
            id: Some(id),
            method,
            params,
        })
        .await;
        pending
    }

    /// Sends a notification. A connection that is closed loses it.
    pub async fn notify(&self, method: &str, params: &(impl Serialize + Sync)) {
        self.send(&Call {
            jsonrpc: "2.0",
            id: None,
            method,
            params,
        })
        .await;
    }

    /// Answers a request of the agent.
    pub async fn respond(&self, id: &RawValue, answer: Result<&RawValue, &RpcError>) {
        self.send(&Answer {
            jsonrpc: "2.0",
            id,
            result: answer.ok(),
            error: answer.err(),
        })
        .await;
    }

    /// `Some` once nothing more comes from the agent.
    #[must_use]
    pub fn closed(&self) -> watch::Receiver<Option<Closed>> {
        self.shared.closed.subscribe()
    }

    /// Closes the agent's stdin, which tells it to end.
    pub fn close_input(&self) {
        self.shared.input_closed.notify_one();
    }

    /// Stops listening, although the agent's output may still be open: something that it started can
    /// hold the pipe longer than the agent lives.
    pub fn end(&self) {
        self.shared.ended.notify_one();
    }

    async fn send(&self, message: &(impl Serialize + Sync)) {
        // These are maps with string keys: serialising them can't fail.
        let mut line = serde_json::to_vec(message).unwrap_or_default();
        line.push(b'\n');
        // A closed channel: the agent reads no more, and `closed` will say why.
        drop(self.outgoing.send(line).await);
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn why(&self) -> Closed {
        self.state().closed.clone().unwrap_or(Closed::Eof)
    }

    fn close(&self, why: Closed) {
        let pending = {
            let mut state = self.state();
            state.closed = Some(why.clone());
            std::mem::take(&mut state.pending)
        };
        self.closed.send_replace(Some(why));
        // Nobody writes to it any more either: what a dead agent left running may hold the reading end,
        // and whoever waits for room would wait for ever.
        self.input_closed.notify_one();
        drop(pending);
    }
}

/// The reading task: whatever ends it, a panic of the handler too, nobody waits for it any more.
struct Reading {
    shared: Arc<Shared>,
    closed: Closed,
}

impl Drop for Reading {
    fn drop(&mut self) {
        self.shared.close(self.closed.clone());
    }
}

/// The answer to a request that has been sent.
#[must_use = "dropping it loses the answer"]
pub struct PendingAnswer {
    answer: oneshot::Receiver<Result<Box<RawValue>, RequestError>>,
    forget: Forget,
}

impl PendingAnswer {
    /// Everything that the agent sent before the answer has been handled when this returns.
    pub async fn wait(self) -> Result<Box<RawValue>, RequestError> {
        match self.answer.await {
            Ok(answer) => answer,
            Err(_dropped) => Err(RequestError::Closed(self.forget.shared.why())),
        }
    }
}

/// Takes a request out of the table when nobody waits for its answer any more.
struct Forget {
    shared: Arc<Shared>,
    id: u64,
}

impl Drop for Forget {
    fn drop(&mut self) {
        self.shared.state().pending.remove(&self.id);
    }
}

/// Writes whole lines: a caller that gives up never leaves half a line behind.
async fn write(mut stdin: pipe::Writer, mut lines: mpsc::Receiver<Vec<u8>>) {
    while let Some(line) = lines.recv().await {
        if stdin.write_all(&line).await.is_err() {
            // The agent closed its stdin or died; the reading side finds out which.
            return;
        }
    }
}

async fn read(
    stdout: pipe::Reader,
    limit: usize,
    handler: &dyn Handler,
    outgoing: &mpsc::WeakSender<Vec<u8>>,
    shared: &Arc<Shared>,
) -> Closed {
    let mut lines = LineReader::new(stdout, limit);
    loop {
        let line = match lines.next().await {
            Ok(Line::Whole(line)) => line,
            Ok(Line::End { rest }) => {
                // It died in the middle of this; whoever looks for the reason wants to see it.
                if !rest.is_empty() {
                    let _ends_anyway = handler.stray(rest).await;
                }
                return Closed::Eof;
            }
            Err(error @ LineError::TooLong { .. }) => return Closed::Protocol(error.to_string()),
            Err(LineError::Io(error)) => return Closed::Io(error.to_string()),
        };
        let line = line.trim_ascii();
        if line.is_empty() {
            continue;
        }
        let message = std::str::from_utf8(line)
            .ok()
            .and_then(|text| Some((text, Message::parse(text)?)));
        if message.is_some()
            && let Some(how) = too_complex(line)
        {
            return Closed::Protocol(format!("a message {how}"));
        }
        let flow = match message {
            Some((line, Message::Notification { method, params })) => {
                handler.notification(line, &method, params).await
            }
            Some((_, Message::Request { id, .. })) if id.get().len() > MAX_ID => {
                return Closed::Protocol(format!(
                    "a request whose id has more than {MAX_ID} bytes"
                ));
            }
            Some((_, Message::Request { method, .. })) if method.len() > MAX_METHOD => {
                let problem = format!("a request whose method has more than {MAX_METHOD} bytes");
                return Closed::Protocol(problem);
            }
            Some((line, Message::Request { id, method, params })) => {
                // Without a client that could still answer there is nobody to ask.
                let Some(outgoing) = outgoing.upgrade() else {
                    continue;
                };
                let connection = Connection {
                    outgoing,
                    shared: Arc::clone(shared),
                };
                let request = Request {
                    id,
                    method: &method,
                    params,
                    line,
                };
                handler.request(&connection, request).await
            }
            Some((text, Message::Response { id, result })) => {
                let id: Option<u64> = serde_json::from_str(id.get()).ok();
                let waiting = id.and_then(|id| shared.state().pending.remove(&id));
                match waiting {
                    Some(waiting) => {
                        handler.answered(&waiting.method, result.as_ref().ok().copied());
                        let answer = result.map(ToOwned::to_owned).map_err(RequestError::Rpc);
                        // A caller that stopped waiting has lost interest in the answer.
                        drop(waiting.answered.send(answer));
                        ControlFlow::Continue(())
                    }
                    None => handler.stray(text.as_bytes()).await,
                }
            }
            None => handler.stray(line).await,
        };
        if flow.is_break() {
            return Closed::Ended;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{BufRead, BufReader, Write};

    use super::*;
    use crate::acp::message::{MAX_NESTING, MAX_VALUES};

    /// Records what it hears.
    #[derive(Default)]
    struct Recorder(Mutex<Vec<String>>);

    impl Recorder {
        fn add(&self, text: String) {
            self.0.lock().expect("no panic").push(text);
        }
    }

    #[async_trait]
    impl Handler for Recorder {
        async fn notification(
            &self,
            _line: &str,
            method: &str,
            _params: Option<&RawValue>,
        ) -> ControlFlow<()> {
            self.add(method.to_owned());
            ControlFlow::Continue(())
        }

        async fn request(&self, connection: &Connection, request: Request<'_>) -> ControlFlow<()> {
            let error = RpcError::method_not_found(request.method);
            connection.respond(request.id, Err(&error)).await;
            ControlFlow::Continue(())
        }

        async fn stray(&self, line: &[u8]) -> ControlFlow<()> {
            self.add(format!("stray {}", String::from_utf8_lossy(line)));
            ControlFlow::Continue(())
        }
    }

    struct Agent<H = Recorder> {
        connection: Connection,
        heard: Arc<H>,
        stdin: BufReader<File>,
        stdout: File,
    }

    fn agent() -> Agent {
        agent_heard_by(Arc::new(Recorder::default()))
    }

    fn agent_heard_by<H: Handler>(heard: Arc<H>) -> Agent<H> {
        agent_with(10_000, heard)
    }

    fn agent_with<H: Handler>(limit: usize, heard: Arc<H>) -> Agent<H> {
        let pipe = || nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).expect("a pipe");
        let ((stdin_read, stdin), (stdout, stdout_write)) = (pipe(), pipe());
        Agent {
            connection: Connection::start(stdin, stdout, limit, heard.clone())
                .expect("a connection"),
            heard,
            stdin: BufReader::new(stdin_read.into()),
            stdout: stdout_write.into(),
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn an_answer_is_seen_after_what_was_sent_before_it() {
        let mut agent = agent();
        let (connection, mut stdout) = (agent.connection.clone(), agent.stdout);
        let script = tokio::task::spawn_blocking(move || {
            let mut line = String::new();
            agent.stdin.read_line(&mut line).expect("a request");
            stdout
                .write_all(b"noise\n{\"method\":\"first\"}\n{\"id\":99,\"result\":1}\n{\"id\":1,\"result\":{\"x\":1}}\n")
                .expect("written");
            line
        });
        let answer = connection
            .request("ask", &serde_json::json!({"a": 1}))
            .await;
        assert_eq!(answer.expect("a result").get(), r#"{"x":1}"#);
        let heard = agent.heard.0.lock().expect("no panic").clone();
        assert_eq!(
            heard,
            ["stray noise", "first", r#"stray {"id":99,"result":1}"#]
        );
        let sent = script.await.expect("no panic");
        assert_eq!(
            sent,
            "{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"ask\",\"params\":{\"a\":1}}\n"
        );
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_request_of_the_agent_is_answered_with_its_own_id() {
        let mut agent = agent();
        agent
            .stdout
            .write_all(b"{\"id\":{\"odd\":1},\"method\":\"fs/read_text_file\"}\n")
            .expect("written");
        let answer = tokio::task::spawn_blocking(move || {
            let mut line = String::new();
            agent.stdin.read_line(&mut line).expect("an answer");
            line
        });
        let answer = answer.await.expect("no panic");
        assert!(answer.contains(r#""id":{"odd":1}"#), "{answer}");
        assert!(answer.contains("-32601"), "{answer}");
    }

    #[tokio::test]
    async fn what_waits_fails_when_the_agent_closes_its_output() {
        let agent = agent();
        drop(agent.stdout);
        let error = agent.connection.request("ask", &()).await;
        assert!(matches!(error, Err(RequestError::Closed(Closed::Eof))));
    }

    #[tokio::test]
    async fn a_line_over_the_limit_ends_the_connection() {
        let mut agent = agent();
        agent
            .stdout
            .write_all(&vec![b'x'; 20_000])
            .expect("written");
        let mut closed = agent.connection.closed();
        let closed = closed.wait_for(Option::is_some).await.expect("closed");
        assert!(matches!(&*closed, Some(Closed::Protocol(_))));
    }

    #[tokio::test]
    async fn a_message_that_javascript_reads_too_slowly_ends_the_connection() {
        let deep = format!("{}{}", "[".repeat(MAX_NESTING), "]".repeat(MAX_NESTING));
        let many = format!("[{}0]", "{},".repeat(MAX_VALUES));
        for (params, why) in [(deep, "nested"), (many, "values")] {
            let agent = agent_with(1 << 20, Arc::new(Recorder::default()));
            let mut stdout = agent.stdout;
            let writing = tokio::task::spawn_blocking(move || {
                writeln!(stdout, "{{\"method\":\"x\",\"params\":{params}}}")
            });
            let mut closed = agent.connection.closed();
            let closed = closed.wait_for(Option::is_some).await.expect("closed");
            let Some(Closed::Protocol(problem)) = &*closed else {
                panic!("{closed:?}");
            };
            assert!(problem.contains(why), "{problem}");
            writing.await.expect("no panic").expect("written");
        }
    }

    #[tokio::test]
    async fn dropping_the_connection_closes_the_agents_stdin() {
        let mut agent = agent();
        drop(agent.connection);
        let mut rest = String::new();
        let length = tokio::task::spawn_blocking(move || agent.stdin.read_line(&mut rest));
        assert_eq!(length.await.expect("no panic").expect("the end"), 0);
    }

    /// Has a defect.
    struct Panics;

    #[async_trait]
    impl Handler for Panics {
        async fn notification(
            &self,
            _line: &str,
            method: &str,
            _params: Option<&RawValue>,
        ) -> ControlFlow<()> {
            panic!("{method}")
        }

        async fn request(&self, _: &Connection, _: Request<'_>) -> ControlFlow<()> {
            ControlFlow::Continue(())
        }

        async fn stray(&self, _line: &[u8]) -> ControlFlow<()> {
            ControlFlow::Continue(())
        }
    }

    #[tokio::test]
    async fn a_panic_of_the_handler_leaves_nobody_waiting() {
        let mut agent = agent_heard_by(Arc::new(Panics));
        let asked = agent.connection.start_request("ask", &()).await;
        agent
            .stdout
            .write_all(b"{\"method\":\"x\"}\n")
            .expect("written");
        let error = asked.wait().await;
        assert!(matches!(error, Err(RequestError::Closed(Closed::Ended))));
    }
}
