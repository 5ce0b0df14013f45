//! Connections to servers outside.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::pin;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::sleep;

/// How long a server may leave a connection unanswered before another one is tried as well (RFC 8305,
/// "Connection Attempt Delay").
const DELAY: Duration = Duration::from_millis(250);

/// How long the last one may leave it unanswered where the first one has failed, which its program is to hear of:
/// for a SYN that was lost and sent again.
const PATIENCE: Duration = Duration::from_secs(4);

/// Connects to `first`, or to one of `others` where that one fails or does not answer, and says to which.
///
/// Programs do that themselves outside. In the VM they can't: each of their connections is there at once.
pub(super) async fn dial(
    first: SocketAddr,
    others: impl FnOnce() -> Vec<SocketAddr>,
) -> io::Result<(TcpStream, SocketAddr)> {
    let mut dialling = pin!(dial_one(first));
    // What the first one has failed with, which is what is told.
    let mut failure = tokio::select! {
        dialled = &mut dialling => match dialled {
            Ok(server) => return Ok((server, first)),
            Err(error) => Some(error),
        },
        () = sleep(DELAY) => None,
    };
    let mut others = others().into_iter().peekable();
    let mut attempts = JoinSet::new();
    loop {
        if let Some(other) = others.next() {
            attempts.spawn(async move { (dial_one(other).await, other) });
        }
        if attempts.is_empty()
            && let Some(error) = failure
        {
            return Err(error);
        }
        tokio::select! {
            dialled = &mut dialling, if failure.is_none() => match dialled {
                Ok(server) => return Ok((server, first)),
                Err(error) => failure = Some(error),
            },
            Some(attempt) = attempts.join_next() => {
                if let Ok((Ok(server), other)) = attempt {
                    return Ok((server, other));
                }
            }
            () = sleep(DELAY), if others.peek().is_some() => {}
            () = sleep(PATIENCE), if others.peek().is_none() && failure.is_some() => {
                attempts.abort_all();
            }
        }
    }
}

/// On the host's loopback, also by its other address: many servers listen on 127.0.0.1 only, and who asks
/// for `localhost` tries `::1` first.
async fn dial_one(destination: SocketAddr) -> io::Result<TcpStream> {
    let other: IpAddr = match destination.ip() {
        address if !address.is_loopback() => return TcpStream::connect(destination).await,
        IpAddr::V4(_) => Ipv6Addr::LOCALHOST.into(),
        IpAddr::V6(_) => Ipv4Addr::LOCALHOST.into(),
    };
    let refused = match TcpStream::connect(destination).await {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => error,
        result => return result,
    };
    let dialled = TcpStream::connect((other, destination.port())).await;
    dialled.map_err(|_| refused)
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddrV4;
    use std::os::fd::AsRawFd;

    use nix::sys::socket::{
        AddressFamily, Backlog, SockFlag, SockType, SockaddrIn, bind, getsockname, listen, socket,
    };
    use tokio::net::TcpListener;

    use super::*;

    async fn server() -> (TcpListener, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a listener");
        let address = listener.local_addr().expect("an address");
        (listener, address)
    }

    /// Nobody listens there.
    async fn closed() -> SocketAddr {
        server().await.1
    }

    /// A server that answers no connection: its backlog is full.
    fn silent() -> (impl Sized, SocketAddr) {
        let listener = socket(
            AddressFamily::Inet,
            SockType::Stream,
            SockFlag::SOCK_CLOEXEC,
            None,
        )
        .expect("a socket");
        bind(listener.as_raw_fd(), &SockaddrIn::new(127, 0, 0, 1, 0)).expect("an address");
        listen(&listener, Backlog::new(0).expect("a backlog")).expect("a listener");
        let address: SockaddrIn = getsockname(listener.as_raw_fd()).expect("an address");
        let address = SocketAddr::from(SocketAddrV4::from(address));
        let waits = std::net::TcpStream::connect(address).expect("a connection");
        ((listener, waits), address)
    }

    #[tokio::test]
    async fn the_first_that_answers_is_connected_to() {
        let (_server, address) = server().await;
        let (_other, other) = server().await;
        let dialled = dial(address, || vec![other]).await;
        assert_eq!(dialled.expect("a connection").1, address);
    }

    #[tokio::test]
    async fn another_one_is_tried_where_one_fails_or_does_not_answer() {
        let (_server, address) = server().await;
        let (_held, silent) = silent();
        for first in [closed().await, silent] {
            let others = vec![closed().await, silent, address];
            let dialled = dial(first, || others).await;
            assert_eq!(dialled.expect("a connection").1, address);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_failure_is_told_though_others_do_not_answer() {
        let (_held, silent) = silent();
        for others in [vec![], vec![silent, silent]] {
            let failed = dial(closed().await, || others).await;
            let error = failed.expect_err("nobody listens");
            assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
        }
    }
}
