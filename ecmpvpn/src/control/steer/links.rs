//! The links that tunnels use: which link, how fast it is, and how much waits in its queue.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use ecmpvpn_common::layout::{TunnelId, tunnel_flags};
use ecmpvpn_common::load::{COST_BITS, cost_of_rate, free_at, set_room};
use ecmpvpn_common::order::UNIT_BITS;

use super::error::SteerError;
use super::paths::{self, Placed};
use super::queue::{self, Drift, Queue};
use super::rate::{self, Rate};
use crate::config::Config;
use crate::control::health::Handover;
use crate::dataplane::{TunnelView, View, monotonic_ns, tick_ns};
use crate::host::Netlink;
use crate::host::queues::Queues;
use crate::host::underlay::{self, Carriers};
use crate::live::stats::outer_endpoints;

/// The rate that a link is assumed to have until it was busy, bits a second.
const NOMINAL: u64 = 1_000_000_000;
/// Approximate WireGuard, UDP, IP and link-layer headers and padding of one packet, bytes.
const OVERHEAD: f64 = 84.0;
/// A shaper's burst, and packets that are still being encrypted, bytes.
const SWING: u64 = 32_768;
/// Bounds of an automatic flowlet gap.
const GAP: std::ops::RangeInclusive<Duration> = Duration::from_millis(2)..=Duration::from_millis(500);
/// The automatic flowlet gap while round trips are not known.
const UNKNOWN_GAP: Duration = Duration::from_millis(50);
/// Nanoseconds that sprayed packets rather wait for each millionth of loss: 5 ms for one in a thousand.
const AVOIDED_PER_PPM: u32 = 5_000;
/// Nanoseconds that they wait at most.
const AVOIDED_AT_MOST: u32 = 20_000_000;
/// What stamps are assumed to be wrong by at least: the estimate of a full queue is right to a millisecond or so. Held
/// too long, only a sprayed flow waits; held too briefly, its first packets overtake each other.
const LEAST_SPREAD: Duration = Duration::from_micros(1_500);

/// The links and their measurements.
#[derive(Debug, Default)]
pub struct Underlay {
    tunnels: Vec<TunnelView>,
    placed: Vec<Placed>,
    /// By interface index.
    rates: BTreeMap<u32, Rate>,
    /// The rates that the programs get, bits a second, by interface index.
    reported: BTreeMap<u32, f64>,
    /// The interface index of each tunnel's link.
    interfaces: BTreeMap<TunnelId, u32>,
    /// The share of inner packets in the outer bytes.
    inner_share: f64,
    last: Option<Instant>,
    /// By the tunnel whose record stands for the link.
    drifts: BTreeMap<TunnelId, Drift>,
    /// How much each peer's delays vary although nothing waits.
    spreads: BTreeMap<u32, Duration>,
}

impl Underlay {
    /// Finds out which link each tunnel uses, and writes changes to the maps.
    pub async fn look_up(&mut self, config: &Config, view: &View, netlink: &Netlink) -> Result<(), SteerError> {
        let links = netlink.links().await.map_err(SteerError::Netlink)?;
        let tunnels = view.tunnels()?;
        self.inner_share = inner_share(&self.tunnels, &tunnels).unwrap_or(self.inner_share.max(0.5));
        let mut placed = Vec::new();
        self.interfaces.clear();
        for seen in &tunnels {
            let mut member = None;
            if let Some((local, remote)) = outer_endpoints(config, seen) {
                let mut carriers = Carriers::of(&links, netlink.outgoing_interface(local, remote).await);
                if carriers.read_macs() {
                    carriers.macs = underlay::macs(&links, netlink, local, remote).await.0;
                }
                if let Some(link) = carriers.carrier(local, remote) {
                    self.interfaces.insert(seen.id, link.ifindex);
                    // Without a bond each tunnel is taken to have its own link: beyond the port each has its own path.
                    member = carriers.are_bonded().then_some(link.ifindex);
                }
            }
            placed.push(Placed { id: seen.id, member });
        }
        for interface in self.interfaces.values() {
            self.rates.entry(*interface).or_insert_with(|| Rate::nominal(NOMINAL));
        }
        self.rates.retain(|interface, _| self.interfaces.values().any(|used| used == interface));
        if placed != self.placed {
            write_paths(view, &placed);
            for tunnel in &placed {
                tracing::debug!(tunnel = ?tunnel.id, link = ?self.interfaces.get(&tunnel.id), "tunnel's link");
            }
            self.placed = placed;
            self.drifts.clear();
        }
        self.tunnels = tunnels;
        self.level_out();
        self.write_costs(view);
        Ok(())
    }

    /// Reads the links' queues, updates the maps, and tells probing what became of packets there. Returns whether
    /// anything was sent since the last call.
    pub fn read_rates(&mut self, view: &View, queues: &mut Queues, handover: &Handover) -> Result<bool, SteerError> {
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
            for tunnel in &self.tunnels {
                if let Some(rate) = self.interfaces.get(&tunnel.id).and_then(|interface| self.rates.get(interface)) {
                    handover.set_queue(&tunnel.name, rate.queue());
                }
            }
        }
        Ok(traffic)
    }

    /// Whether some links are full, and others are not.
    pub fn is_uneven(&self) -> bool {
        let mut busy = self.rates.values().map(Rate::is_busy);
        let first = busy.next();
        busy.any(|busy| Some(busy) != first)
    }

    /// The longest time that packets wait for a busy link.
    pub fn longest_queue(&self) -> Duration {
        let busy = self.rates.values().filter(|rate| rate.is_busy());
        busy.map(|rate| Duration::from_secs_f64(8.0 * f64::from(rate.waiting()) / rate.bits_per_second()))
            .max()
            .unwrap_or_default()
    }

    fn level_out(&mut self) {
        let mut rates = rate::assumed(&self.rates.values().copied().collect::<Vec<_>>());
        rate::level_out(&mut rates);
        self.reported = self.rates.keys().copied().zip(rates).collect();
    }

    /// Writes to the maps what a byte costs on each link.
    fn write_costs(&self, view: &View) {
        for tunnel in &self.placed {
            let Some(load) = view.load(tunnel.id) else { continue };
            let cost = cost_of_rate(self.inner_rate(tunnel.id) as u64);
            load.cost.set(cost);
            load.weighted_cost.set(self.weighted_cost(tunnel, cost));
        }
    }

    /// What a byte would cost if the links were as fast as the configured weights say; the mean stays the same. With
    /// automatic weights it is the measured cost.
    fn weighted_cost(&self, tunnel: &Placed, cost: u32) -> u32 {
        let of_peer = || self.placed.iter().zip(&self.tunnels).filter(|(other, _)| other.id.peer() == tunnel.id.peer());
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

    /// Corrects the programs' estimate of the queues by what really waits on each link.
    fn write_queues(&mut self, view: &View) {
        let now = monotonic_ns();
        let mut peers: BTreeMap<u32, BTreeMap<TunnelId, Queue>> = BTreeMap::new();
        for tunnel in self.placed.iter().filter(|tunnel| paths::link_of(tunnel, &self.placed) == tunnel.id) {
            let rate = self.interfaces.get(&tunnel.id).and_then(|interface| self.rates.get(interface));
            if let (Some(load), Some(rate)) = (view.load(tunnel.id), rate)
                && rate.is_measured()
            {
                let time = |outer_bytes: u32| {
                    ((f64::from(outer_bytes) * self.inner_share) as u64 * u64::from(load.cost.get())) >> COST_BITS
                };
                let real = time(rate.waiting());
                let reckoned = free_at(load, now) - now;
                let swing = (SWING * u64::from(load.cost.get())) >> COST_BITS;
                set_room(load, rate.room().map(|room| time(room) + swing / 2));
                peers.entry(tunnel.id.peer()).or_default().insert(tunnel.id, Queue { reckoned, real, swing });
            }
        }
        for queues in peers.values() {
            for (link, by) in queue::corrections(queues, &mut self.drifts) {
                let Queue { reckoned, real, .. } = queues[&link];
                tracing::trace!(?link, reckoned, real, by, rate = self.inner_rate(link), "queue of a link, ns");
                if let Some(load) = view.load(link) {
                    // Add the difference: packets may have arrived meanwhile.
                    load.free_ns.set(free_at(load, now).saturating_add_signed(by));
                }
            }
        }
    }

    /// Writes to the maps how much longer each tunnel's path is than the peer's fastest, and how long a flow must pause
    /// so that no packet overtakes another one when it moves.
    pub fn set_gaps(&mut self, config: &Config, view: &View, handover: &Handover) {
        for number in (0..).take(config.peers.len()) {
            let of_peer = || self.placed.iter().filter(|tunnel| tunnel.id.peer() == number);
            let trips: Vec<RoundTrip> = of_peer().filter_map(|tunnel| round_trip(view, tunnel.id)).collect();
            let quickest = trips.iter().map(|trip| trip.least).min().unwrap_or_default();
            // Assume that half of a difference is on the way there, and half on the way back.
            let beyond = |trip: &RoundTrip| trip.least.saturating_sub(quickest).as_nanos() / 2;
            for tunnel in of_peer() {
                if let (Some(load), Some(trip)) = (view.load(tunnel.id), round_trip(view, tunnel.id)) {
                    load.delay_ns.set(u32::try_from(beyond(&trip)).unwrap_or(u32::MAX));
                }
                if let Some(load) = view.load(tunnel.id) {
                    load.loss_ns.set(avoided(self.worst_loss(tunnel, handover)));
                }
            }
            if let (Some(peer), Some(order)) = (view.peer(number), view.order(number)) {
                let lives = |tunnel: &&Placed| peer.live.get() >> tunnel.id.slot() & 1 == 1;
                let alive: Vec<RoundTrip> =
                    of_peer().filter(lives).filter_map(|tunnel| round_trip(view, tunnel.id)).collect();
                let spread = spread(self.spreads.get(&number).copied(), &alive);
                self.spreads.insert(number, spread);
                order.spread.set(u32::try_from(spread.as_nanos() >> UNIT_BITS).unwrap_or(u32::MAX));
            }
            if config.steering.flowlet_gap_us.is_none()
                && let Some(peer) = view.peer(number)
            {
                let gap = gap(&trips, Duration::from_nanos(u64::from(tick_ns())));
                peer.gap_ns.set(u32::try_from(gap.as_nanos()).unwrap_or(u32::MAX));
            }
        }
    }

    /// The highest share that is lost of what the tunnels on this tunnel's link carry, millionths.
    fn worst_loss(&self, tunnel: &Placed, handover: &Handover) -> u32 {
        let link = paths::link_of(tunnel, &self.placed);
        let all = self.placed.iter().zip(&self.tunnels);
        let on_link = all.filter(|(other, _)| paths::link_of(other, &self.placed) == link);
        on_link.map(|(_, seen)| handover.loss_ppm(&seen.name)).max().unwrap_or_default()
    }

    /// The rate of a tunnel's link in inner packets, bits a second.
    fn inner_rate(&self, id: TunnelId) -> f64 {
        let rate = self.interfaces.get(&id).and_then(|interface| self.reported.get(interface));
        rate.copied().unwrap_or(NOMINAL as f64) * self.inner_share
    }

    /// The tunnels and their links, from the last look-up.
    pub fn placed(&self) -> &[Placed] {
        &self.placed
    }
}

/// Round-trip times of a tunnel.
#[derive(Clone, Copy, Debug)]
struct RoundTrip {
    least: Duration,
    smoothed: Duration,
    jitter: Duration,
}

fn round_trip(view: &View, id: TunnelId) -> Option<RoundTrip> {
    let health = view.health(id)?;
    let micros = |word: u32| Duration::from_micros(u64::from(word));
    let (least, smoothed) = (health.rtt_min_us.get(), health.rtt_us.get());
    (least > 0 && smoothed > 0).then(|| RoundTrip {
        least: micros(least),
        smoothed: micros(smoothed),
        jitter: micros(health.rtt_jitter_us.get()),
    })
}

/// The pause after which a flow may change tunnels: how much longer the slowest tunnel takes than the fastest, with
/// queues and their variation. Source: FLARE (Sinha et al., "Harnessing TCP's burstiness with flowlet switching",
/// Workshop on Hot Topics in Networks 2004) requires more than the paths' difference in delay.
fn gap(trips: &[RoundTrip], tick: Duration) -> Duration {
    let slowest = trips.iter().map(|trip| trip.smoothed + 2 * trip.jitter).max();
    let quickest = trips.iter().map(|trip| trip.least).min();
    match (slowest, quickest) {
        (Some(slowest), Some(quickest)) => {
            // A gap below one tick would need an exact clock read for each packet.
            slowest.saturating_sub(quickest).clamp(tick.max(*GAP.start()), *GAP.end())
        }
        _ => UNKNOWN_GAP,
    }
}

/// How long sprayed packets rather wait for other links than use one that loses this share of them, millionths;
/// nanoseconds. Each loss makes a flow send less, and with it all links: by the square root of the share for the usual
/// congestion control (Mathis et al., "The macroscopic behavior of the TCP congestion avoidance algorithm", Computer
/// Communication Review 1997). While others' queues are that long, they stay busy after a loss.
fn avoided(loss_ppm: u32) -> u32 {
    loss_ppm.saturating_mul(AVOIDED_PER_PPM).min(AVOIDED_AT_MOST)
}

/// How much one-way delays vary although nothing waits. Queues make round trips vary too: so it follows them at once
/// when they vary less, and slowly when they vary more. `before`: the result of the last round, a second ago.
fn spread(before: Option<Duration>, trips: &[RoundTrip]) -> Duration {
    // If each way's delay is evenly distributed, a round trip's mean deviation is a third of the width.
    let now = LEAST_SPREAD.max(3 * trips.iter().map(|trip| trip.jitter).max().unwrap_or_default());
    before.map_or(now, |before| now.min(before * 21 / 20 + Duration::from_micros(10)))
}

/// The share of inner packets in the bytes sent between two readings; `None` if nothing was sent.
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
            load.link.set(paths::link_of(tunnel, placed).number());
        }
    }
    let mut peers: Vec<u32> = placed.iter().map(|tunnel| tunnel.id.peer()).collect();
    peers.dedup();
    for number in peers {
        let (Some(peer), records) = (view.peer(number), view.paths(number)) else { continue };
        let paths = paths::of_peer(number, placed);
        for (record, path) in records.iter().zip(&paths) {
            record.link.set(path.link.number());
            record.tunnels.set(path.tunnels);
        }
        peer.path_count.set(u32::try_from(paths.len()).unwrap_or(0));
    }
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

    #[test]
    fn what_delays_vary_by_is_that_of_quiet_times() {
        let ms = Duration::from_millis;
        assert_eq!(spread(None, &[trip(10, 10, 0), trip(10, 12, 3)]), ms(9));
        assert_eq!(spread(None, &[]), LEAST_SPREAD);
        // A queue for five seconds counts for little, and its end counts at once.
        let mut now = Some(ms(9));
        for _ in 0..5 {
            now = Some(spread(now, &[trip(10, 50, 20)]));
        }
        assert!(now.is_some_and(|now| now < ms(12)), "{now:?}");
        assert_eq!(spread(now, &[trip(10, 12, 3)]), ms(9));
    }
}
