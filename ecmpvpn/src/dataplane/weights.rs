//! Sets weights and what follows from them: which tunnel each bucket belongs to.

use ecmpvpn_common::layout::{MAX_TUNNELS_PER_PEER, Peer, TunnelId, tunnel_flags};
use ecmpvpn_common::load::{cost_of_rate, rate_of_cost};
use ecmpvpn_common::rendezvous::{Candidate, NONE, inverse_weight, pick};

use super::{DataplaneError, TunnelView, View};

impl View {
    /// Sets a tunnel's weight and recomputes the homes of its peer's buckets. A home changes only where the weight
    /// changes which tunnel ranks first, so as few buckets as possible move. Buckets go to their homes when they pause.
    /// `learned`: the weight is learned from now on, starting with `weight`.
    ///
    /// Returns how many homes changed.
    ///
    /// # Errors
    /// There is no such tunnel, or the map cannot be written.
    pub fn set_weight(&mut self, id: TunnelId, weight: u16, learned: bool) -> Result<usize, DataplaneError> {
        let found = self.tunnel_records().into_iter().find(|(there, tunnel)| *there == id && tunnel.ifindex != 0);
        let Some((_, mut record)) = found else {
            return Err(DataplaneError::Mismatch(format!("peer {} has no tunnel in slot {}", id.peer(), id.slot())));
        };
        record.weight = weight;
        record.inverse_weight = inverse_weight(weight);
        record.flags = record.flags & !tunnel_flags::AUTO_WEIGHT | if learned { tunnel_flags::AUTO_WEIGHT } else { 0 };
        self.set_tunnel_record(id, record);
        self.weigh_links(id.peer())?;
        self.set_homes(id.peer())
    }

    /// Sets what a byte adds to the level of each of a peer's links, by the weights. On average this equals what the
    /// byte costs. If a weight of the peer is learned, it is exactly what the byte costs. The daemon sets it again with
    /// each measurement.
    fn weigh_links(&self, peer: u32) -> Result<(), DataplaneError> {
        let tunnels: Vec<TunnelView> = self.tunnels()?.into_iter().filter(|tunnel| tunnel.id.peer() == peer).collect();
        let load = |tunnel: &TunnelView| self.load(tunnel.id);
        let learned = tunnels.iter().any(|tunnel| tunnel.flags & tunnel_flags::AUTO_WEIGHT != 0);
        let weights: u64 = tunnels.iter().map(|tunnel| u64::from(tunnel.weight)).sum();
        let rates: u64 = tunnels.iter().filter_map(load).map(|load| rate_of_cost(load.cost.get())).sum();
        for tunnel in &tunnels {
            let Some(of_tunnel) = load(tunnel) else { continue };
            let link = of_tunnel.link();
            let on_link: Vec<u64> = tunnels
                .iter()
                .filter(|other| load(other).is_some_and(|load| load.link() == link))
                .map(|other| u64::from(other.weight))
                .collect();
            let share = on_link.iter().sum::<u64>() * rates / (weights * on_link.len() as u64).max(1);
            let cost = if learned { of_tunnel.cost.get() } else { cost_of_rate(share) };
            of_tunnel.weighted_cost.set(cost);
        }
        Ok(())
    }

    /// Sets the home of each of a peer's buckets by the tunnels' weights. Returns how many homes changed.
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn set_homes(&self, peer: u32) -> Result<usize, DataplaneError> {
        let candidates = self.candidates(peer)?;
        let mut changed = 0;
        for (number, bucket) in (0..).zip(self.buckets(peer)) {
            let home = pick(number, u32::MAX, |slot| candidates[slot as usize]);
            if let Ok(home) = u8::try_from(home)
                && home != bucket.home.get()
            {
                bucket.home.set(home);
                changed += 1;
            }
        }
        Ok(changed)
    }

    /// What a peer's tunnels are ranked by, in the order of their slots; `None` for a slot without a tunnel.
    pub fn candidates(&self, peer: u32) -> Result<Vec<Option<Candidate>>, DataplaneError> {
        let mut candidates = vec![None; MAX_TUNNELS_PER_PEER as usize];
        for (id, tunnel) in self.tunnel_records() {
            if id.peer() == peer && tunnel.ifindex != 0 {
                candidates[id.slot() as usize] = Some(tunnel.candidate());
            }
        }
        Ok(candidates)
    }

    /// Moves buckets of a tunnel that is being drained to the peer's other tunnels. Only buckets without a packet since
    /// `before` (nanoseconds of the monotonic clock) move, because their packets cannot overtake any. A bucket moves to
    /// where its next packet would go under policy `hash`. Returns how many buckets are left.
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn move_off(&self, id: TunnelId, before: u64) -> Result<usize, DataplaneError> {
        let (peer, slot) = (id.peer(), id.slot());
        let Some(record) = self.peer(peer) else { return Ok(0) };
        let others = live_and_open(record) & !(1 << slot);
        let candidates = self.candidates(peer)?;
        let mut left = 0;
        for (number, bucket) in (0..).zip(self.buckets(peer)) {
            if u32::from(bucket.tunnel.get()) != slot {
                continue;
            }
            let home = u32::from(bucket.home.get());
            let to = match others.checked_shr(home).unwrap_or(0) & 1 {
                1 => home,
                _ => pick(number, others, |slot| candidates[slot as usize]),
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

/// Tunnels that take new flows and are up, one bit per slot.
fn live_and_open(peer: &Peer) -> u32 {
    peer.live.get() & peer.open.get()
}
