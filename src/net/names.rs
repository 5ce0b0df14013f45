//! For which names the VM's resolver has given out an address.

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long an address is known, whatever its record says: programs connect a little later than they
/// ask, and again without asking.
const SHORTEST: Duration = Duration::from_mins(10);
const LONGEST: Duration = Duration::from_hours(1);

/// Who connects so soon after an answer connects to what was asked for.
const FRESH: Duration = Duration::from_secs(30);

/// Addresses that were given out of late, and those of one name that are looked at.
const MAX_RECENT: usize = 512;
const MAX_ALIKE: usize = 8;

/// Nothing inside the VM is told to remember an answer for longer than it is known here.
pub(super) const MAX_TTL: u32 = 3600;

/// Addresses of one VM. Where there are more, those that end first are forgotten.
const MAX_ADDRESSES: usize = 4096;

/// Names of one address, as those of a large host of many sites.
const MAX_NAMES: usize = 64;

/// What the resolver of one VM has answered.
#[derive(Debug, Default)]
pub(super) struct Names {
    known: Mutex<HashMap<IpAddr, Vec<Known>>>,
    recent: Mutex<RecentAnswers>,
}

#[derive(Debug, Default)]
struct RecentAnswers {
    /// The last ones last.
    given_out: VecDeque<Recent>,
    /// Until then somebody may rely on an address that is not known any more.
    forgotten_until: Option<Instant>,
}

#[derive(Debug, Clone)]
struct Known {
    name: Arc<str>,
    until: Instant,
}

/// An address that was given out for a name.
#[derive(Debug)]
struct Recent {
    name: Arc<str>,
    address: IpAddr,
    at: Instant,
}

impl Names {
    /// `address` is given out as that of `name`, which is in lower case and without a dot at its end.
    pub(super) fn record(&self, name: &Arc<str>, address: IpAddr, ttl: u32, now: Instant) {
        let until = now + Duration::from_secs(ttl.into()).clamp(SHORTEST, LONGEST);
        self.note(name, address, now);
        let mut known = self.known();
        let is_full = known.len() >= MAX_ADDRESSES && !known.contains_key(&address);
        let mut forgotten = is_full.then(|| make_room(&mut known, now)).flatten();
        let names = known.entry(address).or_default();
        names.retain(|own| own.until > now && own.name != *name);
        if names.len() >= MAX_NAMES
            && let Some(first) = (0..names.len()).min_by_key(|index| names[*index].until)
        {
            forgotten = forgotten.max(Some(names.swap_remove(first).until));
        }
        names.push(Known {
            name: Arc::clone(name),
            until,
        });
        drop(known);
        let until = &mut self.recent().forgotten_until;
        *until = forgotten.max(*until);
    }

    fn note(&self, name: &Arc<str>, address: IpAddr, at: Instant) {
        let given_out = &mut self.recent().given_out;
        if given_out.len() >= MAX_RECENT {
            given_out.pop_front();
        }
        given_out.push_back(Recent {
            name: Arc::clone(name),
            address,
            at,
        });
    }

    /// The latest last.
    pub(super) fn of(&self, address: IpAddr, now: Instant) -> Vec<Arc<str>> {
        let known = self.known();
        let names = known.get(&address).into_iter().flatten();
        let current = names.filter(|own| own.until > now);
        current.map(|own| Arc::clone(&own.name)).collect()
    }

    /// Other addresses of what this one was given out for a moment ago, the last first: where it is that of several
    /// names, those that are of each of them. Who gives another one's address out for a name of theirs must not
    /// get what is meant for the other.
    pub(super) fn instead_of(&self, address: IpAddr, now: Instant) -> Vec<IpAddr> {
        let alike = self.given_out_with(address, now);
        let names = self.of(address, now);
        if names.is_empty() {
            return Vec::new();
        }
        let has_all = |other: &IpAddr| {
            let own = self.of(*other, now);
            names.iter().all(|name| own.contains(name))
        };
        alike.into_iter().filter(has_all).collect()
    }

    /// Other addresses of the name that this one was given out for last.
    fn given_out_with(&self, address: IpAddr, now: Instant) -> Vec<IpAddr> {
        let recent = self.recent();
        let is_fresh = |own: &&Recent| now.saturating_duration_since(own.at) < FRESH;
        let mut fresh = recent.given_out.iter().rev().take_while(is_fresh);
        let mut alike = Vec::new();
        // It could be the address of what was forgotten.
        if recent.forgotten_until.is_some_and(|until| until > now) {
            return alike;
        }
        let Some(meant) = fresh.clone().find(|own| own.address == address) else {
            return alike;
        };
        while alike.len() < MAX_ALIKE
            && let Some(own) = fresh.find(|own| own.name == meant.name)
        {
            if own.address != address && !alike.contains(&own.address) {
                alike.push(own.address);
            }
        }
        alike
    }

    fn recent(&self) -> MutexGuard<'_, RecentAnswers> {
        self.recent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn known(&self) -> MutexGuard<'_, HashMap<IpAddr, Vec<Known>>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An eighth at once, so that it is seldom done. Returns until when what is forgotten would have been known.
fn make_room(known: &mut HashMap<IpAddr, Vec<Known>>, now: Instant) -> Option<Instant> {
    let end = |names: &[Known]| names.iter().map(|own| own.until).max().unwrap_or(now);
    let mut ends: Vec<(Instant, IpAddr)> = known
        .iter()
        .map(|(address, names)| (end(names), *address))
        .collect();
    ends.sort_unstable();
    let mut forgotten = None;
    for (index, (until, address)) in ends.into_iter().enumerate() {
        if until > now && index >= MAX_ADDRESSES / 8 {
            break;
        }
        known.remove(&address);
        forgotten = Some(until);
    }
    forgotten
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn name(text: &str) -> Arc<str> {
        text.into()
    }

    #[test]
    fn an_address_is_known_by_its_names_for_ten_minutes_to_an_hour() {
        let (names, now) = (Names::default(), Instant::now());
        let address = Ipv4Addr::new(1, 2, 3, 4).into();
        names.record(&name("short.test"), address, 1, now);
        names.record(&name("long.test"), address, u32::MAX, now);
        let at = |seconds| names.of(address, now + Duration::from_secs(seconds));
        assert_eq!(at(0), [name("short.test"), name("long.test")]);
        assert_eq!(at(599), [name("short.test"), name("long.test")]);
        assert_eq!(at(600), [name("long.test")]);
        assert_eq!(at(3600), []);
        assert_eq!(names.of(Ipv4Addr::new(1, 2, 3, 5).into(), now), []);
    }

    #[test]
    fn instead_of_an_address_there_are_those_that_all_its_names_have_for_a_moment() {
        let (names, now) = (Names::default(), Instant::now());
        let [one, two, three] = [1, 2, 3].map(|last| IpAddr::from([1, 2, 3, last]));
        for address in [one, two] {
            names.record(&name("a.test"), address, 60, now);
        }
        let at = |address, seconds| names.instead_of(address, now + Duration::from_secs(seconds));
        assert_eq!(at(one, 29), [two]);
        assert_eq!(at(one, 30), [] as [IpAddr; 0]);
        assert_eq!(at(three, 0), [] as [IpAddr; 0]);
        // As one who would have what is meant for `one`.
        for address in [one, three] {
            names.record(&name("b.test"), address, 60, now);
        }
        assert_eq!(at(one, 0), [] as [IpAddr; 0]);
        // Two sites of the same addresses.
        names.record(&name("b.test"), two, 60, now);
        assert_eq!(at(one, 0), [two]);
        // Many names, of which some are forgotten: nobody knows whose addresses these were.
        for number in 0..2 * MAX_NAMES {
            for address in [one, three] {
                names.record(&name(&format!("{number}.test")), address, 3600, now);
            }
        }
        assert_eq!(at(one, 0), [] as [IpAddr; 0]);
    }

    #[test]
    fn what_is_known_is_bounded_and_the_latest_is_kept() {
        let (names, now) = (Names::default(), Instant::now());
        let later = |number: u32| now + Duration::from_millis(number.into());
        for number in 0..3 * 4096 {
            let address = Ipv4Addr::from_bits(number).into();
            names.record(&name("a.test"), address, 60, later(number));
            assert_eq!(names.of(address, later(number)).len(), 1);
            assert!(names.known().len() <= MAX_ADDRESSES);
        }
        let address = Ipv4Addr::new(1, 2, 3, 4).into();
        for number in 0..1000 {
            names.record(&name(&format!("{number}.test")), address, 60, later(number));
        }
        let known = names.of(address, now);
        assert_eq!(known.len(), MAX_NAMES);
        assert!(known.contains(&name("999.test")));
    }
}
