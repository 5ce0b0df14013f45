//! `NativeClient`.

#![expect(
    clippy::needless_pass_by_value,
    reason = "napi hands arguments over by value"
)]

use napi::Status;
use napi::threadsafe_function::{ThreadsafeFunction, ThreadsafeFunctionCallMode};
use napi_derive::napi;

use super::error::rejection;
use super::events::progress_json;
use super::options::client_options;
use super::vm::NativeVm;
use crate::ids::VmKey;
use crate::session::Client;

/// A client as `lib/client.ts` uses it.
#[napi]
pub struct NativeClient {
    client: Client,
}

#[napi]
impl NativeClient {
    /// `options`: JSON of the client's options; `package_dir`: root of this npm package; `node`: the
    /// Node that runs this.
    #[napi(constructor)]
    pub fn new(options: String, package_dir: String, node: String) -> napi::Result<Self> {
        let options =
            client_options(&options, package_dir.into(), node.into()).map_err(rejection)?;
        Ok(Self {
            client: Client::new(options),
        })
    }

    #[napi]
    pub fn vm(&self, key: Vec<String>) -> napi::Result<NativeVm> {
        VmKey::new(key)
            .and_then(|key| self.client.vm(key))
            .map(NativeVm::new)
            .map_err(rejection)
    }

    /// Ends what this client runs.
    #[napi]
    pub async fn close(&self) -> napi::Result<()> {
        self.client.close().await.map_err(rejection)
    }

    /// Puts an agent into the store, if it is not there yet. `progress` is called with JSON.
    #[napi]
    pub async fn install_agent(
        &self,
        agent_type: String,
        progress: ProgressCallback,
    ) -> napi::Result<()> {
        let tell = move |step| {
            progress.call(
                progress_json(&step).to_string(),
                ThreadsafeFunctionCallMode::NonBlocking,
            );
        };
        let installed = self.client.install(&agent_type, &tell).await;
        installed.map_err(rejection)
    }
}

/// Does not keep Node alive; the promise of the call does.
type ProgressCallback = ThreadsafeFunction<String, (), String, Status, false, true>;
