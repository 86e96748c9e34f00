//! A model of the maps on the host, on which the decision runs. It is filled without the program's own code.

use std::cell::{Cell, RefCell};
use std::net::IpAddr;

use ecmpvpn::dataplane::tick_ns;
use ecmpvpn::plan::SteeringTable;
use ecmpvpn::plan::rules::{Placed, RuleTables, TunnelNames};
use ecmpvpn_common::decide::{Steer, Verdict, decide};
use ecmpvpn_common::inline::Inline;
use ecmpvpn_common::layout::{
    Address, BUCKETS_PER_PEER, Bucket, Load, MAX_PEERS, Path, Peer, Policy, Rule, RuleSet, Settings, Tunnel,
    TunnelCounters, TunnelId, settings_flags,
};
use ecmpvpn_common::load::cost_of_rate;
use ecmpvpn_common::packet::Packet;
use ecmpvpn_common::rendezvous::{home, inverse_weight, key_of};
use ecmpvpn_common::shared::Shared;
use ecmpvpn_common::tables::Tables;
use ipnet::IpNet;

use super::rig::{Outcome, ifindexes};

pub struct Model {
    settings: Settings,
    prefixes: Vec<(IpNet, u32)>,
    peers: Vec<Peer>,
    tunnels: Vec<Tunnel>,
    buckets: Vec<Bucket>,
    loads: Vec<Load>,
    counters: RefCell<Vec<TunnelCounters>>,
    paths: Vec<Path>,
    rules: Vec<Rule>,
    rule_fields: Vec<RuleSet>,
    rule_tables: RuleTables,
    pub now: Cell<u64>,
}

impl Model {
    pub fn new(table: &SteeringTable, hash_fields: u32, symmetric: bool) -> Self {
        let ifindexes = ifindexes(table);
        let flags = if symmetric { settings_flags::SYMMETRIC } else { 0 };
        let mut model = Self {
            settings: Settings { seed: table.seed, hash_fields, flags, tick_ns: tick_ns(), ..Settings::default() },
            prefixes: Vec::new(),
            peers: Vec::new(),
            tunnels: vec![Tunnel::default(); 32 * table.peers.len()],
            buckets: Vec::new(),
            counters: RefCell::new(vec![TunnelCounters::default(); 32 * table.peers.len()]),
            loads: (0..32 * table.peers.len()).map(|_| Load::default()).collect(),
            paths: (0..32 * table.peers.len()).map(|_| Path::default()).collect(),
            rules: Vec::new(),
            rule_fields: Vec::new(),
            rule_tables: RuleTables::empty(table.peers.len()),
            now: Cell::new(0),
        };
        for (number, peer) in (0..).zip(&table.peers) {
            model.prefixes.extend(peer.prefixes.iter().map(|prefix| (*prefix, number)));
            for (slot, (name, weight)) in (0..).zip(&peer.tunnels) {
                model.tunnels[TunnelId::new(number, slot).index()] = Tunnel {
                    key: key_of(name.as_str().as_bytes()),
                    ifindex: ifindexes[name],
                    inverse_weight: inverse_weight(weight.unwrap_or(1)),
                    ..Tunnel::default()
                };
                let id = TunnelId::new(number, slot);
                model.loads[id.index()].link.set(id.number());
                model.loads[id.index()].cost.set(cost_of_rate(1_000_000_000));
                model.loads[id.index()].weighted_cost.set(cost_of_rate(1_000_000_000));
                model.paths[id.index()].link.set(id.number());
                model.paths[id.index()].tunnels.set(1 << slot);
            }
            let count = u32::try_from(peer.tunnels.len()).expect("a few");
            let live = (1 << count) - 1;
            for within in 0..BUCKETS_PER_PEER {
                let first = TunnelId::new(number, 0).index();
                let candidates = model.tunnels[first..][..peer.tunnels.len()].iter().map(Tunnel::candidate);
                let home = u8::try_from(home(within, &candidates.collect::<Vec<_>>())).expect("a slot");
                model.buckets.push(Bucket { home: Shared::new(home), tunnel: Shared::new(home), ..Bucket::default() });
            }
            model.peers.push(Peer {
                live: Shared::new(live),
                open: Shared::new(live),
                policy: Shared::new(Policy::Hash.number()),
                gap_ns: Shared::new(50_000_000),
                path_count: Shared::new(count),
                expected_bytes: Shared::new(65_536),
                bucket_base: number * BUCKETS_PER_PEER,
                bucket_mask: BUCKETS_PER_PEER - 1,
                tunnel_count: Shared::new(count),
                ..Peer::default()
            });
        }
        model
    }

    /// Sets the rules, by tables that unit tests compare with a simple check of each rule.
    pub fn set_rules(&mut self, rules: &[Placed], names: &TunnelNames) {
        self.rule_tables = RuleTables::of(rules, names);
        let record = |(policy, flags): &(u32, u32)| Rule { policy: Shared::new(*policy), flags: Shared::new(*flags) };
        self.rules = self.rule_tables.records.iter().map(record).collect();
        self.rule_fields = self.rule_tables.fields.iter().map(|set| RuleSet { rules: Shared::new(*set) }).collect();
        for (peer, rules) in self.peers.iter().zip(&self.rule_tables.peers) {
            peer.rules.set(*rules);
        }
    }

    pub fn set_live(&self, peer: u32, slot: u32, live: bool) {
        self.peers[peer as usize].live.set_bits(1 << slot, live);
    }

    pub fn peer_record(&self, peer: u32) -> &Peer {
        &self.peers[peer as usize]
    }

    pub fn load_record(&self, id: TunnelId) -> &Load {
        &self.loads[id.index()]
    }

    pub fn path_record(&self, index: u32) -> &Path {
        &self.paths[index as usize]
    }

    pub fn bucket_record(&self, index: u32) -> &Bucket {
        &self.buckets[index as usize]
    }

    pub fn bucket_homes(&self) -> impl Iterator<Item = u8> {
        self.buckets.iter().map(|bucket| bucket.home.get())
    }

    /// The result of the host's build of the decision.
    pub fn outcome(&self, packet: &[u8], mark: u32) -> Outcome {
        self.outcome_and_stamp(packet, mark).0
    }

    /// As [`Self::outcome`], and the stamp that the packet gets; 0 if it gets none.
    pub fn outcome_and_stamp(&self, packet: &[u8], mark: u32) -> (Outcome, u16) {
        match decide(&Marked { packet, mark }, self) {
            Verdict::Steer(steer) => {
                let Steer { tunnel, bucket, how, time, .. } = steer;
                (Outcome::Steered { tunnel: tunnel.number(), bucket, how }, time)
            }
            Verdict::NotSteered(reason) | Verdict::Dropped(reason) => (Outcome::Refused(reason as u32), 0),
        }
    }
}

/// A packet with a firewall mark.
pub struct Marked<'a> {
    pub packet: &'a [u8],
    pub mark: u32,
}

impl Packet for Marked<'_> {
    fn load<const N: usize>(&self, offset: u32) -> Option<[u32; N]> {
        self.packet.load(offset)
    }

    fn length(&self) -> u32 {
        self.packet.length()
    }

    fn mark(&self) -> u32 {
        self.mark
    }
}

/// The value of the longest prefix that contains the address.
fn longest<'a, T>(prefixes: impl Iterator<Item = (&'a IpNet, T)>, address: &Address) -> Option<T> {
    let octets: Vec<u8> = address.address.iter().flat_map(|word| word.to_ne_bytes()).collect();
    let address = match address.family {
        4 => IpAddr::from(<[u8; 4]>::try_from(&octets[..4]).expect("four bytes")),
        _ => IpAddr::from(<[u8; 16]>::try_from(&octets[..]).expect("sixteen bytes")),
    };
    let containing = prefixes.filter(|(prefix, _)| prefix.contains(&address));
    containing.max_by_key(|(prefix, _)| prefix.prefix_len()).map(|(_, value)| value)
}

impl Inline for Model {}

impl Tables for Model {
    fn settings(&self) -> Option<&Settings> {
        Some(&self.settings)
    }

    fn peer_of(&self, destination: &Address) -> Option<u32> {
        longest(self.prefixes.iter().map(|(prefix, peer)| (prefix, *peer)), destination)
    }

    fn peer(&self, peer: u32) -> Option<&Peer> {
        self.peers.get(peer as usize)
    }

    fn tunnel(&self, id: TunnelId) -> Option<&Tunnel> {
        self.tunnels.get(id.index())
    }

    fn bucket(&self, index: u32) -> Option<&Bucket> {
        self.buckets.get(index as usize)
    }
    fn now(&self) -> u64 {
        self.now.get()
    }

    fn load(&self, id: TunnelId) -> Option<&Load> {
        self.loads.get(id.index())
    }

    fn update_counters<R>(&self, id: TunnelId, change: impl FnOnce(&mut TunnelCounters) -> R) -> Option<R> {
        self.counters.borrow_mut().get_mut(id.index()).map(change)
    }

    fn path(&self, peer: u32, place: u32) -> Option<&Path> {
        self.paths.get(TunnelId::new(peer, place).index())
    }

    fn rule(&self, rule: u32) -> Option<&Rule> {
        self.rules.get(rule as usize)
    }

    fn rule_field(&self, at: u32) -> Option<&RuleSet> {
        self.rule_fields.get(at as usize)
    }

    fn rules_of_mark(&self, mark: u32) -> Option<u64> {
        self.rule_tables.marks.get(&mark).copied()
    }

    fn rules_of_source(&self, source: &Address) -> u64 {
        longest(self.rule_tables.sources.iter(), source).copied().unwrap_or(0)
    }

    fn rules_of_destination(&self, destination: &Address) -> u64 {
        longest(self.rule_tables.destinations.iter(), destination).copied().unwrap_or(0)
    }

    fn rule_tunnels(&self, rule: u32, peer: u32) -> u32 {
        self.rule_tables.tunnels[(rule * MAX_PEERS + peer) as usize]
    }
}
