//! What an unpacking, in a thread of its own, and whoever waits for it know of each other.

use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::Notify;

use super::pull::Tell;
use super::{ImageError, Progress, Result, Step};

/// Between two messages of progress.
pub(super) const BEAT: Duration = Duration::from_millis(250);

#[derive(Debug, Default)]
pub(super) struct Work {
    /// Bytes of packed layers, of `total`.
    done: AtomicU64,
    total: AtomicU64,
    begun: Notify,
    abandoned: AtomicBool,
}

impl Work {
    pub(super) fn begin(&self, total: u64) {
        self.total.store(total, Ordering::Relaxed);
        self.begun.notify_one();
    }

    /// An error when nobody waits for it any more.
    pub(super) fn check(&self) -> Result<()> {
        if self.abandoned.load(Ordering::Relaxed) {
            Err(ImageError::Abandoned)
        } else {
            Ok(())
        }
    }

    /// Nobody waits for it any more.
    pub(super) fn abandon(&self) {
        self.abandoned.store(true, Ordering::Relaxed);
    }

    fn tell(&self, image: &str, tell: Tell<'_>) {
        tell(Progress {
            image: image.to_owned(),
            step: Step::Unpacking,
            bytes: self.done.load(Ordering::Relaxed),
            total: self.total.load(Ordering::Relaxed),
        });
    }
}

/// Does `work` in a thread and tells how far it is. Dropping the future ends it soon.
pub(super) async fn attended<T: Send + 'static>(
    image: &str,
    tell: Tell<'_>,
    work: impl FnOnce(&Arc<Work>) -> Result<T> + Send + 'static,
) -> Result<T> {
    struct Attending(Arc<Work>);
    impl Drop for Attending {
        fn drop(&mut self) {
            self.0.abandon();
        }
    }

    let attending = Attending(Arc::default());
    let state = &attending.0;
    let own = Arc::clone(state);
    let mut done = tokio::task::spawn_blocking(move || work(&own));
    let mut has_begun = false;
    loop {
        tokio::select! {
            biased;
            () = state.begun.notified() => {
                has_begun = true;
                state.tell(image, tell);
            }
            done = &mut done => {
                return done.unwrap_or_else(|error| {
                    let problem = io::Error::other(error);
                    Err(ImageError::host("can't finish the work on", Path::new("an image"), problem))
                });
            }
            () = tokio::time::sleep(BEAT), if has_begun => state.tell(image, tell),
        }
    }
}

/// Counts what is read of a packed layer.
pub(super) struct Counting<R> {
    inner: R,
    work: Arc<Work>,
}

impl<R: Read> Counting<R> {
    pub(super) const fn new(inner: R, work: Arc<Work>) -> Self {
        Self { inner, work }
    }
}

impl<R: Read> Read for Counting<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.work.check().map_err(io::Error::other)?;
        let n = self.inner.read(buffer)?;
        self.work.done.fetch_add(n as u64, Ordering::Relaxed);
        Ok(n)
    }
}
