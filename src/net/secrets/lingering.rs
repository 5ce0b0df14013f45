//! Uploads that are answered before they have ended.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use http_body_util::BodyExt;
use hyper::StatusCode;
use hyper::body::{Body, Bytes, Frame, Incoming, SizeHint};
use tokio::runtime::Handle;
use tokio::sync::oneshot;

/// How long what nobody wants of a request is read, for its client to see the answer.
const LINGER: Duration = Duration::from_secs(30);

/// The body of a request of HTTP/2, which may be refused before all of it has been sent. Its stream is not reset
/// at once then: some clients would not look at the answer (curl before 8). What is answered otherwise is reset,
/// for they would send all of it and then wait.
pub(super) struct Lingering {
    /// `None` only while it is dropped.
    body: Option<Incoming>,
    /// What becomes of the request.
    answer: Option<oneshot::Receiver<StatusCode>>,
}

impl Lingering {
    pub(super) const fn new(body: Incoming, answer: oneshot::Receiver<StatusCode>) -> Self {
        Self {
            body: Some(body),
            answer: Some(answer),
        }
    }
}

impl Body for Lingering {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<hyper::Result<Frame<Bytes>>>> {
        match &mut self.body {
            Some(body) => Pin::new(body).poll_frame(cx),
            None => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map(Body::size_hint).unwrap_or_default()
    }
}

impl Drop for Lingering {
    fn drop(&mut self) {
        let body = self.body.take().filter(|body| !body.is_end_stream());
        let (Some(mut body), Some(answer)) = (body, self.answer.take()) else {
            return;
        };
        let Ok(runtime) = Handle::try_current() else {
            return;
        };
        // Not among the connection's own tasks, whose lock may be held. It ends with the connection all the same.
        runtime.spawn(async move {
            let end = async { while let Some(Ok(_lost)) = body.frame().await {} };
            let wanted = async {
                let refused =
                    |status: StatusCode| status.is_client_error() || status.is_server_error();
                if answer.await.is_ok_and(refused) {
                    tokio::time::sleep(LINGER).await;
                }
            };
            tokio::select! {
                () = end => {}
                // Then it is reset.
                () = wanted => {}
            }
        });
    }
}
