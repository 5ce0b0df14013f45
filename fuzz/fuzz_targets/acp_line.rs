//! However the bytes of an agent arrive, they are cut at the newlines and nowhere else: none is lost,
//! none is made up, and no line is longer than allowed.

#![no_main]

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use agentvm::acp::{Line, LineError, LineReader};
use libfuzzer_sys::fuzz_target;
use tokio::io::{AsyncRead, ReadBuf};

/// A pipe that is read in pieces.
struct Pieces<'a> {
    rest: &'a [u8],
    piece: usize,
}

impl AsyncRead for Pieces<'_> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let len = self.piece.min(self.rest.len()).min(buffer.remaining());
        let (now, later) = self.rest.split_at(len);
        buffer.put_slice(now);
        self.rest = later;
        Poll::Ready(Ok(()))
    }
}

fuzz_target!(|input: (u8, u8, &[u8])| {
    let (limit, piece, stream) = input;
    let limit = usize::from(limit);
    let pieces = Pieces {
        rest: stream,
        piece: usize::from(piece) + 1,
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .expect("a runtime");
    runtime.block_on(read(LineReader::new(pieces, limit), stream, limit));
});

async fn read(mut reader: LineReader<Pieces<'_>>, stream: &[u8], limit: usize) {
    let mut seen = Vec::new();
    loop {
        match reader.next().await {
            Ok(Line::Whole(line)) => {
                assert!(line.len() <= limit && !line.contains(&b'\n'));
                seen.extend_from_slice(line);
                seen.push(b'\n');
                assert!(stream.starts_with(&seen));
            }
            Ok(Line::End { rest }) => {
                assert!(rest.len() <= limit && !rest.contains(&b'\n'));
                seen.extend_from_slice(rest);
                assert_eq!(seen, stream);
                return;
            }
            Err(LineError::TooLong { limit: told }) => {
                assert_eq!(told, limit);
                let too_long = &stream[seen.len()..];
                let line = too_long.split(|byte| *byte == b'\n').next();
                assert!(line.is_some_and(|line| line.len() > limit));
                return;
            }
            Err(LineError::Io(error)) => panic!("{error}"),
        }
    }
}
