//! What a VM may not reach, as its users hear of it.

use std::ptr::addr_eq;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};

use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};

use super::emission::{Emission, Notice};
use crate::net::{Denial, Rules};
use crate::vm::{DynVm, Vm, VmError};

/// The rules of a VM's boots. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct NetworkRules(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    rules: RwLock<Rules>,
    /// Somebody has said them.
    are_given: AtomicBool,
    /// The last VM that has got them.
    vm: Mutex<Option<Weak<dyn Vm>>>,
}

impl NetworkRules {
    /// Rules that somebody has said, and that hold for a VM that runs already, too.
    #[must_use]
    pub fn new(rules: Rules) -> Self {
        Self(Arc::new(Shared {
            rules: RwLock::new(rules),
            are_given: AtomicBool::new(true),
            vm: Mutex::default(),
        }))
    }

    #[must_use]
    pub fn get(&self) -> Rules {
        let rules = self.0.rules.read();
        rules.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The same, which changes on its own.
    pub(super) fn apart(&self) -> Self {
        Self(Arc::new(Shared {
            rules: RwLock::new(self.get()),
            are_given: AtomicBool::new(self.0.are_given.load(Ordering::Relaxed)),
            vm: Mutex::default(),
        }))
    }

    pub(super) fn set(&self, rules: Rules) {
        *self.0.rules.write().unwrap_or_else(PoisonError::into_inner) = rules;
        self.0.are_given.store(true, Ordering::Relaxed);
    }

    /// This VM was booted with them.
    pub(super) fn note(&self, vm: &DynVm) {
        *self.vm() = Some(Arc::downgrade(vm));
    }

    /// Puts them into force in a VM that somebody else may have booted, once.
    pub(super) async fn put_into_force(&self, vm: &DynVm) -> Result<(), VmError> {
        let has_them = |known: &Weak<dyn Vm>| addr_eq(known.as_ptr(), Arc::as_ptr(vm));
        let is_done = self.vm().as_ref().is_some_and(has_them);
        if is_done || !self.0.are_given.load(Ordering::Relaxed) {
            return Ok(());
        }
        vm.set_network(self.get()).await?;
        self.note(vm);
        Ok(())
    }

    fn vm(&self) -> MutexGuard<'_, Option<Weak<dyn Vm>>> {
        self.0.vm.lock().unwrap_or_else(PoisonError::into_inner)
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
