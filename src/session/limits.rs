//! What a VM may take, as its users hear of it.

use std::sync::Arc;

use super::client::VmHandle;
use super::emission::{Emission, Notice};
use crate::error::Result;
use crate::vm::limits::InForce;
use crate::vm::namespace;
use crate::vm::{DynVm, Limit, Reached, Usage};

/// What a VM takes of the host. Of one that does not run only its disk.
#[derive(Debug, Clone)]
pub struct Stats {
    pub running: Option<Running>,
    pub disk_bytes: u64,
}

/// Of a VM that runs.
#[derive(Debug, Clone)]
pub struct Running {
    pub usage: Usage,
    pub limits: Vec<InForce>,
}

impl VmHandle {
    /// What the VM takes, unless another process has it. Boots nothing.
    pub async fn stats(&self) -> Result<Stats> {
        self.open()?;
        let running = match self.machine.running_vm().await {
            None => None,
            Some(vm) => match vm.usage().await {
                Ok(usage) => Some(Running {
                    usage,
                    limits: vm.limits().to_vec(),
                }),
                // It ended meanwhile.
                Err(_) if !vm.still_runs().await => None,
                Err(error) => return Err(error.into()),
            },
        };
        if running.is_none() {
            self.machine.check_not_elsewhere().await?;
        }
        Ok(Stats {
            running,
            disk_bytes: namespace::disk_usage(&self.machine.dir).await?,
        })
    }
}

/// Tells listeners of limits that the VM meets, until it has ended.
pub(super) fn watch(vm: &DynVm, emission: Arc<Emission>) {
    let mut changes = vm.watch_limits();
    // Not the VM itself: it ends when nobody has it any more.
    let described =
        [Limit::Memory, Limit::Pids, Limit::Disk, Limit::FreeDisk].map(|limit| vm.describe(limit));
    tokio::spawn(async move {
        let mut told = Reached::default();
        while changes.changed().await.is_ok() {
            let now = *changes.borrow_and_update();
            for (limit, detail) in news(told, now, &described) {
                emission.notify(&Notice::LimitReached { limit, detail });
            }
            told = now;
        }
    });
}

fn news(told: Reached, now: Reached, described: &[String; 4]) -> Vec<(Limit, String)> {
    let [memory, pids, disk, free_disk] = described;
    let mut news = Vec::new();
    if now.memory > told.memory {
        let count = now.memory;
        let detail = format!(
            "the VM needed more than {memory}: {count} of its processes killed since it booted"
        );
        news.push((Limit::Memory, detail));
    }
    if now.pids > told.pids {
        let count = now.pids;
        let detail = format!(
            "the VM has {pids} processes and threads: {count} more refused since it booted"
        );
        news.push((Limit::Pids, detail));
    }
    if now.fork_bombs > told.fork_bombs {
        let detail = format!(
            "a fork bomb ran in the VM, which may have {pids} processes and threads: all of them were killed"
        );
        news.push((Limit::Pids, detail));
    }
    if now.disk > told.disk {
        let detail = format!("the VM had more than {disk} on its disk: its processes were killed");
        news.push((Limit::Disk, detail));
    }
    if now.free_disk > told.free_disk {
        let detail = format!(
            "the VM was growing when the disk of the data directory had less than {free_disk} left: its \
             processes were killed"
        );
        news.push((Limit::FreeDisk, detail));
    }
    if now.free_disk_unseen > told.free_disk_unseen {
        let detail = format!(
            "the disk of the data directory had less than half of {free_disk} left and went on to fill, and how \
             much the VM takes could not be told: its processes were killed"
        );
        news.push((Limit::FreeDisk, detail));
    }
    news
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_new_is_told() {
        let described = [
            "memoryBytes (1)",
            "pids (2)",
            "diskBytes (3)",
            "minFreeDiskBytes (4)",
        ]
        .map(str::to_owned);
        let told = Reached {
            memory: 1,
            ..Reached::default()
        };
        let now = Reached { pids: 5, ..told };
        let news = news(told, now, &described);
        assert_eq!(news.len(), 1);
        assert_eq!(news[0].0, Limit::Pids);
        assert!(news[0].1.contains("pids (2)"), "{news:?}");
    }
}
