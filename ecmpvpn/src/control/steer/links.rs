//! The links that tunnels leave by: which, how fast, how much waits there.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use ecmpvpn_common::layout::{MAX_TUNNELS_PER_PEER, tunnel_flags};
use ecmpvpn_common::load::{COST_BITS, cost_of_rate, free_at};

use super::error::SteerError;
use super::paths::{self, Placed};
use super::queue::{self, Drift, Queue};
use super::rate::{self, Rate};
use crate::config::Config;
use crate::dataplane::{TunnelView, View, tick_ns};
use crate::host::Netlink;
use crate::host::queues::Queues;
use crate::host::underlay::{self, Carriers};
use crate::live::stats::outer_endpoints;

/// Assumed until a link was busy, bits a second.
const NOMINAL: u64 = 1_000_000_000;
/// WireGuard, UDP, IP and link-layer headers and padding of one packet, bytes, about.
const OVERHEAD: f64 = 84.0;
/// Bounds of an automatic flowlet gap.
const GAP: std::ops::RangeInclusive<Duration> = Duration::from_millis(2)..=Duration::from_millis(500);
/// An automatic flowlet gap while round trips are not known.
const UNKNOWN_GAP: Duration = Duration::from_millis(50);

/// The links and what was measured of them.
#[derive(Debug, Default)]
pub struct Underlay {
    tunnels: Vec<TunnelView>,
    placed: Vec<Placed>,
    /// By interface index.
    rates: BTreeMap<u32, Rate>,
    /// The same as the programs are told it, bits a second.
    reported: BTreeMap<u32, f64>,
    /// By tunnel id: the interface that its link is.
    interfaces: BTreeMap<u32, u32>,
    /// Share of what leaves that is inner packets.
    inner_share: f64,
    last: Option<Instant>,
    /// By the tunnel that the link has its record from.
    drifts: BTreeMap<u32, Drift>,
}

impl Underlay {
    /// Finds out which link each tunnel leaves by, and tells the programs where that changed.
    pub async fn look_up(&mut self, config: &Config, view: &View, netlink: &Netlink) -> Result<(), SteerError> {
        let links = netlink.links().await.map_err(SteerError::Netlink)?;
        let tunnels = view.tunnels()?;
        self.inner_share = inner_share(&self.tunnels, &tunnels).unwrap_or(self.inner_share.max(0.5));
        let mut placed = Vec::new();
        self.interfaces.clear();
        for seen in &tunnels {
            let id = seen.peer * MAX_TUNNELS_PER_PEER + seen.slot;
            let mut member = None;
            if let Some((local, remote)) = outer_endpoints(config, seen) {
                let mut carriers = Carriers::of(&links, netlink.outgoing_interface(local, remote).await);
                if carriers.read_macs() {
                    carriers.macs = underlay::macs(&links, netlink, local, remote).await.0;
                }
                if let Some(link) = carriers.carrier(local, remote) {
                    self.interfaces.insert(id, link.ifindex);
                    // Without a bond tunnels are told apart by more than the port: each has a path of its own beyond.
                    member = carriers.are_bonded().then_some(link.ifindex);
                }
            }
            placed.push(Placed { id, peer: seen.peer, slot: seen.slot, member });
        }
        for interface in self.interfaces.values() {
            self.rates.entry(*interface).or_insert_with(|| Rate::nominal(NOMINAL));
        }
        self.rates.retain(|interface, _| self.interfaces.values().any(|used| used == interface));
        if placed != self.placed {
            write_paths(view, &placed);
            for tunnel in &placed {
                tracing::debug!(tunnel = tunnel.id, link = ?self.interfaces.get(&tunnel.id), "tunnel's link");
            }
            self.placed = placed;
            self.drifts.clear();
        }
        self.tunnels = tunnels;
        self.level_out();
        self.write_costs(view);
        Ok(())
    }

    /// Reads the links' queues and tells the programs. Whether anything was sent since the last time.
    pub fn measure(&mut self, view: &View, queues: &mut Queues) -> Result<bool, SteerError> {
        let now = Instant::now();
        let readings = queues.read(|interface| self.rates.contains_key(&interface)).map_err(SteerError::Queues)?;
        let elapsed = self.last.replace(now).map(|last| now - last);
        let mut traffic = false;
        for (interface, reading) in readings {
            let Some(rate) = self.rates.get_mut(&interface) else { continue };
            traffic |= rate.sent() != Some(reading.sent);
            rate.read(reading, elapsed.unwrap_or_default());
        }
        if traffic {
            self.level_out();
            self.write_costs(view);
            self.write_queues(view);
        }
        Ok(traffic)
    }

    fn level_out(&mut self) {
        let mut rates = rate::assumed(&self.rates.values().copied().collect::<Vec<_>>());
        rate::level_out(&mut rates);
        self.reported = self.rates.keys().copied().zip(rates).collect();
    }

    /// Tells the programs what a byte costs on each link.
    fn write_costs(&self, view: &View) {
        for tunnel in &self.placed {
            let Some(load) = view.load(tunnel.id) else { continue };
            let cost = cost_of_rate(self.inner_rate(tunnel.id) as u64);
            load.cost.set(cost);
            load.weighted_cost.set(self.weighted_cost(tunnel, cost));
        }
    }

    /// What a byte would cost were the links as fast as the weights say: the same on average. With learnt weights that
    /// is what it costs.
    fn weighted_cost(&self, tunnel: &Placed, cost: u32) -> u32 {
        let of_peer = || self.placed.iter().zip(&self.tunnels).filter(|(other, _)| other.peer == tunnel.peer);
        if of_peer().any(|(_, seen)| seen.flags & tunnel_flags::AUTO_WEIGHT != 0) {
            return cost;
        }
        let on_link: Vec<f64> = of_peer()
            .filter(|(other, _)| paths::link_of(other, &self.placed) == paths::link_of(tunnel, &self.placed))
            .map(|(_, seen)| f64::from(seen.weight))
            .collect();
        let weights: f64 = of_peer().map(|(_, seen)| f64::from(seen.weight)).sum();
        let rates: f64 = of_peer().map(|(other, _)| self.inner_rate(other.id)).sum();
        let weight = on_link.iter().sum::<f64>() / on_link.len().max(1) as f64;
        if weights <= 0.0 || weight <= 0.0 {
            return cost;
        }
        cost_of_rate((rates * weight / weights) as u64)
    }

    /// Brings the programs' reckoning of the queues nearer to what truly waits on each link.
    fn write_queues(&mut self, view: &View) {
        let now = monotonic_ns();
        let mut peers: BTreeMap<u32, BTreeMap<u32, Queue>> = BTreeMap::new();
        for tunnel in self.placed.iter().filter(|tunnel| paths::link_of(tunnel, &self.placed) == tunnel.id) {
            let rate = self.interfaces.get(&tunnel.id).and_then(|interface| self.rates.get(interface));
            if let (Some(load), Some(rate)) = (view.load(tunnel.id), rate)
                && rate.is_measured()
            {
                let waiting = f64::from(rate.waiting()) * self.inner_share;
                let real = (waiting as u64 * u64::from(load.cost.get())) >> COST_BITS;
                let reckoned = free_at(load, now) - now;
                peers.entry(tunnel.peer).or_default().insert(tunnel.id, Queue { reckoned, real });
            }
        }
        for queues in peers.values() {
            for (link, by) in queue::corrections(queues, &mut self.drifts) {
                if let Some(load) = view.load(link) {
                    // By the difference: packets may have come meanwhile.
                    load.free_ns.set(free_at(load, now).saturating_add_signed(by));
                }
            }
        }
    }

    /// Tells the programs how much longer than the peer's quickest each tunnel's path is, and how long a flow must pause
    /// so that nothing is overtaken when it moves.
    pub fn set_gaps(&self, config: &Config, view: &View) {
        for number in 0..config.peers.len() {
            let number = u32::try_from(number).unwrap_or(u32::MAX);
            let of_peer = || self.placed.iter().filter(|tunnel| tunnel.peer == number);
            let trips: Vec<RoundTrip> = of_peer().filter_map(|tunnel| round_trip(view, tunnel.id)).collect();
            let quickest = trips.iter().map(|trip| trip.least).min().unwrap_or_default();
            for tunnel in of_peer() {
                if let (Some(load), Some(trip)) = (view.load(tunnel.id), round_trip(view, tunnel.id)) {
                    // Half of the difference is taken to be on the way there.
                    load.delay_ns
                        .set(u32::try_from(trip.least.saturating_sub(quickest).as_nanos() / 2).unwrap_or(u32::MAX));
                }
            }
            if config.steering.flowlet_gap_us.is_none()
                && let Some(peer) = view.peer(number)
            {
                let gap = gap(&trips, Duration::from_nanos(u64::from(tick_ns())));
                peer.gap_ns.set(u32::try_from(gap.as_nanos()).unwrap_or(u32::MAX));
            }
        }
    }

    /// What a tunnel's link carries of inner packets, bits a second.
    fn inner_rate(&self, id: u32) -> f64 {
        let rate = self.interfaces.get(&id).and_then(|interface| self.reported.get(interface));
        rate.copied().unwrap_or(NOMINAL as f64) * self.inner_share
    }

    /// The tunnels and their links, as they were looked up last.
    pub fn placed(&self) -> &[Placed] {
        &self.placed
    }
}

/// What is known of a tunnel's round trips.
#[derive(Clone, Copy, Debug)]
struct RoundTrip {
    least: Duration,
    smoothed: Duration,
    jitter: Duration,
}

fn round_trip(view: &View, id: u32) -> Option<RoundTrip> {
    let health = view.health(id / MAX_TUNNELS_PER_PEER, id % MAX_TUNNELS_PER_PEER)?;
    let micros = |word: u32| Duration::from_micros(u64::from(word));
    let (least, smoothed) = (health.rtt_min_us.get(), health.rtt_us.get());
    (least > 0 && smoothed > 0).then(|| RoundTrip {
        least: micros(least),
        smoothed: micros(smoothed),
        jitter: micros(health.rtt_jitter_us.get()),
    })
}

/// A pause after which a flow may change tunnels: what the slowest tunnel takes longer than the quickest, queues and
/// their swings included. Source: FLARE (Sinha et al., "Harnessing TCP's burstiness with flowlet switching",
/// Workshop on Hot Topics in Networks 2004) asks for more than the paths' difference in delay.
fn gap(trips: &[RoundTrip], tick: Duration) -> Duration {
    let slowest = trips.iter().map(|trip| trip.smoothed + 2 * trip.jitter).max();
    let quickest = trips.iter().map(|trip| trip.least).min();
    match (slowest, quickest) {
        (Some(slowest), Some(quickest)) => {
            // Shorter pauses than a tick cost an exact look at the clock with each packet.
            slowest.saturating_sub(quickest).clamp(tick.max(*GAP.start()), *GAP.end())
        }
        _ => UNKNOWN_GAP,
    }
}

/// Which share of what was sent between two looks is inner packets; `None` if nothing was.
fn inner_share(before: &[TunnelView], after: &[TunnelView]) -> Option<f64> {
    let sum = |tunnels: &[TunnelView]| {
        let sums = tunnels.iter().map(|tunnel| (tunnel.counters.tx_bytes, tunnel.counters.tx_packets));
        sums.fold((0, 0), |sum, counts| (sum.0 + counts.0, sum.1 + counts.1))
    };
    let ((bytes_before, packets_before), (bytes_after, packets_after)) = (sum(before), sum(after));
    let bytes = bytes_after.checked_sub(bytes_before).filter(|bytes| *bytes > 0)? as f64;
    let packets = packets_after.checked_sub(packets_before)? as f64;
    Some(bytes / (bytes + OVERHEAD * packets))
}

fn write_paths(view: &View, placed: &[Placed]) {
    for tunnel in placed {
        if let Some(load) = view.load(tunnel.id) {
            load.link.set(paths::link_of(tunnel, placed));
        }
    }
    let mut peers: Vec<u32> = placed.iter().map(|tunnel| tunnel.peer).collect();
    peers.dedup();
    for number in peers {
        let (Some(peer), records) = (view.peer(number), view.paths(number)) else { continue };
        let paths = paths::of_peer(number, placed);
        for (record, path) in records.iter().zip(&paths) {
            record.link.set(path.link);
            record.tunnels.set(path.tunnels);
        }
        peer.path_count.set(u32::try_from(paths.len()).unwrap_or(0));
    }
}

/// The clock of the BPF programs. Source: `bpf_ktime_get_ns()`.
fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    u64::try_from(now.tv_sec * 1_000_000_000 + now.tv_nsec).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trip(least: u64, smoothed: u64, jitter: u64) -> RoundTrip {
        let millis = Duration::from_millis;
        RoundTrip { least: millis(least), smoothed: millis(smoothed), jitter: millis(jitter) }
    }

    #[test]
    fn the_gap_covers_what_paths_differ_by() {
        let gap_of = |trips: &[RoundTrip]| gap(trips, Duration::from_millis(1));
        assert_eq!(gap_of(&[]), UNKNOWN_GAP);
        assert_eq!(gap_of(&[trip(10, 10, 0), trip(15, 15, 0)]), Duration::from_millis(5));
        assert_eq!(gap_of(&[trip(10, 30, 5), trip(10, 12, 1)]), Duration::from_millis(30));
        assert_eq!(gap_of(&[trip(10, 10, 0)]), *GAP.start());
        assert_eq!(gap_of(&[trip(10, 2000, 9)]), *GAP.end());
        assert_eq!(gap(&[trip(10, 10, 0)], Duration::from_millis(4)), Duration::from_millis(4));
    }
}
