//! The store of images: what `client.images` stands on.

use napi::Env;
use napi::bindgen_prelude::PromiseRaw;
use napi::threadsafe_function::ThreadsafeFunctionCallMode;
use napi_derive::napi;
use serde_json::{Value, json};

use super::agents::ProgressCallback;
use super::client::NativeClient;
use super::error::promise;
use super::images::{RawImage, image_progress_json};
use super::vm::{NativeAbort, unless_aborted};
use crate::error::Error;
use crate::session::{ImageRemoval, KnownImage};

#[napi]
impl NativeClient {
    /// Returns JSON of an array.
    #[napi]
    pub fn list_images<'env>(&self, env: &'env Env) -> napi::Result<PromiseRaw<'env, String>> {
        let client = self.client.clone();
        promise(env, async move {
            Ok(images_json(&client.images().await?).to_string())
        })
    }

    /// `image`: JSON, as the option of a VM. `progress` is called with JSON. Returns JSON.
    #[napi]
    pub fn pull_image<'env>(
        &self,
        env: &'env Env,
        image: String,
        progress: ProgressCallback,
        abort: &NativeAbort,
    ) -> napi::Result<PromiseRaw<'env, String>> {
        let client = self.client.clone();
        let abort = abort.signal();
        promise(env, async move {
            let wrong = |problem: String| Error::invalid_argument("image", problem);
            let source = serde_json::from_str::<RawImage>(&image)
                .map_err(|error| wrong(error.to_string()))?
                .0
                .ok_or_else(|| wrong("false is no image".to_owned()))?;
            let tell = move |step| {
                progress.call(
                    image_progress_json(&step).to_string(),
                    ThreadsafeFunctionCallMode::NonBlocking,
                );
            };
            let pulled = unless_aborted(abort, client.pull_image(source, &tell)).await?;
            Ok(image_json(&pulled).to_string())
        })
    }

    /// Returns JSON of `{ removed, untagged }`.
    #[napi]
    pub fn remove_image<'env>(
        &self,
        env: &'env Env,
        image: String,
    ) -> napi::Result<PromiseRaw<'env, String>> {
        let client = self.client.clone();
        promise(env, async move {
            let ImageRemoval {
                removed, untagged, ..
            } = client.remove_image(&image).await?;
            let removal = json!({ "removed": images_json(&removed), "untagged": untagged });
            Ok(removal.to_string())
        })
    }

    /// Returns JSON of `{ removed, kept, layers, bases }`.
    #[napi]
    pub fn prune_images<'env>(
        &self,
        env: &'env Env,
        dry_run: bool,
    ) -> napi::Result<PromiseRaw<'env, String>> {
        let client = self.client.clone();
        promise(env, async move {
            let ImageRemoval {
                removed,
                kept,
                layers,
                bases,
                ..
            } = client.prune_images(dry_run).await?;
            let removal = json!({
                "removed": images_json(&removed),
                "kept": images_json(&kept),
                "layers": { "count": layers.count, "bytes": layers.bytes },
                "bases": { "count": bases.count, "bytes": bases.bytes },
            });
            Ok(removal.to_string())
        })
    }
}

fn images_json(images: &[KnownImage]) -> Value {
    images.iter().map(image_json).collect()
}

fn image_json(image: &KnownImage) -> Value {
    let stored = &image.stored;
    let vms = image.vms.iter().map(|vm| {
        json!({
            "key": vm.key,
            "dataDir": vm.data_dir.to_string_lossy(),
        })
    });
    json!({
        "digest": stored.digest.to_string(),
        "references": stored.names,
        "bytes": stored.bytes,
        "pulledAt": stored.made_at,
        "vms": vms.collect::<Vec<_>>(),
        "running": stored.is_running,
    })
}
