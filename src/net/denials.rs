//! Refusals, told: each at once, what repeats it once a second, and never more than that.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::mpsc::UnboundedSender;

use super::policy::Reason;

/// What is counted under one refusal.
const WINDOW: Duration = Duration::from_secs(1);

/// Different refusals that are told in one window. The rest is only counted.
const MAX_KINDS: usize = 256;

/// How a program tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Protocol {
    Tcp,
    Udp,
    /// It asked for a name.
    Dns,
    Other,
}

impl Protocol {
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Dns => "dns",
            Self::Other => "other",
        }
    }
}

/// Something was refused.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Refused {
    /// The name, where one is known, or else the address.
    pub host: String,
    pub port: u16,
    pub protocol: Protocol,
    /// `None`: of many.
    pub rule: Option<Reason>,
}

impl Refused {
    /// What stands for refusals that nobody has room for.
    #[must_use]
    pub fn others() -> Self {
        Self {
            host: "*".to_owned(),
            port: 0,
            protocol: Protocol::Other,
            rule: None,
        }
    }
}

/// Something was refused, `count` times since it was last told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Denial {
    pub refused: Refused,
    pub count: u64,
}

/// Where the refusals of one VM are told.
#[derive(Debug, Clone)]
pub(super) struct Denials {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    /// Nobody may listen.
    listener: Option<UnboundedSender<Denial>>,
    runtime: Handle,
    window: Mutex<Option<Window>>,
}

/// What has been told in this second, and how often it came again since.
#[derive(Debug, Default)]
struct Window {
    again: HashMap<Refused, u64>,
    others: u64,
}

impl Denials {
    /// To be called in the runtime that serves.
    pub(super) fn new(listener: Option<UnboundedSender<Denial>>) -> Self {
        Self {
            inner: Arc::new(Inner {
                listener,
                runtime: Handle::current(),
                window: Mutex::new(None),
            }),
        }
    }

    pub(super) fn report(&self, refused: Refused) {
        let mut current = self.inner.window();
        let window = self.open(&mut current);
        if let Some(count) = window.again.get_mut(&refused) {
            *count += 1;
        } else if window.again.len() < MAX_KINDS {
            window.again.insert(refused.clone(), 0);
            self.inner.tell(refused, 1);
        } else {
            window.others += 1;
        }
    }

    /// As many were refused, and what they were is not known.
    pub(super) fn report_lost(&self, count: u64) {
        let mut current = self.inner.window();
        let window = self.open(&mut current);
        window.others = window.others.saturating_add(count);
    }

    fn open<'a>(&self, current: &'a mut Option<Window>) -> &'a mut Window {
        current.get_or_insert_with(|| {
            let inner = Arc::clone(&self.inner);
            self.inner.runtime.spawn(async move {
                loop {
                    tokio::time::sleep(WINDOW).await;
                    if !inner.end_window() {
                        return;
                    }
                }
            });
            Window::default()
        })
    }
}

impl Inner {
    /// Tells what was counted. `false`: nothing was, and there is no window any more.
    fn end_window(&self) -> bool {
        let mut current = self.window();
        let Some(window) = &mut *current else {
            return false;
        };
        let others = std::mem::take(&mut window.others);
        // What does not come again is forgotten.
        window.again.retain(|refused, count| {
            let count = std::mem::take(count);
            if count > 0 {
                self.tell(refused.clone(), count);
            }
            count > 0
        });
        if others > 0 {
            self.tell(Refused::others(), others);
        }
        let goes_on = others > 0 || !window.again.is_empty();
        if !goes_on {
            *current = None;
        }
        goes_on
    }

    fn tell(&self, refused: Refused, count: u64) {
        let rule = refused.rule.as_ref().map(ToString::to_string);
        tracing::info!(
            host = %refused.host, port = refused.port, rule, count,
            "network access denied"
        );
        if let Some(listener) = &self.listener {
            // Whoever listened may be gone.
            drop(listener.send(Denial { refused, count }));
        }
    }

    fn window(&self) -> MutexGuard<'_, Option<Window>> {
        self.window.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc;

    use super::*;

    fn refused(host: &str) -> Refused {
        Refused {
            host: host.to_owned(),
            port: 443,
            protocol: Protocol::Tcp,
            rule: Some(Reason::Allowlist),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_refusal_is_told_at_once_and_what_repeats_it_is_counted() {
        let (sender, mut told) = mpsc::unbounded_channel();
        let denials = Denials::new(Some(sender));
        for _ in 0..10 {
            denials.report(refused("a.test"));
        }
        denials.report(refused("b.test"));
        let denial = |host: &str, count| Denial {
            refused: refused(host),
            count,
        };
        assert_eq!(told.try_recv(), Ok(denial("a.test", 1)));
        assert_eq!(told.try_recv(), Ok(denial("b.test", 1)));
        assert!(told.try_recv().is_err());
        assert_eq!(told.recv().await, Some(denial("a.test", 9)));
        // Nothing came in the second after that: it is news again.
        tokio::time::sleep(3 * WINDOW).await;
        denials.report(refused("a.test"));
        assert_eq!(told.try_recv(), Ok(denial("a.test", 1)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_flood_is_few_events_and_none_is_lost() {
        let (sender, mut told) = mpsc::unbounded_channel();
        let denials = Denials::new(Some(sender));
        for number in 0..100_000 {
            denials.report(refused(&format!("{number}.test")));
        }
        denials.report_lost(50);
        tokio::time::sleep(2 * WINDOW).await;
        let mut count = 0;
        let mut events = 0;
        while let Ok(denial) = told.try_recv() {
            count += denial.count;
            events += 1;
        }
        assert_eq!(count, 100_050);
        assert_eq!(events, MAX_KINDS + 1);
    }
}
