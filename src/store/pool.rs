//! The writer threads of the process: a few, for all VMs.
//!
//! A store with something to write is scheduled once; one thread at a time works on it, one batch a
//! turn, then the next store gets its turn. So an fsync of one VM holds up no other (as long as a
//! thread is free), and a VM that writes nothing costs no thread.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::thread;

use nix::errno::Errno;

use super::shared::Shared;

/// Enough to keep a few disks' flushes in flight; commits themselves are bound by one core each.
const THREADS: usize = 4;

struct Pool {
    scheduled: Mutex<VecDeque<Arc<Shared>>>,
    ready: Condvar,
}

static POOL: Pool = Pool {
    scheduled: Mutex::new(VecDeque::new()),
    ready: Condvar::new(),
};

/// Starts the threads, once in the life of the process.
pub(super) fn start() -> Result<(), Errno> {
    static STARTED: OnceLock<bool> = OnceLock::new();
    let started = STARTED.get_or_init(|| {
        let threads = (0..THREADS).filter(|index| {
            thread::Builder::new()
                .name(format!("agentvm-store-{index}"))
                .spawn(|| POOL.work())
                .is_ok()
        });
        // Fewer threads than wanted still do the work.
        threads.count() > 0
    });
    if *started { Ok(()) } else { Err(Errno::EAGAIN) }
}

/// Gives a store its turn. The caller sees to it that a store is scheduled at most once.
pub(super) fn schedule(store: Arc<Shared>) {
    POOL.scheduled
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .push_back(store);
    POOL.ready.notify_one();
}

impl Pool {
    fn work(&self) {
        loop {
            let mut store = self.next();
            while store.take_turn() {
                store = self.next_after(store);
            }
        }
    }

    /// The store goes to the end of the queue. Where it is alone in it, it stays with this thread, whose
    /// caches know it, and no other is woken in vain.
    fn next_after(&self, store: Arc<Shared>) -> Arc<Shared> {
        let mut scheduled = self
            .scheduled
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        match scheduled.pop_front() {
            Some(first) => {
                scheduled.push_back(store);
                first
            }
            None => store,
        }
    }

    fn next(&self) -> Arc<Shared> {
        let mut scheduled = self
            .scheduled
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        loop {
            match scheduled.pop_front() {
                Some(store) => return store,
                None => {
                    scheduled = self
                        .ready
                        .wait(scheduled)
                        .unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }
}
