//! What the decision reads and writes, and the parts of it that are separate functions in BPF.

use crate::flow::FlowKey;
use crate::layout::{Address, Bucket, Load, Path, Peer, Rule, RuleSet, Settings, Tunnel, TunnelCounters, TunnelId};

/// What the decision looks up. A look-up returns `None` if there is no such entry.
pub trait Tables {
    /// The monotonic clock, nanoseconds.
    fn now(&self) -> u64;
    /// The monotonic clock, up to `tick_ns` too early or too late, nanoseconds. `None` if only the exact clock is
    /// known.
    #[inline(always)]
    fn coarse_now(&self, tick_ns: u32) -> Option<u64> {
        let now = self.now();
        Some(now - now % u64::from(if tick_ns == 0 { 1 } else { tick_ns }))
    }
    fn settings(&self) -> Option<&Settings>;
    /// Number of the peer with the longest matching prefix.
    fn peer_of(&self, destination: &Address) -> Option<u32>;
    /// The same, if the cache of recent destinations has it. The cache has no destination that never leaves the link.
    #[inline(always)]
    fn cached_peer_of(&self, destination: &Address, _: &Settings) -> Option<u32> {
        self.peer_of(destination)
    }
    fn peer(&self, peer: u32) -> Option<&Peer>;
    fn tunnel(&self, id: TunnelId) -> Option<&Tunnel>;
    /// `index` counts over all peers' buckets.
    fn bucket(&self, index: u32) -> Option<&Bucket>;
    /// The tunnel's own record. [`Load::link`] names the record that is used for it.
    fn load(&self, id: TunnelId) -> Option<&Load>;
    /// Applies `change` to this CPU's counters of a tunnel.
    fn update_counters<R>(&self, id: TunnelId, change: impl FnOnce(&mut TunnelCounters) -> R) -> Option<R>;
    /// `place` counts the peer's links.
    fn path(&self, peer: u32, place: u32) -> Option<&Path>;
    fn rule(&self, rule: u32) -> Option<&Rule>;
    /// The rules that a field's value matches; `at` is an index of [`crate::layout::rule_fields`].
    fn rule_field(&self, at: u32) -> Option<&RuleSet>;
    /// The rules that a firewall mark matches, one bit per rule; `None` if no rule names the mark.
    fn rules_of_mark(&self, mark: u32) -> Option<u64>;
    /// The rules that a source address matches, one bit per rule.
    fn rules_of_source(&self, source: &Address) -> u64;
    /// The rules that a destination address matches, one bit per rule.
    fn rules_of_destination(&self, destination: &Address) -> u64;
    /// The tunnels of a peer that a rule allows, one bit per slot.
    fn rule_tunnels(&self, rule: u32, peer: u32) -> u32;
}

/// The parts of the decision that are separate functions in BPF, so that the verifier checks each of them once and not
/// on every path that leads there. The host calls them directly ([`crate::inline`]).
pub trait Calls: Tables {
    /// See [`crate::rules::first`].
    fn first_rule(&self, key: &FlowKey, marks: u64, candidates: u64) -> u32;

    /// See [`crate::decide::choose`]. `now` is the reading of the exact clock, or 0 if it was not read.
    fn choose(&self, peer: u32, hash: u64, rule: u32, size: u64, now: u64) -> u64;

    /// See [`crate::select::best`].
    fn best(&self, peer: u32, bucket: u32, candidates: u32) -> u32;

    /// See [`crate::account::charge_link`].
    fn charge_link(&self, id: TunnelId, now: u64, before: u64, bytes: u32, expected: u32) -> u32;

    /// See [`crate::select::cheapest_link`].
    fn cheapest_link(&self, peer: u32, bucket: u32, candidates: u32, now: u64, bytes: u32) -> u64;

    /// See [`crate::select::pick_bit`].
    fn pick_bit(&self, slots: u32, bucket: u32) -> u32;

    /// See [`crate::select::least_loaded`].
    fn least_loaded(&self, peer: u32, bucket: u32, candidates: u32, now: u64, current: u32) -> u32;

    /// See [`crate::select::earliest_delivery`].
    fn earliest_delivery(&self, peer: u32, bucket: u32, candidates: u32, now: u64, bytes: u32) -> u64;

    /// See [`crate::order::stamp`].
    fn stamp(&self, bucket: u32, former: TunnelId, now: u64, delivery: u64, packets: u32) -> u32;
}
