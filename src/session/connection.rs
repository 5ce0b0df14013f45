//! Connections to servers inside a VM. One that is open keeps the VM awake.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::sync::watch;

use super::awake::Awake;
use super::client::{VmHandle, closed_error};
use crate::error::{Code, Error, Result};
use crate::net::Connection;
use crate::vm::{DynVm, VmError};

/// How often [`VmHandle::wait_for_port`] looks, at first and then: the kernel tells nobody when a socket
/// begins to listen.
const FIRST_LOOK: Duration = Duration::from_millis(5);
const LATER_LOOKS: Duration = Duration::from_millis(100);

/// An open TCP connection to a server inside the VM. Dropping it before both directions have ended
/// resets it.
pub struct VmConnection {
    connection: Connection,
    port: u16,
    vm: DynVm,
    handle: VmHandle,
    awake: Awake,
    closed: watch::Receiver<bool>,
}

impl VmHandle {
    /// Connects to a server that listens on the VM's 127.0.0.1 or `::1`.
    pub async fn connect(&self, port: u16) -> Result<VmConnection> {
        let (settings, awake) = self.awake().await?;
        let connect = |vm: DynVm| async move { vm.connect(port).await };
        let connecting = self.machine.begin(settings, connect);
        // A server whose backlog is full lets it wait for ever.
        let (vm, connection) = tokio::select! {
            connected = connecting => connected?,
            () = awake.ending() => return Err(self.machine.was_ended()),
        };
        Ok(VmConnection {
            connection,
            port,
            vm,
            handle: self.clone(),
            awake,
            closed: self.client.closed(),
        })
    }

    /// The TCP sockets that listen in the VM, by port.
    pub async fn listening_ports(&self) -> Result<Vec<SocketAddr>> {
        let (settings, _awake) = self.awake().await?;
        self.listeners(settings).await
    }

    /// Waits until something listens on this port, where [`VmHandle::connect`] would find it. It keeps the
    /// VM awake meanwhile.
    pub async fn wait_for_port(&self, port: u16) -> Result<()> {
        let (settings, awake) = self.awake().await?;
        let mut pause = FIRST_LOOK;
        loop {
            let list = |vm: DynVm| async move {
                vm.check_port(port)?;
                vm.listeners().await
            };
            let (_, listeners) = self.machine.begin(settings, list).await?;
            let meets = |listener: &SocketAddr| {
                let ip = listener.ip().to_canonical();
                listener.port() == port && (ip.is_unspecified() || is_localhost(*listener))
            };
            if listeners.iter().any(meets) {
                return Ok(());
            }
            let mut closed = self.client.closed();
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = awake.ending() => return Err(self.machine.was_ended()),
                _ = closed.wait_for(|closed| *closed) => return Err(closed_error()),
            }
            pause = (pause * 2).min(LATER_LOOKS);
        }
    }

    async fn listeners(&self, settings: &super::client::Settings) -> Result<Vec<SocketAddr>> {
        let list = |vm: DynVm| async move { vm.listeners().await };
        let (_, listeners) = self.machine.begin(settings, list).await?;
        Ok(listeners)
    }
}

fn is_localhost(address: SocketAddr) -> bool {
    use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
    let ip = address.ip().to_canonical();
    ip == IpAddr::V4(Ipv4Addr::LOCALHOST) || ip == IpAddr::V6(Ipv6Addr::LOCALHOST)
}

impl VmConnection {
    /// What has arrived, `most` bytes of it and 256 KiB, as soon as there is something. Empty: the server has ended
    /// its direction.
    pub async fn read(&self, most: usize) -> Result<Vec<u8>> {
        let chunk = self.until_the_end(self.connection.read(most)).await?;
        // The servers of a VM that dies are gone before it is: that is no end of what they sent.
        if chunk.is_empty() && !self.vm.still_runs().await {
            return Err(self.vm_gone().await);
        }
        Ok(chunk)
    }

    /// Returns when the kernel has taken all of it.
    pub async fn write(&self, bytes: Vec<u8>) -> Result<()> {
        self.until_the_end(self.connection.write(bytes)).await
    }

    /// How many bytes of what was written the kernel has taken.
    #[must_use]
    pub fn taken(&self) -> u64 {
        self.connection.taken()
    }

    /// Ends this direction; the other goes on.
    pub async fn shutdown_write(&self) -> Result<()> {
        let ended = self.connection.shutdown_write().await;
        ended.map_err(|error| self.failed(&error))
    }

    /// For a connection whose two directions have ended: what was written still arrives.
    pub fn close(self) {
        self.connection.close();
    }

    async fn until_the_end<T>(
        &self,
        transfer: impl Future<Output = std::io::Result<T>> + Send,
    ) -> Result<T> {
        let mut closed = self.closed.clone();
        let transferred = tokio::select! {
            biased;
            () = self.awake.ending() => return Err(self.handle.machine.was_ended()),
            _ = closed.wait_for(|closed| *closed) => return Err(closed_error()),
            transferred = transfer => transferred,
        };
        match transferred {
            Ok(transferred) => Ok(transferred),
            Err(_) if !self.vm.still_runs().await => Err(self.vm_gone().await),
            Err(error) => Err(self.failed(&error)),
        }
    }

    async fn vm_gone(&self) -> Error {
        let gone = format!("a connection to port {} was open", self.port);
        let outcome = self
            .handle
            .machine
            .outcome::<()>(&self.vm, Err(VmError::Ended(gone)));
        match outcome.await {
            Err(error) => error,
            Ok(()) => self.handle.machine.was_ended(),
        }
    }

    fn failed(&self, error: &std::io::Error) -> Error {
        let code = error
            .raw_os_error()
            .map_or(Code::Internal, Code::from_errno);
        let problem = error.raw_os_error().map_or_else(
            || error.to_string(),
            |errno| nix::errno::Errno::from_raw(errno).desc().to_owned(),
        );
        Error::new(
            code,
            format!("the connection to port {} in the VM: {problem}", self.port),
        )
    }
}
