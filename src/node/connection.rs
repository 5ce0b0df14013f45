//! `NativeConnection`: bytes on demand, in both directions.

#![expect(
    clippy::needless_pass_by_value,
    reason = "napi hands arguments over by value"
)]

use std::sync::{Arc, Mutex, PoisonError};

use napi::Env;
use napi::bindgen_prelude::{Buffer, PromiseRaw, Uint8Array};
use napi_derive::napi;
use serde_json::json;
use tokio::sync::watch;

use super::error::{aborted, promise};
use super::vm::{NativeAbort, NativeVm, unless_aborted};
use crate::error::{Error, Result};
use crate::session::VmConnection;

/// A TCP connection to a server in the VM, as `lib/connection.ts` uses it.
#[napi]
pub struct NativeConnection {
    connection: Mutex<Option<Arc<VmConnection>>>,
    /// Ends transfers that are under way when it is destroyed.
    destroyed: watch::Sender<bool>,
}

#[napi]
impl NativeVm {
    #[napi]
    pub fn connect<'env>(
        &self,
        env: &'env Env,
        port: u32,
        abort: &NativeAbort,
    ) -> napi::Result<PromiseRaw<'env, NativeConnection>> {
        let handle = self.handle.clone();
        let abort = abort.signal();
        promise(env, async move {
            let port = port_of(port)?;
            let connection = unless_aborted(abort, handle.connect(port)).await?;
            Ok(NativeConnection {
                connection: Mutex::new(Some(Arc::new(connection))),
                destroyed: watch::Sender::new(false),
            })
        })
    }

    #[napi]
    pub fn wait_for_port<'env>(
        &self,
        env: &'env Env,
        port: u32,
        abort: &NativeAbort,
    ) -> napi::Result<PromiseRaw<'env, ()>> {
        let handle = self.handle.clone();
        let abort = abort.signal();
        promise(env, async move {
            let port = port_of(port)?;
            unless_aborted(abort, handle.wait_for_port(port)).await
        })
    }

    /// Returns JSON of an array of `{ port, address }`.
    #[napi]
    pub fn listening_ports<'env>(&self, env: &'env Env) -> napi::Result<PromiseRaw<'env, String>> {
        let handle = self.handle.clone();
        promise(env, async move {
            let listeners = handle.listening_ports().await?;
            let listeners: Vec<_> = listeners
                .iter()
                .map(|listener| {
                    json!({ "port": listener.port(), "address": listener.ip().to_string() })
                })
                .collect();
            Ok(json!(listeners).to_string())
        })
    }
}

#[napi]
impl NativeConnection {
    /// Resolves to the next bytes, `most` of them; `null` when the server has ended its direction.
    #[napi]
    pub fn read<'env>(
        &self,
        env: &'env Env,
        most: u32,
    ) -> napi::Result<PromiseRaw<'env, Option<Buffer>>> {
        let (connection, destroyed) = (self.connection(), self.destroyed.subscribe());
        promise(env, async move {
            let connection = connection.ok_or_else(aborted)?;
            let chunk = unless_aborted(destroyed, connection.read(most as usize)).await?;
            Ok((!chunk.is_empty()).then(|| chunk.into()))
        })
    }

    /// Resolves when the connection has taken all of it.
    #[napi]
    pub fn write<'env>(
        &self,
        env: &'env Env,
        bytes: Uint8Array,
    ) -> napi::Result<PromiseRaw<'env, ()>> {
        let (connection, destroyed) = (self.connection(), self.destroyed.subscribe());
        // At once: the caller may change it when this has returned.
        let bytes = bytes.to_vec();
        promise(env, async move {
            let connection = connection.ok_or_else(aborted)?;
            unless_aborted(destroyed, connection.write(bytes)).await
        })
    }

    /// How many bytes of what was written the kernel has taken; `null` after [`Self::destroy`].
    #[napi]
    pub fn taken(&self) -> Option<f64> {
        #[expect(clippy::cast_precision_loss, reason = "nobody sends 8 PiB")]
        self.connection()
            .map(|connection| connection.taken() as f64)
    }

    /// Ends the direction to the server.
    #[napi]
    pub fn end<'env>(&self, env: &'env Env) -> napi::Result<PromiseRaw<'env, ()>> {
        let (connection, destroyed) = (self.connection(), self.destroyed.subscribe());
        promise(env, async move {
            match connection {
                Some(connection) => unless_aborted(destroyed, connection.shutdown_write()).await,
                None => Ok(()),
            }
        })
    }

    /// Ends the connection: `graceful` if both directions have ended, else by a reset.
    #[napi]
    pub fn destroy(&self, graceful: bool) {
        self.destroyed.send_replace(true);
        let taken = self
            .connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        // Otherwise a transfer that is just ending holds it, and drops it.
        if graceful && let Some(connection) = taken.and_then(Arc::into_inner) {
            connection.close();
        }
    }
}

impl NativeConnection {
    fn connection(&self) -> Option<Arc<VmConnection>> {
        self.connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

fn port_of(port: u32) -> Result<u16> {
    u16::try_from(port)
        .ok()
        .filter(|port| *port != 0)
        .ok_or_else(|| {
            Error::invalid_argument("port", "must be a whole number between 1 and 65535")
        })
}
