//! Describes what a link does to packets, as queueing disciplines. Pure.

use std::time::Duration;

/// A link's queue holds what the link sends in this time, or [`LEAST_QUEUE`] if that is more.
const QUEUE: Duration = Duration::from_millis(50);
/// Smallest queue, bytes. It holds some packets of each of a few flows.
const LEAST_QUEUE: f64 = 65_536.0;
/// Burst of the shaper, bytes.
const BURST: u32 = 16_384;
/// Most packets in netem's queue. Far above what the fastest link of a lab sends during the longest delay.
const ON_THE_WAY: u32 = 200_000;

/// The arguments of `tc qdisc replace dev DEVICE root` that limit a port to `rate`, 10^6 bits a second. `queue` is in
/// bytes. `None` means what the link sends in 50 ms, but not less than 64 KiB.
pub fn shaper(rate: f64, queue: Option<u32>) -> String {
    let queue = queue.map_or_else(|| (rate * 1e6 / 8.0 * QUEUE.as_secs_f64()).max(LEAST_QUEUE).round(), f64::from);
    format!("tbf rate {rate}mbit burst {BURST} limit {queue}")
}

/// Delay, jitter and loss between two ports, in one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Quality {
    /// Time that a packet takes.
    pub delay: Duration,
    /// Random variation of the delay, up and down. Packets stay in order.
    pub jitter: Duration,
    /// Lost packets, percent.
    pub loss: f64,
}

impl Quality {
    /// Loses all packets.
    pub const CUT: Self = Self { delay: Duration::ZERO, jitter: Duration::ZERO, loss: 100.0 };

    /// Delays packets and loses none.
    pub const fn delayed(delay: Duration) -> Self {
        Self { delay, jitter: Duration::ZERO, loss: 0.0 }
    }

    /// The arguments of `tc qdisc replace dev DEVICE root`.
    pub fn discipline(self) -> String {
        let us = |time: Duration| time.as_micros();
        // With a rate, netem keeps packets in order whatever the jitter: each packet leaves after the one before it
        // (`netem_enqueue()`, net/sched/sch_netem.c). This rate is above that of every link in a lab.
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
