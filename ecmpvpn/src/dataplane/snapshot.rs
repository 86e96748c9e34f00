//! A copy of the maps for the decision. A decision on the copy changes nothing in the maps.

use std::cell::OnceCell;

use aya::maps::lpm_trie::LpmTrie;
use aya::maps::{Map, MapData};
use ecmpvpn_common::inline::Inline;
use ecmpvpn_common::layout::{
    Address, Bucket, Load, MAX_PEERS, MAX_TUNNELS_PER_PEER, Path, Peer, Rule, RuleSet, Settings, Tunnel,
    TunnelCounters, TunnelId, maps,
};
use ecmpvpn_common::tables::Tables;

use super::clock::monotonic_ns;
use super::rules::full_key;
use super::{DataplaneError, Pins, RuleMaps, View};

/// A copy of a site's maps at one moment. Of the buckets it has only the one that was looked up.
pub struct Snapshot<'a> {
    now: u64,
    settings: Settings,
    prefixes: LpmTrie<MapData, Address, u32>,
    peers: Vec<Peer>,
    tunnels: Vec<Tunnel>,
    loads: Vec<Load>,
    paths: Vec<Path>,
    bucket: OnceCell<(u32, Bucket)>,
    view: &'a View,
    rules: &'a RuleMaps,
}

impl<'a> Snapshot<'a> {
    /// Copies the present contents of the maps.
    ///
    /// # Errors
    /// A map cannot be read.
    pub fn take(pins: &Pins, view: &'a View, rules: &'a RuleMaps) -> Result<Self, DataplaneError> {
        let prefixes = Map::LpmTrie(pins.map(maps::PREFIXES)?)
            .try_into()
            .map_err(|error| DataplaneError::new("looking at map PREFIXES", error))?;
        let peers: Vec<Peer> = (0..).map_while(|peer| view.peer(peer)).cloned().collect();
        let slots = peers.len() * MAX_TUNNELS_PER_PEER as usize;
        let mut tunnels = vec![Tunnel::default(); slots];
        for (id, tunnel) in view.tunnel_records() {
            tunnels[id.index()] = tunnel;
        }
        let numbers = || (0..).take(peers.len());
        Ok(Self {
            now: monotonic_ns(),
            settings: view.settings(),
            prefixes,
            loads: numbers()
                .flat_map(|peer| (0..MAX_TUNNELS_PER_PEER).map(move |slot| TunnelId::new(peer, slot)))
                .map(|id| view.load(id).cloned().unwrap_or_default())
                .collect(),
            paths: numbers().flat_map(|peer| view.paths(peer)).cloned().collect(),
            peers,
            tunnels,
            bucket: OnceCell::new(),
            view,
            rules,
        })
    }

    /// Marks a tunnel as down, only in this copy.
    pub fn mark_down(&self, id: TunnelId) {
        if let Some(peer) = self.peers.get(id.peer() as usize) {
            peer.live.set_bits(1 << id.slot(), false);
        }
    }

    /// Time when the copy was taken, nanoseconds of the monotonic clock.
    pub fn now_ns(&self) -> u64 {
        self.now
    }
}

impl Inline for Snapshot<'_> {}

impl Tables for Snapshot<'_> {
    fn now(&self) -> u64 {
        self.now
    }

    fn settings(&self) -> Option<&Settings> {
        Some(&self.settings)
    }

    fn peer_of(&self, destination: &Address) -> Option<u32> {
        self.prefixes.get(&full_key(destination), 0).ok()
    }

    fn peer(&self, peer: u32) -> Option<&Peer> {
        self.peers.get(peer as usize)
    }

    fn tunnel(&self, id: TunnelId) -> Option<&Tunnel> {
        self.tunnels.get(id.index())
    }

    fn bucket(&self, index: u32) -> Option<&Bucket> {
        let bucket = self.view.bucket_record(index)?;
        let (known, copy) = self.bucket.get_or_init(|| (index, bucket.clone()));
        (*known == index).then_some(copy)
    }

    fn load(&self, id: TunnelId) -> Option<&Load> {
        self.loads.get(id.index())
    }

    fn update_counters<R>(&self, _: TunnelId, change: impl FnOnce(&mut TunnelCounters) -> R) -> Option<R> {
        // Nothing is sent, so nothing is counted.
        Some(change(&mut TunnelCounters::default()))
    }

    fn path(&self, peer: u32, place: u32) -> Option<&Path> {
        self.paths.get(TunnelId::new(peer, place).index())
    }

    fn rule(&self, rule: u32) -> Option<&Rule> {
        self.rules.record(rule)
    }

    fn rule_field(&self, at: u32) -> Option<&RuleSet> {
        self.rules.field(at)
    }

    fn rules_of_mark(&self, mark: u32) -> Option<u64> {
        self.rules.of_mark(mark)
    }

    fn rules_of_source(&self, source: &Address) -> u64 {
        self.rules.of_source(source)
    }

    fn rules_of_destination(&self, destination: &Address) -> u64 {
        self.rules.of_destination(destination)
    }

    fn rule_tunnels(&self, rule: u32, peer: u32) -> u32 {
        self.rules.tunnels(rule * MAX_PEERS + peer)
    }
}
