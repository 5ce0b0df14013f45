//! What a VM may not reach, as its users hear of it.

use std::sync::{Arc, PoisonError, RwLock};

use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};

use super::emission::{Emission, Notice};
use crate::net::{Denial, Rules};

/// The rules of a VM's boots. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct NetworkRules(Arc<RwLock<Rules>>);

impl NetworkRules {
    #[must_use]
    pub fn new(rules: Rules) -> Self {
        Self(Arc::new(RwLock::new(rules)))
    }

    #[must_use]
    pub fn get(&self) -> Rules {
        self.0
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    pub(super) fn set(&self, rules: Rules) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = rules;
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
