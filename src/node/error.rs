//! Failures on their way to JavaScript.

use napi::Env;
use napi::bindgen_prelude::{PromiseRaw, ToNapiValue};
use serde::Serialize;
use serde_json::Value;

use crate::error::{Code, Error, Result};

#[derive(Serialize)]
struct Rejection<'a> {
    code: &'a str,
    message: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<&'a Value>,
}

/// An error whose reason is `{"code","message","data"}`: `lib/errors.ts` makes an `AgentVmError` of
/// it, with the stack of the call.
#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
pub(super) fn rejection(error: Error) -> napi::Error {
    let rejection = Rejection {
        code: error.code.as_str(),
        message: &error.message,
        data: error.data.as_ref(),
    };
    // Strings and a Value: always representable.
    napi::Error::from_reason(serde_json::to_string(&rejection).unwrap_or_default())
}

/// A call that was given up by its caller.
pub(super) fn aborted() -> Error {
    Error::new(Code::Aborted, "the call was aborted")
}

/// A promise of what `call` gives.
///
/// A call must own what it works on. An `async fn` of a `#[napi]` object borrows the object, which is
/// freed when its JavaScript environment ends (a worker thread that is terminated, an exit), while
/// the call goes on.
pub(super) fn promise<T: ToNapiValue + Send + 'static>(
    env: &Env,
    call: impl Future<Output = Result<T>> + Send + 'static,
) -> napi::Result<PromiseRaw<'_, T>> {
    env.spawn_future(async move { call.await.map_err(rejection) })
}
