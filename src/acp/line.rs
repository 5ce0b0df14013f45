//! Splitting a byte stream into lines, with a limit.

use std::io;

use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt};

/// How much is read at once: what a pipe holds.
const CHUNK: usize = 64 * 1024;

#[derive(Debug, Error)]
pub enum LineError {
    #[error("a line of more than {limit} bytes")]
    TooLong { limit: usize },
    #[error("reading failed: {0}")]
    Io(#[from] io::Error),
}

/// What [`LineReader::next`] found.
#[derive(Debug, PartialEq, Eq)]
pub enum Line<'a> {
    /// A line without its newline.
    Whole(&'a [u8]),
    /// The end of the stream. What follows the last newline is not a line: its writer died in the
    /// middle of it.
    End { rest: &'a [u8] },
}

/// Reads lines of any content up to `limit` bytes; memory grows to the longest line and no further.
#[derive(Debug)]
pub struct LineReader<R> {
    reader: R,
    buffer: Vec<u8>,
    /// Start of the next line in `buffer`.
    start: usize,
    /// No newline lies before this.
    scanned: usize,
    limit: usize,
}

impl<R: AsyncRead + Unpin> LineReader<R> {
    pub const fn new(reader: R, limit: usize) -> Self {
        Self {
            reader,
            buffer: Vec::new(),
            start: 0,
            scanned: 0,
            limit,
        }
    }

    /// Cancel safe: a future that is dropped has consumed nothing.
    pub async fn next(&mut self) -> Result<Line<'_>, LineError> {
        loop {
            if let Some(length) = memchr::memchr(b'\n', &self.buffer[self.scanned..]) {
                let (start, end) = (self.start, self.scanned + length);
                self.start = end + 1;
                self.scanned = self.start;
                if end - start > self.limit {
                    return Err(self.too_long());
                }
                return Ok(Line::Whole(&self.buffer[start..end]));
            }
            self.scanned = self.buffer.len();
            if self.scanned - self.start > self.limit {
                return Err(self.too_long());
            }
            self.make_room();
            if self.reader.read_buf(&mut self.buffer).await? == 0 {
                return Ok(Line::End {
                    rest: &self.buffer[self.start..],
                });
            }
        }
    }

    const fn too_long(&self) -> LineError {
        LineError::TooLong { limit: self.limit }
    }

    fn make_room(&mut self) {
        if self.start > 0 {
            self.buffer.drain(..self.start);
            self.scanned -= self.start;
            self.start = 0;
            // A single long line must not keep its memory for the life of the stream.
            if self.buffer.len() <= CHUNK && self.buffer.capacity() > 4 * CHUNK {
                self.buffer.shrink_to(2 * CHUNK);
            }
        }
        self.buffer.reserve(CHUNK);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn lines(input: &[u8], limit: usize) -> (Vec<Vec<u8>>, Vec<u8>) {
        let mut reader = LineReader::new(input, limit);
        let mut lines = Vec::new();
        loop {
            match reader.next().await.expect("no line is too long") {
                Line::Whole(line) => lines.push(line.to_vec()),
                Line::End { rest } => return (lines, rest.to_vec()),
            }
        }
    }

    #[tokio::test]
    async fn lines_of_any_bytes_come_out_whole() {
        let (lines, rest) = lines(b"one\n\n\xff\x00\nlast", 10).await;
        assert_eq!(lines, [b"one".to_vec(), vec![], vec![0xff, 0]]);
        assert_eq!(rest, b"last");
    }

    #[tokio::test]
    async fn a_line_that_arrives_byte_by_byte_is_one_line() {
        let (mut sender, receiver) = tokio::io::duplex(1);
        let writer = tokio::spawn(async move {
            tokio::io::AsyncWriteExt::write_all(&mut sender, b"{\"a\":1}\n{}\n").await
        });
        let mut reader = LineReader::new(receiver, 100);
        for expected in [
            Line::Whole(b"{\"a\":1}"),
            Line::Whole(b"{}"),
            Line::End { rest: b"" },
        ] {
            assert_eq!(reader.next().await.expect("no error"), expected);
        }
        writer.await.expect("no panic").expect("written");
    }

    #[tokio::test]
    async fn a_line_over_the_limit_is_an_error_whether_or_not_it_ends() {
        for input in [&b"12345\n"[..], &b"123456789"[..]] {
            let mut reader = LineReader::new(input, 4);
            let error = reader.next().await.expect_err("too long");
            assert!(matches!(error, LineError::TooLong { limit: 4 }), "{error}");
        }
        assert_eq!(lines(b"1234\n", 4).await.0, [b"1234".to_vec()]);
    }
}
