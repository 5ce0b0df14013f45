//! Processes: started, fed, signalled, listed, and their output on its way to JavaScript.

#![expect(
    clippy::needless_pass_by_value,
    reason = "napi hands arguments over by value"
)]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use napi::Env;
use napi::bindgen_prelude::{Buffer, Function, Promise, PromiseRaw, Uint8Array, spawn};
use napi_derive::napi;
use nix::sys::signal::Signal;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::watch;

use super::argument::{MAX_SAFE, Whole, parse};
use super::error::{promise, rejection};
use super::options::{RawUser, path};
use super::vm::{NativeAbort, NativeVm, signal_name, unless_aborted};
use crate::error::{Error, Result};
use crate::session::{
    End, Interest, Output, OutputSubscription, ShellId, Source, SpawnOptions, Started, Stream,
    check_environment,
};
use crate::vm::{Exit, ProcessInfo, User};

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct RawSpawnOptions {
    env: BTreeMap<String, String>,
    cwd: Option<String>,
    user: RawUser,
    timeout_ms: Option<Whole<1, MAX_SAFE>>,
    max_output_bytes: Option<Whole<0, { 64 << 20 }>>,
}

#[derive(Default, Deserialize)]
struct RawArguments {
    args: Vec<String>,
}

/// How a process ended.
#[napi(object)]
pub struct NativeEnd {
    pub exit_code: Option<i32>,
    pub signal: Option<String>,
    pub timed_out: bool,
    pub vm_ended: bool,
}

impl From<End> for NativeEnd {
    fn from(end: End) -> Self {
        let (exit_code, signal) = match end.exit {
            Exit::Code(code) => (Some(code), None),
            Exit::Signal(number) => (None, Some(signal_name(number))),
        };
        Self {
            exit_code,
            signal,
            timed_out: end.timed_out,
            vm_ended: end.with_vm,
        }
    }
}

/// Something that a process or shell has written, or its end: one of `data` and `end` is there, and one of
/// `pid` and `shell_id`.
#[napi(object)]
pub struct NativeOutput {
    pub pid: Option<u32>,
    pub shell_id: Option<String>,
    /// Not of standard error.
    pub is_stdout: bool,
    pub data: Option<Buffer>,
    /// Before these bytes.
    pub dropped_bytes: f64,
    pub end: Option<NativeEnd>,
}

/// A callback for output that is called until this is closed.
#[napi]
pub struct NativeOutputSubscription {
    subscription: Arc<OutputSubscription>,
    closed: watch::Sender<bool>,
}

#[napi]
impl NativeOutputSubscription {
    /// The events that the callback is for from now on.
    #[napi]
    pub fn set_interest(&self, events: Vec<String>) {
        let has = |event: &str| events.iter().any(|own| own == event);
        self.subscription.set_interest(Interest {
            process_output: has("processOutput"),
            process_exit: has("processExit"),
            shell_data: has("shellData"),
            shell_exit: has("shellExit"),
        });
    }

    #[napi]
    pub fn close(&self) {
        self.subscription.set_interest(Interest::default());
        self.closed.send_replace(true);
    }
}

#[napi]
impl NativeVm {
    /// Resolves to the pid. `arguments`: JSON of `{ args }`; `options`: JSON.
    #[napi]
    pub fn spawn<'env>(
        &self,
        env: &'env Env,
        command: String,
        arguments: String,
        options: String,
        stdin: Option<Uint8Array>,
        abort: &NativeAbort,
    ) -> napi::Result<PromiseRaw<'env, u32>> {
        let handle = self.handle.clone();
        let abort = abort.signal();
        // At once: the caller may change it when this has returned.
        let stdin = stdin.map(|bytes| bytes.to_vec());
        promise(env, async move {
            let (argv, options) = spawn_options(command, &arguments, &options, stdin)?;
            unless_aborted(abort, handle.spawn(argv, options)).await
        })
    }

    /// Resolves when the process's stdin has taken all of it.
    #[napi]
    pub fn write_process_stdin<'env>(
        &self,
        env: &'env Env,
        pid: u32,
        data: Uint8Array,
    ) -> napi::Result<PromiseRaw<'env, ()>> {
        // Here, not in the promise: in the order of the calls.
        let written = self.handle.write_process_stdin(pid, data.to_vec());
        promise(env, written)
    }

    #[napi]
    pub fn close_process_stdin<'env>(
        &self,
        env: &'env Env,
        pid: u32,
    ) -> napi::Result<PromiseRaw<'env, ()>> {
        let closed = self.handle.close_process_stdin(pid);
        promise(env, closed)
    }

    /// Keeps Node alive until the process has ended.
    #[napi]
    pub fn wait_process<'env>(
        &self,
        env: &'env Env,
        pid: u32,
        abort: &NativeAbort,
    ) -> napi::Result<PromiseRaw<'env, NativeEnd>> {
        let handle = self.handle.clone();
        let abort = abort.signal();
        promise(env, async move {
            let end = unless_aborted(abort, handle.wait_process(pid)).await?;
            Ok(end.into())
        })
    }

    /// `signal`: a name, as `SIGINT`, or a number.
    #[napi]
    pub fn signal_process<'env>(
        &self,
        env: &'env Env,
        pid: u32,
        signal: String,
    ) -> napi::Result<PromiseRaw<'env, ()>> {
        let handle = self.handle.clone();
        promise(env, async move {
            handle.signal_process(pid, signal_number(&signal)?).await
        })
    }

    #[napi]
    pub fn kill_process<'env>(
        &self,
        env: &'env Env,
        pid: u32,
    ) -> napi::Result<PromiseRaw<'env, ()>> {
        let handle = self.handle.clone();
        promise(env, async move { handle.kill_process(pid).await })
    }

    /// Returns JSON of an array.
    #[napi]
    pub fn list_processes<'env>(&self, env: &'env Env) -> napi::Result<PromiseRaw<'env, String>> {
        let listed = self.handle.list_processes();
        promise(env, async move {
            let processes: Vec<_> = listed?.iter().map(spawned_json).collect();
            Ok(Value::from(processes).to_string())
        })
    }

    /// Returns JSON.
    #[napi]
    pub fn get_process<'env>(
        &self,
        env: &'env Env,
        pid: u32,
    ) -> napi::Result<PromiseRaw<'env, String>> {
        let found = self.handle.get_process(pid);
        promise(env, async move { Ok(spawned_json(&found?).to_string()) })
    }

    /// Returns JSON of an array.
    #[napi]
    pub fn all_processes<'env>(&self, env: &'env Env) -> napi::Result<PromiseRaw<'env, String>> {
        let handle = self.handle.clone();
        promise(env, async move {
            let processes = handle.all_processes().await?;
            let processes: Vec<_> = processes.iter().map(process_json).collect();
            Ok(Value::from(processes).to_string())
        })
    }

    /// Calls `callback` until it is closed: with the next output when the promise of the last has
    /// resolved. Does not keep Node alive. Of interest is nothing at first.
    #[napi(ts_args_type = "callback: (batch: NativeOutput[]) => Promise<void>")]
    pub fn subscribe_output(
        &self,
        callback: Function<'_, Vec<NativeOutput>, Promise<()>>,
    ) -> napi::Result<NativeOutputSubscription> {
        let subscription = self.handle.subscribe_output(Interest::default());
        let subscription = Arc::new(subscription.map_err(rejection)?);
        let callback = callback
            .build_threadsafe_function()
            .weak::<true>()
            .callee_handled::<false>()
            .build()?;
        let closed = watch::Sender::new(false);
        let mut closing = closed.subscribe();
        let own = Arc::clone(&subscription);
        spawn(async move {
            let deliver = async {
                loop {
                    let batch: Vec<_> = own.next().await.into_iter().map(output).collect();
                    let count = batch.len();
                    // An error means that the JavaScript environment is going away.
                    let Ok(taken) = callback.call_async(batch).await else {
                        return;
                    };
                    if taken.await.is_err() {
                        return;
                    }
                    own.taken(count);
                }
            };
            tokio::select! {
                () = deliver => {}
                _ = closing.wait_for(|closed| *closed) => {}
            }
            own.close();
        });
        Ok(NativeOutputSubscription {
            subscription,
            closed,
        })
    }
}

fn output(output: Output) -> NativeOutput {
    let of = |source| match source {
        Source::Process(pid) => (Some(pid), None),
        Source::Shell(number) => (None, Some(ShellId(number).to_string())),
    };
    match output {
        Output::Data {
            source,
            stream,
            data,
            dropped,
        } => {
            let (pid, shell_id) = of(source);
            NativeOutput {
                pid,
                shell_id,
                is_stdout: stream == Stream::Stdout,
                data: Some(data.into()),
                #[expect(clippy::cast_precision_loss, reason = "exact to 8 PiB")]
                dropped_bytes: dropped as f64,
                end: None,
            }
        }
        Output::Exit { source, end } => {
            let (pid, shell_id) = of(source);
            NativeOutput {
                pid,
                shell_id,
                is_stdout: false,
                data: None,
                dropped_bytes: 0.0,
                end: Some(end.into()),
            }
        }
    }
}

fn spawn_options(
    command: String,
    arguments: &str,
    json: &str,
    stdin: Option<Vec<u8>>,
) -> Result<(Vec<String>, SpawnOptions)> {
    let RawArguments { args } = parse(arguments)?;
    let raw: RawSpawnOptions = parse(json)?;
    check_environment("env", &raw.env)?;
    if command.is_empty() {
        return Err(Error::invalid_argument("command", "must not be empty"));
    }
    let argv: Vec<String> = std::iter::once(command).chain(args).collect();
    if let Some(index) = argv.iter().position(|word| word.contains('\0')) {
        let field = match index.checked_sub(1) {
            None => "command".to_owned(),
            Some(index) => format!("args[{index}]"),
        };
        return Err(Error::invalid_argument(&field, "contains a NUL byte"));
    }
    let default = SpawnOptions::default();
    let options = SpawnOptions {
        env: raw.env.into_iter().collect(),
        cwd: match raw.cwd {
            Some(cwd) => path("cwd", &cwd)?,
            None => default.cwd,
        },
        user: raw.user.user(),
        stdin,
        timeout: raw.timeout_ms.map(|ms| Duration::from_millis(ms.0)),
        max_output_bytes: raw
            .max_output_bytes
            .map_or(default.max_output_bytes, |own| {
                usize::try_from(own.0).unwrap_or(usize::MAX)
            }),
    };
    Ok((argv, options))
}

fn signal_number(signal: &str) -> Result<i32> {
    /// The last real-time one.
    const LAST: i32 = 64;
    let number = match signal.parse() {
        Ok(number) => Some(number),
        Err(_) => signal.parse().ok().map(|signal: Signal| signal as i32),
    };
    number
        .filter(|number| (1..=LAST).contains(number))
        .ok_or_else(|| {
            let problem = format!(
                "must be the name of a signal, as \"SIGINT\", or its number, not {signal:?}"
            );
            Error::invalid_argument("signal", problem)
        })
}

fn spawned_json(process: &Started) -> Value {
    let mut json = started_json(process);
    json["pid"] = process.pid.into();
    json["timedOut"] = process.end.is_some_and(|end| end.timed_out).into();
    json
}

/// What a process and a shell have in common.
pub(super) fn started_json(process: &Started) -> Value {
    let (exit_code, signal) = match process.end.map(|end| end.exit) {
        Some(Exit::Code(code)) => (Some(code), None),
        Some(Exit::Signal(number)) => (None, Some(signal_name(number))),
        None => (None, None),
    };
    json!({
        "command": process.argv.first(),
        "args": process.argv.get(1..),
        "cwd": process.cwd.as_str(),
        "user": match process.user {
            User::User => "user",
            User::Root => "root",
        },
        "startedAt": process.started_at,
        "running": process.end.is_none(),
        "exitCode": exit_code,
        "signal": signal,
        "vmEnded": process.end.is_some_and(|end| end.with_vm),
    })
}

fn process_json(process: &ProcessInfo) -> Value {
    let user = match process.uid {
        0 => "root".to_owned(),
        agentvm_guest::protocol::USER_ID => "user".to_owned(),
        uid => uid.to_string(),
    };
    json!({
        "pid": process.pid,
        "ppid": process.parent,
        "pgid": process.group,
        "sid": process.session,
        "user": user,
        "state": process.state.as_str(),
        "threads": process.threads,
        "cpuTimeMs": process.cpu_ms,
        "memoryBytes": process.memory_bytes,
        "startedAt": process.started_at,
        "command": process.command,
    })
}
