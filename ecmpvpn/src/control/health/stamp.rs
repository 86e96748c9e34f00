//! When a handshake was, by the monotonic clock. Pure.
//!
//! The kernel's WireGuard gives the time of a handshake by the wall clock, which may be set at any moment. But a
//! handshake that was not there at the last look happened since then, whatever the clock says.

use super::nanos::Nanos;

/// The last handshake of a tunnel.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stamp {
    /// Time by the wall clock, and by the monotonic clock.
    last: Option<(Nanos, Nanos)>,
    looked: Option<Nanos>,
}

impl Stamp {
    /// When the handshake with the wall clock's time `stamp` was, by the monotonic clock; 0 if `stamp` is `None`. `wall`
    /// and `now` are both clocks. If the wall clock was set before the first look, the result of this look is wrong by
    /// as much.
    pub fn at(&mut self, stamp: Option<Nanos>, wall: Nanos, now: Nanos) -> Nanos {
        let looked = self.looked.replace(now);
        let Some(stamp) = stamp else {
            self.last = None;
            return 0;
        };
        if let Some((known, at)) = self.last
            && known == stamp
        {
            return at;
        }
        // If the clock was set back since, the handshake seems to be in the future.
        let at = now.saturating_sub(wall.saturating_sub(stamp));
        let at = looked.map_or(at, |looked| at.clamp(looked.min(now), now)).max(1);
        self.last = Some((stamp, at));
        at
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::health::nanos::SECOND;

    /// The wall clock's time when the monotonic clock is 0.
    const EPOCH: Nanos = 1_700_000_000 * SECOND;

    /// Looks every 5 seconds for 400 seconds. There is a handshake every 120 seconds, at the seconds 3, 123 and so on.
    /// `step` is added to the wall clock at second 200. Returns the longest age of a handshake, seconds.
    fn longest_age(step: i64) -> Nanos {
        let wall = |now: Nanos| {
            let set = if now >= 200 * SECOND { step * SECOND.cast_signed() } else { 0 };
            (EPOCH + now).checked_add_signed(set).unwrap()
        };
        let mut stamp = Stamp::default();
        let mut longest = 0;
        for now in (5..400).step_by(5).map(|second| second * SECOND) {
            let handshake = (now - 3 * SECOND) / (120 * SECOND) * 120 * SECOND + 3 * SECOND;
            let at = stamp.at(Some(wall(handshake)), wall(now), now);
            assert!(at >= handshake.saturating_sub(5 * SECOND) && at <= now, "{handshake} {at} {now}");
            longest = longest.max(now - at);
        }
        longest / SECOND
    }

    #[test]
    fn a_clock_that_is_set_makes_no_handshake_old_or_new() {
        for step in [0, 190, 100_000, -190, -100_000] {
            assert!((115..=122).contains(&longest_age(step)), "{step}: {}", longest_age(step));
        }
    }

    #[test]
    fn what_is_not_there_is_0_and_what_comes_is_new() {
        let mut stamp = Stamp::default();
        assert_eq!(stamp.at(None, EPOCH, 5 * SECOND), 0);
        // The clock was set forward, right after the handshake.
        assert_eq!(stamp.at(Some(EPOCH), EPOCH + 1_000 * SECOND, 10 * SECOND), 5 * SECOND);
        assert_eq!(stamp.at(Some(EPOCH), EPOCH + 2_000 * SECOND, 15 * SECOND), 5 * SECOND);
        assert_eq!(stamp.at(None, EPOCH, 20 * SECOND), 0);
    }

    #[test]
    fn the_first_look_believes_the_clock() {
        assert_eq!(Stamp::default().at(Some(EPOCH), EPOCH + 30 * SECOND, 100 * SECOND), 70 * SECOND);
        assert_eq!(Stamp::default().at(Some(EPOCH), EPOCH + 300 * SECOND, 100 * SECOND), 1);
        assert_eq!(Stamp::default().at(Some(EPOCH), EPOCH - 300 * SECOND, 100 * SECOND), 100 * SECOND);
    }
}
