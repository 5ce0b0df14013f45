//! The end of what a process said, for errors that somebody has to understand.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::io::AsyncReadExt;

use crate::pipe::{self, PipeEnd};

/// Enough for a stack trace.
const KEPT: usize = 16 * 1024;

/// The last bytes of an output; older ones are forgotten.
#[derive(Debug, Clone, Default)]
pub(super) struct Tail(Arc<Mutex<VecDeque<u8>>>);

impl Tail {
    pub(super) fn push(&self, bytes: &[u8]) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = &bytes[bytes.len().saturating_sub(KEPT)..];
        let excess = (kept.len() + bytes.len()).saturating_sub(KEPT);
        kept.drain(..excess);
        kept.extend(bytes);
    }

    /// As text, without what would confuse a terminal.
    pub(super) fn text(&self) -> String {
        let bytes: Vec<u8> = {
            let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            kept.iter().copied().collect()
        };
        String::from_utf8_lossy(&bytes)
            .chars()
            .filter(|c| !c.is_control() || matches!(c, '\n' | '\t'))
            .collect::<String>()
            .trim()
            .to_owned()
    }
}

/// Reads an output to its end, so that its writer never waits, and keeps the tail.
pub(super) fn follow(output: PipeEnd, tail: Tail) -> std::io::Result<()> {
    let mut output = pipe::Reader::new(output)?;
    tokio::spawn(async move {
        let mut chunk = vec![0; 4096];
        while let Ok(length @ 1..) = output.read(&mut chunk).await {
            tail.push(&chunk[..length]);
        }
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_end_is_kept() {
        let tail = Tail::default();
        for _ in 0..10 {
            tail.push(&[b'x'; KEPT / 2]);
        }
        tail.push(b"\x1b[31mthe end\n");
        let text = tail.text();
        assert!(text.ends_with("x[31mthe end"), "{text}");
        assert!(text.len() <= KEPT);
        tail.push(&vec![b'y'; 3 * KEPT]);
        assert_eq!(tail.text(), "y".repeat(KEPT));
    }
}
