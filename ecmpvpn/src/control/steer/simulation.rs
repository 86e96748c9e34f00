//! Tests the programs' decision together with the daemon's rounds, on simulated traffic and time.

use std::cell::{Cell, RefCell};
use std::time::Duration;

use ecmpvpn_common::decide::{Verdict, decide};
use ecmpvpn_common::flow::{fields, mix};
use ecmpvpn_common::inline::Inline;
use ecmpvpn_common::layout::{
    Address, BUCKETS_PER_PEER, Bucket, Load, Path, Peer, Policy, Rule, RuleSet, Settings, Tunnel, TunnelCounters,
    TunnelId, bucket_flags, bucket_seen, how,
};
use ecmpvpn_common::load::cost_of_rate;
use ecmpvpn_common::packet::Packet;
use ecmpvpn_common::rendezvous::{Candidate, home, inverse_weight, key_of};
use ecmpvpn_common::shared::Shared;
use ecmpvpn_common::tables::Tables;

use super::flows::{Flows, Records};
use super::paths::Placed;

const BUCKETS: u32 = BUCKETS_PER_PEER;
const MS: u64 = 1_000_000;
const TCP: u8 = 6;
const SPRAYED: u8 = bucket_flags::SPRAY | bucket_flags::STAMP;
const UDP: u8 = 17;

/// A site with one peer, and one tunnel for each link.
struct Site {
    now: Cell<u64>,
    settings: Settings,
    peer: Peer,
    tunnels: Vec<Tunnel>,
    buckets: Vec<Bucket>,
    loads: Vec<Load>,
    counters: RefCell<Vec<TunnelCounters>>,
    paths: Vec<Path>,
}

impl Site {
    /// Links of these rates, bits a second.
    fn new(policy: Policy, rates: &[u64], seed: u64) -> Self {
        let ids = 0..u32::try_from(rates.len()).unwrap();
        let all = (1 << rates.len()) - 1;
        let tunnels: Vec<Tunnel> = ids
            .clone()
            .map(|id| Tunnel {
                key: key_of(format!("wg{id}").as_bytes()),
                ifindex: 10 + id,
                inverse_weight: inverse_weight(1),
                weight: 1,
                ..Tunnel::default()
            })
            .collect();
        let candidates: Vec<Candidate> = tunnels.iter().map(Tunnel::candidate).collect();
        let bucket = |within| {
            let home = u8::try_from(home(within, &candidates)).unwrap();
            Bucket { tunnel: Shared::new(home), home: Shared::new(home), ..Bucket::default() }
        };
        let load = |(id, rate): (u32, &u64)| {
            let cost = cost_of_rate(*rate);
            Load { link: Shared::new(id), cost: Shared::new(cost), weighted_cost: Shared::new(cost), ..Load::default() }
        };
        Self {
            now: Cell::new(5_000 * MS),
            settings: Settings { seed, hash_fields: fields::FIVE_TUPLE, ..Settings::default() },
            peer: Peer {
                live: Shared::new(all),
                open: Shared::new(all),
                bucket_mask: BUCKETS - 1,
                policy: Shared::new(policy.number()),
                tunnel_count: Shared::new(ids.end),
                gap_ns: Shared::new(u32::try_from(50 * MS).unwrap()),
                path_count: Shared::new(ids.end),
                expected_bytes: Shared::new(65_536),
                ..Peer::default()
            },
            buckets: (0..BUCKETS).map(bucket).collect(),
            counters: RefCell::new(vec![TunnelCounters::default(); rates.len()]),
            loads: ids.clone().zip(rates).map(load).collect(),
            paths: ids.map(|id| Path { link: Shared::new(id), tunnels: Shared::new(1 << id) }).collect(),
            tunnels,
        }
    }

    fn placed(&self) -> Vec<Placed> {
        (0..self.peer.tunnel_count.get()).map(|slot| Placed { id: TunnelId::new(0, slot), member: None }).collect()
    }
}

impl Inline for Site {}

impl Tables for Site {
    fn now(&self) -> u64 {
        self.now.get()
    }

    fn settings(&self) -> Option<&Settings> {
        Some(&self.settings)
    }

    fn peer_of(&self, _: &Address) -> Option<u32> {
        Some(0)
    }

    fn peer(&self, _: u32) -> Option<&Peer> {
        Some(&self.peer)
    }

    fn tunnel(&self, id: TunnelId) -> Option<&Tunnel> {
        self.tunnels.get(id.index())
    }

    fn bucket(&self, index: u32) -> Option<&Bucket> {
        self.buckets.get(index as usize)
    }

    fn load(&self, id: TunnelId) -> Option<&Load> {
        self.loads.get(id.index())
    }

    fn update_counters<R>(&self, id: TunnelId, change: impl FnOnce(&mut TunnelCounters) -> R) -> Option<R> {
        self.counters.borrow_mut().get_mut(id.index()).map(change)
    }

    fn path(&self, _: u32, place: u32) -> Option<&Path> {
        self.paths.get(place as usize)
    }

    fn rule(&self, _: u32) -> Option<&Rule> {
        None
    }

    fn rule_field(&self, _: u32) -> Option<&RuleSet> {
        None
    }

    fn rules_of_mark(&self, _: u32) -> Option<u64> {
        None
    }

    fn rules_of_source(&self, _: &Address) -> u64 {
        0
    }

    fn rules_of_destination(&self, _: &Address) -> u64 {
        0
    }

    fn rule_tunnels(&self, _: u32, _: u32) -> u32 {
        0
    }
}

impl Records for Site {
    fn peer(&self, _: u32) -> Option<&Peer> {
        Some(&self.peer)
    }

    fn buckets(&self, _: u32) -> &[Bucket] {
        &self.buckets
    }

    fn load(&self, id: TunnelId) -> Option<&Load> {
        self.loads.get(id.index())
    }
}

/// A TCP segment of a flow, or a UDP datagram; only its headers exist.
struct Datagram {
    bytes: [u8; 28],
    length: u32,
}

impl Datagram {
    fn new(flow: u32, length: u32) -> Self {
        let mut bytes = [0; 28];
        (bytes[0], bytes[9]) = (0x45, TCP);
        bytes[12..16].copy_from_slice(&(0x0a01_0000 + flow).to_be_bytes());
        bytes[16..20].copy_from_slice(&[10, 20, 0, 1]);
        bytes[20..24].copy_from_slice(&[0x10, 0, 0x20, 0]);
        Self { bytes, length }
    }

    fn udp(flow: u32, length: u32) -> Self {
        let mut datagram = Self::new(flow, length);
        datagram.bytes[9] = UDP;
        datagram
    }
}

impl Packet for Datagram {
    fn load<const N: usize>(&self, offset: u32) -> Option<[u32; N]> {
        self.bytes[..].load(offset)
    }

    fn length(&self) -> u32 {
        self.length
    }

    fn mark(&self) -> u32 {
        0
    }
}

/// The results of a simulation, measured in its second half.
struct Outcome {
    bytes: Vec<f64>,
    moves: u64,
}

impl Outcome {
    fn max_over_mean(&self) -> f64 {
        let mean = self.bytes.iter().sum::<f64>() / self.bytes.len() as f64;
        self.bytes.iter().copied().fold(0.0, f64::max) / mean
    }
}

/// Simulates flows of these rates, bytes a second, for `seconds`. All start at once and never pause. Packets have 1,400
/// bytes.
fn simulate(site: &Site, rates: &[f64], seconds: u64) -> Outcome {
    const LENGTH: u32 = 1_400;
    let start = site.now.get();
    let mut next: Vec<(u64, u32)> = (0..).zip(rates).map(|(flow, _)| (start, flow)).collect();
    let mut queue: std::collections::BinaryHeap<std::cmp::Reverse<(u64, u32)>> =
        next.drain(..).map(std::cmp::Reverse).collect();
    let placed = site.placed();
    let (mut flows, mut round) = (Flows::default(), start);
    let mut seen = Outcome { bytes: vec![0.0; site.tunnels.len()], moves: 0 };
    let moves = || site.loads.iter().map(|load| load.rebalance_moves.get()).sum::<u64>();
    let mut moves_before = 0;
    while let Some(std::cmp::Reverse((at, flow))) = queue.pop() {
        if at >= start + seconds * 1_000 * MS {
            break;
        }
        if at >= round + 1_000 * MS {
            flows.rebalance(site, &placed, Duration::from_secs(1), true);
            round += 1_000 * MS;
            if round == start + seconds / 2 * 1_000 * MS {
                moves_before = moves();
            }
        }
        site.now.set(at);
        let Verdict::Steer(steer) = decide(&Datagram::new(flow, LENGTH), site) else { panic!("not steered") };
        if at >= start + seconds / 2 * 1_000 * MS {
            seen.bytes[steer.tunnel.index()] += f64::from(LENGTH);
        }
        // Flows are not synchronised.
        let jitter = 0.5 + (mix(at ^ u64::from(flow) << 40) >> 11) as f64 / (1u64 << 53) as f64;
        let pause = f64::from(LENGTH) / rates[flow as usize] * 1e9 * jitter;
        queue.push(std::cmp::Reverse((at + pause as u64, flow)));
    }
    seen.moves = moves() - moves_before;
    seen
}

#[test]
fn equal_flows_spread_evenly() {
    let mut worst: f64 = 0.0;
    for seed in 0..10 {
        let site = Site::new(Policy::Adaptive, &[10_000_000; 4], seed);
        let seen = simulate(&site, &[35_000.0; 32], 6);
        worst = worst.max(seen.max_over_mean());
        assert_eq!(seen.moves, 0, "a balanced system makes no moves");
    }
    println!("32 equal flows on 4 tunnels: worst max/mean {worst:.3}");
    assert!(worst <= 1.10, "{worst}");
}

#[test]
fn a_static_hash_spreads_less_evenly() {
    let sum: f64 = (0..10)
        .map(|seed| simulate(&Site::new(Policy::Hash, &[10_000_000; 4], seed), &[35_000.0; 32], 2).max_over_mean())
        .sum();
    println!("32 equal flows on 4 tunnels by hash: mean of max/mean {:.3}", sum / 10.0);
    assert!(sum / 10.0 > 1.2, "{sum}");
}

#[test]
fn pareto_flows_spread_evenly_where_they_can() {
    let (mut judged, mut worst) = (0, 0.0f64);
    for seed in 0..12u64 {
        let uniform = |flow: u64| ((mix(mix(seed) ^ flow) >> 11) as f64 + 1.0) / (1u64 << 53) as f64;
        let sizes: Vec<f64> = (0..1024).map(|flow| uniform(flow).powf(-1.0 / 1.1)).collect();
        let sum: f64 = sizes.iter().sum();
        if sizes.iter().any(|size| *size > sum / 4.0) {
            continue;
        }
        // Four links of 40 Mbit/s at 70%.
        let rates: Vec<f64> = sizes.iter().map(|size| size / sum * 14e6).collect();
        let seen = simulate(&Site::new(Policy::Adaptive, &[40_000_000; 4], seed), &rates, 8);
        judged += 1;
        worst = worst.max(seen.max_over_mean());
    }
    println!("1,024 Pareto flows on 4 tunnels, {judged} draws: worst max/mean {worst:.3}");
    assert!(judged >= 4 && worst <= 1.15, "{judged} draws, {worst}");
}

#[test]
fn only_flows_that_meet_no_rule_are_moved() {
    // All on one link of three.
    let site = Site::new(Policy::Adaptive, &[10_000_000; 3], 1);
    let busy = [3usize, 30, 300, 3000];
    let rounds = |ruled: &[usize]| {
        let mut flows = Flows::default();
        for bucket in busy {
            site.buckets[bucket].tunnel.set(0);
        }
        for _ in 0..4 {
            for bucket in busy {
                let record = &site.buckets[bucket];
                record.bytes.set(record.bytes.get().wrapping_add(300_000));
                record.seen.set(u8::from(ruled.contains(&bucket)) * bucket_seen::RULED);
            }
            flows.rebalance(&site, &site.placed(), Duration::from_secs(1), true);
        }
        busy.map(|bucket| site.buckets[bucket].tunnel.get())
    };
    assert_eq!(rounds(&busy), [0; 4]);
    let moved = rounds(&busy[..2]);
    assert_eq!(moved[..2], [0; 2]);
    assert!(moved[2..].iter().all(|tunnel| *tunnel != 0), "{moved:?}");
}

#[test]
fn flows_that_start_together_take_a_link_each() {
    for seed in 0..50 {
        let site = Site::new(Policy::Flowlet, &[1_000_000_000; 3], seed);
        let mut taken: Vec<u32> = (0..3)
            .map(|flow| {
                site.now.set(site.now.get() + 1000);
                match decide(&Datagram::new(flow, 60), &site) {
                    Verdict::Steer(steer) => steer.tunnel,
                    verdict => panic!("{verdict:?}"),
                }
            })
            .map(TunnelId::slot)
            .collect();
        taken.sort_unstable();
        assert_eq!(taken, [0, 1, 2], "seed {seed}");
    }
}

#[test]
fn a_sprayed_flow_fills_links_by_their_rates_and_arrives_in_order() {
    let rates = [20_000_000u64, 20_000_000, 5_000_000];
    let site = Site::new(Policy::Spray, &rates, 1);
    // One flow at 97% of all links' rate. Each link is a queue that sends at its rate.
    let (mut free, mut arrivals, mut bytes) = ([0u64; 3], Vec::new(), [0u64; 3]);
    for number in 0..20_000u64 {
        site.now.set(5_000 * MS + number * 1_400 * 8 * 1_000_000 / 43_650);
        let Verdict::Steer(steer) = decide(&Datagram::new(1, 1_400), &site) else { panic!("not steered") };
        assert_eq!(steer.how, how::SPRAYED);
        let link = steer.tunnel.index();
        free[link] = free[link].max(site.now.get()) + 1_400 * 8 * 1_000_000_000 / rates[link];
        bytes[link] += 1_400;
        arrivals.push(free[link]);
    }
    let late = arrivals.windows(2).filter(|pair| pair[1] + MS / 10 < pair[0]).count();
    let share = bytes[2] as f64 / bytes.iter().sum::<u64>() as f64;
    println!("sprayed: {late} of 20,000 overtaken by over 0.1 ms, slow link {:.1}% of the bytes", share * 100.0);
    assert!(late < 200, "{late} of 20,000 were overtaken");
    assert!((0.07..0.14).contains(&share), "{share}");
}

/// The slots that one flow takes in this many packets, a millisecond apart, and whether one was sprayed.
fn slots_of(site: &Site, packet: &Datagram, packets: u32) -> (u32, bool) {
    let (mut slots, mut sprayed) = (0, false);
    for _ in 0..packets {
        site.now.set(site.now.get() + MS);
        let Verdict::Steer(steer) = decide(packet, site) else { panic!("not steered") };
        slots |= 1 << steer.tunnel.slot();
        sprayed |= steer.how & how::SPRAYED != 0;
    }
    (slots, sprayed)
}

#[test]
fn what_does_not_tolerate_reordering_is_not_sprayed() {
    let marked = |policy, flags| {
        let site = Site::new(policy, &[10_000_000; 3], 1);
        site.buckets.iter().for_each(|bucket| bucket.flags.set(flags));
        site
    };
    for (policy, flags) in [(Policy::Spray, 0), (Policy::Adaptive, bucket_flags::SPRAY)] {
        let (slots, sprayed) = slots_of(&marked(policy, flags), &Datagram::new(1, 1_400), 100);
        assert!(sprayed && slots == 0b111, "TCP under {policy:?}: {slots:#b}");
        let site = marked(policy, flags);
        let (slots, sprayed) = slots_of(&site, &Datagram::udp(1, 1_400), 100);
        assert!(!sprayed && slots.is_power_of_two(), "UDP under {policy:?}: {slots:#b}");
        // As under `flowlet`: after a pause it takes another link if its own is busier.
        let load = &site.loads[slots.trailing_zeros() as usize];
        ecmpvpn_common::load::charge(load, site.now.get(), 1_000_000, 0);
        site.now.set(site.now.get() + 60 * MS);
        let Verdict::Steer(steer) = decide(&Datagram::udp(1, 1_400), &site) else { panic!("not steered") };
        assert!(steer.how == how::FLOWLET && slots >> steer.tunnel.slot() & 1 == 0, "{steer:?}");
    }
}

#[test]
fn a_large_flow_that_must_stay_in_order_is_left_whole_and_the_others_leave_it() {
    let rounds = |ordered: u8| {
        let site = Site::new(Policy::Adaptive, &[10_000_000; 3], 1);
        // One flow fills its link, and two small ones share it.
        let (large, small) = (3usize, [30usize, 300]);
        for bucket in [large, small[0], small[1]] {
            site.buckets[bucket].tunnel.set(0);
        }
        site.buckets[large].seen.set(ordered);
        let mut flows = Flows::default();
        for _ in 0..6 {
            for (bucket, bytes) in [(large, 1_200_000), (small[0], 60_000), (small[1], 60_000)] {
                let record = &site.buckets[bucket];
                record.bytes.set(record.bytes.get().wrapping_add(bytes));
            }
            flows.rebalance(&site, &site.placed(), Duration::from_secs(1), true);
        }
        let moved = small.iter().filter(|bucket| site.buckets[**bucket].tunnel.get() != 0).count();
        (site.buckets[large].flags.get(), moved)
    };
    assert_eq!(rounds(0).0, SPRAYED, "it would be sprayed");
    assert_eq!(rounds(bucket_seen::ORDERED), (0, 2));
}

#[test]
fn a_stray_packet_does_not_stand_for_its_bucket() {
    let site = Site::new(Policy::Adaptive, &[10_000_000; 3], 1);
    let mut flows = Flows::default();
    let mut round = |ordered: bool| {
        let record = &site.buckets[3];
        // Sprayed, it is faster.
        let bytes = if record.flags.get() == 0 { 1_200_000 } else { 3_300_000 };
        record.bytes.set(record.bytes.get().wrapping_add(bytes));
        record.seen.set(u8::from(ordered) * bucket_seen::ORDERED);
        flows.rebalance(&site, &site.placed(), Duration::from_secs(1), true);
        record.flags.get()
    };
    for _ in 0..3 {
        round(false);
    }
    assert_eq!([true, false, false].map(&mut round), [SPRAYED; 3]);
    // For a round after it is not sprayed any more, it is stamped.
    assert_eq!([true, true, true].map(&mut round), [SPRAYED, bucket_flags::STAMP, 0]);
}

#[test]
fn a_flow_that_fills_its_link_is_sprayed_from_the_second_look_on() {
    const FULL: u32 = 1_250_000;
    // The flow's rates from look to look, and its flags after each.
    let flags = |ordered: u8, rates: &[u32], others: u32| {
        let site = Site::new(Policy::Adaptive, &[10_000_000; 3], 1);
        for (bucket, tunnel) in [(3, 0), (30, 1), (300, 2)] {
            site.buckets[bucket].tunnel.set(tunnel);
        }
        site.buckets[3].seen.set(ordered);
        let mut flows = Flows::default();
        flows.rebalance(&site, &site.placed(), Duration::from_secs(1), true);
        let mut flags = Vec::new();
        for rate in rates {
            for (bucket, rate) in [(3, *rate), (30, others), (300, others)] {
                let record = &site.buckets[bucket];
                record.bytes.set(record.bytes.get().wrapping_add(rate / 10));
            }
            flows.look(&site, &site.placed(), Duration::from_millis(100));
            flags.push(site.buckets[3].flags.get());
        }
        // The next round has seen little of it, and leaves it.
        flows.rebalance(&site, &site.placed(), Duration::from_secs(1), true);
        assert_eq!(site.buckets[3].flags.get() & bucket_flags::SPRAY, flags.last().unwrap() & bucket_flags::SPRAY);
        flags
    };
    assert_eq!(flags(0, &[FULL; 4], 0), [0, bucket_flags::STAMP, SPRAYED, SPRAYED]);
    assert_eq!(flags(0, &[FULL; 4], FULL), [0; 4], "all links are full");
    assert_eq!(flags(bucket_seen::ORDERED, &[FULL; 4], 0), [0; 4]);
    assert_eq!(flags(bucket_seen::RULED, &[FULL; 4], 0), [0; 4]);
    // A burst is not noticed twice.
    let burst = flags(0, &[0, FULL, FULL / 4, 0, FULL, 0], 0);
    assert!(burst.iter().all(|flags| flags & bucket_flags::SPRAY == 0), "{burst:?}");
}
