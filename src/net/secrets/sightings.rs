//! Placeholders where they are not for, told without end and within bounds.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use tokio::sync::Notify;

/// Different ones that wait to be told. A VM can make up as many hosts as it likes.
const MAX_WAITING: usize = 64;

/// What stands for hosts beyond that.
const MANY: &str = "*";

/// Longest name of a host; what claims to be one may have any length.
const MAX_HOST: usize = 255;

/// A placeholder went, or would have gone, where its secret's value does not go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Misdirected {
    /// Name of the secret.
    pub secret: String,
    pub host: String,
    pub port: u16,
    pub place: Place,
    /// How often since it was last told.
    pub count: u64,
}

impl Misdirected {
    /// Whether they differ in `count` alone.
    #[must_use]
    pub fn is_alike(&self, other: &Self) -> bool {
        let key = |of: &Self| (of.port, of.place);
        key(self) == key(other) && self.secret == other.secret && self.host == other.host
    }

    /// Makes it one of many.
    pub fn forget_host(&mut self) {
        MANY.clone_into(&mut self.host);
        self.port = 0;
    }
}

/// Where in a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    Header,
    Url,
    /// Not in TLS.
    Plaintext,
}

impl Place {
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Header => "header",
            Self::Url => "url",
            Self::Plaintext => "plaintext",
        }
    }
}

type Key = (String, String, u16, Place);

/// Those of a VM that nobody was told of yet.
#[derive(Debug, Default)]
pub struct Sightings {
    waiting: Mutex<BTreeMap<Key, u64>>,
    added: Notify,
}

impl Sightings {
    pub(super) fn add(&self, secret: String, mut host: String, port: u16, place: Place) {
        if host.len() > MAX_HOST {
            MANY.clone_into(&mut host);
        }
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let mut key = (secret, host, port, place);
        if waiting.len() >= MAX_WAITING && !waiting.contains_key(&key) {
            MANY.clone_into(&mut key.1);
            key.2 = 0;
        }
        let count = waiting.entry(key.clone()).or_default();
        *count += 1;
        let is_new = *count == 1;
        drop(waiting);
        if is_new {
            let (secret, host, port, place) = key;
            let place = place.as_str();
            tracing::warn!(%secret, %host, port, place, "a placeholder of a secret was misdirected");
            self.added.notify_one();
        }
    }

    /// Waits for some.
    pub async fn next(&self) -> Vec<Misdirected> {
        loop {
            let taken = self.take();
            if !taken.is_empty() {
                return taken;
            }
            self.added.notified().await;
        }
    }

    /// Those that are there.
    pub fn take(&self) -> Vec<Misdirected> {
        let taken =
            std::mem::take(&mut *self.waiting.lock().unwrap_or_else(PoisonError::into_inner));
        let told = taken
            .into_iter()
            .map(|((secret, host, port, place), count)| Misdirected {
                secret,
                host,
                port,
                place,
                count,
            });
        told.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_same_is_counted_and_too_many_are_one() {
        let sightings = Sightings::default();
        let add = |host: &str| sightings.add("KEY".to_owned(), host.to_owned(), 443, Place::Header);
        add("a.example");
        add("a.example");
        let told = sightings.next().await;
        assert_eq!(told.len(), 1);
        assert_eq!((&*told[0].host, told[0].count), ("a.example", 2));
        for number in 0..1000 {
            add(&format!("{number}.example"));
        }
        let told = sightings.take();
        assert_eq!(told.len(), MAX_WAITING + 1);
        assert_eq!(told.iter().map(|told| told.count).sum::<u64>(), 1000);
    }
}
