//! Moments that nobody chose, and that can be chosen again.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// `SplitMix64`: any seed is a good one.
pub(super) struct Random(u64);

impl Random {
    /// With a seed of the moment, or that of a run that failed.
    pub(super) fn new() -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let seed = std::env::var("AGENTVM_TEST_SEED").map_or_else(
            |_| u64::from(now.subsec_nanos()),
            |seed| seed.parse().unwrap(),
        );
        println!("AGENTVM_TEST_SEED={seed}");
        Self(seed)
    }

    pub(super) fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % bound
    }

    /// A moment of a span, or a little after it.
    pub(super) fn moment_of(&mut self, span: Duration) -> Duration {
        let micros = u64::try_from(span.as_micros()).unwrap().max(1);
        Duration::from_micros(self.below(micros + micros / 10 + 1))
    }
}
