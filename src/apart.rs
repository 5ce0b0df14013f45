//! Runtimes of their own, for what strangers can make long.
//!
//! What reads and relays as long as there is something, and libraries that make what they are sent into work, would
//! leave calls of other VMs waiting. On threads of their own that takes time from others only as far as the kernel
//! lets it.

use std::sync::OnceLock;

use tokio::runtime::{Builder, Handle, Runtime};

/// Begun when it is first needed.
#[derive(Debug)]
pub(crate) struct Apart {
    name: &'static str,
    threads: Option<usize>,
    runtime: OnceLock<Option<Runtime>>,
}

impl Apart {
    /// One thread. The kernel shows 15 bytes of its `name`.
    pub(crate) const fn thread(name: &'static str) -> Self {
        Self {
            name,
            threads: Some(1),
            runtime: OnceLock::new(),
        }
    }

    /// As many threads as there are cores.
    pub(crate) const fn threads(name: &'static str) -> Self {
        Self {
            name,
            threads: None,
            runtime: OnceLock::new(),
        }
    }

    /// Where there can be no thread, that of the caller.
    pub(crate) fn handle(&self) -> Handle {
        let runtime = self.runtime.get_or_init(|| {
            let mut builder = Builder::new_multi_thread();
            if let Some(threads) = self.threads {
                builder.worker_threads(threads);
            }
            let runtime = builder.thread_name(self.name).enable_all().build();
            if let Err(error) = &runtime {
                tracing::warn!(%error, name = self.name, "there is no thread apart");
            }
            runtime.ok()
        });
        let own = runtime.as_ref().map(Runtime::handle);
        own.cloned().unwrap_or_else(Handle::current)
    }
}

impl Drop for Apart {
    fn drop(&mut self) {
        // It may be dropped where nothing may wait.
        if let Some(runtime) = self.runtime.take().flatten() {
            runtime.shutdown_background();
        }
    }
}
