//! The parts of the decision that are separate functions in the program.
//!
//! They are global functions, so that the verifier checks each of them once and not on every path that leads there.

use ecmpvpn_common::flow::FlowKey;
use ecmpvpn_common::layout::TunnelId;
use ecmpvpn_common::rendezvous::NONE;
use ecmpvpn_common::tables::Calls;
use ecmpvpn_common::{account, decide, order, rules, select};

use crate::maps::Maps;

impl Calls for Maps<'_> {
    #[inline(always)]
    fn first_rule(&self, key: &FlowKey, marks: u64, candidates: u64) -> u32 {
        ecmpvpn_first_rule(key, marks, candidates)
    }

    #[inline(always)]
    fn choose(&self, peer: u32, hash: u64, rule: u32, size: u64, now: u64) -> u64 {
        ecmpvpn_choose(peer, hash, rule, size, if self.now == 0 { now } else { self.now })
    }

    #[inline(always)]
    fn best(&self, peer: u32, bucket: u32, candidates: u32) -> u32 {
        ecmpvpn_best(peer, bucket, candidates)
    }

    #[inline(always)]
    fn charge_link(&self, id: TunnelId, now: u64, before: u64, bytes: u32, expected: u32) -> u32 {
        ecmpvpn_charge_link(id.number(), now, before, bytes, expected)
    }

    #[inline(always)]
    fn cheapest_link(&self, peer: u32, bucket: u32, candidates: u32, now: u64, bytes: u32) -> u64 {
        ecmpvpn_cheapest_link(peer, bucket, candidates, now, bytes)
    }

    #[inline(always)]
    fn pick_bit(&self, slots: u32, bucket: u32) -> u32 {
        ecmpvpn_pick_bit(slots, bucket)
    }

    #[inline(always)]
    fn least_loaded(&self, peer: u32, bucket: u32, candidates: u32, now: u64, current: u32) -> u32 {
        ecmpvpn_least_loaded(peer, bucket, candidates, now, current)
    }

    #[inline(always)]
    fn earliest_delivery(&self, peer: u32, bucket: u32, candidates: u32, now: u64, bytes: u32) -> u64 {
        ecmpvpn_earliest_delivery(peer, bucket, candidates, now, bytes)
    }

    #[inline(always)]
    fn stamp(&self, bucket: u32, former: TunnelId, now: u64, delivery: u64, packets: u32) -> u32 {
        ecmpvpn_stamp(bucket, former.number(), now, delivery, packets)
    }
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn ecmpvpn_choose(peer: u32, hash: u64, rule: u32, size: u64, now: u64) -> u64 {
    Maps::at(now).map_or(decide::BAD_STATE, |maps| decide::choose(&maps, peer, hash, rule, size))
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn ecmpvpn_first_rule(key: *const FlowKey, marks: u64, candidates: u64) -> u32 {
    // SAFETY: the only caller passes a reference. The verifier assumes that the pointer may be null until it is
    // checked.
    match unsafe { key.as_ref() } {
        Some(key) => Maps::at(0).map_or(rules::NONE, |maps| rules::first(&maps, key, marks, candidates)),
        None => rules::NONE,
    }
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn ecmpvpn_best(peer: u32, bucket: u32, candidates: u32) -> u32 {
    Maps::at(0).map_or(NONE, |maps| select::best(&maps, peer, bucket, candidates))
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn ecmpvpn_charge_link(id: u32, now: u64, before: u64, bytes: u32, expected: u32) -> u32 {
    Maps::at(now).map_or(0, |maps| account::charge_link(&maps, TunnelId::from_number(id), now, before, bytes, expected))
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn ecmpvpn_cheapest_link(peer: u32, bucket: u32, candidates: u32, now: u64, bytes: u32) -> u64 {
    Maps::at(now).map_or(select::NO_RANK, |maps| select::cheapest_link(&maps, peer, bucket, candidates, now, bytes))
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn ecmpvpn_pick_bit(slots: u32, bucket: u32) -> u32 {
    select::pick_bit(slots, bucket)
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn ecmpvpn_least_loaded(peer: u32, bucket: u32, candidates: u32, now: u64, current: u32) -> u32 {
    Maps::at(now).map_or(NONE, |maps| select::least_loaded(&maps, peer, bucket, candidates, now, current))
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn ecmpvpn_earliest_delivery(peer: u32, bucket: u32, candidates: u32, now: u64, bytes: u32) -> u64 {
    Maps::at(now).map_or(NONE.into(), |maps| select::earliest_delivery(&maps, peer, bucket, candidates, now, bytes))
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn ecmpvpn_stamp(bucket: u32, former: u32, now: u64, delivery: u64, packets: u32) -> u32 {
    let former = TunnelId::from_number(former);
    Maps::at(now).map_or(0, |maps| order::stamp(&maps, bucket, former, now, delivery, packets))
}
