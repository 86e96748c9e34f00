//! How fast a link truly is, told by what it sends while packets wait for it. Pure.
//!
//! A link's nominal speed says little where a shaper, a virtual port or a radio limits it. While packets wait, what
//! leaves is what the link can send; while none wait, it is what was offered, and only a lower bound.

use std::time::Duration;

/// Bytes waiting at both ends of an interval: the link never idled in between.
const BUSY_BYTES: u32 = 3_000;
/// Weight of a new reading while the rate is known.
const FRESH: f64 = 0.25;
/// A link that sends so many times its rate without a queue has become faster; a shaper's burst is less.
const FASTER: f64 = 1.3;

/// A link's interface as it is now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reading {
    /// Bytes that left, link-layer header included.
    pub sent: u64,
    /// Bytes that wait in its queueing discipline.
    pub waiting: u32,
}

/// The estimate for one link.
#[derive(Clone, Copy, Debug)]
pub struct Rate {
    bits_per_second: f64,
    measured: bool,
    last: Option<Reading>,
}

impl Rate {
    /// A link of this nominal speed, bits a second.
    pub fn nominal(bits_per_second: u64) -> Self {
        Self { bits_per_second: bits_per_second as f64, measured: false, last: None }
    }

    /// Takes a reading, `elapsed` after the last one.
    pub fn read(&mut self, reading: Reading, elapsed: Duration) {
        let Some(last) = self.last.replace(reading) else { return };
        let seconds = elapsed.as_secs_f64();
        if seconds <= 0.0 || reading.sent < last.sent {
            return;
        }
        let rate = 8.0 * (reading.sent - last.sent) as f64 / seconds;
        let busy = last.waiting >= BUSY_BYTES && reading.waiting >= BUSY_BYTES;
        match (busy, self.measured) {
            (true, false) => (self.bits_per_second, self.measured) = (rate, true),
            (true, true) => self.bits_per_second += FRESH * (rate - self.bits_per_second),
            (false, true) if rate > FASTER * self.bits_per_second => {
                self.bits_per_second += FRESH * (rate - self.bits_per_second)
            }
            (false, _) => {}
        }
    }

    /// Bits a second, link-layer headers included; at least 1,000.
    pub fn bits_per_second(&self) -> f64 {
        self.bits_per_second.max(1_000.0)
    }

    /// Whether the link was ever busy; else the rate is the nominal one.
    pub fn is_measured(&self) -> bool {
        self.measured
    }

    /// Bytes that had left at the last reading.
    pub fn sent(&self) -> Option<u64> {
        self.last.map(|last| last.sent)
    }

    /// Bytes that waited at the last reading.
    pub fn waiting(&self) -> u32 {
        self.last.map_or(0, |last| last.waiting)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TICK: Duration = Duration::from_millis(50);

    /// Readings of a link that sends `bytes` a tick while `waiting` bytes wait.
    fn feed(rate: &mut Rate, from: u64, bytes: u64, waiting: u32, ticks: u64) -> u64 {
        for tick in 0..=ticks {
            rate.read(Reading { sent: from + bytes * tick, waiting }, TICK);
        }
        from + bytes * ticks
    }

    #[test]
    fn a_busy_link_shows_its_rate() {
        let mut rate = Rate::nominal(10_000_000_000);
        let sent = feed(&mut rate, 0, 62_500, 0, 10);
        assert!(!rate.is_measured() && rate.bits_per_second() > 9e9, "an idle link shows nothing");
        let sent = feed(&mut rate, sent, 62_500, 20_000, 2);
        assert!((rate.bits_per_second() - 1e7).abs() < 1.0, "{rate:?}");
        // Half the rate from now on.
        let sent = feed(&mut rate, sent, 31_250, 20_000, 20);
        assert!((rate.bits_per_second() / 5e6 - 1.0).abs() < 0.02, "{rate:?}");
        // No queue and less traffic: nothing is learnt.
        let sent = feed(&mut rate, sent, 1_000, 0, 20);
        assert!((rate.bits_per_second() / 5e6 - 1.0).abs() < 0.02, "{rate:?}");
        // No queue and more traffic: the link is faster than it was.
        feed(&mut rate, sent, 125_000, 0, 30);
        assert!((0.76..1.0).contains(&(rate.bits_per_second() / 2e7)), "{rate:?}");
    }

    #[test]
    fn counters_that_start_anew_are_no_rate() {
        let mut rate = Rate::nominal(1_000_000);
        feed(&mut rate, 1_000_000, 62_500, 20_000, 3);
        rate.read(Reading { sent: 0, waiting: 20_000 }, TICK);
        assert!((rate.bits_per_second() - 1e7).abs() < 1.0);
    }
}
