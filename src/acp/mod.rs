//! The client side of ACP: JSON-RPC 2.0, one message a line, over a pair of pipes.
//!
//! What comes from the agent is kept as the text that came: fields that we do not know, the order of
//! keys and the digits of big numbers survive ([`message`]). One task reads ([`line`]), in order; the
//! answer to a request is therefore seen after everything that the agent sent before it
//! ([`connection`]).
//!
//! Protocol: <https://agentclientprotocol.com>.

mod connection;
mod line;
mod message;

pub use connection::{Closed, Connection, Handler, PendingAnswer, Request, RequestError};
pub use line::{Line, LineError, LineReader};
pub use message::{
    MAX_VALUES, Message, OuterSessionIds, RpcError, count_values, has_field, has_more_values,
    has_outer_meta, outer_session_id, present, with_session_id,
};
