//! The agent store: what `client.agents` stands on.

use napi::bindgen_prelude::PromiseRaw;
use napi::threadsafe_function::{ThreadsafeFunction, ThreadsafeFunctionCallMode};
use napi::{Env, Status};
use napi_derive::napi;
use serde_json::{Value, json};

use super::client::NativeClient;
use super::error::promise;
use super::events::progress_json;
use super::vm::{NativeAbort, unless_aborted};
use crate::agents::{Removal, StoreEntry};

/// Does not keep Node alive; the promise of the call does.
pub(super) type ProgressCallback = ThreadsafeFunction<String, (), String, Status, false, true>;

#[napi]
impl NativeClient {
    /// Puts an agent into the store, if it is not there yet. `progress` is called with JSON.
    #[napi]
    pub fn install_agent<'env>(
        &self,
        env: &'env Env,
        agent: String,
        progress: ProgressCallback,
        abort: &NativeAbort,
    ) -> napi::Result<PromiseRaw<'env, ()>> {
        let client = self.client.clone();
        let abort = abort.signal();
        promise(env, async move {
            let tell = move |step| {
                progress.call(
                    progress_json(&step).to_string(),
                    ThreadsafeFunctionCallMode::NonBlocking,
                );
            };
            unless_aborted(abort, client.install(&agent, &tell)).await
        })
    }

    /// Returns JSON of `{ agents, entries }`.
    #[napi]
    pub fn list_agents<'env>(&self, env: &'env Env) -> napi::Result<PromiseRaw<'env, String>> {
        let client = self.client.clone();
        promise(env, async move {
            let available = client.available().await?;
            let available = available.iter().map(|agent| {
                json!({
                    "name": agent.name,
                    "package": agent.package,
                    "version": agent.version,
                    "pinned": agent.is_pinned,
                    "installed": agent.is_installed,
                })
            });
            let entries = client.installed().await?;
            let entries = entries.iter().map(entry_json);
            let listing = json!({
                "agents": available.collect::<Vec<_>>(),
                "entries": entries.collect::<Vec<_>>(),
            });
            Ok(listing.to_string())
        })
    }

    /// Returns JSON of `{ removed, kept }`.
    #[napi]
    pub fn remove_agent<'env>(
        &self,
        env: &'env Env,
        agent: String,
    ) -> napi::Result<PromiseRaw<'env, String>> {
        let client = self.client.clone();
        promise(env, async move {
            Ok(removal_json(&client.uninstall(&agent).await?))
        })
    }

    /// Returns JSON of `{ removed, kept }`.
    #[napi]
    pub fn prune_agents<'env>(
        &self,
        env: &'env Env,
        dry_run: bool,
    ) -> napi::Result<PromiseRaw<'env, String>> {
        let client = self.client.clone();
        promise(env, async move {
            Ok(removal_json(&client.prune(dry_run).await?))
        })
    }
}

fn entry_json(entry: &StoreEntry) -> Value {
    json!({
        "name": entry.name,
        "agent": entry.agent,
        "version": entry.version,
        "bytes": entry.bytes,
        "use": entry.used.as_str(),
        "running": entry.in_use,
    })
}

fn removal_json(removal: &Removal) -> String {
    let kept = removal.kept.iter().map(|(entry, why)| {
        let mut entry = entry_json(entry);
        entry["reason"] = why.as_str().into();
        entry
    });
    let removed = removal.removed.iter().map(entry_json);
    json!({
        "removed": removed.collect::<Vec<_>>(),
        "kept": kept.collect::<Vec<_>>(),
    })
    .to_string()
}
