//! Connections to servers of the VM. PID 1 makes the sockets, which are in the VM's net namespace then.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::{Arc, PoisonError};

use agentvm_guest::net::{ADDRESS_V4, ADDRESS_V6, PROXY_PORT, RESOLVER};
use agentvm_guest::protocol::{PortOp, Request};
use async_trait::async_trait;
use nix::errno::Errno;

use super::control::Answer;
use super::running::{NamespaceVm, unexpected};
use crate::net::Connection;
use crate::vm::{Ports, Result, VmError};

const DNS_PORT: u16 = 53;

#[async_trait]
impl Ports for NamespaceVm {
    async fn connect(&self, port: u16) -> Result<Connection> {
        self.check_port(port)?;
        let refused = match self.connect_to(port, false).await {
            Err(
                error @ VmError::Connect {
                    errno: Errno::ECONNREFUSED,
                    ..
                },
            ) => error,
            result => return result,
        };
        match self.connect_to(port, true).await {
            // Nor is there one, or an IPv6, on the other address.
            Err(VmError::Connect { .. }) => Err(refused),
            result => result,
        }
    }

    fn check_port(&self, port: u16) -> Result<()> {
        if self.is_exempt(port) {
            return Err(VmError::ExemptPort(port));
        }
        Ok(())
    }

    async fn listeners(&self) -> Result<Vec<SocketAddr>> {
        let op = PortOp::Listeners;
        match self.port(op).await? {
            Answer::Listeners(mut listeners) => {
                listeners.retain(|listener| !is_ours(*listener));
                listeners.sort_unstable_by_key(|listener| (listener.port(), listener.ip()));
                listeners.dedup();
                Ok(listeners)
            }
            Answer::Failed { errno, .. } => Err(VmError::File {
                op: "can't list the ports in",
                path: "/proc/net".to_owned(),
                errno,
            }),
            other => Err(unexpected(&other)),
        }
    }
}

impl NamespaceVm {
    /// As the VM that runs was booted, whatever options its callers have now.
    fn is_exempt(&self, port: u16) -> bool {
        let network = self.network.lock().unwrap_or_else(PoisonError::into_inner);
        network
            .as_ref()
            .is_some_and(|network| network.is_exempt(port))
    }

    async fn connect_to(&self, port: u16, v6: bool) -> Result<Connection> {
        let closing = self.control.closing();
        let socket: OwnedFd = match self.port(PortOp::Connect { port, v6 }).await? {
            Answer::Opened(socket) => socket.take(),
            Answer::Failed { errno, .. } => return Err(VmError::Connect { port, errno }),
            other => return Err(unexpected(&other)),
        };
        let established = Connection::establish(socket, Arc::clone(closing)).await;
        established.map_err(|error| {
            // What PID 1 handed out is no TCP socket: no errno says so.
            let errno = error.raw_os_error().map_or(Errno::EPROTO, Errno::from_raw);
            VmError::Connect { port, errno }
        })
    }

    async fn port(&self, op: PortOp) -> Result<Answer> {
        let id = self.control.next_id();
        self.control.call(id, &Request::Port { id, op }, &[]).await
    }
}

/// A socket that PID 1 made for the host to serve.
fn is_ours(listener: SocketAddr) -> bool {
    let proxy = |ip: IpAddr| ip == ADDRESS_V4 || ip == ADDRESS_V6;
    match listener.port() {
        PROXY_PORT => proxy(listener.ip()),
        DNS_PORT => listener.ip() == RESOLVER,
        _ => false,
    }
}
