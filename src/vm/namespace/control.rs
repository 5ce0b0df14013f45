//! The host's end of the control socket: requests out, replies matched to them, exits published.

use std::collections::HashMap;
use std::convert::Infallible;
use std::fs::File;
use std::io::{self, IoSlice, Write};
use std::mem::ManuallyDrop;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use agentvm_guest::protocol::files::FileAnswer;
use agentvm_guest::protocol::{
    FailedAt, IN_MEMFD, INLINE, Instance, MAX_DESCRIPTORS, MAX_PACKET, ProcessEntry, ProcessUsage,
    Reply, Request, RequestId, decode, encode,
};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{
    ControlMessage, MsgFlags, UnixAddr, UnixCredentials, sendmsg, setsockopt, sockopt,
};
use tokio::io::unix::AsyncFd;
use tokio::sync::{Notify, oneshot, watch};
use tokio::time::timeout;

use super::directory::host;
use crate::closing::Closing;
use crate::vm::{Exit, VmError};

/// Descriptors that a message may have as far as the kernel goes (`SCM_MAX_FD`): all are received, for the kernel
/// closes those that there is no room for then and there, however long that takes.
const MOST_DESCRIPTORS: usize = 253;

/// Processes at most that wait to be killed, because their callers gave up.
const MOST_UNWANTED: usize = 1 << 16;

/// How long what PID 1 has sent may take to be closed, when there is too much of it.
const PATIENCE: Duration = Duration::from_secs(30);

/// The answer to one request.
#[derive(Debug)]
pub(super) enum Answer {
    Spawned(Child),
    Opened(Received),
    /// It was opened or started, and this process had no room for the descriptor.
    NoRoom,
    Listeners(Vec<SocketAddr>),
    Done,
    Foreground(Option<Instance>, Vec<Instance>),
    ForegroundEnded(u32),
    Usage(ProcessUsage),
    /// And whether there are more.
    Processes(Vec<ProcessEntry>, bool),
    Failed {
        errno: Errno,
        at: FailedAt,
    },
    File(FileAnswer),
}

/// A started process: its pid inside, and how it ends.
#[derive(Debug)]
pub(super) struct Child {
    pub(super) pid: u32,
    pub(super) exit: watch::Receiver<Option<Exit>>,
    /// What PID 1 says is the other end of its terminal.
    pub(super) terminal: Option<Received>,
}

/// A message of PID 1, with what came along.
pub(super) type Message = (Reply, Descriptors);

/// The descriptors of a message.
pub(super) struct Descriptors {
    received: Vec<Received>,
    /// This process may have no more: some were lost.
    lost: bool,
}

impl Descriptors {
    /// All that were sent, unless this process had no room for them.
    pub(super) fn all(self) -> io::Result<Vec<Received>> {
        if self.lost {
            return Err(Errno::EMFILE.into());
        }
        Ok(self.received)
    }
}

/// A descriptor that PID 1 has sent, whatever it is. What nobody takes is reset, and closed as [`Closing`]
/// does.
#[derive(Debug)]
pub(super) struct Received {
    descriptor: ManuallyDrop<OwnedFd>,
    taken: bool,
    closing: Arc<Closing>,
}

impl Received {
    const fn new(descriptor: OwnedFd, closing: Arc<Closing>) -> Self {
        Self {
            descriptor: ManuallyDrop::new(descriptor),
            taken: false,
            closing,
        }
    }

    /// For who has looked at it.
    pub(super) fn take(mut self) -> OwnedFd {
        self.taken = true;
        // SAFETY: `taken` says that it is gone, and nothing uses `self` but its drop.
        unsafe { ManuallyDrop::take(&mut self.descriptor) }
    }
}

impl AsFd for Received {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

impl Drop for Received {
    fn drop(&mut self) {
        if self.taken {
            return;
        }
        // SAFETY: it was not taken, and nothing uses `self` after this.
        let descriptor = unsafe { ManuallyDrop::take(&mut self.descriptor) };
        self.closing.reset(descriptor);
    }
}

pub(super) struct Control {
    socket: ManuallyDrop<AsyncFd<OwnedFd>>,
    next_id: AtomicU32,
    state: Mutex<State>,
    /// There is something in [`State::unwanted`].
    abandoned: Notify,
    closing: Arc<Closing>,
}

#[derive(Default)]
struct State {
    pending: HashMap<RequestId, oneshot::Sender<Answer>>,
    children: HashMap<i32, watch::Sender<Option<Exit>>>,
    /// Started for callers that gave up meanwhile: to be killed.
    unwanted: Vec<i32>,
    /// Set once PID 1 is gone: nothing is accepted any more.
    ended: Option<String>,
}

impl Control {
    pub(super) fn new(socket: OwnedFd) -> io::Result<Self> {
        Ok(Self {
            // SAFETY: an OwnedFd that nobody replaces or closes while the AsyncFd owns it.
            socket: ManuallyDrop::new(unsafe { AsyncFd::register(socket) }?),
            next_id: AtomicU32::new(1),
            state: Mutex::default(),
            abandoned: Notify::new(),
            closing: Closing::new(),
        })
    }

    /// Where what PID 1 may have a duplicate of is closed.
    pub(super) const fn closing(&self) -> &Arc<Closing> {
        &self.closing
    }

    pub(super) fn next_id(&self) -> RequestId {
        self.next_id.fetch_add(1, Ordering::Relaxed)
    }

    /// Sends a request and waits for its answer, however long that takes.
    pub(super) async fn call(
        &self,
        id: RequestId,
        request: &Request,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<Answer, VmError> {
        let (reply, answer) = oneshot::channel();
        {
            let mut state = self.state();
            if let Some(why) = &state.ended {
                return Err(VmError::NotSent(why.clone()));
            }
            state.pending.insert(id, reply);
        }
        // Forgets the request if the caller gives up waiting; a late answer then closes its descriptor.
        let mut waiting = Waiting {
            control: self,
            id,
            answer,
        };
        self.send(request, descriptors)
            .await
            .map_err(|error| match error.kind() {
                // A packet is sent as a whole or not at all.
                io::ErrorKind::BrokenPipe
                | io::ErrorKind::ConnectionReset
                | io::ErrorKind::NotConnected => VmError::NotSent("PID 1 is gone".to_owned()),
                _ => host("can't send a request to", Path::new("PID 1"), error),
            })?;
        match (&mut waiting.answer).await {
            Ok(Answer::NoRoom) => Err(host(
                "can't take a descriptor from",
                Path::new("PID 1"),
                Errno::EMFILE.into(),
            )),
            Ok(answer) => Ok(answer),
            Err(_) => {
                let why = self.state().ended.clone();
                Err(VmError::Ended(
                    why.unwrap_or_else(|| "PID 1 is gone".to_owned()),
                ))
            }
        }
    }

    pub(super) async fn send(
        &self,
        request: &Request,
        descriptors: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        let mut body = encode(request).ok_or(io::ErrorKind::InvalidData)?;
        let mut fds: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        let mut kind = INLINE;
        let memfd;
        if body.len() >= MAX_PACKET {
            let mut file = File::from(memfd_create(c"agentvm-request", MFdFlags::MFD_CLOEXEC)?);
            file.write_all(&body)?;
            body.clear();
            memfd = file;
            fds.push(memfd.as_raw_fd());
            kind = IN_MEMFD;
        }
        if fds.len() > MAX_DESCRIPTORS {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        loop {
            let mut ready = self.socket.writable().await?;
            let sent = ready.try_io(|socket| {
                let rights = [ControlMessage::ScmRights(&fds)];
                let rights = if fds.is_empty() { &[][..] } else { &rights[..] };
                let iov = [
                    IoSlice::new(std::slice::from_ref(&kind)),
                    IoSlice::new(&body),
                ];
                let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
                sendmsg::<UnixAddr>(socket.as_raw_fd(), &iov, rights, flags, None)
                    .map_err(io::Error::from)
            });
            match sent {
                Ok(result) => return result.map(drop),
                Err(_would_block) => {}
            }
        }
    }

    /// The next message of PID 1. `Ok(None)`: it closed its end. Its content is not to be trusted.
    pub(super) async fn receive(&self) -> Result<Option<Message>, String> {
        let mut packet = vec![0; MAX_PACKET];
        let (length, descriptors) = loop {
            let mut ready = self
                .socket
                .readable()
                .await
                .map_err(|error| error.to_string())?;
            match ready.try_io(|socket| receive_packet(socket.as_fd(), &mut packet, &self.closing))
            {
                Ok(Ok(Some(received))) => break received,
                Ok(Ok(None)) => return Ok(None),
                Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionReset => {
                    return Ok(None);
                }
                Ok(Err(error)) => return Err(error.to_string()),
                Err(_would_block) => {}
            }
        };
        let Some((kind, body)) = packet.get(..length).and_then(<[u8]>::split_first) else {
            return Err("an empty message".to_owned());
        };
        if *kind != INLINE {
            return Err("a message in a descriptor".to_owned());
        }
        let reply = decode(body).ok_or_else(|| "a malformed message".to_owned())?;
        Ok(Some((reply, descriptors)))
    }

    /// Whether PID 1 still has its end, which closes first when it dies. As the kernel knows it, which
    /// is before [`Control::run`] can have noticed.
    pub(super) fn is_connected(&self) -> bool {
        // A hang-up is always reported.
        let mut socket = [PollFd::new(
            self.socket.get_ref().as_fd(),
            PollFlags::empty(),
        )];
        let polled = poll(&mut socket, PollTimeout::ZERO);
        let hung_up = polled.is_ok_and(|ready| ready > 0);
        !hung_up && self.state().ended.is_none()
    }

    /// Handles replies until PID 1 is gone or breaks the protocol; says which. `fork_bomb` is called when
    /// it ends one.
    pub(super) async fn run(&self, fork_bomb: impl Fn()) -> String {
        let why = tokio::select! {
            why = self.take_all(fork_bomb) => why,
            // Beside it: PID 1 may read nothing until what it sends is read.
            never = self.kill_unwanted() => match never {},
        };
        self.end(&why);
        // Where somebody has ended it, PID 1 was only the one to go.
        self.state().ended.clone().unwrap_or(why)
    }

    /// Reads what PID 1 sends, to its end, and returns why.
    async fn take_all(&self, fork_bomb: impl Fn()) -> String {
        loop {
            if timeout(PATIENCE, self.closing.few()).await.is_err() {
                return "PID 1 sent descriptors that can't be closed".to_owned();
            }
            match self.receive().await {
                Ok(Some((reply, descriptors))) => {
                    // It may send faster than this reads, and who ends the VM is to have a turn.
                    tokio::task::yield_now().await;
                    match self.dispatch(reply, descriptors, &fork_bomb) {
                        Ok(None) => {}
                        Ok(Some(pid)) if self.abandon(pid) => {}
                        Ok(Some(_)) => {
                            return "PID 1 started more than it was asked for".to_owned();
                        }
                        Err(problem) => return format!("PID 1 sent {problem}"),
                    }
                }
                Ok(None) => return "PID 1 exited".to_owned(),
                Err(problem) => return format!("PID 1 sent {problem}"),
            }
        }
    }

    /// Tells PID 1 to end the VM, by closing this direction for good.
    pub(super) fn hang_up(&self) {
        let both = nix::sys::socket::Shutdown::Both;
        // An error means that there is nobody left to tell.
        let _ = nix::sys::socket::shutdown(self.socket.as_raw_fd(), both);
    }

    /// Fails everything that waits, and everything that will be asked.
    pub(super) fn end(&self, why: &str) {
        let mut state = self.state();
        state.ended.get_or_insert_with(|| why.to_owned());
        state.pending.clear();
        state.children.clear();
    }

    /// Kills processes that nobody wants any more.
    async fn kill_unwanted(&self) -> Infallible {
        loop {
            self.abandoned.notified().await;
            let unwanted = std::mem::take(&mut self.state().unwanted);
            for pid in unwanted {
                self.kill(pid).await;
            }
        }
    }

    /// `false`: there are more than callers can have given up.
    fn abandon(&self, pid: i32) -> bool {
        let mut state = self.state();
        state.unwanted.push(pid);
        self.abandoned.notify_one();
        state.unwanted.len() < MOST_UNWANTED
    }

    /// Kills a process whose caller gave up while it was being started.
    async fn kill(&self, pid: i32) {
        let request = Request::EndSession {
            id: self.next_id(),
            leader: pid,
        };
        if let Err(error) = self.send(&request, &[]).await {
            tracing::debug!(%error, pid, "PID 1 can't be told to kill a process: it is gone too");
        }
    }

    /// Returns the pid of a process that nobody wants any more.
    fn dispatch(
        &self,
        reply: Reply,
        descriptors: Descriptors,
        fork_bomb: &impl Fn(),
    ) -> Result<Option<i32>, &'static str> {
        let mut state = self.state();
        let (id, answer) = match reply {
            Reply::Spawned { id, pid } => {
                let Some(waiting) = state.pending.remove(&id) else {
                    return Ok(Some(pid));
                };
                let Ok(mut sent) = descriptors.all() else {
                    // Its caller can't have it, so it is to end.
                    drop(waiting.send(Answer::NoRoom));
                    return Ok(Some(pid));
                };
                let (exited, exit) = watch::channel(None);
                let child = Child {
                    pid: pid.cast_unsigned(),
                    exit,
                    terminal: sent.pop(),
                };
                return Ok(match waiting.send(Answer::Spawned(child)) {
                    Ok(()) => {
                        state.children.insert(pid, exited);
                        None
                    }
                    Err(_) => Some(pid),
                });
            }
            Reply::Exited { pid, status } => {
                if let Some(exited) = state.children.remove(&pid) {
                    exited.send_replace(Some(exit_of(status)));
                }
                return Ok(None);
            }
            Reply::Opened { id } => match descriptors.all() {
                Ok(mut sent) => {
                    let file = sent.pop().ok_or("an opened file without descriptor")?;
                    (id, Answer::Opened(file))
                }
                Err(_no_room) => (id, Answer::NoRoom),
            },
            Reply::Listeners { id, listeners } => (id, Answer::Listeners(listeners)),
            Reply::Done { id } => (id, Answer::Done),
            Reply::Foreground { id, agent, seen } => (id, Answer::Foreground(agent, seen)),
            Reply::ForegroundEnded { id, killed } => (id, Answer::ForegroundEnded(killed)),
            Reply::Processes {
                id,
                processes,
                more,
            } => (id, Answer::Processes(processes, more)),
            Reply::Usage { id, usage } => (id, Answer::Usage(usage)),
            Reply::File { id, answer } => (id, Answer::File(answer)),
            Reply::Failed { id, errno, at } => {
                let errno = Errno::from_raw(errno);
                (id, Answer::Failed { errno, at })
            }
            Reply::Ready { .. } | Reply::BootFailed { .. } => return Err("a second boot report"),
            Reply::ForkBomb => {
                fork_bomb();
                return Ok(None);
            }
        };
        // A caller that gave up is not there any more: dropping the answer closes its descriptor.
        if let Some(waiting) = state.pending.remove(&id) {
            drop(waiting.send(answer));
        }
        Ok(None)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        // SAFETY: nothing uses it after this.
        let socket = unsafe { ManuallyDrop::take(&mut self.socket) }.into_inner();
        // Nobody calls any more: the VM has ended. What it has sent and nobody has read is closed with the socket,
        // and some of it may wait for the rest.
        let closing = Arc::clone(&self.closing);
        if take_unread(&socket, &closing, 1) {
            return closing.end();
        }
        self.closing.beside(move || {
            take_unread(&socket, &closing, usize::MAX);
            closing.end();
            drop(socket);
        });
    }
}

/// Takes so many messages at most that are left in a socket that nobody reads any more. `true`: there are no more.
fn take_unread(socket: &OwnedFd, closing: &Arc<Closing>, most: usize) -> bool {
    // Nothing is added. And every message comes with who has sent it, also an empty one, which is not the end.
    let shut = nix::sys::socket::shutdown(socket.as_raw_fd(), nix::sys::socket::Shutdown::Both);
    let has_end = shut.and_then(|()| setsockopt(socket, sockopt::PassCred, &true));
    if let Err(errno) = has_end {
        tracing::debug!(%errno, "what PID 1 has sent is not read to its end");
        return true;
    }
    let mut packet = vec![0; MAX_PACKET];
    for _ in 0..most {
        match receive_packet(socket.as_fd(), &mut packet, closing) {
            Ok(None) => return true,
            Ok(Some(_)) => {}
            // A reset is told once, before the rest; what has no number is our own refusal of one message.
            Err(error) => match error.raw_os_error() {
                None | Some(libc::ECONNRESET | libc::EINTR) => {}
                Some(_) => return true,
            },
        }
    }
    false
}

struct Waiting<'a> {
    control: &'a Control,
    id: RequestId,
    answer: oneshot::Receiver<Answer>,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut state = self.control.state();
        state.pending.remove(&self.id);
        // Answered, but nobody has taken it: the caller gave up at this very moment.
        if let Ok(Answer::Spawned(child)) = self.answer.try_recv() {
            state.unwanted.push(child.pid.cast_signed());
            self.control.abandoned.notify_one();
        }
    }
}

/// The length of a message, and what came along. `None`: there is none, and never will be; or, of a socket without
/// `SO_PASSCRED`, an empty message.
///
/// Not nix's `cmsgs`, which gives nothing of a message that was cut, and so leaves open what it brought.
fn receive_packet(
    socket: BorrowedFd<'_>,
    packet: &mut [u8],
    closing: &Arc<Closing>,
) -> io::Result<Option<(usize, Descriptors)>> {
    let mut ancillary = nix::cmsg_space!([RawFd; MOST_DESCRIPTORS], UnixCredentials);
    let mut part = libc::iovec {
        iov_base: packet.as_mut_ptr().cast(),
        iov_len: packet.len(),
    };
    // SAFETY: all zero is a valid msghdr: one without anything.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = ancillary.as_mut_ptr().cast();
    message.msg_controllen = ancillary.capacity();
    let flags = libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT;
    // SAFETY: the message points to a packet and to room for descriptors that both outlive the call, with
    // their sizes.
    let length = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, flags) };
    let length = usize::try_from(Errno::result(length)?).unwrap_or(0);
    if length == 0 && message.msg_controllen == 0 {
        return Ok(None);
    }
    let received = descriptors_of(&message, closing);
    // It is this process that may have no more (unix(7), SCM_RIGHTS): there was room for all.
    let lost = message.msg_flags & libc::MSG_CTRUNC != 0;
    if message.msg_flags & libc::MSG_TRUNC != 0 || received.len() > MAX_DESCRIPTORS {
        return Err(io::Error::other("a message over the limit"));
    }
    Ok(Some((length, Descriptors { received, lost })))
}

/// Those that the kernel has just installed for this process with a message.
fn descriptors_of(message: &libc::msghdr, closing: &Arc<Closing>) -> Vec<Received> {
    let mut received = Vec::new();
    // SAFETY: recvmsg has filled the message's control buffer, and set its length to what it holds.
    let mut header = unsafe { libc::CMSG_FIRSTHDR(message) };
    // SAFETY: CMSG_FIRSTHDR and CMSG_NXTHDR give a whole header in that buffer, or null.
    while let Some(part) = unsafe { header.as_ref() } {
        if part.cmsg_level == libc::SOL_SOCKET && part.cmsg_type == libc::SCM_RIGHTS {
            // SAFETY: arithmetic.
            let before = unsafe { libc::CMSG_LEN(0) } as usize;
            let count = part.cmsg_len.saturating_sub(before) / size_of::<RawFd>();
            // SAFETY: the data of the header that `part` is.
            let data = unsafe { libc::CMSG_DATA(part) }.cast::<[u8; size_of::<RawFd>()]>();
            received.extend((0..count).map(|index| {
                // SAFETY: the kernel has written so many descriptors there, which are nobody's yet.
                let descriptor =
                    unsafe { OwnedFd::from_raw_fd(RawFd::from_ne_bytes(data.add(index).read())) };
                Received::new(descriptor, Arc::clone(closing))
            }));
        }
        // SAFETY: see above.
        header = unsafe { libc::CMSG_NXTHDR(message, header) };
    }
    received
}

fn exit_of(status: i32) -> Exit {
    if libc::WIFSIGNALED(status) {
        Exit::Signal(libc::WTERMSIG(status))
    } else {
        Exit::Code(libc::WEXITSTATUS(status))
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::future::poll_fn;
    use std::io::Write as _;
    use std::net::{Ipv4Addr, TcpListener, TcpStream};
    use std::pin::pin;
    use std::task::Poll;
    use std::time::Instant;

    use nix::sys::socket::{AddressFamily, SockFlag, SockType, send, socketpair};

    use super::*;

    /// The host's end, and PID 1's.
    fn pair() -> (Control, OwnedFd) {
        let (ours, theirs) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )
        .expect("a pair");
        (Control::new(ours).expect("a control"), theirs)
    }

    fn says(from: &OwnedFd, reply: &Reply) {
        let message = encode(reply).expect("a message");
        let packet = [&[INLINE][..], &message].concat();
        send(from.as_raw_fd(), &packet, MsgFlags::MSG_DONTWAIT).expect("room");
    }

    #[tokio::test]
    async fn what_pid_1_sends_is_read_while_it_reads_nothing() {
        let (control, theirs) = pair();
        let full = |packet: &[u8]| send(control.socket.as_raw_fd(), packet, MsgFlags::MSG_DONTWAIT);
        while full(b"request").is_ok() {}
        // Whose caller has given up: it is to be killed, and PID 1 to be told.
        says(&theirs, &Reply::Spawned { id: 7, pid: 8 });
        says(&theirs, &Reply::ForkBomb);
        let heard = Notify::new();
        tokio::select! {
            why = control.run(|| heard.notify_one()) => panic!("{why}"),
            () = heard.notified() => {}
            () = tokio::time::sleep(Duration::from_secs(10)) => panic!("nobody reads"),
        }
    }

    #[tokio::test]
    async fn a_flood_of_messages_leaves_a_turn_to_who_ends_the_vm() {
        const MANY: usize = 100;
        let (control, theirs) = pair();
        for _ in 0..MANY {
            says(&theirs, &Reply::ForkBomb);
        }
        let handled = Cell::new(0);
        let mut run = pin!(control.run(|| handled.set(handled.get() + 1)));
        poll_fn(|cx| {
            let before = handled.get();
            assert!(run.as_mut().poll(cx).is_pending());
            assert!(handled.get() <= before + 1, "more than one in a turn");
            if handled.get() == MANY {
                return Poll::Ready(());
            }
            Poll::Pending
        })
        .await;
    }

    #[tokio::test]
    async fn what_nobody_takes_is_closed_without_waiting() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a listener");
        let address = listener.local_addr().expect("an address");
        let mut sent = TcpStream::connect(address).expect("a connection");
        let (_never_reads, _) = listener.accept().expect("a connection");
        sent.set_nonblocking(true).expect("O_NONBLOCK");
        while sent.write(&[0; 1 << 12]).is_ok() {}
        let minutes = libc::linger {
            l_onoff: 1,
            l_linger: 600,
        };
        setsockopt(&sent, sockopt::Linger, &minutes).expect("SO_LINGER");
        let began = Instant::now();
        drop(Received::new(sent.into(), Closing::new()));
        assert!(began.elapsed() < Duration::from_secs(10));
    }

    #[tokio::test(flavor = "current_thread")]
    async fn what_is_left_unread_is_closed_behind_an_empty_message() {
        let (control, theirs) = pair();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a listener");
        let address = listener.local_addr().expect("an address");
        let mut sent = TcpStream::connect(address).expect("a connection");
        let (never_reads, _) = listener.accept().expect("a connection");
        sent.set_nonblocking(true).expect("O_NONBLOCK");
        while sent.write(&[0; 1 << 12]).is_ok() {}
        let minutes = libc::linger {
            l_onoff: 1,
            l_linger: 600,
        };
        setsockopt(&sent, sockopt::Linger, &minutes).expect("SO_LINGER");
        // The connection waits for its other end, which comes after it.
        let mut messages = vec![vec![], vec![], vec![sent.as_raw_fd()], vec![]];
        messages.push(vec![never_reads.as_raw_fd()]);
        for descriptors in messages {
            let rights = [ControlMessage::ScmRights(&descriptors)];
            let rights = if descriptors.is_empty() {
                &[][..]
            } else {
                &rights[..]
            };
            let empty = [IoSlice::new(&[])];
            let flags = MsgFlags::MSG_DONTWAIT;
            sendmsg::<UnixAddr>(theirs.as_raw_fd(), &empty, rights, flags, None).expect("room");
        }
        drop((sent, never_reads, theirs));
        let closing = Arc::clone(control.closing());
        let began = Instant::now();
        drop(control);
        assert!(began.elapsed() < Duration::from_secs(10));
        // What closes has let go of it.
        let ended = tokio::time::timeout(Duration::from_secs(30), async {
            while Arc::strong_count(&closing) > 1 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        });
        ended.await.expect("it waits for itself");
    }
}
