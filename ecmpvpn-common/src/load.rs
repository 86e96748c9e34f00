//! Estimates for the steering decision how much is on its way through each link. Pure arithmetic on [`Load`] records.
//!
//! There are two figures. Both are in nanoseconds of the link's time, so that links of different rates can be compared:
//! - the *queue*: the time when the link will have sent everything that was put onto it, at the assumed rate;
//! - the *level*: the time that recent bytes take, halved every [`HALF_LIFE_NS`]. It is CONGA's discounting rate
//!   estimator (Alizadeh et al., "CONGA: Distributed congestion-aware load balancing", SIGCOMM 2014, section 3.2). The
//!   decay is computed when the level is read, because a BPF program has no timer.
//!
//! Several CPUs write without a lock. A lost update makes the estimate wrong by one packet.

use crate::layout::Load;

/// After this time a byte counts half.
pub const HALF_LIFE_NS: u64 = 1 << HALF_LIFE_BITS;
const HALF_LIFE_BITS: u32 = 26;
/// The level is updated in steps of 2^`STEP_BITS` nanoseconds: 256 steps are a half-life.
const STEP_BITS: u32 = HALF_LIFE_BITS - 8;
/// Longest queue that is assumed: an assumed rate that is far too low must not exclude a link.
pub const MAX_QUEUE_NS: u64 = 500_000_000;
/// Fractional bits of [`Load::cost`].
pub const COST_BITS: u32 = 10;

/// What a byte costs on a link with this rate: nanoseconds with [`COST_BITS`] fractional bits, at least 1. The lowest
/// rate that can be represented is about 1.9 kbit/s.
#[must_use]
pub const fn cost_of_rate(bits_per_second: u64) -> u32 {
    let bits_per_second = if bits_per_second == 0 { 1 } else { bits_per_second };
    let cost = (8_000_000_000u64 << COST_BITS) / bits_per_second;
    match cost {
        0 => 1,
        1..=0xffff_ffff => cost as u32,
        _ => u32::MAX,
    }
}

/// The rate whose cost is `cost`, bits per second.
#[must_use]
pub const fn rate_of_cost(cost: u32) -> u64 {
    (8_000_000_000u64 << COST_BITS) / (if cost == 0 { 1 } else { cost as u64 })
}

/// The time that `bytes` take on the link, nanoseconds.
#[must_use]
#[inline(always)]
pub fn time_of(load: &Load, bytes: u32) -> u64 {
    (u64::from(bytes) * u64::from(load.cost.get())) >> COST_BITS
}

/// What `bytes` add to the level, nanoseconds.
#[must_use]
#[inline(always)]
pub fn weighted_time_of(load: &Load, bytes: u32) -> u64 {
    (u64::from(bytes) * u64::from(load.weighted_cost.get())) >> COST_BITS
}

/// How long another packet would wait for the link if it were sent at `now`, nanoseconds.
#[must_use]
#[inline(always)]
pub fn queued_ns(load: &Load, now: u64) -> u64 {
    at_most(positive(load.free_ns.get().wrapping_sub(now)), MAX_QUEUE_NS - u64::from(load.shortfall_ns.get()))
}

/// Sets the longest queue that the link has room for, nanoseconds: what is sent beyond it is dropped. `None`: not known.
pub fn set_room(load: &Load, room: Option<u64>) {
    let shortfall = MAX_QUEUE_NS - room.unwrap_or(MAX_QUEUE_NS).min(MAX_QUEUE_NS);
    // Below 2^32.
    load.shortfall_ns.set(shortfall as u32);
}

/// How long the delivery of `bytes` would take, if they were sent at `now`, beyond what the peer's fastest tunnel takes
/// when nothing waits, nanoseconds.
#[must_use]
#[inline(always)]
pub fn delivery_ns(load: &Load, now: u64, bytes: u32) -> u64 {
    queued_ns(load, now) + time_of(load, bytes) + u64::from(load.delay_ns.get())
}

/// Time when the link would be free for another packet that is sent at `now`, nanoseconds of the monotonic clock.
#[must_use]
#[inline(always)]
pub fn free_at(load: &Load, now: u64) -> u64 {
    now + queued_ns(load, now)
}

/// The level at `now`, nanoseconds.
#[must_use]
#[inline(always)]
pub fn level(load: &Load, now: u64) -> u64 {
    decayed(load.level_ns.get(), positive(now.wrapping_sub(load.stamp_ns.get())))
}

/// `x`, or 0 if the difference `x` is negative. Like everything that is computed for each link, it has no branch: the
/// verifier would follow each branch for each link.
#[inline(always)]
fn positive(x: u64) -> u64 {
    x & !(x.cast_signed() >> 63).cast_unsigned()
}

/// The smaller of two numbers below 2^63.
#[inline(always)]
fn at_most(x: u64, most: u64) -> u64 {
    most - positive(most.wrapping_sub(x))
}

#[inline(always)]
fn decayed(level: u64, elapsed: u64) -> u64 {
    // Levels are below 2^63.
    let level = level >> at_most(elapsed >> HALF_LIFE_BITS, 63);
    // Within a half-life the factor is 1 - 0.6931 x + 0.1931 x^2. It is off by less than 1%. Its slope is right where x
    // is small, so that many short steps decay like one long step.
    let steps = elapsed >> STEP_BITS & 0xff;
    let factor = (1 << 16) - ((45_426 * steps) >> 8) + ((12_658 * steps * steps) >> 16);
    (level >> 16) * factor + (((level & 0xffff) * factor) >> 16)
}

/// Charges the link with `bytes` that are put onto it at `now`, or were put onto it then, and with `expected` bytes
/// that a new flow is expected to send soon. Without the latter, flows that start together would all find the same link
/// the least loaded, because they have sent nothing yet.
#[inline(always)]
pub fn charge(load: &Load, now: u64, bytes: u32, expected: u32) {
    load.free_ns.set(free_at(load, now) + time_of(load, bytes));
    raise(load, now, weighted_time_of(load, bytes) + weighted_time_of(load, expected));
}

#[inline(always)]
fn raise(load: &Load, now: u64, time: u64) {
    let (level, stamp) = (load.level_ns.get(), load.stamp_ns.get());
    let elapsed = now.saturating_sub(stamp);
    if elapsed >> STEP_BITS == 0 {
        load.level_ns.set(level + decayed(time, stamp.saturating_sub(now)));
    } else {
        load.level_ns.set(decayed(level, elapsed) + time);
        // The rest of the last step counts at the next update.
        load.stamp_ns.set(now - (elapsed & ((1 << STEP_BITS) - 1)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn link(bits_per_second: u64) -> Load {
        let load = Load::default();
        load.cost.set(cost_of_rate(bits_per_second));
        load.weighted_cost.set(load.cost.get());
        load
    }

    #[test]
    fn costs_and_rates_are_each_others_inverse() {
        for rate in [1_000_000, 10_000_000, 1_000_000_000, 100_000_000_000] {
            let back = rate_of_cost(cost_of_rate(rate));
            assert!(back.abs_diff(rate) <= rate / 80, "{rate}: {back}");
        }
        assert_eq!((cost_of_rate(u64::MAX), cost_of_rate(0), cost_of_rate(1)), (1, u32::MAX, u32::MAX));
    }

    #[test]
    fn a_queue_grows_by_what_is_sent_and_drains_with_time() {
        let load = link(8_000_000);
        charge(&load, 100 * MS, 1000, 0);
        charge(&load, 100 * MS, 1000, 0);
        assert_eq!(free_at(&load, 100 * MS), 102 * MS);
        assert_eq!(free_at(&load, 101 * MS), 102 * MS);
        assert_eq!(free_at(&load, 200 * MS), 200 * MS);
        load.free_ns.set(u64::MAX >> 1);
        assert_eq!(free_at(&load, 200 * MS), 200 * MS + MAX_QUEUE_NS);
    }

    #[test]
    fn what_a_full_queue_drops_does_not_wait() {
        let load = link(8_000_000);
        set_room(&load, Some(50 * MS));
        for _ in 0..100 {
            charge(&load, 100 * MS, 1000, 0);
        }
        assert_eq!(queued_ns(&load, 100 * MS), 50 * MS);
        // The link sends on, and has room again.
        charge(&load, 110 * MS, 1000, 0);
        assert!(queued_ns(&load, 110 * MS) <= 50 * MS && queued_ns(&load, 130 * MS) >= 20 * MS);
        for room in [None, Some(u64::MAX)] {
            set_room(&load, room);
            load.free_ns.set(u64::MAX >> 1);
            assert_eq!(queued_ns(&load, 200 * MS), MAX_QUEUE_NS);
        }
    }

    #[test]
    fn the_level_halves() {
        let load = link(8_000_000);
        charge(&load, 0, 1_000_000, 0);
        let start = level(&load, 0);
        assert_eq!(start, 1_000 * MS);
        for halvings in 1..20 {
            assert_eq!(level(&load, halvings * HALF_LIFE_NS), start >> halvings);
        }
        assert_eq!(level(&load, 64 * HALF_LIFE_NS), 0);
        assert_eq!(level(&load, u64::MAX >> 1), 0);
        let mut last = start;
        for elapsed in (0..10 * HALF_LIFE_NS).step_by(300_000) {
            let exact = start as f64 * (-(elapsed as f64) / HALF_LIFE_NS as f64).exp2();
            let found = level(&load, elapsed);
            assert!(found <= last && (0.99..1.005).contains(&(found as f64 / exact)), "{elapsed}: {found} {exact}");
            last = found;
        }
    }

    #[test]
    fn a_late_report_counts_as_if_it_had_come_in_time() {
        let (in_time, late) = (link(8_000_000), link(8_000_000));
        charge(&in_time, 100 * MS, 10_000, 0);
        charge(&in_time, 150 * MS, 1_000, 0);
        charge(&late, 150 * MS, 1_000, 0);
        charge(&late, 100 * MS, 10_000, 0);
        let (in_time, late) = (level(&in_time, 150 * MS), level(&late, 150 * MS));
        assert!(late.abs_diff(in_time) < in_time / 100, "{late} {in_time}");
        // Another CPU has charged the link meanwhile: bytes that were sent long ago count as if they still waited.
        let gone = link(8_000_000);
        charge(&gone, 150 * MS, 1_000, 0);
        charge(&gone, 100 * MS, 1_000, 0);
        assert_eq!(free_at(&gone, 150 * MS), 152 * MS);
    }

    #[test]
    fn a_steady_stream_has_a_steady_level_whatever_the_packet_spacing() {
        // At a rate r the level tends to r * half-life / ln 2.
        for spacing in [10_000, 120_000, 1_200_000, 5_000_000] {
            let load = link(8_000_000_000);
            let mut now = MS;
            for _ in 0..(3_000 * MS / spacing) {
                charge(&load, now, u32::try_from(spacing / 10).unwrap(), 0);
                now += spacing;
            }
            let expected = HALF_LIFE_NS as f64 / core::f64::consts::LN_2 / 10.0;
            let found = level(&load, now) as f64;
            assert!((0.94..1.08).contains(&(found / expected)), "{spacing}: {found} {expected}");
        }
    }
}
