//! `NativeClient`.

use std::sync::{Arc, Mutex, PoisonError};

use napi::Env;
use napi::bindgen_prelude::{PromiseRaw, spawn};
use napi_derive::napi;
use serde_json::{Value, json};
use zeroize::Zeroizing;

use super::error::{promise, rejection};
use super::options::{client_options, vm_options};
use super::vm::NativeVm;
use crate::ids::VmKey;
use crate::session::Client;

/// A client as `lib/client.ts` uses it.
#[napi]
pub struct NativeClient {
    pub(super) client: Client,
    /// What is closed when the JavaScript environment ends; nothing once [`NativeClient::close`] was
    /// called.
    open: Arc<Mutex<Option<Client>>>,
}

#[napi]
impl NativeClient {
    /// `options`: JSON of the client's options; `package_dir`: root of this npm package; `node`: the
    /// Node that runs this.
    #[napi(constructor)]
    pub fn new(env: Env, options: String, package_dir: String, node: String) -> napi::Result<Self> {
        // It has the secrets.
        let options = Zeroizing::new(options);
        let options =
            client_options(&options, package_dir.into(), node.into()).map_err(rejection)?;
        let client = Client::new(options);
        // A worker thread that ends leaves the process running, and would leave its VMs.
        let open = Arc::new(Mutex::new(Some(client.clone())));
        env.add_env_cleanup_hook(Arc::clone(&open), |open| {
            if let Some(client) = take(&open) {
                drop(spawn(async move {
                    if let Err(error) = client.close().await {
                        tracing::warn!(%error, "can't close the client of a thread that ended");
                    }
                }));
            }
        })?;
        Ok(Self { client, open })
    }

    /// `options`: JSON of what this VM has over the client's options. What confines it is that of `before`
    /// where it is not given.
    #[napi]
    pub fn vm(
        &self,
        key: Vec<String>,
        options: Option<String>,
        before: Option<&NativeVm>,
    ) -> napi::Result<NativeVm> {
        let options = options.map(Zeroizing::new);
        let vm = || {
            let key = VmKey::new(key)?;
            match &options {
                Some(options) => {
                    let mut over = self.client.vm_settings().clone();
                    let Some(before) = before.map(NativeVm::handle) else {
                        return self.client.vm_with(key, vm_options(options, &over)?);
                    };
                    over.network = before.vm_settings().network.clone();
                    over.secrets = before.vm_settings().secrets.clone();
                    let settings = vm_options(options, &over)?;
                    self.client.vm_instead(key, before, settings)
                }
                None => self.client.vm(key),
            }
        };
        vm().map(NativeVm::new).map_err(rejection)
    }

    /// Returns JSON of an array of `{ key, createdAt }`.
    #[napi]
    pub fn list_vms<'env>(&self, env: &'env Env) -> napi::Result<PromiseRaw<'env, String>> {
        let client = self.client.clone();
        promise(env, async move {
            let made = client.list_vms().await?;
            let vms = made
                .iter()
                .map(|vm| json!({ "key": vm.key, "createdAt": vm.created_at }));
            Ok(Value::from(vms.collect::<Vec<_>>()).to_string())
        })
    }

    /// Ends what this client runs.
    #[napi]
    pub fn close<'env>(&self, env: &'env Env) -> napi::Result<PromiseRaw<'env, ()>> {
        take(&self.open);
        let client = self.client.clone();
        promise(env, async move { client.close().await })
    }
}

fn take(open: &Mutex<Option<Client>>) -> Option<Client> {
    open.lock().unwrap_or_else(PoisonError::into_inner).take()
}
