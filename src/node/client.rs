//! `NativeClient`.

#![expect(
    clippy::needless_pass_by_value,
    reason = "napi hands arguments over by value"
)]

use napi::bindgen_prelude::PromiseRaw;
use napi::threadsafe_function::{ThreadsafeFunction, ThreadsafeFunctionCallMode};
use napi::{Env, Status};
use napi_derive::napi;

use super::error::{promise, rejection};
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
    pub fn close<'env>(&self, env: &'env Env) -> napi::Result<PromiseRaw<'env, ()>> {
        let client = self.client.clone();
        promise(env, async move { client.close().await })
    }

    /// Puts an agent into the store, if it is not there yet. `progress` is called with JSON.
    #[napi]
    pub fn install_agent<'env>(
        &self,
        env: &'env Env,
        agent_type: String,
        progress: ProgressCallback,
    ) -> napi::Result<PromiseRaw<'env, ()>> {
        let client = self.client.clone();
        promise(env, async move {
            let tell = move |step| {
                progress.call(
                    progress_json(&step).to_string(),
                    ThreadsafeFunctionCallMode::NonBlocking,
                );
            };
            client.install(&agent_type, &tell).await
        })
    }
}

/// Does not keep Node alive; the promise of the call does.
type ProgressCallback = ThreadsafeFunction<String, (), String, Status, false, true>;
