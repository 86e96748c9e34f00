//! Moves busy buckets off an overloaded link, and lets one of them use several where links would idle otherwise.

use std::collections::BTreeMap;
use std::time::Duration;

use ecmpvpn_common::layout::{Bucket, Load, Peer, policy, tunnel_id};
use ecmpvpn_common::load::COST_BITS;

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

/// What the buckets carried lately.
#[derive(Debug, Default)]
pub struct Flows {
    /// By peer, by bucket: the counter at the last round, and bytes a second.
    peers: BTreeMap<u32, Vec<(u32, f64)>>,
}

impl Flows {
    /// One round: reads every bucket, and moves those of policy `adaptive` that ought to.
    pub fn rebalance(&mut self, view: &impl Records, placed: &[Placed], elapsed: Duration) {
        let mut ids: Vec<u32> = placed.iter().map(|tunnel| paths::link_of(tunnel, placed)).collect();
        ids.sort_unstable();
        ids.dedup();
        let mut links: Vec<Link> = ids
            .iter()
            .map(|id| {
                let cost = view.load(*id).map_or(0, |load| load.weighted_cost.get());
                Link { load: 0.0, cost: f64::from(cost) / f64::from(1u32 << COST_BITS) / 1e9, open: false }
            })
            .collect();
        // By peer and slot: the place of the tunnel's link.
        let place: BTreeMap<(u32, u32), usize> = placed
            .iter()
            .filter_map(|tunnel| {
                let link = paths::link_of(tunnel, placed);
                Some(((tunnel.peer, tunnel.slot), ids.iter().position(|id| *id == link)?))
            })
            .collect();

        let mut peers: Vec<u32> = placed.iter().map(|tunnel| tunnel.peer).collect();
        peers.dedup();
        let mut busy = BTreeMap::new();
        for number in &peers {
            let rates = self.read(*number, view.buckets(*number), elapsed);
            for (bucket, rate) in rates {
                let slot = u32::from(view.buckets(*number)[bucket as usize].tunnel.get());
                if let Some(link) = place.get(&(*number, slot)) {
                    links[*link].load += rate * links[*link].cost;
                    if rate < SLIGHT {
                        continue;
                    }
                    busy.entry(*number).or_insert_with(Vec::new).push(Busy { bucket, link: *link, rate });
                }
            }
        }
        for number in peers {
            // A bucket does not tell whether its flows meet a rule, and a rule may ask for them to stay where they are.
            let is_movable = |peer: &&Peer| peer.policy.get() == policy::ADAPTIVE && peer.rules.get() == 0;
            let Some(peer) = view.peer(number).filter(is_movable) else { continue };
            let Some(busy) = busy.get_mut(&number) else { continue };
            let usable = peer.live.get() & peer.open.get();
            let slot_on = |link: usize| {
                let mut slots = (0..u32::BITS).filter(|slot| usable >> slot & 1 == 1);
                slots.find(|slot| place.get(&(number, *slot)) == Some(&link))
            };
            for (at, link) in links.iter_mut().enumerate() {
                link.open = slot_on(at).is_some();
            }
            // A sprayed bucket is on all links at once.
            busy.retain(|busy| view.buckets(number)[busy.bucket as usize].flags.get() == 0);
            for found in rebalance::moves(&links, busy) {
                let Some(slot) = slot_on(found.to) else { continue };
                links[found.from].load -= found.rate * links[found.from].cost;
                links[found.to].load += found.rate * links[found.to].cost;
                view.buckets(number)[found.bucket as usize].tunnel.set(slot as u8);
                if let Some(load) = view.load(tunnel_id(number, slot)) {
                    load.rebalance_moves.set(load.rebalance_moves.get() + 1);
                }
                tracing::debug!(
                    "bucket {} of peer {number}, {:.0} kbit/s, moves to slot {slot}: its link was {:.0}% of the way to \
                     full, the other one {:.0}%",
                    found.bucket,
                    found.rate * 8.0 / 1e3,
                    (links[found.from].load + found.rate * links[found.from].cost) * 100.0,
                    (links[found.to].load - found.rate * links[found.to].cost) * 100.0
                );
            }
        }
    }

    /// What each bucket of a peer carries that carries anything, bytes a second.
    fn read(&mut self, peer: u32, buckets: &[Bucket], elapsed: Duration) -> Vec<(u32, f64)> {
        let known = self.peers.entry(peer).or_default();
        let first = known.is_empty();
        known.resize(buckets.len(), (0, 0.0));
        let seconds = elapsed.as_secs_f64().max(0.001);
        let mut busy = Vec::new();
        for (number, (bucket, known)) in (0..).zip(buckets.iter().zip(known)) {
            let bytes = bucket.bytes.get();
            let rate = f64::from(bytes.wrapping_sub(known.0)) / seconds;
            known.0 = bytes;
            known.1 += FRESH * (if first { 0.0 } else { rate } - known.1);
            if known.1 > 1.0 {
                busy.push((number, known.1));
            }
        }
        busy
    }
}
