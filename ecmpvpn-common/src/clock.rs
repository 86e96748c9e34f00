//! Estimates the monotonic clock from the kernel's tick count. Reading that count is one read of memory. Asking for the
//! exact time costs as much as half of a decision.
//!
//! In high resolution mode the kernel counts a tick whenever the monotonic clock has passed another `TICK_NSEC`
//! (`tick_do_update_jiffies64()`, kernel/time/tick-sched.c). So the two differ by a constant: the exact clock at the
//! beginning of a tick, minus the counted ticks. Whoever reads the exact clock records it here. The constant is never
//! underestimated: time stamps may be late, but not early.

use crate::shared::Shared;

/// After this many ticks the constant is determined again. It drifts where ticks are counted one by one.
const VALID_TICKS: u64 = 64;

/// What is known about the constant. Every CPU may write to it at any time: each word is accurate enough by itself.
#[repr(C)]
#[derive(Debug, Default)]
pub struct Clock {
    /// Upper bound of the constant. It is less than a tick too high after it was determined once; nanoseconds modulo
    /// 2^64.
    offset: Shared<u64>,
    /// Tick in which the constant was last determined; 0: never.
    found: Shared<u64>,
}

impl Clock {
    /// The latest possible end of this tick, minus one tick: nanoseconds of the monotonic clock. `None` if the constant
    /// must be determined first.
    #[inline(always)]
    pub fn at(&self, ticks: u64, tick_ns: u32) -> Option<u64> {
        (ticks.wrapping_sub(self.found.get()) < VALID_TICKS)
            .then(|| start(ticks, tick_ns).wrapping_add(self.offset.get()))
    }

    /// Records the reading of the exact clock in this tick.
    #[inline(always)]
    pub fn record(&self, ticks: u64, tick_ns: u32, exact: u64) {
        // At least the constant, and less than a tick more.
        let most = exact.wrapping_sub(start(ticks, tick_ns));
        let beyond = most.wrapping_sub(self.offset.get());
        // A lower value is a better bound. A value that is more than a tick higher means that the kernel left out
        // ticks.
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

    /// The tick count at time `now`, if tick 2^32 - 75,000 begins at `phase`; see `INITIAL_JIFFIES`,
    /// include/linux/jiffies.h.
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
            // By then the constant is known well. What remains is the tick itself.
            assert!(worst <= u64::from(TICK) + 10_000, "{worst}");
        }
    }

    #[test]
    fn it_follows_ticks_that_are_left_out_and_is_asked_again_in_time() {
        let clock = Clock::default();
        let now = 1_000_000_000_000;
        clock.record(250_000, TICK, now);
        // The kernel did not count ten ticks: from the next reading on no time is too early.
        clock.record(250_001, TICK, now + 11 * u64::from(TICK));
        assert_eq!(clock.at(250_001, TICK), Some(now + 11 * u64::from(TICK)));
        // The kernel counts twenty ticks in the time of one.
        clock.record(250_021, TICK, now + 12 * u64::from(TICK));
        assert_eq!(clock.at(250_021, TICK), Some(now + 12 * u64::from(TICK)));
        assert!(clock.at(250_021 + 63, TICK).is_some());
        assert_eq!(clock.at(250_021 + 64, TICK), None);
        assert_eq!(clock.at(250_020, TICK), None);
    }
}
