//! Counts what is put onto a tunnel, and charges the tunnel's link with it.
//!
//! The counts are each CPU's own. The link's record ([`crate::load`]) is everybody's: written with each packet it would
//! wander from CPU to CPU. So a CPU charges it with the first packet of each unit of time, and with what it has put onto
//! the tunnel since; a look at the link misses what came later in the same unit. Flows that choose, and packets that are
//! sprayed, are charged at once.

use crate::layout::{TunnelCounters, how};
use crate::load;
use crate::packet::Segments;
use crate::tables::{Calls, Tables};

/// A unit is 2^20 ns, about a millisecond, or a tick of the kernel's cheap clock where that is longer.
const UNIT_BITS: u32 = 20;

/// Packets that are put onto a tunnel.
#[derive(Clone, Copy, Debug)]
pub struct Sent {
    /// Packets and bytes.
    pub segments: Segments,
    /// Bits of [`how`].
    pub how: u32,
    /// What its flow is expected to send soon, bytes; 0: it is counted already.
    pub expected: u32,
    /// Whether the link is charged at once.
    pub at_once: bool,
}

/// What a link is to be charged with that was put onto it before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Due {
    bytes: u32,
    /// Units that have passed.
    age: u32,
}

/// Counts what is put onto a tunnel at `now`, nanoseconds of the monotonic clock.
#[inline(always)]
pub fn record_sent<T: Calls + ?Sized>(tables: &T, id: u32, now: u64, sent: &Sent) {
    const { assert!(how::FAILOVER == 1 && how::FLOWLET == 2 && how::SPRAYED == 4) };
    let due = tables.counted(id, |counters| {
        let due = due(counters, now, sent.at_once);
        counters.tx_packets += u64::from(sent.segments.packets);
        counters.tx_bytes += u64::from(sent.segments.bytes);
        counters.failover_moves += u64::from(sent.how & 1);
        counters.flowlet_moves += u64::from(sent.how >> 1 & 1);
        counters.sprayed_packets += u64::from(sent.how >> 2 & 1);
        if due.is_some() {
            counters.charged = counters.tx_bytes as u32;
        }
        due
    });
    if let Some(Some(due)) = due {
        tables.charge_link(
            id,
            now,
            u64::from(due.age) << 32 | u64::from(due.bytes),
            sent.segments.bytes,
            sent.expected,
        );
    }
}

/// What is due, if a new unit has begun or it must be `at_once`.
#[inline(always)]
fn due(counters: &mut TunnelCounters, now: u64, at_once: bool) -> Option<Due> {
    let unit = (now >> UNIT_BITS) as u32;
    // The exact clock is ahead of the cheap one: time may seem to go back.
    let age = match unit.wrapping_sub(counters.charged_at) {
        age if age >> 31 == 0 => age,
        _ => 0,
    };
    if age == 0 && !at_once {
        return None;
    }
    counters.charged_at = counters.charged_at.wrapping_add(age);
    Some(Due { bytes: (counters.tx_bytes as u32).wrapping_sub(counters.charged), age })
}

/// Charges a tunnel's link with what was put onto it before (its age in units, and its bytes
/// in the lower half of the word), with `bytes` now, and with `expected` ones that will follow. Returns 0: BPF functions
/// return something.
#[inline(always)]
pub fn charge_link<T: Tables + ?Sized>(tables: &T, id: u32, now: u64, before: u64, bytes: u32, expected: u32) -> u32 {
    if let Some(load) = tables.load(id).and_then(|load| tables.load(load.link.get())) {
        let (age, waiting) = (before >> 32, before as u32);
        if waiting != 0 {
            load::charge(load, now.saturating_sub(age << UNIT_BITS), waiting, 0);
        }
        load::charge(load, now, bytes, expected);
    }
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNIT: u64 = 1 << UNIT_BITS;

    fn sent(counters: &mut TunnelCounters, now: u64, bytes: u64, at_once: bool) -> Option<Due> {
        let due = due(counters, now, at_once);
        counters.tx_bytes += bytes;
        if due.is_some() {
            counters.charged = counters.tx_bytes as u32;
        }
        due
    }

    #[test]
    fn a_link_is_charged_once_a_unit_and_nothing_is_forgotten() {
        let mut counters = TunnelCounters { tx_bytes: u64::from(u32::MAX), charged: u32::MAX, ..Default::default() };
        let start = 5_000 * UNIT;
        assert_eq!(sent(&mut counters, start, 100, false), Some(Due { bytes: 0, age: 5_000 }));
        for _ in 0..3 {
            assert_eq!(sent(&mut counters, start + UNIT - 1, 100, false), None);
        }
        assert_eq!(sent(&mut counters, start + 2 * UNIT, 100, false), Some(Due { bytes: 300, age: 2 }));
        assert_eq!(sent(&mut counters, start + 3 * UNIT, 100, false), Some(Due { bytes: 0, age: 1 }));
    }

    #[test]
    fn at_once_takes_what_waits_along() {
        let mut counters = TunnelCounters::default();
        sent(&mut counters, UNIT, 100, false);
        sent(&mut counters, UNIT, 200, false);
        assert_eq!(sent(&mut counters, UNIT, 100, true), Some(Due { bytes: 200, age: 0 }));
        assert_eq!(sent(&mut counters, UNIT, 100, true), Some(Due { bytes: 0, age: 0 }));
    }

    #[test]
    fn a_clock_that_lags_does_not_lose_what_waits() {
        let mut counters = TunnelCounters::default();
        sent(&mut counters, 9 * UNIT, 100, true);
        assert_eq!(sent(&mut counters, 6 * UNIT, 100, false), None);
        assert_eq!(sent(&mut counters, 10 * UNIT, 100, false), Some(Due { bytes: 100, age: 1 }));
    }
}
