//! Counts what is put onto a tunnel, and charges the tunnel's link with it.
//!
//! Each CPU has its own counters. All CPUs share the link's record ([`crate::load`]): if each packet wrote to it, it
//! would move from CPU to CPU. So a CPU charges the link with the first packet of each unit of time, and with
//! everything that it has put onto the tunnel since the last charge. Whoever reads the link's record misses what came
//! later in the same unit. Packets that start a flow or move a bucket, and all packets that are sprayed, are charged at
//! once.

use crate::layout::{TunnelCounters, TunnelId, how};
use crate::load;
use crate::packet::Segments;
use crate::tables::{Calls, Tables};

/// A unit is 2^20 ns, about a millisecond, or a tick of the kernel's cheap clock where that is longer.
const UNIT_BITS: u32 = 20;

/// Packets that are put onto a tunnel.
#[derive(Clone, Copy, Debug)]
pub struct Sent {
    pub segments: Segments,
    /// Bits of [`how`].
    pub how: u32,
    /// Bytes that the flow is expected to send soon; 0: they were charged already.
    pub expected: u32,
    /// Whether the link is charged now, and not with the next unit.
    pub at_once: bool,
}

/// Bytes that were put onto a link and are not charged yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Due {
    bytes: u32,
    /// Units since the last charge.
    age: u32,
}

/// Counts packets that are put onto a tunnel at `now`, nanoseconds of the monotonic clock, and charges the tunnel's
/// link if that is due.
#[inline(always)]
pub fn record_sent<T: Calls + ?Sized>(tables: &T, id: TunnelId, now: u64, sent: &Sent) {
    const { assert!(how::FAILOVER == 1 && how::FLOWLET == 2 && how::SPRAYED == 4) };
    let due = tables.update_counters(id, |counters| {
        let due = charge_due(counters, now, sent.at_once);
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

/// What is due, if a new unit has begun or `at_once` is set.
#[inline(always)]
fn charge_due(counters: &mut TunnelCounters, now: u64, at_once: bool) -> Option<Due> {
    let unit = (now >> UNIT_BITS) as u32;
    // The exact clock may be ahead of the cheap one, so time may seem to go back.
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

/// Charges a tunnel's link with the bytes that were put onto it before, with `bytes` now, and with `expected` bytes
/// that will follow. `before` holds the age of the earlier bytes in units in the upper half, and their number in the
/// lower half. Returns 0, because a BPF function must return a value.
#[inline(always)]
pub fn charge_link<T: Tables + ?Sized>(
    tables: &T,
    id: TunnelId,
    now: u64,
    before: u64,
    bytes: u32,
    expected: u32,
) -> u32 {
    if let Some(load) = tables.load(id).and_then(|load| tables.load(load.link())) {
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
        let due = charge_due(counters, now, at_once);
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
