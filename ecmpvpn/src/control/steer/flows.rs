//! Moves busy buckets off an overloaded link, and lets one of them use several where links would idle otherwise. Buckets
//! whose flows meet a rule are left to the programs.

use std::collections::BTreeMap;
use std::time::Duration;

use ecmpvpn_common::decide::is_sprayed;
use ecmpvpn_common::layout::{Bucket, Load, Peer, Policy, bucket_flags, tunnel_id};
use ecmpvpn_common::load::COST_BITS;

use super::elephants::{BucketTraffic, Elephants, Round, State};
use super::paths::{self, Placed};
use super::rebalance::{self, Busy, Link};
use crate::dataplane::View;

/// Weight of the last round in what buckets and links are taken to carry: a burst alone moves nothing.
const FRESH: f64 = 0.6;
/// Bytes a second below which a bucket is not worth moving.
const SLIGHT: f64 = 2_000.0;

/// Where buckets are read and moved.
pub trait Records {
    /// A peer's record.
    fn peer(&self, peer: u32) -> Option<&Peer>;
    /// A peer's buckets.
    fn buckets(&self, peer: u32) -> &[Bucket];
    /// A tunnel's load.
    fn load(&self, id: u32) -> Option<&Load>;
}

impl Records for View {
    fn peer(&self, peer: u32) -> Option<&Peer> {
        self.peer(peer)
    }

    fn buckets(&self, peer: u32) -> &[Bucket] {
        self.buckets(peer)
    }

    fn load(&self, id: u32) -> Option<&Load> {
        self.load(id)
    }
}

/// For so many rounds after its last packet that met a rule a bucket stays where it is: until its rate is forgotten.
const RULED: u8 = 8;

/// What the buckets carried lately.
#[derive(Debug, Default)]
pub struct Flows {
    /// By peer, by bucket.
    peers: BTreeMap<u32, Vec<Known>>,
    /// By peer.
    elephants: BTreeMap<u32, Elephants>,
}

/// What is known of a bucket.
#[derive(Clone, Debug, Default)]
struct Known {
    /// Its counter at the last round.
    bytes: u32,
    /// Bytes a second.
    rate: f64,
    /// Rounds for which it counts as one whose flows meet a rule.
    ruled: u8,
}

/// A bucket that carried something of late.
struct Carried {
    bucket: u32,
    /// Bytes a second.
    rate: f64,
    /// Whether a flow in it meets a rule.
    ruled: bool,
}

/// The links of all peers.
struct Links {
    links: Vec<Link>,
    /// By peer and slot: the place of the tunnel's link.
    places: BTreeMap<(u32, u32), usize>,
}

impl Links {
    fn new(view: &impl Records, placed: &[Placed]) -> Self {
        let mut ids: Vec<u32> = placed.iter().map(|tunnel| paths::link_of(tunnel, placed)).collect();
        ids.sort_unstable();
        ids.dedup();
        let link = |id: &u32| {
            let cost = view.load(*id).map_or(0, |load| load.weighted_cost.get());
            Link { load: 0.0, cost: f64::from(cost) / f64::from(1u32 << COST_BITS) / 1e9, open: false }
        };
        let place = |tunnel: &Placed| {
            let link = paths::link_of(tunnel, placed);
            Some(((tunnel.peer, tunnel.slot), ids.iter().position(|id| *id == link)?))
        };
        Self { links: ids.iter().map(link).collect(), places: placed.iter().filter_map(place).collect() }
    }

    /// A usable slot of the peer on a link.
    fn slot_on(&self, link: usize, number: u32, usable: u32) -> Option<u32> {
        let mut slots = (0..u32::BITS).filter(|slot| usable >> slot & 1 == 1);
        slots.find(|slot| self.places.get(&(number, *slot)) == Some(&link))
    }

    /// Opens the links that a peer's tunnels of `usable` leave by, and closes the others.
    fn open(&mut self, number: u32, usable: u32) {
        for at in 0..self.links.len() {
            self.links[at].open = self.slot_on(at, number, usable).is_some();
        }
    }

    /// Adds what a bucket carries to its link, or to all open ones by their rates.
    fn add(&mut self, link: usize, rate: f64, is_sprayed: bool) {
        let open = |link: &&mut Link| link.open && link.cost > 0.0;
        let rates: f64 = self.links.iter_mut().filter(open).map(|link| 1.0 / link.cost).sum();
        if is_sprayed && rates > 0.0 {
            // The same time on each.
            self.links.iter_mut().filter(open).for_each(|link| link.load += rate / rates);
        } else {
            self.links[link].load += rate * self.links[link].cost;
        }
    }

    /// What holds for a peer's flows in this round: over its open links.
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
    /// One round: reads every bucket, moves those of policy `adaptive` that ought to, and says which are sprayed;
    /// `sprays_elephants`: whether `adaptive` may.
    pub fn rebalance(&mut self, view: &impl Records, placed: &[Placed], elapsed: Duration, sprays_elephants: bool) {
        let mut links = Links::new(view, placed);
        let mut peers: Vec<u32> = placed.iter().map(|tunnel| tunnel.peer).collect();
        peers.dedup();
        let mut busy: BTreeMap<u32, Vec<Busy>> = BTreeMap::new();
        for number in &peers {
            let Some(peer) = view.peer(*number) else { continue };
            links.open(*number, peer.live.get() & peer.open.get());
            for Carried { bucket, rate, ruled } in self.read(*number, view.buckets(*number), elapsed) {
                let record = &view.buckets(*number)[bucket as usize];
                let slot = u32::from(record.tunnel.get());
                if let Some(link) = links.places.get(&(*number, slot)).copied() {
                    links.add(link, rate, !ruled && is_sprayed(peer.policy(), record.flags.get()));
                    // A rule may ask for its flows to stay where they are.
                    if rate >= SLIGHT && !ruled {
                        busy.entry(*number).or_default().push(Busy { bucket, link, rate });
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
            // A sprayed bucket is on all links at once.
            busy.retain(|busy| !is_sprayed(policy, view.buckets(number)[busy.bucket as usize].flags.get()));
            for found in rebalance::moves(&links.links, &busy) {
                let Some(slot) = links.slot_on(found.to, number, usable) else { continue };
                tracing::debug!(
                    "bucket {} of peer {number}, {:.0} kbit/s, moves to slot {slot}: its link is {:.0}% of the way to \
                     full, the other one {:.0}%",
                    found.bucket,
                    found.rate * 8.0 / 1e3,
                    links.links[found.from].load * 100.0,
                    links.links[found.to].load * 100.0
                );
                links.add(found.from, -found.rate, false);
                links.add(found.to, found.rate, false);
                view.buckets(number)[found.bucket as usize].tunnel.set(slot as u8);
                if let Some(load) = view.load(tunnel_id(number, slot)) {
                    load.rebalance_moves.set(load.rebalance_moves.get() + 1);
                }
            }
        }
    }

    /// Marks the buckets of a peer that are sprayed or go whole unlike its policy does by itself.
    fn mark(
        &mut self,
        view: &impl Records,
        (number, peer): (u32, &Peer),
        links: &Links,
        busy: &[Busy],
        sprays_elephants: bool,
    ) {
        let policy = peer.policy();
        let round = links.round(policy == Policy::Spray);
        let judges = match policy {
            Policy::Adaptive => sprays_elephants,
            Policy::Spray => true,
            Policy::Hash | Policy::Flowlet => false,
        };
        let elephants = self.elephants.entry(number).or_default();
        let mut flags = BTreeMap::new();
        for Busy { bucket, link, rate } in busy.iter().filter(|_| judges).copied() {
            let seen = BucketTraffic { rate, link_load: links.links[link].load };
            let mark = match elephants.next(bucket, seen, round) {
                Some(State::Sprayed { .. }) => bucket_flags::SPRAY,
                Some(State::Whole) => bucket_flags::WHOLE,
                Some(State::Barred(_)) | None => continue,
            };
            flags.insert(bucket, mark);
        }
        elephants.retain(|bucket| busy.iter().any(|busy| busy.bucket == bucket));
        for (bucket, record) in (0..).zip(view.buckets(number)) {
            let (old, new) = (record.flags.get(), flags.get(&bucket).copied().unwrap_or(0));
            if old != new {
                record.flags.set(new);
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

    /// What each bucket of a peer carries that carries anything.
    fn read(&mut self, peer: u32, buckets: &[Bucket], elapsed: Duration) -> Vec<Carried> {
        let known = self.peers.entry(peer).or_default();
        let first = known.is_empty();
        known.resize(buckets.len(), Known::default());
        let seconds = elapsed.as_secs_f64().max(0.001);
        let mut carried = Vec::new();
        for (number, (bucket, known)) in (0..).zip(buckets.iter().zip(known)) {
            let bytes = bucket.bytes.get();
            let rate = f64::from(bytes.wrapping_sub(known.bytes)) / seconds;
            known.bytes = bytes;
            known.rate += FRESH * (if first { 0.0 } else { rate } - known.rate);
            known.ruled = known.ruled.saturating_sub(1);
            if bucket.ruled.get() != 0 {
                // The next such packet sets it again.
                bucket.ruled.set(0);
                known.ruled = RULED;
            }
            if known.rate > 1.0 {
                carried.push(Carried { bucket: number, rate: known.rate, ruled: known.ruled > 0 });
            }
        }
        carried
    }
}
