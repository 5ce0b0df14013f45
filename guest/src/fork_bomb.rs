//! Tells a fork bomb from what works.
//!
//! The limit on processes contains one, and the machine still suffers: programs that start and end map the
//! same few libraries, under one lock for each file of the host that all its programs wait for, too. A
//! queue of thousands there holds up the start of any program for minutes. So what goes on like that is
//! ended.

use std::time::{Duration, Instant};

use crate::limits;

/// Orphans that end in a second, more than any work leaves to PID 1 for long.
const RATE: u32 = 100;

/// Seconds in a row.
const LASTS: u32 = 3;

const SECOND: Duration = Duration::from_secs(1);

/// Processes that there are at the same time: so many, or half of the VM's limit.
const MANY: u64 = 256;

/// The orphans that PID 1 has reaped lately.
pub(crate) struct Orphans {
    since: Instant,
    reaped: u32,
    busy_seconds: u32,
}

impl Orphans {
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            since: now,
            reaped: 0,
            busy_seconds: 0,
        }
    }

    /// Counts one. Whether they have come as fast as from a fork bomb.
    pub(crate) fn reaped(&mut self, now: Instant) -> bool {
        self.reaped += 1;
        let passed = now.saturating_duration_since(self.since);
        if passed < SECOND {
            return false;
        }
        // PID 1 may come to this late, or after a long pause.
        let is_busy = SECOND.saturating_mul(self.reaped) >= passed.saturating_mul(RATE);
        self.busy_seconds = if is_busy { self.busy_seconds + 1 } else { 0 };
        self.since = now;
        self.reaped = 0;
        if self.busy_seconds < LASTS {
            return false;
        }
        self.busy_seconds = 0;
        true
    }
}

/// Whether there are so many processes at this moment.
pub(crate) fn are_many() -> nix::Result<bool> {
    let limit = limits::processes();
    let many = limit.map_or(MANY, |limit| MANY.min(limit / 2));
    Ok(limits::count()? >= many)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// In which millisecond it was told, if orphans end each so many.
    fn told(every_ms: u64, for_ms: u64) -> Option<u64> {
        let start = Instant::now();
        let mut orphans = Orphans::new(start);
        (1..=for_ms / every_ms)
            .map(|nth| nth * every_ms)
            .find(|ms| orphans.reaped(start + Duration::from_millis(*ms)))
    }

    #[test]
    fn orphans_that_come_fast_for_seconds_are_those_of_a_bomb() {
        assert_eq!(told(1, 10_000), Some(3000));
        assert_eq!(told(10, 10_000), Some(3000));
        assert_eq!(told(11, 60_000), None);
        assert_eq!(told(1, 2900), None);
    }

    #[test]
    fn a_pause_begins_it_anew() {
        let start = Instant::now();
        let mut orphans = Orphans::new(start);
        let at = |ms| start + Duration::from_millis(ms);
        let mut burst = |from: u64| (from..from + 2500).any(|ms| orphans.reaped(at(ms)));
        assert!(!burst(1));
        assert!(!burst(10_000));
        assert!(!burst(20_000));
    }

    #[test]
    fn who_looks_late_has_seen_more() {
        let start = Instant::now();
        let mut orphans = Orphans::new(start);
        // All of four seconds at once. Of the first, it is not known when they ended.
        let late = (1..=4).map(|turn| start + Duration::from_secs(4 * turn));
        let told: Vec<bool> = late
            .map(|now| (0..400).any(|_| orphans.reaped(now)))
            .collect();
        assert_eq!(told, [false, false, false, true]);
    }
}
