//! What a link does to packets, as queueing disciplines. Pure.

use std::time::Duration;

/// A link's queue holds what it sends in this time, or [`LEAST_QUEUE`] if that is more.
const QUEUE: Duration = Duration::from_millis(50);
/// Some packets of each of a few flows, bytes.
const LEAST_QUEUE: f64 = 65_536.0;
/// What may leave at once, bytes.
const BURST: u32 = 16_384;
/// Packets on their way at once: far above what the fastest link of a lab sends in the longest delay.
const ON_THE_WAY: u32 = 200_000;

/// The port's shaper for `rate`, 10^6 bits a second: words for `tc qdisc replace dev DEVICE root`. `queue`: bytes; `None`:
/// what the link sends in 50 ms, but not less than 64 KiB.
pub fn shaper(rate: f64, queue: Option<u32>) -> String {
    let queue = queue.map_or_else(|| (rate * 1e6 / 8.0 * QUEUE.as_secs_f64()).max(LEAST_QUEUE).round(), f64::from);
    format!("tbf rate {rate}mbit burst {BURST} limit {queue}")
}

/// What happens to packets between two ports, in one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Quality {
    /// How long they are on their way.
    pub delay: Duration,
    /// How much longer or shorter, at random; packets stay in order.
    pub jitter: Duration,
    /// Percent that get lost.
    pub loss: f64,
}

impl Quality {
    /// Nothing gets through.
    pub const CUT: Self = Self { delay: Duration::ZERO, jitter: Duration::ZERO, loss: 100.0 };

    /// Nothing but a delay.
    pub const fn delayed(delay: Duration) -> Self {
        Self { delay, jitter: Duration::ZERO, loss: 0.0 }
    }

    /// Words for `tc qdisc replace dev DEVICE root`.
    pub fn discipline(self) -> String {
        let us = |time: Duration| time.as_micros();
        // With a rate, netem keeps packets in order whatever the jitter: one leaves after the one before it
        // (`netem_enqueue()`, net/sched/sch_netem.c). This one is above all that labs have.
        let jitter = if self.jitter.is_zero() { String::new() } else { format!(" {}us rate 100gbit", us(self.jitter)) };
        let loss = if self.loss > 0.0 { format!(" loss {}%", self.loss) } else { String::new() };
        format!("netem limit {ON_THE_WAY} delay {}us{jitter}{loss}", us(self.delay))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_queue_is_fifty_milliseconds_and_never_tiny() {
        assert_eq!(shaper(100.0, None), "tbf rate 100mbit burst 16384 limit 625000");
        assert_eq!(shaper(8.0, None), "tbf rate 8mbit burst 16384 limit 65536");
        assert_eq!(shaper(8.0, Some(9_000)), "tbf rate 8mbit burst 16384 limit 9000");
    }

    #[test]
    fn qualities_are_written_as_tc_reads_them() {
        let delay = Duration::from_millis(2);
        assert_eq!(Quality::delayed(delay).discipline(), "netem limit 200000 delay 2000us");
        let all = Quality { delay, jitter: Duration::from_micros(500), loss: 0.01 };
        assert_eq!(all.discipline(), "netem limit 200000 delay 2000us 500us rate 100gbit loss 0.01%");
        assert_eq!(Quality::CUT.discipline(), "netem limit 200000 delay 0us loss 100%");
    }
}
