//! Selects the tunnel among those that may take a packet: by rank in the bucket, by load, or by delivery time.

use crate::layout::{Path, Tunnel, TunnelId};
use crate::load;
use crate::rendezvous::{self, NONE};
use crate::tables::{Calls, Tables};

/// The slot that ranks first in a peer's bucket among `candidates`, or [`NONE`]. In BPF this is a separate function,
/// which the verifier checks only once.
#[inline(always)]
pub fn best<T: Tables + ?Sized>(tables: &T, peer: u32, bucket: u32, candidates: u32) -> u32 {
    rendezvous::pick(bucket, candidates, |slot| tables.tunnel(TunnelId::new(peer, slot)).map(Tunnel::candidate))
}

/// The slot among `candidates` whose link has the lowest level plus [`Load::loss_ns`]. The `current` slot is kept, unless
/// its link's sum is higher by more than a new flow is expected to add: nothing moves without a gain. Between equal links
/// the first wins, in an order that differs from bucket to bucket.
#[inline(always)]
pub fn least_loaded<T: Calls + ?Sized>(
    tables: &T,
    peer: u32,
    bucket: u32,
    candidates: u32,
    now: u64,
    current: u32,
) -> u32 {
    let first = tables.cheapest_link(peer, bucket, candidates, now, 0);
    if candidates.checked_shr(current).unwrap_or(0) & 1 == 1
        && let Some(record) = tables.peer(peer)
        && let Some(load) = tables.load(TunnelId::new(peer, current)).and_then(|load| tables.load(load.link()))
    {
        let margin = load::weighted_time_of(load, record.expected_bytes.get());
        let cost = load::level(load, now) + u64::from(load.loss_ns.get());
        if cost <= (first >> PLACE_BITS).saturating_add(margin) {
            return current;
        }
    }
    slot_of(tables, peer, bucket, candidates, first)
}

/// The slot among `candidates` that would deliver `bytes` first ("earliest delivery path first"), by the modelled
/// queue, rate and delay of each link, among links that lose packets only if it gains [`Load::loss_ns`] at least: in
/// the lowest 8 bits, all ones for none. Above them, how long the delivery takes
/// beyond what the fastest tunnel takes when nothing waits, nanoseconds. Source: Chebrolu, Rao, "Communication using multiple wireless interfaces", WCNC
/// 2002.
///
/// Where rates are overestimated, all queues look empty. Then the lower level decides, which distributes the bytes
/// evenly.
#[inline(always)]
pub fn earliest_delivery<T: Calls + ?Sized>(
    tables: &T,
    peer: u32,
    bucket: u32,
    candidates: u32,
    now: u64,
    bytes: u32,
) -> u64 {
    let first = tables.cheapest_link(peer, bucket, candidates, now, bytes);
    let slot = slot_of(tables, peer, bucket, candidates, first);
    let link = tables.load(TunnelId::new(peer, slot & (u32::BITS - 1))).and_then(|load| tables.load(load.link()));
    // A packet is not later because it may be lost.
    let loss = link.map_or(0, |load| u64::from(load.loss_ns.get()));
    (first >> PLACE_BITS).saturating_sub(loss) << SLOT_BITS | u64::from(slot & SLOT_MASK)
}

/// Bits of the slot in the result of [`earliest_delivery`].
pub const SLOT_BITS: u32 = 8;
pub const SLOT_MASK: u32 = (1 << SLOT_BITS) - 1;

/// How long the delivery of `bytes` by a tunnel's link would take beyond what the fastest tunnel takes when nothing
/// waits, nanoseconds.
#[inline(always)]
pub fn delivery<T: Tables + ?Sized>(tables: &T, id: TunnelId, now: u64, bytes: u32) -> u64 {
    let load = tables.load(id).and_then(|load| tables.load(load.link()));
    load.map_or(0, |load| load::delivery_ns(load, now, bytes))
}

/// The lowest rank among a peer's links. A rank is the cost from [`rank`], with the link's place in the low bits.
/// Places are counted from a link that differs from bucket to bucket. No comparison branches, because the verifier
/// would follow each branch in each iteration.
#[inline(always)]
pub fn cheapest_link<T: Tables + ?Sized>(
    tables: &T,
    peer: u32,
    bucket: u32,
    candidates: u32,
    now: u64,
    bytes: u32,
) -> u64 {
    let count = tables.peer(peer).map_or(0, |peer| peer.path_count.get());
    let start = spread(bucket, count);
    let mut first = NO_RANK;
    for i in 0..u32::BITS {
        if i >= count {
            break;
        }
        let place = u64::from(i.wrapping_sub(start) & PLACE_MASK);
        let ranked = rank(tables, tables.path(peer, i), candidates, now, bytes) | place;
        // Both are below 2^63: the sign of the difference shows which is lower.
        let difference = ranked.wrapping_sub(first);
        first = first.wrapping_add(difference & (difference.cast_signed() >> 63).cast_unsigned());
    }
    first
}

const PLACE_BITS: u32 = 5;
const PLACE_MASK: u32 = (1 << PLACE_BITS) - 1;
/// Higher than every rank.
pub const NO_RANK: u64 = u64::MAX >> 1;

/// The cost of a link, times 2^[`PLACE_BITS`]. Without `bytes` it is the link's level, otherwise the time when the link
/// would deliver them, nanoseconds from `now`; and in both cases what it costs that packets are lost there. If none of `candidates` leaves by the link, it is [`NO_RANK`] without
/// the bits of the place.
#[inline(always)]
fn rank<T: Tables + ?Sized>(tables: &T, path: Option<&Path>, candidates: u32, now: u64, bytes: u32) -> u64 {
    const NONE: u64 = NO_RANK & !(PLACE_MASK as u64);
    let Some(path) = path else { return NONE };
    let Some(load) = tables.load(path.link()) else { return NONE };
    let level = load::level(load, now);
    let mut cost = level;
    if bytes != 0 {
        cost = load::delivery_ns(load, now, bytes) + (level >> LEVEL_SHARE_BITS);
    }
    cost += u64::from(load.loss_ns.get());
    let leaving = u64::from(path.tunnels.get() & candidates);
    // All ones if no candidate leaves by the link.
    let none = ((leaving | leaving.wrapping_neg()) >> 63).wrapping_sub(1);
    (cost | none) << (PLACE_BITS + 1) >> 1
}

/// Shift that gives the level's share of the cost when delivery counts: enough to decide between equal links, too
/// little to outweigh a queued packet.
const LEVEL_SHARE_BITS: u32 = 12;

/// A slot of the link that a rank belongs to.
#[inline(always)]
fn slot_of<T: Calls + ?Sized>(tables: &T, peer: u32, bucket: u32, candidates: u32, rank: u64) -> u32 {
    let count = tables.peer(peer).map_or(0, |peer| peer.path_count.get());
    let place = (rank as u32).wrapping_add(spread(bucket, count)) & PLACE_MASK;
    tables.path(peer, place).map_or(NONE, |path| tables.pick_bit(path.tunnels.get() & candidates, bucket))
}

/// A number below `count` that differs from bucket to bucket.
#[inline(always)]
fn spread(bucket: u32, count: u32) -> u32 {
    let scattered = bucket.wrapping_mul(0x9e37_79b1);
    ((u64::from(scattered) * u64::from(count)) >> 32) as u32
}

/// The number of one of the set bits, another one from bucket to bucket; [`NONE`] if no bit is set. It does not loop
/// over the bits: kernels before 6.4 would check each end of such a loop separately.
#[inline(always)]
pub fn pick_bit(slots: u32, bucket: u32) -> u32 {
    if slots == 0 {
        return NONE;
    }
    // How many set bits are below the desired one. A half that does not hold more than that is skipped.
    let mut skipped = spread(bucket ^ 0x5555, slots.count_ones());
    let (mut rest, mut at) = (slots, 0);
    let mut width = u32::BITS / 2;
    while width > 0 {
        let held = (rest & ((1 << width) - 1)).count_ones();
        let beyond = held.wrapping_sub(skipped + 1) >> 31;
        skipped -= held * beyond;
        rest >>= width * beyond;
        at += width * beyond;
        width /= 2;
    }
    at & (u32::BITS - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_set_bit_is_chosen_alike_and_no_other() {
        for slots in [1u32, 0b11, 0b1010_0001, 0x8000_0000, 0x8000_0001, u32::MAX, 0x00ff_0f00] {
            let mut chosen = [0u32; 32];
            for bucket in 0..65_536 {
                chosen[pick_bit(slots, bucket) as usize] += 1;
            }
            let share = 65_536 / slots.count_ones();
            for (bit, count) in (0..).zip(chosen) {
                let desired = if slots >> bit & 1 == 1 { share } else { 0 };
                assert!(
                    count.abs_diff(desired) <= desired / 50 + 2,
                    "{slots:#x}: bit {bit} {count} times, not {desired}"
                );
            }
        }
        assert_eq!(pick_bit(0, 7), NONE);
    }
}
