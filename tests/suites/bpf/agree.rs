//! Compares BPF with the host's build of the same code, on random and mutated packets.

use std::collections::BTreeMap;

use anyhow::{Context as _, ensure};
use ecmpvpn::config::{InterfaceName, Policy, Rule};
use ecmpvpn::dataplane::{Options, RuleMaps};
use ecmpvpn::plan::rules::{Placed, TunnelNames, canonical, steps};
use ecmpvpn_common::flow::{fields, mix};
use ecmpvpn_common::layout::{
    BUCKETS_PER_PEER, Bucket, Load, Reason, TunnelId, bucket_flags, bucket_seen, how, peer_flags, rule_flags,
};
use ecmpvpn_common::load::cost_of_rate;
use ecmpvpn_common::packet::parse;
use ecmpvpn_common::rules::{NONE, first, marks};
use ecmpvpn_common::tables::Tables as _;
use ipnet::IpNet;
use rustix::thread::{CpuSet, sched_getcpu, sched_setaffinity};

use super::build::{ICMP, ICMPV6, TCP, UDP, V4, extension, fragment, icmp, tcp, udp, v6};
use super::model::{Marked, Model};
use super::rig::{Outcome, Rig, table};

const PACKETS: u32 = 150_000;
/// The seed of the configuration without rules, which tests the fast path.
const QUICK: u64 = 5;

/// Deterministic random numbers.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % bound as u64).expect("below a usize")
    }

    pub fn one_in(&mut self, odds: usize) -> bool {
        self.below(odds) == 0
    }

    pub fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }

    fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[0]
    }

    fn word(&mut self) -> u32 {
        u32::from_le_bytes(self.next().to_le_bytes()[..4].try_into().expect("four bytes"))
    }

    pub fn port(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    fn bytes(&mut self, length: usize) -> Vec<u8> {
        (0..length).map(|_| self.byte()).collect()
    }
}

pub const V4_ADDRESSES: [&str; 9] = [
    "10.20.1.2",
    "10.20.30.40",
    "10.20.255.1",
    "10.30.0.1",
    "10.100.0.1",
    "192.0.2.1",
    "224.0.0.5",
    "169.254.1.1",
    "255.255.255.255",
];
pub const V6_ADDRESSES: [&str; 8] = [
    "fd00:20::1",
    "fd00:20:0:9::7",
    "fd00:20:0:8:1:2:3:4",
    "fd00:30::1",
    "fd00:100::1",
    "2001:db8::1",
    "ff02::1",
    "fe80::1",
];

/// A transport header with some data. Sometimes an ICMP error that quotes another packet.
fn transport(random: &mut Random, protocol: u8, depth: u32) -> Vec<u8> {
    let data = random.below(64);
    match protocol {
        TCP => tcp(random.port(), random.port(), data),
        ICMP | ICMPV6 if depth == 0 && random.one_in(2) => {
            let quote = packet(random, protocol == ICMP, 1);
            let kind = if protocol == ICMP { random.of(&[3, 4, 5, 11, 12]) } else { random.of(&[1, 2, 3, 4]) };
            let length = if random.one_in(2) { quote.len() } else { random.below(quote.len() + 1) };
            icmp(kind, random.word(), &quote[..length])
        }
        ICMP => icmp(random.of(&[0, 8, 13, 14]), random.word(), &[]),
        ICMPV6 => icmp(random.of(&[128, 129, 135]), random.word(), &[]),
        UDP | 33 | 132 | 136 => udp(random.port(), random.port(), data),
        47 => {
            let flags = random.of(&[0, 0x20, 0x80, 0xa0, 0x60]);
            [vec![flags, random.of(&[0, 1]), 8, 0], random.bytes(12)].concat()
        }
        _ => random.bytes(data + 8),
    }
}

fn packet(random: &mut Random, is_v4: bool, depth: u32) -> Vec<u8> {
    if is_v4 {
        let protocol = random.of(&[TCP, UDP, TCP, UDP, ICMP, ICMP, 33, 47, 50, 51, 58, 132, 136, 89]);
        let payload = transport(random, protocol, depth);
        let header = V4 {
            src: random.of(&V4_ADDRESSES),
            dst: random.of(&V4_ADDRESSES),
            options: if random.one_in(4) { random.below(11) } else { 0 },
            fragment: if random.one_in(5) { random.port() } else { random.of(&[0, 0x4000]) },
        };
        let mut packet = header.with(protocol, &payload);
        // The byte of DSCP (upper 6 bits) and ECN (lower 2 bits).
        packet[1] = random.of(&[0, 1, 46 << 2]);
        return packet;
    }
    let mut next = random.of(&[TCP, UDP, TCP, UDP, ICMPV6, ICMPV6, 33, 47, 50, 51, 59, 132, 136, 1]);
    let mut payload = transport(random, next, depth);
    if random.one_in(2) {
        for _ in 0..random.below(9) {
            if random.one_in(4) {
                let offset = if random.one_in(2) { random.of(&[0, 6]) } else { random.port() };
                payload = fragment(next, offset, &payload);
                next = 44;
            } else {
                let more = if random.one_in(8) { random.below(40) } else { random.below(3) };
                payload = extension(next, u8::try_from(more).expect("below 40"), &payload);
                next = random.of(&[0, 43, 60]);
            }
        }
    }
    let mut packet = v6(random.of(&V6_ADDRESSES), random.of(&V6_ADDRESSES), next, &payload);
    // Traffic class and flow label.
    packet[1..4].copy_from_slice(&random.bytes(3));
    packet
}

/// A packet: whole, truncated, or with flipped bits. Sometimes plain noise.
fn mutated(random: &mut Random) -> Vec<u8> {
    if random.one_in(40) {
        let length = 1 + random.below(120);
        return random.bytes(length);
    }
    let is_v4 = random.one_in(2);
    let mut packet = packet(random, is_v4, 0);
    if random.one_in(4) {
        packet.truncate(1 + random.below(packet.len()));
    }
    if random.one_in(4) {
        for _ in 0..=random.below(8) {
            // Flips bits mostly in the headers.
            let end = if random.one_in(4) { packet.len() } else { packet.len().min(64) };
            let at = random.below(end);
            packet[at] ^= 1 << random.below(8);
        }
    }
    packet.truncate(1400);
    packet
}

/// Keeps this thread on one CPU. Each CPU counts separately what it sent to a tunnel, but the model has only one count.
fn stay_on_one_cpu() -> anyhow::Result<()> {
    let mut one = CpuSet::new();
    one.set(sched_getcpu());
    sched_setaffinity(None, &one).context("staying on one CPU")
}

pub fn bpf_and_host_agree() -> anyhow::Result<()> {
    stay_on_one_cpu()?;
    let configurations = [
        (0x1f2e_3d4c, fields::FIVE_TUPLE, false),
        (u64::MAX, fields::FIVE_TUPLE, true),
        (0, fields::ALL, false),
        (7, fields::SRC_IP | fields::DST_IP | fields::IP_PROTO, true),
        // Without rules, and with flows of many packets: tests the fast path.
        (QUICK, fields::FIVE_TUPLE, false),
    ];
    let mut random = Random(42);
    let (mut seen, mut ways, mut met, mut ruled, mut fast) = (BTreeMap::new(), BTreeMap::new(), 0, 0, [0, 0]);
    let (mut ordered, mut asked) = (0, 0);
    let mut recent: Vec<Vec<u8>> = vec![vec![0x45]; 64];
    for (seed, hash_fields, symmetric) in configurations {
        let table = table(seed);
        let mut rig = Rig::new(&table, &Options { hash_fields, symmetric, ..Options::default() })?;
        let mut model = Model::new(&table, hash_fields, symmetric);
        let (mut rule_maps, names) = (RuleMaps::open(&rig.pins)?, rig.view.tunnel_names()?);
        let mut in_force = Vec::new();
        for (index, home) in (0..).zip(model.bucket_homes()) {
            ensure!(rig.view.bucket(index) == Some((home, home)), "the home of bucket {index} is not {home}");
        }
        rig.now = 5_000_000_000;
        for round in 0..PACKETS / 5 {
            if round % 250 == 249 {
                shake(&mut random, &rig, &model, seed == QUICK)?;
            }
            if round % 3000 == 2999 && seed != QUICK {
                let desired = rules(&mut random, &in_force, &names);
                for step in steps(&in_force, &desired)? {
                    rule_maps.change(&rig.view, &names, &in_force, &step)?;
                    in_force = step;
                }
                model.set_rules(&in_force, &names);
                let description = rule_maps.read(&rig.view)?.rules(&names);
                ensure!(description == in_force, "the maps say {description:?}, in force are {in_force:?}");
            }
            // Sometimes the time jumps so far that flows are forgotten.
            rig.now += match random.below(2000) {
                0 => 1_500_000_000,
                1..20 => 40_000_000,
                _ => random.next() % 400_000,
            };
            model.now.set(rig.now);
            // Repeats earlier packets, so that flows have more than one packet.
            let at = random.below(recent.len());
            if random.one_in(if seed == QUICK { 8 } else { 2 }) {
                recent[at] = mutated(&mut random);
            }
            let packet = recent[at].clone();
            rig.mark = random.of(&[0, 0, 1, 7]);
            let (bpf, host) = (rig.egress(&packet, (0, 0))?, model.outcome(&packet, rig.mark));
            met += usize::from(rule_of(&model, &packet, rig.mark).is_some());
            asked += usize::from(may_be_sprayed(&model, &packet, rig.mark, bpf)?);
            ensure!(bpf == host, "packet {round} of seed {seed}: BPF {bpf:?}, host {host:?}: {packet:02x?}");
            let kind = match bpf {
                Outcome::Steered { tunnel, how, .. } => {
                    *ways.entry(how).or_insert(0) += 1;
                    format!("tunnel {tunnel}")
                }
                Outcome::Refused(reason) => Reason::ALL[reason as usize].name().to_owned(),
            };
            *seen.entry(kind).or_insert(0) += 1;
        }
        the_records_agree(&rig, &model)?;
        ruled += rig.view.buckets(0).iter().filter(|bucket| bucket.seen.get() & bucket_seen::RULED != 0).count();
        ordered += rig.view.buckets(0).iter().filter(|bucket| bucket.seen.get() & bucket_seen::ORDERED != 0).count();
        (0..2).for_each(|way| fast[way] += rig.fast[way]);
    }
    println!("{PACKETS} packets: {seen:?}; how: {ways:?}; {met} met a rule; fast path (chose, stayed): {fast:?}");
    ensure!(fast.iter().all(|packets| *packets > 500), "hardly any packet took the fast path: {fast:?}");
    ensure!(met > 1000, "hardly any packet met a rule");
    ensure!((1..=met).contains(&ruled), "{ruled} buckets are marked for the rules that {met} packets met");
    ensure!(ordered > 1000 && asked > 100, "{ordered} buckets must stay in order, {asked} packets sprayed by a rule");
    // The generator must reach every result that a packet alone can cause.
    for kind in ["tunnel 0", "tunnel 1", "tunnel 2", "tunnel 32", "tunnel 33", "not_ip", "truncated", "multicast"] {
        ensure!(seen.get(kind).is_some_and(|count| *count > 100), "hardly any packet met {kind}: {seen:?}");
    }
    for kind in ["link_local", "no_peer", "no_live_tunnel"] {
        ensure!(seen.get(kind).is_some_and(|count| *count > 100), "hardly any packet met {kind}: {seen:?}");
    }
    for way in [0, how::FAILOVER, how::FLOWLET, how::SPRAYED] {
        ensure!(ways.get(&way).is_some_and(|count| *count > 100), "hardly any packet came by way {way}: {ways:?}");
    }
    ensure!(!seen.contains_key("bad_table"), "{seen:?}");
    Ok(())
}

/// Checks that a sprayed packet is TCP, or that its rule names its protocol. Returns whether a rule asked for it.
fn may_be_sprayed(model: &Model, packet: &[u8], mark: u32, found: Outcome) -> anyhow::Result<bool> {
    let Outcome::Steered { how: how::SPRAYED, .. } = found else { return Ok(false) };
    let parsed = parse(packet).map_err(|reason| anyhow::anyhow!("sprayed, and refused as {}", reason.name()))?;
    let is_tcp = parsed.transport.protocol == TCP && parsed.key.sport | parsed.key.dport != 0;
    let rule = rule_of(model, packet, mark).and_then(|rule| model.rule(rule));
    let asked = rule.is_some_and(|rule| rule.flags.get() & rule_flags::SPRAY_ANY != 0);
    ensure!(is_tcp || asked, "sprayed, and no TCP: {packet:02x?}");
    Ok(!is_tcp)
}

/// The first rule that a packet matches.
fn rule_of(model: &Model, packet: &[u8], mark: u32) -> Option<u32> {
    let packet = Marked { packet, mark };
    let parsed = parse(&packet).ok()?;
    let among = model.peer_record(model.peer_of(&parsed.destination)?).rules.get();
    Some(first(model, &parsed.outer(), marks(&packet), among)).filter(|rule| *rule != NONE)
}

/// Rules that differ from those in force: one more, one less, all new, or none.
fn rules(random: &mut Random, in_force: &[Placed], names: &TunnelNames) -> Vec<Rule> {
    let mut rules: Vec<Rule> = in_force.iter().map(|placed| placed.rule.clone()).collect();
    match random.below(4) {
        0 if !rules.is_empty() => drop(rules.remove(random.below(rules.len()))),
        1 => rules = (0..random.of(&[3, 12, 30])).map(|_| rule(random, names)).collect(),
        _ if rules.len() < 64 => rules.insert(random.below(rules.len() + 1), rule(random, names)),
        _ => rules.clear(),
    }
    rules
}

pub fn rule(random: &mut Random, names: &TunnelNames) -> Rule {
    const NETS: [&str; 9] = [
        "10.20.0.0/16",
        "10.20.30.0/24",
        "10.20.1.2/32",
        "0.0.0.0/0",
        "192.0.2.0/24",
        "fd00::/16",
        "fd00:20:0:9::/64",
        "::/0",
        "2001:db8::1/128",
    ];
    let net = |random: &mut Random| random.one_in(2).then(|| random.of(&NETS).parse().expect("a net"));
    let (src, dst): (Option<IpNet>, Option<IpNet>) = (net(random), net(random));
    let proto = random.of(&[None, None, Some(TCP), Some(UDP), Some(ICMP), Some(ICMPV6), Some(47)]);
    let ports = |random: &mut Random| {
        let (a, b) = (random.port(), random.port());
        if matches!(proto, Some(TCP | UDP)) && random.one_in(2) { vec![(a.min(b), a.max(b))] } else { Vec::new() }
    };
    let (src_ports, dst_ports) = (ports(random), ports(random));
    let all: Vec<InterfaceName> = names.iter().flatten().flatten().cloned().collect();
    let tunnels = (0..random.below(3)).map(|_| all[random.below(all.len())].clone()).collect();
    let rule = Rule {
        src,
        dst: dst.filter(|dst| src.is_none_or(|src| src.addr().is_ipv4() == dst.addr().is_ipv4())),
        proto,
        src_ports,
        dst_ports,
        dscp: random.of(&[None, None, Some(0), Some(46)]),
        fwmark: random.of(&[None, None, Some(0), Some(1), Some(7)]),
        policy: random.of(&[None, Some(Policy::Hash), Some(Policy::Flowlet), Some(Policy::Spray)]),
        tunnels,
        pin: random.one_in(3),
    };
    canonical(&rule, names)
}

/// Changes in both sets of tables what the daemon and its user change while traffic flows. With `steady`, most flows
/// keep their tunnel.
fn shake(random: &mut Random, rig: &Rig, model: &Model, steady: bool) -> anyhow::Result<()> {
    let (number, slot) = random.of(&[(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]);
    let (live, open) = (!random.one_in(if steady { 8 } else { 2 }), random.one_in(2));
    rig.view.set_live(TunnelId::new(number, slot), live).context("a tunnel of the table")?;
    model.set_live(number, slot, live);
    let peer = random.of(&[0, 1]);
    let gaps = if steady {
        [5_000_000, 50_000_000, 50_000_000, 500_000_000]
    } else {
        [100_000, 5_000_000, 50_000_000, 500_000_000]
    };
    let (policy, gap) = (random.of(&[0, 1, 2, 3]), random.of(&gaps));
    let flags = random.of(&[0, 0, peer_flags::UNMARK, peer_flags::UNMARK | peer_flags::STAMP]);
    for peer in [rig.view.peer(peer).context("a peer")?, model.peer_record(peer)] {
        peer.policy.set(policy);
        peer.flags.set(flags);
        peer.gap_ns.set(gap);
    }
    for peer in [rig.view.peer(number).context("a peer")?, model.peer_record(number)] {
        peer.open.set_bits(1 << slot, open);
    }
    let id = TunnelId::new(number, slot);
    let (cost, delay) = (cost_of_rate(random.of(&[5_000_000, 20_000_000, 10_000_000_000])), random.of(&[0, 5_000_000]));
    for load in [rig.view.load(id).context("a load")?, model.load_record(id)] {
        load.cost.set(cost);
        load.weighted_cost.set(cost / 2);
        load.delay_ns.set(delay);
    }
    // Tunnels 0 and 1 of the first peer share a link or have separate links.
    let shared = random.one_in(2);
    for i in 0..2 {
        let (of_rig, of_model) = (rig.view.paths(0).get(i as usize).context("a path")?, model.path_record(i));
        for path in [of_rig, of_model] {
            path.tunnels.set(if shared { [0b11, 0][i as usize] } else { 1 << i });
        }
    }
    for load in [rig.view.load(TunnelId::new(0, 1)).context("a load")?, model.load_record(TunnelId::new(0, 1))] {
        load.link.set(u32::from(!shared));
    }
    let (bucket, flags) =
        (random.word() & (BUCKETS_PER_PEER - 1), random.of(&[0, bucket_flags::SPRAY, bucket_flags::WHOLE]));
    for bucket in [&rig.view.buckets(0)[bucket as usize], model.bucket_record(bucket)] {
        bucket.flags.set(flags);
    }
    Ok(())
}

/// Checks that all records that decisions change are the same in BPF and in the model.
fn the_records_agree(rig: &Rig, model: &Model) -> anyhow::Result<()> {
    for id in [0, 1, 2, 32, 33].map(TunnelId::from_number) {
        let words = |load: &Load| (load.free_ns.get(), load.level_ns.get(), load.stamp_ns.get());
        let (bpf, host) = (words(rig.view.load(id).context("a load")?), words(model.load_record(id)));
        ensure!(bpf == host, "load of {id:?}: BPF {bpf:?}, host {host:?}");
    }
    for (index, bucket) in (0..).zip(rig.view.buckets(0).iter().chain(rig.view.buckets(1))) {
        let words =
            |bucket: &Bucket| (bucket.last_ns.get(), bucket.bytes.get(), bucket.tunnel.get(), bucket.seen.get());
        let (bpf, host) = (words(bucket), words(model.bucket_record(index)));
        ensure!(bpf == host, "bucket {index}: BPF {bpf:?}, host {host:?}");
    }
    Ok(())
}
