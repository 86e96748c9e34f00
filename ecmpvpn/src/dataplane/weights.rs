//! Weights, and what follows from them: which tunnel each bucket belongs to.

use ecmpvpn_common::layout::{MAX_TUNNELS_PER_PEER, Peer, tunnel_flags, tunnel_id};
use ecmpvpn_common::load::{cost_of_rate, rate_of_cost};
use ecmpvpn_common::rendezvous::{Candidate, NONE, inverse_weight, pick};

use super::{DataplaneError, TunnelView, View};

impl View {
    /// Gives a tunnel a weight and its peer's buckets their homes anew: each bucket's best tunnel stays the best unless
    /// the weight changed that, so as little as possible moves. Buckets go to their homes when they pause. `learned`:
    /// whether the weight is to be learned from now on; `weight` is what it starts from then.
    ///
    /// Returns how many homes changed.
    ///
    /// # Errors
    /// There is no such tunnel, or the map cannot be written.
    pub fn set_weight(&mut self, peer: u32, slot: u32, weight: u16, learned: bool) -> Result<usize, DataplaneError> {
        let id = tunnel_id(peer, slot);
        let found = self.tunnel_records().into_iter().find(|(there, tunnel)| *there == id && tunnel.ifindex != 0);
        let Some((_, mut record)) = found else {
            return Err(DataplaneError::Mismatch(format!("peer {peer} has no tunnel in slot {slot}")));
        };
        record.weight = weight;
        record.inverse_weight = inverse_weight(weight);
        record.flags = record.flags & !tunnel_flags::AUTO_WEIGHT | if learned { tunnel_flags::AUTO_WEIGHT } else { 0 };
        self.set_tunnel_record(id, record);
        self.weigh_links(peer)?;
        self.set_homes(peer)
    }

    /// Tells the programs what a byte counts on each of a peer's links, by the weights: the same on average as it costs.
    /// The daemon does it again whenever it measures. With a weight that is learned that is what it costs.
    fn weigh_links(&self, peer: u32) -> Result<(), DataplaneError> {
        let tunnels: Vec<TunnelView> = self.tunnels()?.into_iter().filter(|tunnel| tunnel.peer == peer).collect();
        let load = |tunnel: &TunnelView| self.load(tunnel_id(peer, tunnel.slot));
        let learned = tunnels.iter().any(|tunnel| tunnel.flags & tunnel_flags::AUTO_WEIGHT != 0);
        let weights: u64 = tunnels.iter().map(|tunnel| u64::from(tunnel.weight)).sum();
        let rates: u64 = tunnels.iter().filter_map(load).map(|load| rate_of_cost(load.cost.get())).sum();
        for tunnel in &tunnels {
            let Some(of_tunnel) = load(tunnel) else { continue };
            let link = of_tunnel.link.get();
            let on_link: Vec<u64> = tunnels
                .iter()
                .filter(|other| load(other).is_some_and(|load| load.link.get() == link))
                .map(|other| u64::from(other.weight))
                .collect();
            let share = on_link.iter().sum::<u64>() * rates / (weights * on_link.len() as u64).max(1);
            let cost = if learned { of_tunnel.cost.get() } else { cost_of_rate(share) };
            of_tunnel.weighted_cost.set(cost);
        }
        Ok(())
    }

    /// Gives each of a peer's buckets the home that the tunnels' weights ask for.
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn set_homes(&self, peer: u32) -> Result<usize, DataplaneError> {
        let candidates = self.candidates(peer)?;
        let mut changed = 0;
        for (within, bucket) in (0..).zip(self.buckets(peer)) {
            let home = pick(within, u32::MAX, |slot| candidates[slot as usize]);
            if let Ok(home) = u8::try_from(home)
                && home != bucket.home.get()
            {
                bucket.home.set(home);
                changed += 1;
            }
        }
        Ok(changed)
    }

    /// What ranks a peer's tunnels, by slot.
    pub fn candidates(&self, peer: u32) -> Result<Vec<Option<Candidate>>, DataplaneError> {
        let mut candidates = vec![None; MAX_TUNNELS_PER_PEER as usize];
        for (id, tunnel) in self.tunnel_records() {
            if id / MAX_TUNNELS_PER_PEER == peer && tunnel.ifindex != 0 {
                candidates[(id % MAX_TUNNELS_PER_PEER) as usize] = Some(tunnel.candidate());
            }
        }
        Ok(candidates)
    }

    /// Puts buckets of a tunnel that is being drained onto the peer's other tunnels: those without a packet since
    /// `before`, nanoseconds of the monotonic clock, whose packets can overtake none. Each goes where its next packet
    /// would under policy `hash`. Returns how many are left.
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn move_off(&self, peer: u32, slot: u32, before: u64) -> Result<usize, DataplaneError> {
        let Some(record) = self.peer(peer) else { return Ok(0) };
        let others = others(record) & !(1 << slot);
        let candidates = self.candidates(peer)?;
        let mut left = 0;
        for (within, bucket) in (0..).zip(self.buckets(peer)) {
            if u32::from(bucket.tunnel.get()) != slot {
                continue;
            }
            let home = u32::from(bucket.home.get());
            let to = match others.checked_shr(home).unwrap_or(0) & 1 {
                1 => home,
                _ => pick(within, others, |slot| candidates[slot as usize]),
            };
            if to == NONE || bucket.last_ns.get() >= before {
                left += 1;
            } else {
                bucket.tunnel.set(u8::try_from(to).unwrap_or(u8::MAX));
            }
        }
        Ok(left)
    }
}

/// Tunnels that take new flows and carry traffic.
fn others(peer: &Peer) -> u32 {
    peer.live.get() & peer.open.get()
}
