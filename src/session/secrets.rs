//! Secrets of a VM, as its users change them and hear of them.

use std::sync::Arc;
use std::time::Duration;

use super::client::VmHandle;
use super::emission::{Emission, Notice};
use crate::error::{Error, Result};
use crate::net::secrets::Secrets;
use crate::vm::DynVm;

/// What is seen in it is told at once, with how often.
const TOGETHER: Duration = Duration::from_secs(1);

impl VmHandle {
    /// Exchanges the VM's secrets, also while it runs, and for its next boots by this handle.
    pub async fn set_secrets(&self, secrets: Secrets) -> Result<()> {
        let settings = self.open()?;
        if !self.exchange_running(&secrets).await? {
            self.machine.check_not_elsewhere().await?;
        }
        settings.vm.secrets.set(&secrets);
        // One that was booting meanwhile may have the old ones.
        self.exchange_running(&secrets).await.map(drop)
    }

    /// `false`: it does not run in this process.
    async fn exchange_running(&self, secrets: &Secrets) -> Result<bool> {
        match self.machine.running_vm().await {
            Some(vm) if !vm.set_secrets(secrets) => Err(Error::invalid_argument(
                "secrets",
                "this VM was booted without any, and trusts nobody to stand in for their hosts: \
                 sleep() it first",
            )),
            running => Ok(running.is_some()),
        }
    }
}

/// Tells listeners where placeholders were seen that they are not for, until the VM has ended.
pub(super) fn watch(vm: &DynVm, emission: Arc<Emission>) {
    let Some(sightings) = vm.misdirected_secrets() else {
        return;
    };
    let mut ended = vm.ended();
    tokio::spawn(async move {
        let tell = |told: Vec<_>| {
            for misdirected in told {
                emission.notify(&Notice::SecretMisdirected(misdirected));
            }
        };
        let follow = async {
            loop {
                tell(sightings.next().await);
                tokio::time::sleep(TOGETHER).await;
            }
        };
        tokio::select! {
            () = follow => {}
            // An error: the VM is gone.
            _ = ended.wait_for(Option::is_some) => {}
        }
        tell(sightings.take());
    });
}
