//! `client.doctor()`.

use napi::Env;
use napi::bindgen_prelude::PromiseRaw;
use napi_derive::napi;
use serde_json::{Value, json};

use super::client::NativeClient;
use super::error::promise;
use crate::vm::{Check, Diagnosis, State};

#[napi]
impl NativeClient {
    /// Returns JSON of `{ ok, checks }`.
    #[napi]
    pub fn doctor<'env>(&self, env: &'env Env) -> napi::Result<PromiseRaw<'env, String>> {
        let client = self.client.clone();
        promise(env, async move {
            Ok(diagnosis(&client.doctor().await?).to_string())
        })
    }
}

fn diagnosis(diagnosis: &Diagnosis) -> Value {
    let checks: Vec<Value> = diagnosis.checks.iter().map(check).collect();
    json!({ "ok": diagnosis.is_ok(), "checks": checks })
}

fn check(check: &Check) -> Value {
    let state = match check.state {
        State::Ok => "ok",
        State::Degraded => "degraded",
        State::Missing => "missing",
    };
    json!({
        "name": check.name,
        "state": state,
        "detail": check.detail,
        "lost": check.trouble.as_ref().map(|trouble| &trouble.lost),
        "remedy": check.trouble.as_ref().map(|trouble| &trouble.remedy),
    })
}
