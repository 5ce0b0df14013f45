//! What the host asks of the VM's ports.

use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum PortOp {
    /// Begins to connect to a port of `127.0.0.1`, or of `::1`, and hands the socket out at once: the
    /// host waits for what comes of it.
    Connect { port: u16, v6: bool },
    /// Lists the TCP sockets that listen.
    Listeners,
}

/// Listening sockets in one reply: as many as fit a packet (20 bytes each, at the worst).
pub const MAX_LISTENERS: usize = 3000;
