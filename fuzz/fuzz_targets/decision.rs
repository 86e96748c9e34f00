//! Decides with arbitrary tables, for arbitrary packets, with changes in between. The fast path must come to the same
//! verdicts and records as the full decision, and both must obey the tables.
//!
//! Two sites start equal. One decides with `decide` alone. The other asks `try_decide` first and caches destinations,
//! as the BPF program does.

#![no_main]

use std::cell::{Cell, RefCell};

use ecmpvpn_common::decide::{Steer, Verdict, classify, decide, steer};
use ecmpvpn_common::fast_path::try_decide;
use ecmpvpn_common::flow::{IPV4, fields};
use ecmpvpn_common::inline::Inline;
use ecmpvpn_common::layout::{
    Address, Bucket, Load, PEER_CACHE_WORDS, Path, Peer, Reason, Rule, RuleSet, Settings, Tunnel, TunnelCounters,
    TunnelId, how, settings_flags,
};
use ecmpvpn_common::packet::{Packet, Segments, Transport, parse, segments};
use ecmpvpn_common::peer_cache;
use ecmpvpn_common::rendezvous::{inverse_weight, key_of};
use ecmpvpn_common::shared::Shared;
use ecmpvpn_common::tables::Tables;
use libfuzzer_sys::arbitrary::{Arbitrary, Unstructured};
use libfuzzer_sys::fuzz_target;

/// Buckets of each peer: so few that packets share them.
const BUCKETS: u32 = 16;
const SLOTS: u32 = 32;
const MOST_EVENTS: usize = 200;
const RULES: u32 = 4;
/// Nanoseconds.
const GAPS: [u32; 5] = [50_000_000, 0, 1, 4_000_000, u32::MAX];
/// Nanoseconds: the kernel's usual tick periods, and 0 for unknown.
const TICKS: [u32; 4] = [4_000_000, 0, 1_000_000, 10_000_000];
/// The cost at 1 Gbit/s, and extreme values.
const COSTS: [u32; 4] = [8_192, 1, u32::MAX, 0];

fuzz_target!(|bytes: &[u8]| {
    let (mut input, mut same) = (Input(Unstructured::new(bytes)), Input(Unstructured::new(bytes)));
    let mut long = Site::new(&mut input, false);
    let mut fast = Site::new(&mut same, true);
    for _ in 0..MOST_EVENTS {
        if input.0.is_empty() {
            break;
        }
        match Event::next(&mut input) {
            Event::Packet(packet) => {
                let found = long.long_way(&packet);
                assert_eq!(fast.fast_way(&packet), found, "{packet:?}");
                long.assert_same_records(&fast);
                long.assert_kept_to(found);
            }
            Event::Change(change) => {
                long.change(&change);
                fast.change(&change);
            }
        }
    }
});

/// Numbers from the fuzzer's bytes; zeros after their end.
struct Input<'a>(Unstructured<'a>);

impl<'a> Input<'a> {
    fn next<T: Arbitrary<'a> + Default>(&mut self) -> T {
        self.0.arbitrary().unwrap_or_default()
    }

    fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[usize::from(self.next::<u8>()) % all.len()]
    }

    fn below(&mut self, end: u32) -> u32 {
        u32::from(self.next::<u8>()) % end
    }
}

#[derive(Debug)]
struct Sent {
    bytes: Vec<u8>,
    /// For a super-packet it is not the number of `bytes`.
    length: u32,
    mark: u32,
    gso_size: u32,
    gso_segs: u32,
}

impl Packet for Sent {
    fn load<const N: usize>(&self, offset: u32) -> Option<[u32; N]> {
        self.bytes[..].load(offset)
    }

    fn length(&self) -> u32 {
        self.length
    }

    fn mark(&self) -> u32 {
        self.mark
    }
}

impl Sent {
    fn next(input: &mut Input<'_>, kind: u8) -> Self {
        let bytes = match kind {
            0..=2 => {
                let (to, source, protocol) = (input.next::<u8>(), input.next::<u8>(), input.of(&[6, 17, 1, 47]));
                let head = [0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, protocol, 0, 0, 10, 1, 0, source];
                [&head[..], &[10, 20, to >> 6, to], &[0, source, 0, 80], &[0; 8], &[5 << 4, 0, 0, 0]].concat()
            }
            3 => {
                let (to, source, protocol) = (input.next::<u8>(), input.next::<u8>(), input.of(&[17, 6, 58, 44, 0]));
                let head = [0x60, 0, 0, 0, 0, 20, protocol, 64];
                let (mut from, mut dst) = ([0; 16], [0; 16]);
                (from[0], from[15]) = (0xfd, source);
                (dst[0], dst[1], dst[5], dst[15]) = (0xfd, to & 0xc0, to & 3, to);
                [&head[..], &from, &dst, &[0, source, 0, 80], &[0; 12]].concat()
            }
            _ => {
                let length = usize::from(input.next::<u8>()).min(input.0.len());
                input.0.bytes(length).unwrap_or_default().to_owned()
            }
        };
        let shape: u8 = input.next();
        let length = u32::try_from(bytes.len()).unwrap();
        let mut sent = Self { bytes, length, mark: u32::from(shape >> 6), gso_size: 0, gso_segs: 0 };
        if shape & 7 == 7 {
            sent.length += u32::from(input.next::<u16>());
            sent.gso_size = u32::from(input.next::<u16>());
            sent.gso_segs = u32::from(input.next::<u16>());
        }
        sent
    }
}

/// A steered prefix.
#[derive(Clone, Copy, Debug)]
struct Prefix {
    family: u32,
    address: u128,
    length: u32,
    peer: u32,
}

impl Prefix {
    fn next(input: &mut Input<'_>) -> Self {
        let peer = input.below(4);
        let (family, first, most) = match input.of(&[4, 4, 6, 0]) {
            4 => (4, [10, 20, input.next(), input.next()], 32),
            6 => (6, [0xfd, input.next(), 0, 0], 128),
            // All addresses, including those that never leave the link.
            _ => return Self { family: input.of(&[4, 6]), address: 0, length: 0, peer },
        };
        let address = u128::from(u32::from_be_bytes(first)) << 96;
        Self { family, address, length: u32::from(input.next::<u8>()) % (most + 1), peer }
    }

    fn mask(&self) -> u128 {
        u128::MAX.checked_shl(128 - self.length).unwrap_or(0)
    }

    fn contains(&self, address: &Address) -> bool {
        self.family == address.family && (self.address ^ number(address)) & self.mask() == 0
    }
}

/// An address as a number; an IPv4 address is in the highest bits.
fn number(address: &Address) -> u128 {
    address.address.iter().fold(0, |number, word| number << 32 | u128::from(u32::from_be(*word)))
}

enum Event {
    Packet(Sent),
    Change(Change),
}

#[derive(Debug)]
enum Change {
    Time(u64),
    Live { peer: u32, slots: u32 },
    Open { peer: u32, slots: u32 },
    BucketFlags { bucket: u32, flags: u8 },
    BucketTunnel { bucket: u32, slot: u8 },
    Interface { tunnel: u32, ifindex: u32 },
    Link { tunnel: u32, link: u32, cost: u32, delay_ns: u32 },
    Policy { peer: u32, policy: u32 },
    Rules { peer: u32, rules: u64 },
    Prefix(Prefix),
}

impl Event {
    fn next(input: &mut Input<'_>) -> Self {
        match input.next::<u8>() % 8 {
            kind @ 0..=4 => Self::Packet(Sent::next(input, kind)),
            5 => Self::Change(Change::Time(u64::from(input.next::<u32>()))),
            _ => Self::Change(Change::next(input)),
        }
    }
}

impl Change {
    fn next(input: &mut Input<'_>) -> Self {
        let kind = input.next::<u8>() % 9;
        let (peer, tunnel, bucket) = (input.below(4), input.below(4 * SLOTS), input.below(4 * BUCKETS));
        match kind {
            0 => Self::Live { peer, slots: input.next() },
            1 => Self::Open { peer, slots: input.next() },
            2 => Self::BucketFlags { bucket, flags: input.next() },
            3 => Self::BucketTunnel { bucket, slot: input.next() },
            4 => Self::Interface { tunnel, ifindex: input.below(3) },
            5 => Self::Link { tunnel, link: input.below(130), cost: input.of(&COSTS), delay_ns: input.next() },
            6 => Self::Policy { peer, policy: input.below(5) },
            7 => Self::Rules { peer, rules: input.next::<u8>().into() },
            _ => Self::Prefix(Prefix::next(input)),
        }
    }
}

struct Site {
    now: Cell<u64>,
    settings: Settings,
    prefixes: Vec<Prefix>,
    peers: Vec<Peer>,
    tunnels: Vec<Tunnel>,
    buckets: Vec<Bucket>,
    loads: Vec<Load>,
    paths: Vec<Path>,
    counters: RefCell<Vec<TunnelCounters>>,
    rules: Vec<Rule>,
    /// The rules that the value of a field matches. Values are looked up modulo the number of entries, because it only
    /// matters that both sites give the same result.
    rule_fields: Vec<RuleSet>,
    rule_tunnels: Vec<u32>,
    /// `None`: nothing is cached.
    cache: Option<Cache>,
}

struct Cache {
    ipv4: Box<[Shared<u64>; PEER_CACHE_WORDS as usize]>,
    /// The BPF program has a cache of another kind for IPv6. This one has the same effect.
    ipv6: RefCell<Vec<([u32; 4], u32)>>,
}

impl Site {
    fn new(input: &mut Input<'_>, remembers: bool) -> Self {
        let (flags, peers) = (input.next::<u8>(), 1 + input.below(4));
        let is_usual = flags & 2 == 0;
        let mut site = Self {
            now: Cell::new(5_000_000_000 + u64::from(input.next::<u16>()) * 100_000),
            settings: Settings {
                seed: input.next::<u8>().into(),
                hash_fields: if is_usual { fields::FIVE_TUPLE } else { u32::from(input.next::<u8>()) & fields::ALL },
                flags: if flags & 1 == 1 { settings_flags::SYMMETRIC } else { 0 },
                tick_ns: input.of(&TICKS),
                prefixes_version: 2,
                ..Settings::default()
            },
            prefixes: Vec::new(),
            peers: Vec::new(),
            tunnels: Vec::new(),
            buckets: Vec::new(),
            loads: Vec::new(),
            paths: Vec::new(),
            counters: RefCell::new(vec![TunnelCounters::default(); (peers * SLOTS) as usize]),
            rules: Vec::new(),
            rule_fields: Vec::new(),
            rule_tunnels: (0..4 * RULES).map(|_| if flags & 4 == 0 { u32::MAX } else { input.next() }).collect(),
            cache: remembers.then(|| Cache {
                ipv4: Box::new([const { Shared::new(0) }; PEER_CACHE_WORDS as usize]),
                ipv6: RefCell::default(),
            }),
        };
        for number in 0..peers {
            site.add_peer(input, number, flags & 8 == 0);
        }
        if flags & 16 != 0 {
            // Fewer rules than the fields name: tables that contradict each other must be refused.
            let rule = |_| Rule { policy: Shared::new(input.below(5)), flags: Shared::new(input.below(2)) };
            site.rules = (1..RULES).map(rule).collect();
            site.rule_fields = (0..5).map(|_| RuleSet { rules: Shared::new(input.next::<u8>().into()) }).collect();
        }
        for _ in 0..input.below(4) {
            site.prefixes.push(Prefix::next(input));
        }
        // The destinations of the packets that this target makes.
        let address = u128::from(u32::from_be_bytes([10, 20, 0, 0])) << 96;
        site.prefixes.push(Prefix { family: 4, address, length: 16, peer: 0 });
        site.prefixes.push(Prefix { family: 6, address: 0xfd << 120, length: 9, peer: peers - 1 });
        site.set_masks();
        site
    }

    fn add_peer(&mut self, input: &mut Input<'_>, number: u32, is_sound: bool) {
        let count = 1 + input.below(SLOTS);
        let all = u32::MAX >> (SLOTS - count);
        let mut slots = || if is_sound { all } else { input.next() };
        let (live, open) = (slots(), slots());
        self.peers.push(Peer {
            live: Shared::new(live),
            open: Shared::new(open),
            bucket_base: number * BUCKETS,
            bucket_mask: BUCKETS - 1,
            policy: Shared::new(input.below(5)),
            tunnel_count: Shared::new(count),
            path_count: Shared::new(count),
            gap_ns: Shared::new(input.of(&GAPS)),
            expected_bytes: Shared::new(u32::from(input.next::<u16>()) * 16),
            rules: Shared::new(0),
            ..Peer::default()
        });
        for slot in 0..SLOTS {
            let id = TunnelId::new(number, slot).number();
            self.tunnels.push(Tunnel {
                key: key_of(&id.to_ne_bytes()),
                ifindex: if slot < count { 10 + id } else { 0 },
                inverse_weight: inverse_weight(1),
                ..Tunnel::default()
            });
            let (cost, link, tunnels) =
                if is_sound { (COSTS[0], id, 1 << slot) } else { (input.of(&COSTS), input.below(130), input.next()) };
            self.paths.push(Path { link: Shared::new(link), tunnels: Shared::new(tunnels) });
            self.loads.push(Load {
                link: Shared::new(link),
                cost: Shared::new(cost),
                weighted_cost: Shared::new(cost),
                ..Load::default()
            });
        }
        for bucket_number in 0..BUCKETS {
            let home = if is_sound { u8::try_from(bucket_number % count).unwrap() } else { input.next() };
            self.buckets.push(Bucket { tunnel: Shared::new(home), home: Shared::new(home), ..Bucket::default() });
        }
    }

    /// Sets the masks as `dataplane::prefixes` does.
    fn set_masks(&mut self) {
        let longest = |family| {
            let prefixes = self.prefixes.iter().filter(|prefix| prefix.family == family);
            prefixes.map(Prefix::mask).max().unwrap_or(0)
        };
        let (ipv4, ipv6) = (longest(4) | u128::MAX << 112, longest(6) | u128::MAX << 118);
        let word = |mask: u128, at: u32| ((mask >> (96 - 32 * at)) as u32).to_be();
        self.settings.ipv4_mask = word(ipv4, 0);
        self.settings.ipv6_mask = [0, 1, 2, 3].map(|at| word(ipv6, at));
    }

    fn change(&mut self, change: &Change) {
        let at = |number: u32, count: usize| number as usize % count;
        let peer = |number| &self.peers[at(number, self.peers.len())];
        let bucket = |number| &self.buckets[at(number, self.buckets.len())];
        match *change {
            Change::Time(passed) => self.now.set(self.now.get() + passed),
            Change::Live { peer: number, slots } => peer(number).live.set(slots),
            Change::Open { peer: number, slots } => peer(number).open.set(slots),
            Change::Policy { peer: number, policy } => peer(number).policy.set(policy),
            Change::Rules { peer: number, rules } => peer(number).rules.set(rules),
            Change::BucketFlags { bucket: number, flags } => bucket(number).flags.set(flags),
            Change::BucketTunnel { bucket: number, slot } => bucket(number).tunnel.set(slot),
            Change::Interface { tunnel, ifindex } => {
                let tunnel = at(tunnel, self.tunnels.len());
                self.tunnels[tunnel].ifindex = ifindex;
            }
            Change::Link { tunnel, link, cost, delay_ns } => {
                let load = &self.loads[at(tunnel, self.loads.len())];
                load.link.set(link);
                load.cost.set(cost);
                load.delay_ns.set(delay_ns);
            }
            Change::Prefix(prefix) => {
                self.settings.prefixes_version |= 1;
                self.prefixes.insert(0, prefix);
                self.prefixes.truncate(5);
                self.set_masks();
                self.settings.prefixes_version += 1;
            }
        }
    }

    fn long_way(&self, packet: &Sent) -> Result<Steer, Reason> {
        if packet.gso_size == 0 {
            return match decide(packet, self) {
                Verdict::Steer(steer) => Ok(steer),
                Verdict::NotSteered(reason) | Verdict::Dropped(reason) => Err(reason),
            };
        }
        let mut parsed = parse(packet)?;
        let flow = classify(&mut parsed, packet, self)?;
        steer(&flow, segments_of(packet, parsed.transport), self)
    }

    fn fast_way(&self, packet: &Sent) -> Result<Steer, Reason> {
        match try_decide(packet, |transport| segments_of(packet, transport), self) {
            Some(decided) => decided.map(|steered| steered.steer),
            None => self.long_way(packet),
        }
    }

    fn assert_same_records(&self, other: &Self) {
        for (at, (a, b)) in self.buckets.iter().zip(&other.buckets).enumerate() {
            let record = |bucket: &Bucket| {
                (bucket.last_ns.get(), bucket.bytes.get(), bucket.tunnel.get(), bucket.flags.get(), bucket.seen.get())
            };
            assert_eq!(record(a), record(b), "bucket {at}");
        }
        for (at, (a, b)) in self.loads.iter().zip(&other.loads).enumerate() {
            let record = |load: &Load| (load.free_ns.get(), load.level_ns.get(), load.stamp_ns.get());
            assert_eq!(record(a), record(b), "load {at}");
        }
        assert_eq!(*self.counters.borrow(), *other.counters.borrow());
    }

    /// Checks that the tunnel is up, and that the bucket is one of the peer's.
    fn assert_kept_to(&self, found: Result<Steer, Reason>) {
        let Ok(steer) = found else { return };
        let (peer, slot) = (steer.tunnel.peer(), steer.tunnel.slot());
        let record = &self.peers[peer as usize];
        assert!(record.live.get() >> slot & 1 == 1, "{steer:?}: {record:?}");
        assert!((record.bucket_base..record.bucket_base + BUCKETS).contains(&steer.bucket), "{steer:?}");
        assert!(steer.ifindex != 0 && steer.ifindex == self.tunnels[steer.tunnel.index()].ifindex, "{steer:?}");
        assert!([0, how::FAILOVER, how::FLOWLET, how::SPRAYED].contains(&steer.how), "{steer:?}");
    }

    fn field(&self, at: u32) -> Option<&RuleSet> {
        self.rule_fields.get(at as usize % self.rule_fields.len().max(1))
    }
}

fn segments_of(packet: &Sent, transport: Transport) -> Segments {
    segments(packet, transport, packet.length, packet.gso_size, packet.gso_segs)
}

impl Inline for Site {}

impl Tables for Site {
    fn now(&self) -> u64 {
        self.now.get()
    }

    fn settings(&self) -> Option<&Settings> {
        Some(&self.settings)
    }

    fn peer_of(&self, destination: &Address) -> Option<u32> {
        if let Some(peer) = self.cached_peer_of(destination, &self.settings) {
            return Some(peer);
        }
        let containing = self.prefixes.iter().filter(|prefix| prefix.contains(destination));
        let peer = containing.max_by_key(|prefix| prefix.length)?.peer;
        match &self.cache {
            Some(cache) if destination.family == u32::from(IPV4) => {
                let version = self.settings.prefixes_version;
                peer_cache::remember(&cache.ipv4, &self.settings, destination.address[0], version, peer);
            }
            Some(cache) => cache.ipv6.borrow_mut().push((destination.address, self.settings.prefixes_version)),
            None => {}
        }
        Some(peer)
    }

    fn cached_peer_of(&self, destination: &Address, settings: &Settings) -> Option<u32> {
        let cache = self.cache.as_ref()?;
        if destination.family == u32::from(IPV4) {
            return peer_cache::peer_of(&cache.ipv4, settings, destination.address[0]);
        }
        let version = settings.prefixes_version;
        cache.ipv6.borrow().contains(&(destination.address, version)).then(|| {
            let containing = self.prefixes.iter().filter(|prefix| prefix.contains(destination));
            containing.max_by_key(|prefix| prefix.length).map(|prefix| prefix.peer)
        })?
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
        self.field(at)
    }

    fn rules_of_mark(&self, mark: u32) -> Option<u64> {
        self.field(mark).map(|set| set.rules.get())
    }

    fn rules_of_source(&self, source: &Address) -> u64 {
        self.field(source.address[0]).map_or(0, |set| set.rules.get())
    }

    fn rules_of_destination(&self, destination: &Address) -> u64 {
        self.field(destination.address[0]).map_or(0, |set| set.rules.get())
    }

    fn rule_tunnels(&self, rule: u32, peer: u32) -> u32 {
        self.rule_tunnels.get((rule * 4 + peer) as usize).copied().unwrap_or(0)
    }
}
