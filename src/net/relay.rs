//! Two connections made one.

use std::io;

use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};

use super::Traffic;
use super::hello::{Hello, Inspection};

/// What is read at once. Measured: more gains nothing on loopback.
const CHUNK: usize = 128 * 1024;

/// What is read of what a connection begins with, at once.
const BEGINNING: usize = 16 * 1024;

/// Relays both ways until both sides have ended their stream. An end of stream is passed on as such,
/// while the other direction goes on; so it does when a side takes nothing more, as it may have said why. `held`:
/// what of the guest has been read before. `see`: is shown what it sends.
///
/// What the guest says is held back until it is clear what it begins with, and `judge` lets it pass. The
/// server may speak meanwhile, as servers of mail do before anybody else. An error ends both directions.
pub(super) async fn relay(
    guest: &mut TcpStream,
    server: &mut TcpStream,
    traffic: &Traffic,
    mut held: Vec<u8>,
    judge: impl FnOnce(Inspection) -> io::Result<()>,
    mut see: impl FnMut(&[u8]),
) -> io::Result<()> {
    let (from_guest, to_guest) = guest.split();
    let (from_server, mut to_server) = server.split();
    let send = |bytes: &[u8]| {
        traffic.send(bytes.len());
        see(bytes);
    };
    let ended = tokio::try_join!(
        async {
            let mut send = send;
            judge(listen(&from_guest, &mut held).await?)?;
            if let Some(ended) = pass(&held, &mut to_server, &mut send).await? {
                return Ok(Some(ended));
            }
            drop(held);
            pump(from_guest, to_server, send).await
        },
        pump(from_server, to_guest, |bytes| traffic.receive(bytes.len())),
    )?;
    let (to_server, to_guest) = ended;
    to_server.or(to_guest).map_or(Ok(()), Err)
}

/// Reads on until it is clear what it is.
async fn listen(from: &ReadHalf<'_>, held: &mut Vec<u8>) -> io::Result<Inspection> {
    let mut hello = Hello::default();
    let mut judged = 0;
    loop {
        if judged < held.len() {
            let begun = hello.push(held.get(judged..).unwrap_or_default());
            if *begun != Inspection::Incomplete {
                return Ok(begun.clone());
            }
            judged = held.len();
        }
        from.readable().await?;
        held.reserve(BEGINNING);
        match from.try_read_buf(held) {
            // The end is read again by who relays it.
            Ok(0) if held.is_empty() => return Ok(Inspection::NotTls),
            Ok(0) => return Ok(Inspection::Malformed),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

/// Why a side takes nothing more, once it does not.
type Closed = Option<io::Error>;

/// Holds a buffer only while there is something to read: idle connections cost no memory.
async fn pump(
    from: ReadHalf<'_>,
    mut to: WriteHalf<'_>,
    mut passes: impl FnMut(&[u8]),
) -> io::Result<Closed> {
    loop {
        from.readable().await?;
        let mut buffer = Vec::with_capacity(CHUNK);
        loop {
            buffer.clear();
            match from.try_read_buf(&mut buffer) {
                Ok(0) => return to.shutdown().await.map(|()| None),
                Ok(_) => {
                    if let Some(closed) = pass(&buffer, &mut to, &mut passes).await? {
                        return Ok(Some(closed));
                    }
                    // A stream that never runs dry must let others run.
                    tokio::task::yield_now().await;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
    }
}

async fn pass(
    bytes: &[u8],
    to: &mut WriteHalf<'_>,
    passes: &mut impl FnMut(&[u8]),
) -> io::Result<Closed> {
    passes(bytes);
    match to.write_all(bytes).await {
        Ok(()) => Ok(None),
        // What it has sent before is still there to be read, and then its end.
        Err(error)
            if [io::ErrorKind::BrokenPipe, io::ErrorKind::ConnectionReset]
                .contains(&error.kind()) =>
        {
            Ok(Some(error))
        }
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;
    use tokio::net::TcpListener;

    use super::*;

    /// The two ends of a connection.
    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a listener");
        let address = listener.local_addr().expect("an address");
        let connecting = TcpStream::connect(address);
        let (accepted, connected) = tokio::join!(listener.accept(), connecting);
        (accepted.expect("accepted").0, connected.expect("connected"))
    }

    #[tokio::test]
    async fn what_a_server_says_before_it_takes_no_more_arrives() {
        let (mut program, mut guest) = pair().await;
        let (mut host, mut server) = pair().await;
        program.write_all(b"much").await.expect("written");
        // A close of what has unread bytes is a reset.
        server.write_all(b"unread").await.expect("written");
        host.readable().await.expect("readable");
        host.write_all(b"too much").await.expect("written");
        drop(host);
        let traffic = Traffic::default();
        let relayed = relay(
            &mut guest,
            &mut server,
            &traffic,
            Vec::new(),
            |_| Ok(()),
            |_| {},
        );
        assert!(relayed.await.is_err(), "not all was taken");
        let mut said = [0; 8];
        program.read_exact(&mut said).await.expect("an answer");
        assert_eq!(&said, b"too much");
    }

    #[tokio::test]
    async fn what_is_judged_does_not_pass_before() {
        let (mut program, mut guest) = pair().await;
        let (mut host, mut server) = pair().await;
        program.write_all(b"GET").await.expect("written");
        let traffic = Traffic::default();
        let deny = |_| Err(io::ErrorKind::PermissionDenied.into());
        let relayed = relay(&mut guest, &mut server, &traffic, Vec::new(), deny, |_| {}).await;
        let error = relayed.expect_err("denied");
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
        drop(server);
        let mut heard = Vec::new();
        host.read_to_end(&mut heard).await.expect("an end");
        assert_eq!(heard, b"");
    }
}
