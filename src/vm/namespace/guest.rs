//! PID 1's process: watched, and reaped.

use std::collections::HashSet;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::control::Control;
use super::deleted::{parent_of, with_descendants};
use super::directory::host;
use super::starter;
use crate::vm::{KILL_AGAIN, Result};

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
                // It may wait for what one of its programs holds, a lock of a file, and they are killed only after it.
                let pid = self.pid;
                while tokio::time::timeout(KILL_AGAIN, reap(pidfd)).await.is_err() {
                    let killing = tokio::task::spawn_blocking(move || kill_descendants(pid));
                    if let Err(error) = killing.await {
                        tracing::error!(%error, "can't kill what PID 1 has started");
                    }
                }
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

/// Kills what PID 1 has started, and what that has.
fn kill_descendants(pid: i32) {
    let mut of_vm = with_descendants(pid);
    let processes = of_vm.split_off(1);
    let of_vm: HashSet<_> = of_vm.iter().chain(&processes).copied().collect();
    // Before their parents, whose children they are then no longer.
    for pid in processes.into_iter().rev() {
        // SAFETY: integers.
        let opened = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) });
        let Some(pidfd) = opened.ok().and_then(|fd| RawFd::try_from(fd).ok()) else {
            continue; // it has ended
        };
        // SAFETY: the kernel has just made it for us.
        let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
        // Its number may be that of another since.
        if parent_of(pid).is_some_and(|parent| of_vm.contains(&parent)) {
            starter::kill(&pidfd);
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

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn what_pid_1_has_started_is_killed_without_it() {
        // Two below, of which the first waits for the second.
        let script =
            "sh -c 'sleep 1000 & echo begun; wait' || true; echo $?; sleep 1000; echo ended";
        let mut child = Command::new("sh");
        let mut child = child
            .args(["-c", script])
            .stdout(Stdio::piped())
            .spawn()
            .expect("sh");
        let mut output = std::io::BufReader::new(child.stdout.take().expect("a pipe"));
        let mut said = String::new();
        std::io::BufRead::read_line(&mut output, &mut said).expect("begun");
        let pid = i32::try_from(child.id()).expect("a pid");
        let deadline = std::time::Instant::now() + Duration::from_secs(30);
        while child.try_wait().expect("a child").is_none() {
            assert!(std::time::Instant::now() < deadline, "it is not killed");
            kill_descendants(pid);
        }
        let mut rest = String::new();
        std::io::Read::read_to_string(&mut output, &mut rest).expect("an end");
        assert!(rest.ends_with("ended\n"), "{rest}");
    }
}
