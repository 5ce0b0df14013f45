//! Two connections made one.

use std::io;

use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};

use super::Traffic;

/// What is read at once. Measured: more gains nothing on loopback.
const CHUNK: usize = 128 * 1024;

/// Relays both ways until both sides have ended their stream. An end of stream is passed on as such,
/// while the other direction goes on.
pub(super) async fn relay(
    guest: &mut TcpStream,
    server: &mut TcpStream,
    traffic: &Traffic,
) -> io::Result<()> {
    let (from_guest, to_guest) = guest.split();
    let (from_server, to_server) = server.split();
    tokio::try_join!(
        pump(from_guest, to_server, |bytes| traffic.send(bytes)),
        pump(from_server, to_guest, |bytes| traffic.receive(bytes)),
    )?;
    Ok(())
}

/// Holds a buffer only while there is something to read: idle connections cost no memory.
async fn pump(from: ReadHalf<'_>, mut to: WriteHalf<'_>, count: impl Fn(usize)) -> io::Result<()> {
    loop {
        from.readable().await?;
        let mut buffer = Vec::with_capacity(CHUNK);
        loop {
            // A stream that never runs dry must let others run.
            tokio::task::coop::consume_budget().await;
            buffer.clear();
            match from.try_read_buf(&mut buffer) {
                Ok(0) => return to.shutdown().await,
                Ok(length) => {
                    count(length);
                    to.write_all(&buffer).await?;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
    }
}
