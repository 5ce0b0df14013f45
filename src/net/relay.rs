//! Two connections made one.

use std::io;

use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};

use super::Traffic;
use super::hello::{Hello, Inspection};

/// What is read at once. Measured: more gains nothing on loopback.
const CHUNK: usize = 128 * 1024;

/// Relays both ways until both sides have ended their stream. An end of stream is passed on as such,
/// while the other direction goes on. `held`: what of the guest has been read before. `see`: is shown what it
/// sends.
///
/// With a `judge`, what the guest says is held back until it is clear what it begins with. The server may
/// speak meanwhile, as servers of mail do before anybody else. An error ends both directions.
pub(super) async fn relay(
    guest: &mut TcpStream,
    server: &mut TcpStream,
    traffic: &Traffic,
    held: Vec<u8>,
    judge: Option<impl FnOnce(Inspection) -> io::Result<()>>,
    mut see: impl FnMut(&[u8]),
) -> io::Result<()> {
    let (from_guest, to_guest) = guest.split();
    let (from_server, mut to_server) = server.split();
    tokio::try_join!(
        async {
            let mut send = |bytes: &[u8]| {
                traffic.send(bytes.len());
                see(bytes);
            };
            let mut held = held;
            if let Some(judge) = judge {
                judge(listen(&from_guest, &mut held).await?)?;
            }
            if !held.is_empty() {
                send(&held);
                to_server.write_all(&held).await?;
            }
            drop(held);
            pump(from_guest, to_server, send).await
        },
        pump(from_server, to_guest, |bytes| traffic.receive(bytes.len())),
    )?;
    Ok(())
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

/// Holds a buffer only while there is something to read: idle connections cost no memory.
async fn pump(
    from: ReadHalf<'_>,
    mut to: WriteHalf<'_>,
    mut passes: impl FnMut(&[u8]),
) -> io::Result<()> {
    loop {
        from.readable().await?;
        let mut buffer = Vec::with_capacity(CHUNK);
        loop {
            // A stream that never runs dry must let others run.
            tokio::task::coop::consume_budget().await;
            buffer.clear();
            match from.try_read_buf(&mut buffer) {
                Ok(0) => return to.shutdown().await,
                Ok(_) => {
                    passes(&buffer);
                    to.write_all(&buffer).await?;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
    }
}
