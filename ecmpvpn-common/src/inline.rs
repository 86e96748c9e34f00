//! The host does not need separate functions: it calls each part of the decision directly.

use crate::flow::FlowKey;
use crate::layout::TunnelId;
use crate::tables::{Calls, Tables};
use crate::{account, decide, order, rules, select};

/// Tables of the host implement this trait to get [`Calls`].
pub trait Inline: Tables {}

impl<T: Inline + ?Sized> Calls for T {
    fn first_rule(&self, key: &FlowKey, marks: u64, candidates: u64) -> u32 {
        rules::first(self, key, marks, candidates)
    }

    fn choose(&self, peer: u32, hash: u64, rule: u32, size: u64, _now: u64) -> u64 {
        decide::choose(self, peer, hash, rule, size)
    }

    fn best(&self, peer: u32, bucket: u32, candidates: u32) -> u32 {
        select::best(self, peer, bucket, candidates)
    }

    fn charge_link(&self, id: TunnelId, now: u64, before: u64, bytes: u32, expected: u32) -> u32 {
        account::charge_link(self, id, now, before, bytes, expected)
    }

    fn cheapest_link(&self, peer: u32, bucket: u32, candidates: u32, now: u64, bytes: u32) -> u64 {
        select::cheapest_link(self, peer, bucket, candidates, now, bytes)
    }

    fn pick_bit(&self, slots: u32, bucket: u32) -> u32 {
        select::pick_bit(slots, bucket)
    }

    fn least_loaded(&self, peer: u32, bucket: u32, candidates: u32, now: u64, current: u32) -> u32 {
        select::least_loaded(self, peer, bucket, candidates, now, current)
    }

    fn earliest_delivery(&self, peer: u32, bucket: u32, candidates: u32, now: u64, bytes: u32) -> u64 {
        select::earliest_delivery(self, peer, bucket, candidates, now, bytes)
    }

    fn stamp(&self, bucket: u32, former: TunnelId, now: u64, delivery: u64, packets: u32) -> u32 {
        order::stamp(self, bucket, former, now, delivery, packets)
    }
}
