//! Closing descriptors that PID 1 has opened.
//!
//! To close the last one of a connection waits as long as `SO_LINGER` says, which PID 1 may set at any time on
//! a duplicate that it has kept; to reset one waits for who is just sending on it, and for their memory; to close
//! the last one of a deleted file frees its blocks. So that is done by a thread that may wait: one for each VM,
//! however many there are, and whoever takes descriptors from PID 1 waits while many are left.

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt};
use tokio::runtime::Handle;
use tokio::sync::Notify;

/// So many may wait for their turn.
const MANY: usize = 256;

/// What is to be closed, one after the other: of one VM, or of one file of it.
#[derive(Debug)]
pub struct Closing {
    waiting: Mutex<Waiting>,
    /// Fewer wait than did.
    fewer: Notify,
    runtime: Handle,
}

#[derive(Debug, Default)]
struct Waiting {
    descriptors: VecDeque<(OwnedFd, How)>,
    /// A thread is at it.
    under_way: bool,
    /// PID 1 is gone.
    ended: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    AsItIs,
    /// If it is a connection, its end is a reset.
    Reset,
}

impl Closing {
    /// To be called in the runtime whose threads close them.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            waiting: Mutex::default(),
            fewer: Notify::new(),
            runtime: Handle::current(),
        })
    }

    /// Closes it soon, and waits for nothing.
    pub fn close(self: &Arc<Self>, descriptor: OwnedFd) {
        self.add(descriptor, How::AsItIs);
    }

    /// The same, and if it is a connection, its end is a reset.
    pub fn reset(self: &Arc<Self>, descriptor: OwnedFd) {
        self.add(descriptor, How::Reset);
    }

    fn add(self: &Arc<Self>, descriptor: OwnedFd, how: How) {
        let mut waiting = self.waiting();
        if waiting.ended {
            return self.reset_at_once([(descriptor, how)].into());
        }
        waiting.descriptors.push_back((descriptor, how));
        if std::mem::replace(&mut waiting.under_way, true) {
            return;
        }
        let own = Arc::clone(self);
        self.runtime.spawn_blocking(move || {
            while let Some((descriptor, how)) = own.next() {
                if how == How::Reset {
                    reset(descriptor.as_fd());
                }
                drop(descriptor);
            }
        });
    }

    /// Does something that may wait, beside closing.
    pub fn beside(&self, work: impl FnOnce() + Send + 'static) {
        self.runtime.spawn_blocking(work);
    }

    /// Waits until no more than some are left.
    pub async fn few(&self) {
        while self.waiting().descriptors.len() > MANY {
            self.fewer.notified().await;
        }
    }

    /// Closes what is left, once PID 1 is gone and lets nothing wait any more, and what comes later. What is being
    /// closed may wait for the other end of its connection, which is among them.
    pub fn end(&self) {
        let rest = {
            let mut waiting = self.waiting();
            waiting.ended = true;
            std::mem::take(&mut waiting.descriptors)
        };
        if !rest.is_empty() {
            self.reset_at_once(rest);
        }
    }

    fn reset_at_once(&self, descriptors: VecDeque<(OwnedFd, How)>) {
        self.runtime.spawn_blocking(move || {
            for (descriptor, _) in &descriptors {
                reset(descriptor.as_fd());
            }
            drop(descriptors);
        });
    }

    fn next(&self) -> Option<(OwnedFd, How)> {
        let mut waiting = self.waiting();
        let next = waiting.descriptors.pop_front();
        waiting.under_way = next.is_some();
        drop(waiting);
        self.fewer.notify_one();
        next
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// If it is a TCP connection, ends it at once, in both directions, whatever has been sent (tcp(7): connecting to
/// `AF_UNSPEC` dissolves it), so that to close it waits for nothing. Where it may not be dissolved, it is reset when
/// it is closed.
pub(crate) fn reset(socket: BorrowedFd<'_>) {
    const SIZE: libc::socklen_t = 16;
    /// A `struct sockaddr` of this family, which is 0.
    const NOWHERE: [u8; SIZE as usize] = [0; SIZE as usize];
    let at_once = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    // An error: it is no socket.
    let _ = setsockopt(&socket, sockopt::Linger, &at_once);
    // SAFETY: the kernel reads the address, whose size is given.
    let result = unsafe { libc::connect(socket.as_raw_fd(), NOWHERE.as_ptr().cast(), SIZE) };
    if let Err(errno) = Errno::result(result) {
        tracing::debug!(%errno, "can't reset a descriptor: it is no connection");
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::{Ipv4Addr, TcpListener, TcpStream};
    use std::time::{Duration, Instant};

    use super::*;

    /// A connection whose last descriptor takes minutes to close, until its server is gone.
    fn lingering() -> (TcpStream, OwnedFd) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a listener");
        let address = listener.local_addr().expect("an address");
        let mut ours = TcpStream::connect(address).expect("a connection");
        let (never_reads, _) = listener.accept().expect("a connection");
        // Little memory for each.
        setsockopt(&ours, sockopt::SndBuf, &4096).expect("SO_SNDBUF");
        setsockopt(&never_reads, sockopt::RcvBuf, &4096).expect("SO_RCVBUF");
        ours.set_nonblocking(true).expect("O_NONBLOCK");
        while ours.write(&[0; 1 << 12]).is_ok() {}
        let minutes = libc::linger {
            l_onoff: 1,
            l_linger: 120,
        };
        setsockopt(&ours, sockopt::Linger, &minutes).expect("SO_LINGER");
        (never_reads, ours.into())
    }

    async fn all_closed(closing: &Closing) {
        while closing.waiting().under_way {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    #[tokio::test]
    async fn the_end_closes_both_ends_of_what_waits_for_itself() {
        let closing = Closing::new();
        let (server, descriptor) = lingering();
        closing.close(descriptor);
        // Until the thread is at it.
        while !closing.waiting().descriptors.is_empty() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        closing.end();
        closing.close(server.into());
        let closed = tokio::time::timeout(Duration::from_secs(30), all_closed(&closing));
        closed.await.expect("it waits for itself");
    }

    #[tokio::test]
    async fn connections_that_linger_hold_one_thread_and_whoever_takes_more() {
        let closing = Closing::new();
        let mut servers = Vec::new();
        let began = Instant::now();
        for _ in 0..MANY + 2 {
            // What it takes is a thread each, or this one.
            let (server, descriptor) = lingering();
            servers.push(server);
            closing.close(descriptor);
        }
        assert!(began.elapsed() < Duration::from_mins(1));
        let soon = tokio::time::timeout(Duration::from_millis(200), closing.few()).await;
        assert!(soon.is_err(), "more than it bears are left");
        // Another VM's are closed meanwhile.
        let other = Closing::new();
        let (server, descriptor) = lingering();
        drop(server);
        other.close(descriptor);
        all_closed(&other).await;
        // The first is under way, and the end of its server ends it.
        drop(servers);
        closing.few().await;
        all_closed(&closing).await;
    }
}
