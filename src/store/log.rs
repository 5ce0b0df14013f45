//! A session's log in memory: the numbers it has given out, and its most recent events.

use std::collections::VecDeque;

use super::record::{Event, Page, PageBuilder, Query, StoredEvent};
use crate::ids::Seq;

/// Bounds of what is kept of a session in memory; whichever is reached first.
const RECENT_BYTES: usize = 1 << 20;
const RECENT_EVENTS: usize = 4096;

pub(super) struct Log {
    /// The session's number in the database.
    pub(super) number: i64,
    /// Last number that is committed: what the world may know.
    committed: Seq,
    /// Last number that was given to a queued event.
    given: Seq,
    /// Time of the last event that got a number.
    last_time: i64,
    /// The last committed events, without a gap up to `committed`.
    recent: VecDeque<StoredEvent>,
    recent_bytes: usize,
}

impl Log {
    pub(super) const fn new(number: i64, last: Seq, last_time: i64) -> Self {
        Self {
            number,
            committed: last,
            given: last,
            last_time,
            recent: VecDeque::new(),
            recent_bytes: 0,
        }
    }

    pub(super) const fn committed(&self) -> Seq {
        self.committed
    }

    /// Gives the event the next number. Its time is `now`, but never before that of its predecessor:
    /// a clock that is set back does not reorder a transcript.
    pub(super) fn give_number(&mut self, event: Event, now: i64) -> StoredEvent {
        self.given = self.given.next();
        self.last_time = self.last_time.max(now);
        StoredEvent {
            seq: self.given,
            created_at: self.last_time,
            method: event.method,
            json: event.json,
        }
    }

    /// The event is on disk: from now on it is visible.
    pub(super) fn commit(&mut self, event: StoredEvent) {
        debug_assert_eq!(event.seq, self.committed.next(), "commits are in order");
        self.committed = event.seq;
        self.recent_bytes += event.cost();
        self.recent.push_back(event);
        while self.recent_bytes > RECENT_BYTES || self.recent.len() > RECENT_EVENTS {
            match self.recent.pop_front() {
                Some(oldest) => self.recent_bytes -= oldest.cost(),
                None => break,
            }
        }
    }

    /// What has a number but was not committed never existed.
    pub(super) const fn forget_uncommitted(&mut self) {
        self.given = self.committed;
    }

    /// Releases the memory of the recent events.
    pub(super) fn forget_recent(&mut self) {
        self.recent = VecDeque::new();
        self.recent_bytes = 0;
    }

    /// Answers from memory, if everything after `since` is there; `Err` is `since` beyond the end.
    pub(super) fn recent(&self, query: &Query) -> Result<Option<Page>, Seq> {
        if query.since > self.committed {
            return Err(self.committed);
        }
        let skipped = usize::try_from(self.committed.0 - query.since.0)
            .ok()
            .and_then(|wanted| self.recent.len().checked_sub(wanted));
        let Some(skipped) = skipped else {
            return Ok(None);
        };
        let mut page = PageBuilder::new(query);
        for event in self.recent.iter().skip(skipped) {
            if query
                .method
                .as_ref()
                .is_some_and(|method| *method != event.method)
            {
                continue;
            }
            if !page.accepts(event.json.len()) {
                break;
            }
            page.push(event.clone());
        }
        Ok(Some(page.finish()))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn since(seq: u64) -> Query {
        Query {
            since: Seq(seq),
            method: None,
            limit: None,
            max_bytes: u64::MAX,
        }
    }

    fn log_of(events: u64, json: &str) -> Log {
        let mut log = Log::new(1, Seq(0), 0);
        for _ in 0..events {
            let event = log.give_number(Event::session_update(Arc::from(json)), 1);
            log.commit(event);
        }
        log
    }

    #[test]
    fn time_does_not_run_backwards() {
        let mut log = Log::new(1, Seq(7), 100);
        let event = log.give_number(Event::session_update(Arc::from("{}")), 40);
        assert_eq!((event.seq, event.created_at), (Seq(8), 100));
    }

    #[test]
    fn only_what_is_gapless_in_memory_is_answered_from_it() {
        let log = log_of(RECENT_EVENTS as u64 + 10, "{}");
        assert!(log.recent(&since(9)).expect("not ahead").is_none());
        let page = log.recent(&since(10)).expect("not ahead").expect("kept");
        assert_eq!(page.events.len(), RECENT_EVENTS);
        assert_eq!(page.events[0].seq, Seq(11));
    }

    #[test]
    fn memory_is_bounded_by_bytes_too() {
        let log = log_of(10, &"x".repeat(RECENT_BYTES / 4));
        assert!(log.recent.len() < 4);
        let log = log_of(2, &"x".repeat(RECENT_BYTES + 1));
        assert!(log.recent.is_empty());
        assert_eq!(log.recent_bytes, 0);
        assert_eq!(log.committed(), Seq(2));
    }

    #[test]
    fn since_beyond_the_end_is_told_apart_from_nothing_new() {
        let log = log_of(3, "{}");
        assert_eq!(log.recent(&since(4)), Err(Seq(3)));
        let page = log.recent(&since(3)).expect("not ahead").expect("kept");
        assert!(page.events.is_empty() && page.complete);
    }

    #[test]
    fn pages_end_at_limit_or_bytes_and_say_so() {
        let log = log_of(10, "12345678");
        let page = |limit, max_bytes| {
            let query = Query {
                limit,
                max_bytes,
                ..since(0)
            };
            let page = log.recent(&query).expect("not ahead").expect("kept");
            (page.events.len(), page.complete)
        };
        assert_eq!(page(Some(3), u64::MAX), (3, true));
        assert_eq!(page(None, 20), (2, false));
        assert_eq!(page(None, 1), (1, false));
        assert_eq!(page(Some(0), 20), (0, true));
        assert_eq!(page(None, 80), (10, true));
    }
}
