//! How often something may happen.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// A bucket of tokens. Whoever finds it empty waits for the next one.
#[derive(Debug)]
pub(super) struct Bucket {
    /// Between two tokens.
    interval: Duration,
    burst: u32,
    /// When the bucket will be full again if nobody takes any more.
    full_at: Mutex<Option<Instant>>,
}

impl Bucket {
    pub(super) const fn new(per_second: u32, burst: u32) -> Self {
        Self {
            interval: Duration::from_nanos(1_000_000_000 / per_second as u64),
            burst,
            full_at: Mutex::new(None),
        }
    }

    /// A wait that is given up has taken its token nevertheless.
    pub(super) async fn take(&self) {
        let now = Instant::now();
        let ready = {
            let mut full_at = self.full_at.lock().unwrap_or_else(PoisonError::into_inner);
            let next = full_at.map_or(now, |full| full.max(now)) + self.interval;
            *full_at = Some(next);
            next.checked_sub(self.interval * self.burst)
        };
        if let Some(ready) = ready.filter(|ready| *ready > now) {
            tokio::time::sleep_until(ready).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_burst_is_let_through_and_then_the_rate() {
        let bucket = Bucket::new(10, 5);
        let start = Instant::now();
        for _ in 0..5 {
            bucket.take().await;
        }
        assert_eq!(start.elapsed(), Duration::ZERO);
        for _ in 0..20 {
            bucket.take().await;
        }
        let took = start.elapsed();
        assert!(
            (Duration::from_secs(2)..Duration::from_millis(2010)).contains(&took),
            "{took:?}"
        );
        tokio::time::sleep(Duration::from_secs(10)).await;
        let again = Instant::now();
        for _ in 0..5 {
            bucket.take().await;
        }
        assert_eq!(again.elapsed(), Duration::ZERO);
    }
}
