//! Failures on their way to JavaScript.

use serde::Serialize;
use serde_json::Value;

use crate::error::{Code, Error};

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
pub(super) fn aborted() -> napi::Error {
    rejection(Error::new(Code::Aborted, "the call was aborted"))
}
