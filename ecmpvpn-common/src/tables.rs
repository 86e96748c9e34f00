//! What the decision reads and writes, and the parts of it that BPF calls as functions of their own.

use crate::flow::FlowKey;
use crate::layout::{Address, Bucket, Load, Path, Peer, Rule, RuleSet, Settings, Tunnel, TunnelCounters};

/// What the decision looks up. `None` where there is no such entry.
pub trait Tables {
    /// The monotonic clock, nanoseconds.
    fn now(&self) -> u64;
    /// What the monotonic clock is, up to `tick_ns` too early or too late, nanoseconds; if that is cheaper to know.
    #[inline(always)]
    fn ticked(&self, tick_ns: u32) -> Option<u64> {
        let now = self.now();
        Some(now - now % u64::from(if tick_ns == 0 { 1 } else { tick_ns }))
    }
    /// What holds for all peers.
    fn settings(&self) -> Option<&Settings>;
    /// The peer whose prefix matches longest.
    fn peer_of(&self, destination: &Address) -> Option<u32>;
    /// The same, if the cache of recent destinations has it. No destination in the cache is on the local link.
    #[inline(always)]
    fn cached_peer_of(&self, destination: &Address, _: &Settings) -> Option<u32> {
        self.peer_of(destination)
    }
    /// A peer by its number.
    fn peer(&self, peer: u32) -> Option<&Peer>;
    /// A tunnel by its id.
    fn tunnel(&self, id: u32) -> Option<&Tunnel>;
    /// A bucket by its place among all peers' buckets.
    fn bucket(&self, index: u32) -> Option<&Bucket>;
    /// A tunnel's load by its id.
    fn load(&self, id: u32) -> Option<&Load>;
    /// Applies `change` to this CPU's counts of a tunnel, by its id.
    fn counted<R>(&self, id: u32, change: impl FnOnce(&mut TunnelCounters) -> R) -> Option<R>;
    /// A link by its place among all peers' links.
    fn path(&self, index: u32) -> Option<&Path>;
    /// A rule by its number.
    fn rule(&self, rule: u32) -> Option<&Rule>;
    /// The rules that a field's value meets, by [`crate::layout::rule_fields`].
    fn rule_field(&self, at: u32) -> Option<&RuleSet>;
    /// The rules that a firewall mark meets; `None` if none names it.
    fn rules_of_mark(&self, mark: u32) -> Option<u64>;
    /// The rules that a source address meets.
    fn rules_of_source(&self, source: &Address) -> u64;
    /// The rules that a destination address meets.
    fn rules_of_destination(&self, destination: &Address) -> u64;
    /// The tunnels of a peer that a rule allows, a bit a slot.
    fn rule_tunnels(&self, rule: u32, peer: u32) -> u32;
}

/// The parts of the decision that BPF makes functions of, so that the verifier looks at each of them once and not on every
/// path that leads there. The host has them in place ([`crate::inline`]).
pub trait Calls: Tables {
    /// See [`crate::rules::first`].
    fn first_rule(&self, key: &FlowKey, marks: u64, candidates: u64) -> u32;

    /// See [`crate::decide::choose`]. `now` is the exact clock's reading, if it was read, or 0.
    fn choose(&self, peer: u32, hash: u64, rule: u32, size: u64, now: u64) -> u64;

    /// See [`crate::select::best`].
    fn best(&self, peer: u32, bucket: u32, candidates: u32) -> u32;

    /// See [`crate::account::charge_link`].
    fn charge_link(&self, id: u32, now: u64, before: u64, bytes: u32, expected: u32) -> u32;

    /// See [`crate::select::cheapest_link`].
    fn cheapest_link(&self, peer: u32, bucket: u32, candidates: u32, now: u64, bytes: u32) -> u64;

    /// See [`crate::select::pick_bit`].
    fn pick_bit(&self, slots: u32, bucket: u32) -> u32;

    /// See [`crate::select::least_loaded`].
    fn least_loaded(&self, peer: u32, bucket: u32, candidates: u32, now: u64, current: u32) -> u32;

    /// See [`crate::select::earliest_delivery`].
    fn earliest_delivery(&self, peer: u32, bucket: u32, candidates: u32, now: u64, bytes: u32) -> u32;
}
