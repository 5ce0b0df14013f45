//! Shells on terminals.

#![expect(
    clippy::needless_pass_by_value,
    reason = "napi hands arguments over by value"
)]

use std::collections::BTreeMap;

use napi::Env;
use napi::bindgen_prelude::{PromiseRaw, Uint8Array};
use napi_derive::napi;
use serde::Deserialize;
use serde_json::Value;

use super::argument::{Whole, parse, parse_argument};
use super::error::promise;
use super::options::{RawUser, path};
use super::processes::{NativeEnd, started_json};
use super::vm::{NativeAbort, NativeVm, unless_aborted};
use crate::error::{Code, Error, Result};
use crate::session::{ShellId, ShellOptions, check_environment};
use crate::vm::Size;

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct RawShellOptions {
    command: Option<String>,
    args: Vec<String>,
    env: BTreeMap<String, String>,
    cwd: Option<String>,
    user: RawUser,
    cols: Option<Cells>,
    rows: Option<Cells>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawSize {
    cols: Cells,
    rows: Cells,
}

type Cells = Whole<1, { u16::MAX as u64 }>;

#[napi]
impl NativeVm {
    /// Resolves to the shell's id. `options`: JSON.
    #[napi]
    pub fn open_shell<'env>(
        &self,
        env: &'env Env,
        options: String,
    ) -> napi::Result<PromiseRaw<'env, String>> {
        let handle = self.handle.clone();
        promise(env, async move {
            let options = shell_options(&options)?;
            Ok(handle.open_shell(options).await?.to_string())
        })
    }

    /// Resolves when the terminal has taken all of it.
    #[napi]
    pub fn write_shell<'env>(
        &self,
        env: &'env Env,
        shell_id: String,
        data: Uint8Array,
    ) -> napi::Result<PromiseRaw<'env, ()>> {
        // Here, not in the promise: in the order of the calls.
        let written = id(&shell_id).map(|shell| self.handle.write_shell(shell, data.to_vec()));
        promise(env, async move { written?.await })
    }

    /// `size`: JSON of `{ cols, rows }`.
    #[napi]
    pub fn resize_shell<'env>(
        &self,
        env: &'env Env,
        shell_id: String,
        size: String,
    ) -> napi::Result<PromiseRaw<'env, ()>> {
        let resized = id(&shell_id).and_then(|shell| {
            let RawSize { cols, rows } = parse_argument("size", &size)?;
            self.handle.resize_shell(shell, size_of(cols, rows))
        });
        promise(env, async move { resized })
    }

    /// Returns JSON of an array.
    #[napi]
    pub fn list_shells<'env>(&self, env: &'env Env) -> napi::Result<PromiseRaw<'env, String>> {
        let listed = self.handle.list_shells();
        promise(env, async move {
            let shells = listed?.into_iter().map(|(id, shell)| {
                let mut json = started_json(&shell);
                json["shellId"] = id.to_string().into();
                json
            });
            Ok(Value::from(shells.collect::<Vec<_>>()).to_string())
        })
    }

    #[napi]
    pub fn close_shell<'env>(
        &self,
        env: &'env Env,
        shell_id: String,
    ) -> napi::Result<PromiseRaw<'env, ()>> {
        let handle = self.handle.clone();
        promise(env, async move { handle.close_shell(id(&shell_id)?).await })
    }

    /// Keeps Node alive until the shell has ended.
    #[napi]
    pub fn wait_shell<'env>(
        &self,
        env: &'env Env,
        shell_id: String,
        abort: &NativeAbort,
    ) -> napi::Result<PromiseRaw<'env, NativeEnd>> {
        let handle = self.handle.clone();
        let abort = abort.signal();
        promise(env, async move {
            let shell = id(&shell_id)?;
            let end = unless_aborted(abort, handle.wait_shell(shell)).await?;
            Ok(end.into())
        })
    }
}

fn shell_options(json: &str) -> Result<ShellOptions> {
    let raw: RawShellOptions = parse(json)?;
    check_environment("env", &raw.env)?;
    if raw.command.is_none() && !raw.args.is_empty() {
        return Err(Error::invalid_argument(
            "args",
            "are of no use without a command: give one, as { command, args }",
        ));
    }
    if raw.command.as_deref() == Some("") {
        return Err(Error::invalid_argument("command", "must not be empty"));
    }
    let argv: Vec<String> = raw.command.into_iter().chain(raw.args).collect();
    if argv.iter().any(|word| word.contains('\0')) {
        return Err(Error::invalid_argument("command", "contains a NUL byte"));
    }
    let default = ShellOptions::default();
    let or = |cells: Option<Cells>, default: u16| cells.unwrap_or_else(|| Whole(default.into()));
    Ok(ShellOptions {
        argv,
        env: raw.env.into_iter().collect(),
        cwd: match raw.cwd {
            Some(cwd) => path("cwd", &cwd)?,
            None => default.cwd,
        },
        user: raw.user.user(),
        size: size_of(
            or(raw.cols, default.size.cols),
            or(raw.rows, default.size.rows),
        ),
    })
}

fn size_of(cols: Cells, rows: Cells) -> Size {
    // In the range of `Cells`.
    let cells = |cells: Cells| u16::try_from(cells.0).unwrap_or(u16::MAX);
    Size {
        cols: cells(cols),
        rows: cells(rows),
    }
}

fn id(shell: &str) -> Result<ShellId> {
    shell.parse().map_err(|()| {
        Error::new(
            Code::ShellNotFound,
            format!("{shell:?} is no shell: openShell() tells the shellId"),
        )
    })
}
