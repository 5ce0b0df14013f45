//! What a VM may not reach, as its users hear of it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};

use super::emission::{Emission, Notice};
use crate::net::{Denial, Rules};

/// The rules of a VM's boots, and of one that runs. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct NetworkRules(Arc<RwLock<Given>>);

#[derive(Debug, Clone, Default)]
struct Given {
    rules: Rules,
    at: Moment,
}

/// When rules were given, among all that this process was given: of two, the later hold. The first is that of
/// rules that nobody has given.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Moment(u64);

impl Moment {
    fn next() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

impl NetworkRules {
    /// Given now.
    #[must_use]
    pub fn new(rules: Rules) -> Self {
        let at = Moment::next();
        Self(Arc::new(RwLock::new(Given { rules, at })))
    }

    #[must_use]
    pub fn get(&self) -> Rules {
        self.read().rules.clone()
    }

    pub(super) fn given_at(&self) -> Moment {
        self.read().at
    }

    /// The same, which change on their own.
    pub(super) fn apart(&self) -> Self {
        Self(Arc::new(RwLock::new(self.read().clone())))
    }

    pub(super) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    pub(super) fn set(&self, rules: Rules) {
        let mut given = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let at = Moment::next();
        *given = Given { rules, at };
    }

    fn read(&self) -> RwLockReadGuard<'_, Given> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Tells listeners of what is sent, until the VM has ended. What is sent is bounded in time, and what
/// waits for a slow listener in number.
pub(super) fn tell(emission: Arc<Emission>) -> UnboundedSender<Denial> {
    let (sender, mut denials) = unbounded_channel();
    tokio::spawn(async move {
        while let Some(denial) = denials.recv().await {
            emission.notify(&Notice::NetworkDenied(denial));
        }
    });
    sender
}
