//! A little world for tests: a host with public addresses, and an internet that nobody else sees.
//!
//! The test runs again in a child process that has net and mount namespaces of its own, as root as
//! well as as an ordinary user. A thread of it in a further net namespace is the internet.

use std::collections::HashMap;
use std::io::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::process::Command;
use std::sync::{Arc, Mutex, mpsc};

use hickory_proto::op::{Message, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, CNAME, TXT};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::{oneshot, watch};

/// Public addresses of the internet's server.
pub(super) const SERVER_V4: &str = "1.2.3.4";
pub(super) const SERVER_V6: &str = "2606:4700::1";
/// Another server, and one in a private network.
pub(super) const OTHER_V4: &str = "1.2.3.5";
pub(super) const OTHER_V6: &str = "2606:4700::2";
/// What is sent there is lost.
pub(super) const SILENT_V4: &str = "1.2.3.9";
pub(super) const PRIVATE: &str = "10.9.9.9";
/// Public addresses of the host.
pub(super) const HOST_V4: &str = "5.6.7.8";
pub(super) const HOST_V6: &str = "2600:5::8";

/// Sends back what it gets, until the stream ends.
pub(super) const ECHO: u16 = 7;
/// Says how many bytes came, once the stream has ended.
pub(super) const COUNT: u16 = 9;

/// Greets before anybody has said anything, and then sends back what it gets.
pub(super) const GREET: u16 = 25;
pub(super) const GREETING: &str = "220 hello\n";

const RESOLVER: &str = "1.2.3.53";

/// Set in the child.
const INSIDE: &str = "AGENTVM_TEST_WORLD";

/// Runs the test `name` (with its module path) in a world of its own.
pub(super) fn in_a_world<F: Future<Output = ()>>(name: &str, test: impl FnOnce(World) -> F) {
    if std::env::var_os(INSIDE).is_none() {
        let mut unshare = Command::new("unshare");
        unshare.args(["--net", "--mount"]);
        if !nix::unistd::geteuid().is_root() {
            unshare.args(["--user", "--map-current-user", "--keep-caps"]);
        }
        let status = unshare
            .arg(std::env::current_exe().unwrap())
            .args([name, "--exact", "--nocapture"])
            .env(INSIDE, "1")
            .status()
            .unwrap();
        assert!(status.success(), "see above");
        return;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async { test(World::make()).await });
}

pub(super) struct World {
    /// Echo connections that are open at this moment.
    pub(super) open: watch::Receiver<usize>,
    /// Names that the internet's resolver was asked for.
    pub(super) asked: Asked,
    tasks: UnboundedSender<Task>,
}

pub(super) type Asked = Arc<Mutex<Vec<String>>>;

type Task = Pin<Box<dyn Future<Output = ()> + Send>>;

impl World {
    fn make() -> Self {
        let (number, thread) = mpsc::channel();
        let (wired, go) = mpsc::channel();
        let (up, ready) = mpsc::channel();
        let (open_sender, open) = watch::channel(0);
        let asked = Asked::default();
        let (tasks, given) = unbounded_channel();
        let hears = Arc::clone(&asked);
        std::thread::spawn(move || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            number.send(nix::unistd::gettid()).unwrap();
            go.recv().unwrap();
            for command in [
                "link set lo up".to_owned(),
                "link set internet up".to_owned(),
                "addr add 5.6.7.1/24 dev internet".to_owned(),
                "addr add 2600:5::1/64 dev internet nodad".to_owned(),
                format!("addr add {SERVER_V4}/32 dev lo"),
                format!("addr add {RESOLVER}/32 dev lo"),
                format!("addr add {SERVER_V6}/128 dev lo"),
                format!("addr add {OTHER_V4}/32 dev lo"),
                format!("addr add {OTHER_V6}/128 dev lo"),
                format!("addr add {PRIVATE}/32 dev lo"),
            ] {
                ip(&command);
            }
            tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap()
                .block_on(internet(open_sender, hears, given, up));
        });
        let thread = thread.recv().unwrap();
        ip("link set lo up");
        ip(&format!(
            "link add name wan type veth peer name internet netns {thread}"
        ));
        ip("link set wan up");
        ip(&format!("addr add {HOST_V4}/24 dev wan"));
        ip(&format!("addr add {HOST_V6}/64 dev wan nodad"));
        wired.send(()).unwrap();
        ready.recv().unwrap();
        ip("route add default via 5.6.7.1");
        ip("route add default via 2600:5::1");
        use_resolver(RESOLVER);
        Self { open, asked, tasks }
    }

    /// Has the internet do something; what it spawns goes on there.
    pub(super) async fn outside<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> T {
        let (done, result) = oneshot::channel();
        let task = async { drop(done.send(work.await)) };
        self.tasks.send(Box::pin(task)).unwrap();
        result.await.unwrap()
    }
}

/// Runs ip(8) in this thread's net namespace.
pub(super) fn ip(command: &str) {
    let status = Command::new("ip")
        .args(command.split_whitespace())
        .status()
        .unwrap();
    assert!(status.success(), "ip {command}");
}

/// In this mount namespace only.
fn use_resolver(address: &str) {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    writeln!(file, "nameserver {address}").unwrap();
    nix::mount::mount(
        Some(file.path()),
        "/etc/resolv.conf",
        None::<&str>,
        nix::mount::MsFlags::MS_BIND,
        None::<&str>,
    )
    .unwrap();
}

async fn internet(
    open: watch::Sender<usize>,
    asked: Asked,
    mut tasks: UnboundedReceiver<Task>,
    up: mpsc::Sender<()>,
) {
    let echo = TcpListener::bind(("::", ECHO)).await.unwrap();
    let count = TcpListener::bind(("::", COUNT)).await.unwrap();
    let greet = TcpListener::bind(("::", GREET)).await.unwrap();
    let dns_udp = UdpSocket::bind((RESOLVER, 53)).await.unwrap();
    let dns_tcp = TcpListener::bind((RESOLVER, 53)).await.unwrap();
    up.send(()).unwrap();
    let open = Arc::new(open);
    tokio::join!(
        serve(echo, move |stream| {
            let open = Arc::clone(&open);
            async move {
                open.send_modify(|open| *open += 1);
                drop(send_back(stream).await);
                open.send_modify(|open| *open -= 1);
            }
        }),
        serve(count, |mut stream| async move {
            let count = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await;
            let count = count.unwrap();
            drop(stream.write_all(format!("{count}\n").as_bytes()).await);
        }),
        serve(greet, |mut stream| async move {
            drop(stream.write_all(GREETING.as_bytes()).await);
            drop(send_back(stream).await);
        }),
        async {
            while let Some(task) = tasks.recv().await {
                tokio::spawn(task);
            }
        },
        answer_datagrams(dns_udp, &asked),
        serve(dns_tcp, |stream| {
            let asked = Arc::clone(&asked);
            async move {
                drop(answer_stream(stream, &asked).await);
            }
        }),
    );
}

async fn serve<F>(listener: TcpListener, serve: impl Fn(TcpStream) -> F)
where
    F: Future<Output = ()> + Send + 'static,
{
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        tokio::spawn(serve(stream));
    }
}

async fn send_back(mut stream: TcpStream) -> std::io::Result<()> {
    let (mut from, mut to) = stream.split();
    tokio::io::copy(&mut from, &mut to).await?;
    to.shutdown().await
}

async fn answer_datagrams(socket: UdpSocket, asked: &Asked) {
    let mut buffer = [0; 1500];
    loop {
        let (len, from): (usize, SocketAddr) = socket.recv_from(&mut buffer).await.unwrap();
        let answer = answer(&buffer[..len], asked);
        let mut bytes = answer.to_vec().unwrap();
        if bytes.len() > 1232 {
            bytes = answer.truncate().to_vec().unwrap();
        }
        socket.send_to(&bytes, from).await.unwrap();
    }
}

async fn answer_stream(mut stream: TcpStream, asked: &Asked) -> std::io::Result<()> {
    loop {
        let len = stream.read_u16().await?;
        let mut message = vec![0; usize::from(len)];
        stream.read_exact(&mut message).await?;
        let answer = answer(&message, asked).to_vec().unwrap();
        stream
            .write_u16(u16::try_from(answer.len()).unwrap())
            .await?;
        stream.write_all(&answer).await?;
    }
}

/// What the internet's resolver knows.
fn zone() -> HashMap<(&'static str, RecordType), RData> {
    let address = |text: &str| match text.parse().unwrap() {
        IpAddr::V4(address) => RData::A(A(address)),
        IpAddr::V6(address) => RData::AAAA(AAAA(address)),
    };
    let long = TXT::new(vec!["x".repeat(250); 8]);
    HashMap::from([
        (("site.example.", RecordType::A), address(SERVER_V4)),
        (("site.example.", RecordType::AAAA), address(SERVER_V6)),
        (("a.b.example.", RecordType::A), address(SERVER_V4)),
        (("b.example.", RecordType::A), address(SERVER_V4)),
        (("other.example.", RecordType::A), address(OTHER_V4)),
        (("other.example.", RecordType::AAAA), address(OTHER_V6)),
        (("half.example.", RecordType::A), address(SILENT_V4)),
        (("half.example.", RecordType::AAAA), address(SERVER_V6)),
        (("long.example.", RecordType::TXT), RData::TXT(long)),
        (("private.example.", RecordType::A), address("10.0.0.5")),
        (
            ("metadata.example.", RecordType::A),
            address("169.254.169.254"),
        ),
    ])
}

fn alias(name: &str) -> Option<&'static str> {
    match name {
        "to-private.example." => Some("private.example."),
        "to-other.example." => Some("other.example."),
        _ => None,
    }
}

fn answer(message: &[u8], heard: &Asked) -> Message {
    let asked = Message::from_vec(message).unwrap();
    let mut answer = Message::response(asked.metadata.id, asked.metadata.op_code);
    answer.metadata.recursion_desired = true;
    answer.metadata.recursion_available = true;
    let query = asked.queries[0].clone();
    let name = query.name.to_ascii().to_lowercase();
    if name != "rebind.example." || query.query_type == RecordType::A {
        heard.lock().unwrap().push(name.clone());
    }
    let zone = zone();
    if name == "rebind.example." {
        // Public at first, and then private.
        let heard = heard.lock().unwrap();
        let before = heard.iter().filter(|own| **own == name).count();
        let address = if before > 1 { PRIVATE } else { SERVER_V4 };
        if query.query_type == RecordType::A {
            let data = RData::A(A(address.parse().unwrap()));
            answer.add_answer(Record::from_rdata(query.name.clone(), 0, data));
        }
    } else if let Some(target) = alias(&name) {
        let to = Name::from_ascii(target).unwrap();
        let data = RData::CNAME(CNAME(to.clone()));
        answer.add_answer(Record::from_rdata(query.name.clone(), 60, data));
        if let Some(data) = zone.get(&(target, query.query_type)) {
            answer.add_answer(Record::from_rdata(to, 60, data.clone()));
        }
    } else if let Some(data) = zone.get(&(name.as_str(), query.query_type)) {
        let name: Name = query.name.clone();
        answer.add_answer(Record::from_rdata(name, 60, data.clone()));
    } else if !zone.keys().any(|(known, _)| *known == name) {
        answer.metadata.response_code = ResponseCode::NXDomain;
    }
    answer.add_query(query);
    answer
}
