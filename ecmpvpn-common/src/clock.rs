//! The monotonic clock from the kernel's count of ticks: a look at memory, where asking for the time costs as much as half
//! of a decision.
//!
//! In high resolution mode the kernel counts a tick whenever the monotonic clock has passed another `TICK_NSEC`
//! (`tick_do_update_jiffies64()`, kernel/time/tick-sched.c), so the two differ by a constant: what the exact clock is at
//! the beginning of a tick, less the ticks. Whoever reads the exact clock tells it here. It is never taken for less than it
//! is: stamps may be late, but not early.

use crate::shared::Shared;

/// After so many ticks the constant is found anew: where ticks are counted one by one it drifts.
const VALID_TICKS: u64 = 64;

/// What is known of the constant. Everybody may write to it at any time: each word by itself is right enough.
#[repr(C)]
#[derive(Debug, Default)]
pub struct Clock {
    /// At least the constant, and less than a tick more as soon as it was found once; nanoseconds modulo 2^64.
    offset: Shared<u64>,
    /// The tick in which it was found last; 0: never.
    found: Shared<u64>,
}

impl Clock {
    /// When this tick is over at the latest, less a tick: nanoseconds of the monotonic clock. `None` if it must be found
    /// out first.
    #[inline(always)]
    pub fn at(&self, ticks: u64, tick_ns: u32) -> Option<u64> {
        (ticks.wrapping_sub(self.found.get()) < VALID_TICKS)
            .then(|| start(ticks, tick_ns).wrapping_add(self.offset.get()))
    }

    /// Tells what the exact clock was in this tick.
    #[inline(always)]
    pub fn record(&self, ticks: u64, tick_ns: u32, exact: u64) {
        // The constant, and up to a tick more.
        let most = exact.wrapping_sub(start(ticks, tick_ns));
        let beyond = most.wrapping_sub(self.offset.get());
        // Less than was known, or more than can be: ticks have been left out.
        if beyond.cast_signed() < 0 || beyond >= u64::from(tick_ns) || self.found.get() == 0 {
            self.offset.set(most);
        }
        self.found.set(ticks);
    }
}

#[inline(always)]
fn start(ticks: u64, tick_ns: u32) -> u64 {
    ticks.wrapping_mul(u64::from(tick_ns))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::mix;

    const TICK: u32 = 4_000_000;

    /// The tick at a time, where tick 2^32 - 75,000 begins at `phase`; see `INITIAL_JIFFIES`, include/linux/jiffies.h.
    fn ticks(now: u64, phase: u64) -> u64 {
        (1 << 32) - 75_000 + (now - phase) / u64::from(TICK)
    }

    #[test]
    fn it_is_late_by_less_than_a_tick_and_never_early() {
        for phase in [0, 1, 2_345_678, 3_999_999] {
            let clock = Clock::default();
            assert_eq!(clock.at(ticks(5_000_000, phase), TICK), None);
            let (mut now, mut worst) = (5_000_000, 0);
            for round in 0..10_000 {
                if round % 7 == 0 {
                    clock.record(ticks(now, phase), TICK, now);
                }
                let at = clock.at(ticks(now, phase), TICK).unwrap();
                let over = at + u64::from(TICK);
                assert!(over >= now && over - now <= 2 * u64::from(TICK), "{now}: {at}");
                worst = if round > 5_000 { over.abs_diff(now).max(worst) } else { 0 };
                now += mix(round) % 9_000_000;
            }
            // By then it is known well: the rest is the tick itself.
            assert!(worst <= u64::from(TICK) + 10_000, "{worst}");
        }
    }

    #[test]
    fn it_follows_ticks_that_are_left_out_and_is_asked_again_in_time() {
        let clock = Clock::default();
        let now = 1_000_000_000_000;
        clock.record(250_000, TICK, now);
        // Ten ticks were not counted: nothing is early from the next look on.
        clock.record(250_001, TICK, now + 11 * u64::from(TICK));
        assert_eq!(clock.at(250_001, TICK), Some(now + 11 * u64::from(TICK)));
        // Ten too many are counted at once.
        clock.record(250_021, TICK, now + 12 * u64::from(TICK));
        assert_eq!(clock.at(250_021, TICK), Some(now + 12 * u64::from(TICK)));
        assert!(clock.at(250_021 + 63, TICK).is_some());
        assert_eq!(clock.at(250_021 + 64, TICK), None);
        assert_eq!(clock.at(250_020, TICK), None);
    }
}
