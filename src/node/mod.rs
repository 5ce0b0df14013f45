//! The JavaScript boundary: the only code that knows `napi`.
