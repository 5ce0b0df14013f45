//! The kernel's notices that a VM has met a limit of its cgroups.

use std::fs::{self, File};
use std::io::{self, Read, Seek};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use nix::sys::eventfd::{EfdFlags, EventFd};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::place::{Place, Version};

/// Both kinds of notices, for somebody who then reads the counters.
#[derive(Debug)]
pub(in super::super) struct Signals {
    memory: Option<Memory>,
    /// `pids.events`, since Linux 4.8.
    pids: Option<Events>,
}

#[derive(Debug)]
enum Memory {
    /// Of v1: an eventfd that is registered with `memory.oom_control`.
    OutOfMemory(AsyncFd<EventFd>),
    /// Of v2.
    Events(Events),
}

/// A file that says by `POLLPRI` that it has changed, until it is read again.
#[derive(Debug)]
struct Events(AsyncFd<File>);

impl Signals {
    pub(super) fn new(memory: Option<&Place>, pids: Option<&Place>) -> io::Result<Self> {
        let memory = match memory {
            None => None,
            Some(place) if place.version() == Version::V1 => {
                Some(Memory::OutOfMemory(out_of_memory(&place.directory)?))
            }
            Some(place) => Some(Memory::Events(Events::open(
                &place.directory.join("memory.events"),
            )?)),
        };
        let pids = match pids.map(|place| Events::open(&place.directory.join("pids.events"))) {
            Some(Err(error)) if error.kind() == io::ErrorKind::NotFound => None,
            events => events.transpose()?,
        };
        Ok(Self { memory, pids })
    }

    /// Waits until something may have changed.
    pub(in super::super) async fn changed(&mut self) -> io::Result<()> {
        let memory = async {
            match &mut self.memory {
                Some(Memory::OutOfMemory(event)) => {
                    let mut ready = event.readable().await?;
                    // So that it is there again next time.
                    let _count = ready.get_inner().read();
                    ready.clear_ready();
                    Ok(())
                }
                Some(Memory::Events(events)) => events.changed().await,
                None => std::future::pending().await,
            }
        };
        let pids = async {
            match &mut self.pids {
                Some(events) => events.changed().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            changed = memory => changed,
            changed = pids => changed,
        }
    }
}

impl Events {
    fn open(path: &Path) -> io::Result<Self> {
        let mut file = File::open(path)?;
        // What has happened so far is not news.
        io::copy(&mut file, &mut io::sink())?;
        // SAFETY: a File that nobody replaces or closes while the AsyncFd owns it.
        let watched = unsafe { AsyncFd::register_with_interest(file, Interest::PRIORITY) };
        Ok(Self(watched?))
    }

    async fn changed(&mut self) -> io::Result<()> {
        let mut ready = self.0.ready_mut(Interest::PRIORITY).await?;
        let file = ready.get_inner_mut();
        file.rewind()?;
        file.read_to_string(&mut String::new())?;
        ready.clear_ready();
        Ok(())
    }
}

/// Documentation/admin-guide/cgroup-v1/memory.rst, "OOM Control".
fn out_of_memory(directory: &Path) -> io::Result<AsyncFd<EventFd>> {
    let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
    let control = OwnedFd::from(File::open(directory.join("memory.oom_control"))?);
    let request = format!("{} {}", event.as_raw_fd(), control.as_raw_fd());
    fs::write(directory.join("cgroup.event_control"), request)?;
    // SAFETY: an EventFd that nobody replaces or closes while the AsyncFd owns it.
    Ok(unsafe { AsyncFd::register_with_interest(event, Interest::READABLE) }?)
}
