//! An agent that does nothing but talk: on a prompt `{"size", "count", "intervalMicros"}` it
//! writes that many `session/update` lines, as fast as its pipe takes them or at an interval, each with
//! the time at which it was written (`params._meta.at`, nanoseconds of `CLOCK_MONOTONIC`, which Node's
//! `process.hrtime` reads too).
//!
//! Run by `npm run bench -- events`, in a VM as an agent and beside Node as a plain child.

use std::io::{self, BufRead, BufWriter, Write};
use std::thread;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use serde::Deserialize;
use serde_json::{Value, json};

/// What a pipe holds: how programs write whose output is no terminal.
const BUFFER: usize = 64 * 1024;

/// The text of a prompt.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Order {
    /// Bytes of a line without its newline.
    size: usize,
    count: u64,
    /// Between two lines; each is then flushed. 0: none, and lines go out as the buffer fills.
    interval_micros: u64,
}

fn main() -> io::Result<()> {
    let mut output = BufWriter::with_capacity(BUFFER, io::stdout().lock());
    for line in io::stdin().lock().lines() {
        let request: Value = serde_json::from_str(&line?)?;
        let result = match request["method"].as_str() {
            Some("initialize") => json!({
                "protocolVersion": 1,
                "agentCapabilities": { "loadSession": false },
                "agentInfo": { "name": "producer", "version": "1" },
            }),
            Some("session/new") => json!({ "sessionId": "producer" }),
            Some("session/prompt") => {
                let text = &request["params"]["prompt"][0]["text"];
                let order = serde_json::from_str(text.as_str().unwrap_or_default())?;
                produce(&mut output, &order)?;
                json!({ "stopReason": "end_turn" })
            }
            _ => Value::Null,
        };
        if !request["id"].is_null() {
            let answer = json!({ "jsonrpc": "2.0", "id": request["id"], "result": result });
            writeln!(output, "{answer}")?;
            output.flush()?;
        }
    }
    Ok(())
}

fn produce(output: &mut impl Write, order: &Order) -> io::Result<()> {
    let (head, tail) = update(order.size);
    for _ in 0..order.count {
        writeln!(output, "{head}{:020}{tail}", now())?;
        if order.interval_micros > 0 {
            output.flush()?;
            thread::sleep(Duration::from_micros(order.interval_micros));
        }
    }
    output.flush()
}

/// A line of this size, before and after its time of 20 digits: small ones are tokens of a message, as
/// they come most often, large ones the output of a tool.
fn update(size: usize) -> (String, String) {
    let small = size <= 1024;
    let head = concat!(
        r#"{"jsonrpc":"2.0","method":"session/update","params":"#,
        r#"{"sessionId":"producer","_meta":{"at":""#
    );
    let update = if small {
        r#""},"update":{"sessionUpdate":"agent_message_chunk","content":{"type":"text","text":""#
    } else {
        concat!(
            r#""},"update":{"sessionUpdate":"tool_call_update","toolCallId":"call_1","#,
            r#""status":"in_progress","content":[{"type":"content","content":{"type":"text","text":""#
        )
    };
    let end = if small { r#""}}}}"# } else { r#""}}]}}}"# };
    let text = size.saturating_sub(head.len() + 20 + update.len() + end.len());
    (
        head.to_owned(),
        format!("{update}{}{end}", "x".repeat(text)),
    )
}

/// Nanoseconds.
fn now() -> i64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC)
        .map_or(0, |time| time.tv_sec() * 1_000_000_000 + time.tv_nsec())
}
