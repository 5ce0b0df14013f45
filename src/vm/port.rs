//! Servers inside a VM, reached from outside of it.

use std::net::SocketAddr;

use async_trait::async_trait;

use super::Result;
use crate::net::Connection;

/// The ports of a VM's loopback. Nothing of them is open to the host's network.
#[async_trait]
pub trait Ports: Send + Sync {
    /// Connects to a server that listens on `127.0.0.1` or, if nobody does there, on `::1`: a server on
    /// all addresses is met by either. The server sees a connection from its own loopback.
    ///
    /// A port that the VM's network options make the host's is refused: a program in the VM would not
    /// reach a server inside on it either.
    async fn connect(&self, port: u16) -> Result<Connection>;

    /// Fails for a port that `connect` would refuse whatever listens there.
    fn check_port(&self, port: u16) -> Result<()>;

    /// The TCP sockets that listen, by port; those aside that agentvm itself needs.
    async fn listeners(&self) -> Result<Vec<SocketAddr>>;
}
