//! Limits from JavaScript, and what a VM takes to it.

use napi::Env;
use napi::bindgen_prelude::PromiseRaw;
use napi_derive::napi;
use serde::{Deserialize, Deserializer, de::Error as _};
use serde_json::{Value, json};

use super::argument::{MAX_SAFE, Whole};
use super::error::promise;
use super::vm::NativeVm;
use crate::session::Stats;
use crate::vm::Limits;
use crate::vm::limits::InForce;

/// What is left out is the client's, or the default.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct RawLimits {
    /// A guest, a shell and a small program need some.
    memory_bytes: Option<Whole<{ 4 << 20 }, MAX_SAFE>>,
    cpus: Option<Cpus>,
    pids: Option<Whole<8, 4_194_304>>,
    open_files: Option<Whole<64, 1_048_576>>,
    disk_bytes: Option<Whole<{ 1 << 20 }, MAX_SAFE>>,
    min_free_disk_bytes: Option<Whole<0, MAX_SAFE>>,
    best_effort: Option<bool>,
}

impl RawLimits {
    pub(super) fn over(self, limits: &Limits) -> Limits {
        Limits {
            memory_bytes: self.memory_bytes.map(|own| own.0).or(limits.memory_bytes),
            milli_cpus: self.cpus.map(|own| own.0).or(limits.milli_cpus),
            pids: self.pids.map(|own| own.0).or(limits.pids),
            open_files: self.open_files.map(|own| own.0).or(limits.open_files),
            disk_bytes: self.disk_bytes.map(|own| own.0).or(limits.disk_bytes),
            min_free_disk_bytes: self
                .min_free_disk_bytes
                .map(|own| own.0)
                .or(limits.min_free_disk_bytes),
            best_effort: self.best_effort.unwrap_or(limits.best_effort),
        }
    }
}

/// In thousandths.
#[derive(Debug)]
struct Cpus(u64);

impl<'de> Deserialize<'de> for Cpus {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        /// The kernel's smallest quota is a hundredth.
        const LEAST: f64 = 0.01;
        const MOST: f64 = 8192.0;
        let value = Value::deserialize(deserializer)?;
        let cpus = value.as_f64().filter(|cpus| (LEAST..=MOST).contains(cpus));
        let cpus = cpus.ok_or_else(|| {
            let range = format!("a number between {LEAST} and {MOST}");
            D::Error::custom(format!("must be {range}, not {value}"))
        })?;
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "in the range above"
        )]
        Ok(Self((cpus * 1000.0).round() as u64))
    }
}

#[napi]
impl NativeVm {
    /// Returns JSON.
    #[napi]
    pub fn stats<'env>(&self, env: &'env Env) -> napi::Result<PromiseRaw<'env, String>> {
        let handle = self.handle.clone();
        promise(env, async move { Ok(stats_json(&handle.stats().await?)) })
    }
}

fn stats_json(stats: &Stats) -> String {
    let Some(running) = &stats.running else {
        return json!({ "running": false, "diskBytes": stats.disk_bytes }).to_string();
    };
    let usage = &running.usage;
    json!({
        "running": true,
        "diskBytes": stats.disk_bytes,
        "uptimeMs": usage.uptime_ms,
        "cpuTimeMs": usage.cpu_ms,
        "memoryBytes": usage.memory_bytes,
        "memoryPeakBytes": usage.memory_peak_bytes,
        "pids": usage.pids,
        "countedBy": usage.counted_by.map_or("processes", |by| by.as_str()),
        "networkRxBytes": usage.network_rx_bytes,
        "networkTxBytes": usage.network_tx_bytes,
        "limits": running.limits.iter().map(limit_json).collect::<Vec<_>>(),
    })
    .to_string()
}

/// Numbers of bytes and processes without a fraction.
fn limit_json(own: &InForce) -> Value {
    json!({
        "name": own.limit.as_str(),
        "value": own.value,
        "mechanism": own.mechanism.as_str(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::argument::parse;

    fn limits(json: &str) -> crate::error::Result<Limits> {
        Ok(parse::<RawLimits>(json)?.over(&Limits::default()))
    }

    #[test]
    fn limits_are_parsed_into_their_units() {
        let parsed = limits(r#"{"memoryBytes":268435456,"cpus":0.5,"pids":100}"#).expect("valid");
        assert_eq!(parsed.memory_bytes, Some(256 << 20));
        assert_eq!(parsed.milli_cpus, Some(500));
        assert_eq!(parsed.pids, Some(100));
        assert!(!parsed.best_effort);
    }

    #[test]
    fn a_wrong_limit_is_named() {
        for (json, problem) in [
            (
                r#"{"cpus":0}"#,
                "cpus: must be a number between 0.01 and 8192, not 0",
            ),
            (
                r#"{"cpus":"2"}"#,
                "cpus: must be a number between 0.01 and 8192, not \"2\"",
            ),
            (
                r#"{"memoryBytes":1.5}"#,
                "memoryBytes: must be a whole number of at least 4194304, not 1.5",
            ),
            (
                r#"{"bestEffort":1}"#,
                "bestEffort: must be a boolean, not 1",
            ),
        ] {
            let error = limits(json).expect_err(json);
            assert_eq!(error.message, problem);
        }
        assert!(limits(r#"{"memory":1}"#).is_err());
    }
}
