//! Moves busy buckets off an overloaded link, and lets a large flow use several links if they would idle otherwise.
//! Buckets whose flows match a rule are left to the programs. Buckets whose packets must stay in order are moved, and
//! never sprayed.

use std::collections::BTreeMap;
use std::time::Duration;

use ecmpvpn_common::decide::is_sprayed;
use ecmpvpn_common::layout::{Bucket, Load, Peer, Policy, TunnelId, bucket_flags, bucket_seen};
use ecmpvpn_common::load::COST_BITS;

use super::elephants::{BucketTraffic, Elephants, Round, State};
use super::paths::{self, Placed};
use super::rebalance::{self, Busy, Link};
use crate::dataplane::View;

/// Weight of the last round in the smoothed rates: a single burst moves nothing.
const FRESH: f64 = 0.6;
/// A bucket with a lower rate is not worth moving. Bytes a second.
const SLIGHT: f64 = 2_000.0;

/// The records of peers, buckets and links: the maps, or a simulation.
pub trait Records {
    fn peer(&self, peer: u32) -> Option<&Peer>;
    fn buckets(&self, peer: u32) -> &[Bucket];
    fn load(&self, id: TunnelId) -> Option<&Load>;
}

impl Records for View {
    fn peer(&self, peer: u32) -> Option<&Peer> {
        self.peer(peer)
    }

    fn buckets(&self, peer: u32) -> &[Bucket] {
        self.buckets(peer)
    }

    fn load(&self, id: TunnelId) -> Option<&Load> {
        self.load(id)
    }
}

/// Two looks that are further apart show no rates.
const MAX_LOOK: Duration = Duration::from_millis(300);
/// For how many rounds a bucket stays in place after its last packet that matched a rule: until its smoothed rate is
/// forgotten.
const RULED: u8 = 8;

/// The recent traffic of all buckets.
#[derive(Debug, Default)]
pub struct Flows {
    /// By peer, then by bucket.
    peers: BTreeMap<u32, Vec<LastSeen>>,
    /// By peer.
    elephants: BTreeMap<u32, Elephants>,
    /// By peer: the byte counters of its buckets at the last look.
    looks: BTreeMap<u32, Look>,
}

/// The last look for large flows.
#[derive(Debug, Default)]
struct Look {
    bytes: Vec<u32>,
    /// Buckets that should be sprayed if the next look finds the same.
    noticed: Vec<u32>,
}

#[derive(Clone, Debug, Default)]
struct LastSeen {
    /// Its byte counter at the last round.
    bytes: u32,
    /// Bytes a second.
    rate: f64,
    /// For how many more rounds its flows count as matching a rule.
    ruled: u8,
    /// Whether its last packet had to stay in order, one bit a round, the last round lowest.
    ordered: u8,
}

impl LastSeen {
    /// Whether most packets must stay in order: those of two of the last three rounds.
    fn is_ordered(&self) -> bool {
        (self.ordered & 0b111).count_ones() >= 2
    }
}

/// A bucket that carried traffic recently.
struct Carried {
    bucket: u32,
    /// Bytes a second.
    rate: f64,
    /// Whether a flow in it matches a rule.
    ruled: bool,
    /// Whether its packets must stay in order.
    ordered: bool,
}

/// The links of all peers.
struct Links {
    links: Vec<Link>,
    /// The index in `links` of each tunnel's link.
    places: BTreeMap<TunnelId, usize>,
}

impl Links {
    fn new(view: &impl Records, placed: &[Placed]) -> Self {
        let mut ids: Vec<TunnelId> = placed.iter().map(|tunnel| paths::link_of(tunnel, placed)).collect();
        ids.sort_unstable();
        ids.dedup();
        let link = |id: &TunnelId| {
            let cost = view.load(*id).map_or(0, |load| load.weighted_cost.get());
            Link { load: 0.0, cost: f64::from(cost) / f64::from(1u32 << COST_BITS) / 1e9, open: false }
        };
        let place = |tunnel: &Placed| {
            let link = paths::link_of(tunnel, placed);
            Some((tunnel.id, ids.iter().position(|id| *id == link)?))
        };
        Self { links: ids.iter().map(link).collect(), places: placed.iter().filter_map(place).collect() }
    }

    /// The first usable slot of the peer whose tunnel uses `link`.
    fn slot_on(&self, link: usize, number: u32, usable: u32) -> Option<u32> {
        let mut slots = (0..u32::BITS).filter(|slot| usable >> slot & 1 == 1);
        slots.find(|slot| self.places.get(&TunnelId::new(number, *slot)) == Some(&link))
    }

    /// Opens the links that the peer's tunnels in `usable` (a bit mask of slots) use, and closes the others.
    fn open(&mut self, number: u32, usable: u32) {
        for at in 0..self.links.len() {
            self.links[at].open = self.slot_on(at, number, usable).is_some();
        }
    }

    /// Adds a bucket's rate to the load of its link, or of all open links in proportion to their rates.
    fn add(&mut self, link: usize, rate: f64, is_sprayed: bool) {
        let open = |link: &&mut Link| link.open && link.cost > 0.0;
        let rates: f64 = self.links.iter_mut().filter(open).map(|link| 1.0 / link.cost).sum();
        if is_sprayed && rates > 0.0 {
            // Takes the same share of time on each.
            self.links.iter_mut().filter(open).for_each(|link| link.load += rate / rates);
        } else {
            self.links[link].load += rate * self.links[link].cost;
        }
    }

    /// The figures of this round for a peer, over its open links.
    fn round(&self, sprays: bool) -> Round {
        let open = || self.links.iter().filter(|link| link.open && link.cost > 0.0);
        let capacity: f64 = open().map(|link| 1.0 / link.cost).sum();
        let rate: f64 = open().map(|link| link.load / link.cost).sum();
        Round {
            capacity: capacity / open().count().max(1) as f64,
            load: if capacity > 0.0 { rate / capacity } else { 0.0 },
            sprays,
        }
    }
}

impl Flows {
    /// One round: reads every bucket, moves busy ones to other links, and marks those that are sprayed or kept whole.
    /// `sprays_elephants`: whether policy `adaptive` may spray.
    pub fn rebalance(&mut self, view: &impl Records, placed: &[Placed], elapsed: Duration, sprays_elephants: bool) {
        let mut links = Links::new(view, placed);
        let mut peers: Vec<u32> = placed.iter().map(|tunnel| tunnel.id.peer()).collect();
        peers.dedup();
        let mut busy: BTreeMap<u32, Vec<Busy>> = BTreeMap::new();
        for number in &peers {
            let Some(peer) = view.peer(*number) else { continue };
            links.open(*number, peer.live.get() & peer.open.get());
            for Carried { bucket, rate, ruled, ordered } in self.read(*number, view.buckets(*number), elapsed) {
                let record = &view.buckets(*number)[bucket as usize];
                let slot = u32::from(record.tunnel.get());
                if let Some(link) = links.places.get(&TunnelId::new(*number, slot)).copied() {
                    links.add(link, rate, !ruled && !ordered && is_sprayed(peer.policy(), record.flags.get()));
                    // A rule may require its flows to stay on their tunnel.
                    if rate >= SLIGHT && !ruled {
                        busy.entry(*number).or_default().push(Busy { bucket, link, rate, ordered });
                    }
                }
            }
        }
        for number in peers {
            let Some(peer) = view.peer(number) else { continue };
            let usable = peer.live.get() & peer.open.get();
            links.open(number, usable);
            let mut busy = busy.remove(&number).unwrap_or_default();
            self.mark(view, (number, peer), &links, &busy, sprays_elephants);
            let policy = peer.policy();
            match policy {
                Policy::Adaptive | Policy::Spray => {}
                Policy::Hash | Policy::Flowlet => continue,
            }
            // A sprayed bucket uses all links already.
            let flags = |busy: &Busy| view.buckets(number)[busy.bucket as usize].flags.get();
            busy.retain(|busy| busy.ordered || !is_sprayed(policy, flags(busy)));
            for found in rebalance::moves(&links.links, &busy) {
                let Some(slot) = links.slot_on(found.to, number, usable) else { continue };
                tracing::debug!(
                    "bucket {} of peer {number}, {:.0} kbit/s, moves to slot {slot}: its link is {:.0}% used, \
                     the new one {:.0}%",
                    found.bucket,
                    found.rate * 8.0 / 1e3,
                    links.links[found.from].load * 100.0,
                    links.links[found.to].load * 100.0
                );
                links.add(found.from, -found.rate, false);
                links.add(found.to, found.rate, false);
                view.buckets(number)[found.bucket as usize].tunnel.set(slot as u8);
                if let Some(load) = view.load(TunnelId::new(number, slot)) {
                    load.rebalance_moves.set(load.rebalance_moves.get() + 1);
                }
            }
        }
    }

    /// Looks for flows that fill their links while others idle, and begins to spray those that two looks in succession
    /// found. So a large flow need not wait for some rounds until its smoothed rate shows it. Stamps its packets from
    /// the first look on, so that the far end knows the tunnels' delays when it is sprayed.
    pub fn look(&mut self, view: &impl Records, placed: &[Placed], elapsed: Duration) {
        let mut peers: Vec<u32> = placed.iter().map(|tunnel| tunnel.id.peer()).collect();
        peers.dedup();
        for number in peers {
            let Some(peer) = view.peer(number).filter(|peer| peer.policy() == Policy::Adaptive) else { continue };
            let buckets = view.buckets(number);
            let bytes: Vec<u32> = buckets.iter().map(|bucket| bucket.bytes.get()).collect();
            let last = self.looks.remove(&number).unwrap_or_default();
            let mut look = Look { noticed: Vec::new(), bytes };
            // Rates of a longer time would hide that a flow has become large only now.
            if last.bytes.len() == look.bytes.len() && elapsed < MAX_LOOK {
                let mut links = Links::new(view, placed);
                links.open(number, peer.live.get() & peer.open.get());
                let seconds = elapsed.as_secs_f64().max(0.001);
                let changed = (0..).zip(look.bytes.iter().zip(&last.bytes)).filter(|(_, (now, before))| now != before);
                let known = self.peers.get(&number).filter(|known| known.len() == buckets.len());
                let mut carried = Vec::new();
                for (bucket, (now, before)) in changed {
                    let record = &buckets[bucket as usize];
                    let rate = f64::from(now.wrapping_sub(*before)) / seconds;
                    let id = TunnelId::new(number, record.tunnel.get().into());
                    let Some(link) = links.places.get(&id).copied() else { continue };
                    links.add(link, rate, is_sprayed(Policy::Adaptive, record.flags.get()));
                    let ruled = known.is_some_and(|known| known[bucket as usize].ruled > 0);
                    if !ruled && record.seen.get() & (bucket_seen::RULED | bucket_seen::ORDERED) == 0 {
                        carried.push((bucket, link, rate));
                    }
                }
                let round = links.round(false);
                let elephants = self.elephants.entry(number).or_default();
                for (bucket, link, rate) in carried {
                    let seen = BucketTraffic { rate, link_load: links.links[link].load };
                    let flags = &buckets[bucket as usize].flags;
                    if !elephants.should_begin(bucket, seen, round) {
                        continue;
                    }
                    if last.noticed.contains(&bucket) {
                        elephants.begin(bucket, seen);
                        flags.set(bucket_flags::SPRAY | bucket_flags::STAMP);
                        tracing::debug!("bucket {bucket} of peer {number}, {:.0} kbit/s, is sprayed", rate * 8.0 / 1e3);
                    } else {
                        look.noticed.push(bucket);
                        flags.set(flags.get() | bucket_flags::STAMP);
                    }
                }
            }
            self.looks.insert(number, look);
        }
    }

    /// Marks the buckets of a peer that are sprayed or kept whole against the default of its policy.
    fn mark(
        &mut self,
        view: &impl Records,
        (number, peer): (u32, &Peer),
        links: &Links,
        busy: &[Busy],
        sprays_elephants: bool,
    ) {
        let policy = peer.policy();
        let round = links.round(policy.sprays_all());
        let judges = match policy {
            Policy::Adaptive => sprays_elephants,
            Policy::Spray => true,
            Policy::Hash | Policy::Flowlet => false,
        };
        let elephants = self.elephants.entry(number).or_default();
        let mut flags = BTreeMap::new();
        let candidates = |busy: &&Busy| judges && !busy.ordered;
        for Busy { bucket, link, rate, .. } in busy.iter().filter(candidates).copied() {
            let seen = BucketTraffic { rate, link_load: links.links[link].load };
            let mark = match elephants.next(bucket, seen, round) {
                Some(State::Sprayed { .. }) => bucket_flags::SPRAY,
                Some(State::Whole) => bucket_flags::WHOLE,
                Some(State::Barred(_)) | None => continue,
            };
            flags.insert(bucket, mark);
        }
        elephants.retain(|bucket| busy.iter().any(|busy| busy.bucket == bucket && !busy.ordered));
        for (bucket, record) in (0..).zip(view.buckets(number)) {
            let (old, new) = (record.flags.get(), flags.get(&bucket).copied().unwrap_or(0));
            // Packets that were sprayed until now may still be held at the far end: for a round, the next ones are
            // stamped too, and do not overtake them.
            let stamps = (old | new) & bucket_flags::SPRAY != 0;
            let (before, stamp) = (old & !bucket_flags::STAMP, if stamps { bucket_flags::STAMP } else { 0 });
            if old != new | stamp {
                record.flags.set(new | stamp);
            }
            if before != new {
                let rate = busy.iter().find(|busy| busy.bucket == bucket).map_or(0.0, |busy| busy.rate);
                tracing::debug!(
                    "bucket {bucket} of peer {number}, {:.0} kbit/s, is {}: links are {:.0}% used",
                    rate * 8.0 / 1e3,
                    match new {
                        bucket_flags::SPRAY => "sprayed from now on",
                        bucket_flags::WHOLE => "kept whole from now on",
                        _ => "steered as its policy says again",
                    },
                    round.load * 100.0
                );
            }
        }
    }

    /// The buckets of a peer that carry traffic, with their smoothed rates.
    fn read(&mut self, peer: u32, buckets: &[Bucket], elapsed: Duration) -> Vec<Carried> {
        let known = self.peers.entry(peer).or_default();
        let first = known.is_empty();
        known.resize(buckets.len(), LastSeen::default());
        let seconds = elapsed.as_secs_f64().max(0.001);
        let mut carried = Vec::new();
        for (number, (bucket, known)) in (0..).zip(buckets.iter().zip(known)) {
            let bytes = bucket.bytes.get();
            let rate = f64::from(bytes.wrapping_sub(known.bytes)) / seconds;
            known.bytes = bytes;
            known.rate += FRESH * (if first { 0.0 } else { rate } - known.rate);
            known.ruled = known.ruled.saturating_sub(1);
            let seen = bucket.seen.get();
            known.ordered = known.ordered << 1 | u8::from(seen & bucket_seen::ORDERED != 0);
            if seen & bucket_seen::RULED != 0 {
                // The next packet that matches a rule sets it again.
                bucket.seen.set(seen & !bucket_seen::RULED);
                known.ruled = RULED;
            }
            if known.rate > 1.0 {
                let (ruled, ordered) = (known.ruled > 0, known.is_ordered());
                carried.push(Carried { bucket: number, rate: known.rate, ruled, ordered });
            }
        }
        carried
    }
}
