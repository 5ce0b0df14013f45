//! PID 1's process: watched, and reaped.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::control::Control;
use super::directory::host;
use super::starter;
use crate::vm::Result;

/// How long PID 1 may take to end everything when the host has hung up: it kills, and waits for nobody.
const GRACE: Duration = Duration::from_secs(5);

/// PID 1 as the host sees it. Reaped when it is gone, also if nobody waits for that.
pub(super) struct Guest {
    pid: i32,
    pidfd: Option<AsyncFd<OwnedFd>>,
}

impl Guest {
    /// Takes charge of a guest that has been started.
    pub(super) fn adopt(mut started: starter::Started) -> Result<(Self, Control)> {
        let unusable = |error| host("can't watch", Path::new("PID 1"), error);
        let (pidfd, control) = started
            .take()
            .ok_or_else(|| unusable(Errno::EBADF.into()))?;
        // SAFETY: an OwnedFd that nobody replaces or closes while the AsyncFd owns it.
        match unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) } {
            Ok(pidfd) => {
                let guest = Self {
                    pid: started.pid,
                    pidfd: Some(pidfd),
                };
                let control = Control::new(control).map_err(unusable)?;
                Ok((guest, control))
            }
            Err(refused) => {
                let (pidfd, error) = refused.into_parts();
                drop(control);
                starter::reap(&pidfd);
                Err(unusable(error))
            }
        }
    }

    /// Its pid in this process's namespace, valid until it is reaped.
    pub(super) const fn pid(&self) -> i32 {
        self.pid
    }

    /// Waits until PID 1, and with it every process of the VM, is gone. Returns whether somebody else has
    /// killed it.
    pub(super) async fn gone(mut self) -> bool {
        let mut killed = false;
        if let Some(pidfd) = &self.pidfd {
            // Still ours meanwhile: a caller that gives up waiting leaves it to `drop`.
            if let Ok(found) = tokio::time::timeout(GRACE, reap(pidfd)).await {
                killed = found;
            } else {
                tracing::warn!("PID 1 does not end on its own");
                starter::kill(pidfd.get_ref());
                reap(pidfd).await;
            }
        }
        self.pidfd = None;
        killed
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if let (Some(pidfd), Ok(runtime)) =
            (self.pidfd.take(), tokio::runtime::Handle::try_current())
        {
            drop(runtime.spawn(async move { reap(&pidfd).await }));
        }
    }
}

async fn reap(pidfd: &AsyncFd<OwnedFd>) -> bool {
    // A pidfd becomes readable when its process has exited.
    if let Err(error) = pidfd.readable().await {
        tracing::error!(%error, "can't wait for PID 1");
    }
    starter::reap(pidfd.get_ref())
}
