//! Compares the tables with a naive check of each rule; tests the steps from rules to other rules.

use std::net::IpAddr;

use ecmpvpn_common::layout::{Address, Bucket, Load, Path, Peer, RuleSet, Settings, Tunnel, TunnelCounters, TunnelId};
use ecmpvpn_common::packet::{Packet, parse};
use ecmpvpn_common::rules::{NONE, first, marks};
use ecmpvpn_common::shared::Shared;
use ecmpvpn_common::tables::Tables;
use proptest::collection::vec;
use proptest::option::of;
use proptest::prelude::*;
use proptest::sample::select;

use super::*;

fn name(text: &str) -> InterfaceName {
    InterfaceName::new(text).unwrap()
}

/// Two peers; one slot of the first is empty.
fn names() -> TunnelNames {
    vec![vec![Some(name("wg0")), None, Some(name("wg1"))], vec![Some(name("wgc0"))]]
}

const NETS: [&str; 12] = [
    "0.0.0.0/0",
    "10.0.0.0/8",
    "10.10.0.0/16",
    "10.10.0.0/17",
    "10.10.5.0/24",
    "10.20.0.7/32",
    "::/0",
    "fd00::/8",
    "fd00:10::/32",
    "fd00:10::/48",
    "fd00:10::7/128",
    "2001:db8::/32",
];

prop_compose! {
    fn ranges()(ports in vec((select(vec![0u16, 1, 80, 81, 100, 65_535]), 0u16..30), 0..3)) -> Vec<(u16, u16)> {
        ports.into_iter().map(|(low, length)| (low, low.saturating_add(length))).collect()
    }
}

prop_compose! {
    fn rule()(
        src in of(select(&NETS[..])), dst in of(select(&NETS[..])),
        proto in of(select(vec![1u8, 6, 17, 47, 58])), with_ports in any::<bool>(),
        src_ports in ranges(), dst_ports in ranges(), dscp in of(0u8..3), fwmark in of(0u32..3),
        policy in of(select(Policy::ALL)), tunnels in vec(select(vec!["wg0", "wg1", "wgc0"]), 0..3), pin in any::<bool>(),
    ) -> Rule {
        let (src, dst) = (src.map(|net| net.parse::<IpNet>().unwrap()), dst.map(|net| net.parse::<IpNet>().unwrap()));
        let has_ports = with_ports && matches!(proto, Some(6 | 17));
        Rule {
            src,
            dst: dst.filter(|dst| src.is_none_or(|src| src.addr().is_ipv4() == dst.addr().is_ipv4())),
            proto,
            src_ports: if has_ports { src_ports } else { vec![] },
            dst_ports: if has_ports { dst_ports } else { vec![] },
            dscp,
            fwmark,
            policy,
            tunnels: tunnels.into_iter().map(name).collect(),
            pin,
        }
    }
}

/// The fields of a packet, and its bytes.
#[derive(Clone, Debug)]
struct Sent {
    src: IpAddr,
    dst: IpAddr,
    proto: u8,
    ports: Option<(u16, u16)>,
    dscp: u8,
    mark: u32,
    bytes: Vec<u8>,
}

const ADDRESSES: [&str; 7] =
    ["10.10.5.5", "10.10.200.1", "10.20.0.7", "192.0.2.1", "fd00:10::7", "fd00:10:1::1", "2001:db8::5"];

prop_compose! {
    fn packet()(
        src in select(&ADDRESSES[..]), dst in select(&ADDRESSES[..]), proto in select(vec![1u8, 6, 17, 47, 58]),
        sport in select(vec![0u16, 1, 79, 80, 85, 115, 65_535]), dport in select(vec![0u16, 2, 80, 100, 200, 65_535]),
        dscp in 0u8..4, mark in 0u32..4, is_fragment in prop::bool::weighted(0.2),
    ) -> Sent {
        let (src, dst): (IpAddr, IpAddr) = (src.parse().unwrap(), dst.parse().unwrap());
        let dst = if src.is_ipv4() == dst.is_ipv4() { dst } else { src };
        let has_ports = matches!(proto, 6 | 17) && !is_fragment;
        let mut transport = [sport.to_be_bytes(), dport.to_be_bytes()].concat();
        transport.resize(24, 0);
        let bytes = match (src, dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                let flags = if is_fragment { [0x20, 0] } else { [0, 0] };
                let head = [0x45, dscp << 2, 0, 44, 0, 0, flags[0], flags[1], 64, proto, 0, 0];
                [&head[..], &src.octets(), &dst.octets(), &transport].concat()
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                let next = if is_fragment { 44 } else { proto };
                let head = [0x60 | dscp >> 2, (dscp & 3) << 6, 0, 0, 0, 24, next, 64];
                let fragment: &[u8] = if is_fragment { &[proto, 0, 0, 1, 0, 0, 0, 0] } else { &[] };
                [&head[..], &src.octets(), &dst.octets(), fragment, &transport].concat()
            }
            _ => unreachable!("both are of one family"),
        };
        // Ports 0 and 0 mean that there are none.
        let ports = Some((sport, dport)).filter(|ports| has_ports && *ports != (0, 0));
        Sent { src, dst, proto, ports, dscp, mark, bytes }
    }
}

impl Packet for Sent {
    fn load<const N: usize>(&self, offset: u32) -> Option<[u32; N]> {
        self.bytes[..].load(offset)
    }
    fn length(&self) -> u32 {
        self.bytes[..].length()
    }
    fn mark(&self) -> u32 {
        self.mark
    }
}

/// Checks every condition of the rule.
fn meets(rule: &Rule, sent: &Sent) -> bool {
    let port = |ranges: &[(u16, u16)], port: fn((u16, u16)) -> u16| {
        ranges.is_empty()
            || sent.ports.is_some_and(|ports| ranges.iter().any(|(low, high)| (*low..=*high).contains(&port(ports))))
    };
    rule.src.is_none_or(|net| net.contains(&sent.src))
        && rule.dst.is_none_or(|net| net.contains(&sent.dst))
        && rule.proto.is_none_or(|proto| proto == sent.proto)
        && rule.dscp.is_none_or(|dscp| dscp == sent.dscp)
        && rule.fwmark.is_none_or(|mark| mark == sent.mark)
        && port(&rule.src_ports, |ports| ports.0)
        && port(&rule.dst_ports, |ports| ports.1)
}

/// Only the part of the tables that rules need.
struct Looked<'a> {
    tables: &'a RuleTables,
    fields: Vec<RuleSet>,
}

fn longest(prefixes: &BTreeMap<IpNet, u64>, address: &Address) -> u64 {
    let octets: Vec<u8> = address.address.iter().flat_map(|word| word.to_ne_bytes()).collect();
    let address: IpAddr = match address.family {
        4 => <[u8; 4]>::try_from(&octets[..4]).unwrap().into(),
        _ => <[u8; 16]>::try_from(&octets[..]).unwrap().into(),
    };
    let covering = prefixes.iter().filter(|(prefix, _)| prefix.contains(&address));
    covering.max_by_key(|(prefix, _)| prefix.prefix_len()).map_or(0, |(_, rules)| *rules)
}

impl Tables for Looked<'_> {
    fn now(&self) -> u64 {
        0
    }
    fn settings(&self) -> Option<&Settings> {
        None
    }
    fn peer_of(&self, _: &Address) -> Option<u32> {
        None
    }
    fn peer(&self, _: u32) -> Option<&Peer> {
        None
    }
    fn tunnel(&self, _: TunnelId) -> Option<&Tunnel> {
        None
    }
    fn bucket(&self, _: u32) -> Option<&Bucket> {
        None
    }
    fn load(&self, _: TunnelId) -> Option<&Load> {
        None
    }
    fn update_counters<R>(&self, _: TunnelId, _: impl FnOnce(&mut TunnelCounters) -> R) -> Option<R> {
        None
    }

    fn path(&self, _: u32, _: u32) -> Option<&Path> {
        None
    }
    fn rule(&self, _: u32) -> Option<&ecmpvpn_common::layout::Rule> {
        None
    }
    fn rule_field(&self, at: u32) -> Option<&RuleSet> {
        self.fields.get(at as usize)
    }
    fn rules_of_mark(&self, mark: u32) -> Option<u64> {
        self.tables.marks.get(&mark).copied()
    }
    fn rules_of_source(&self, source: &Address) -> u64 {
        longest(&self.tables.sources, source)
    }
    fn rules_of_destination(&self, destination: &Address) -> u64 {
        longest(&self.tables.destinations, destination)
    }
    fn rule_tunnels(&self, _: u32, _: u32) -> u32 {
        0
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn the_tables_find_the_first_rule_that_a_packet_meets(rules in vec(rule(), 1..=64), packets in vec(packet(), 50)) {
        let names = names();
        let placed = place(&rules).unwrap();
        let tables = RuleTables::of(&placed, &names);
        let fields = tables.fields.iter().map(|set| RuleSet { rules: Shared::new(*set) }).collect();
        let looked = Looked { tables: &tables, fields };
        for sent in packets {
            let key = parse(&sent).unwrap().key;
            for (peer, of_peer) in names.iter().enumerate() {
                let applies = |rule: &Rule| {
                    rule.tunnels.is_empty() || of_peer.iter().flatten().any(|name| rule.tunnels.contains(name))
                };
                let naive = placed.iter().find(|placed| applies(&placed.rule) && meets(&placed.rule, &sent));
                let found = first(&looked, &key, marks(&sent), tables.peers[peer]);
                prop_assert_eq!(found, naive.map_or(NONE, |placed| placed.bit), "{:?} of {:?}", sent, placed);
            }
        }
    }

    #[test]
    fn the_tables_say_what_the_rules_were(rules in vec(rule(), 0..=64)) {
        let names = names();
        let placed = place(&rules).unwrap();
        let shown = RuleTables::of(&placed, &names).rules(&names);
        prop_assert_eq!(shown.iter().map(|shown| shown.bit).collect::<Vec<_>>(), placed.iter().map(|p| p.bit).collect::<Vec<_>>());
        for (shown, placed) in shown.iter().zip(&placed) {
            prop_assert_eq!(&shown.rule, &canonical(&placed.rule, &names));
        }
    }

    #[test]
    fn each_step_is_valid_and_the_last_is_the_desired_list(
        first in vec(0u32..40, 0..=64), edits in vec((any::<bool>(), any::<prop::sample::Index>(), 0u32..40), 1..80),
    ) {
        let rule = |mark: u32| Rule { fwmark: Some(mark), ..Rule::default() };
        let mut now = place(&first.into_iter().map(rule).collect::<Vec<_>>()).unwrap();
        for (adds, at, mark) in edits {
            let before: Vec<Rule> = now.iter().map(|placed| placed.rule.clone()).collect();
            let mut desired = before.clone();
            if adds {
                desired.insert(at.index(desired.len() + 1), rule(mark));
            } else if !desired.is_empty() {
                desired.remove(at.index(desired.len()));
            }
            if desired.len() > 64 {
                prop_assert_eq!(steps(&now, &desired), Err(TooManyRules { count: 65 }));
                continue;
            }
            for step in steps(&now, &desired).unwrap() {
                prop_assert!(step.windows(2).all(|pair| pair[0].bit < pair[1].bit), "{step:?}");
                prop_assert!(step.iter().all(|placed| placed.bit < 64));
                let reused = |placed: &&Placed| now.iter().any(|old| old.bit == placed.bit && old.rule != placed.rule);
                prop_assert_eq!(step.iter().find(reused), None);
                let order: Vec<Rule> = step.iter().map(|placed| placed.rule.clone()).collect();
                prop_assert!(order == before || order == desired, "{order:?}");
                now = step;
            }
            prop_assert_eq!(now.iter().map(|placed| placed.rule.clone()).collect::<Vec<_>>(), desired);
        }
    }
}

#[test]
fn a_rule_in_front_leaves_the_others_their_bits() {
    let rule = |mark: u32| Rule { fwmark: Some(mark), ..Rule::default() };
    let mut now = place(&[rule(100), rule(101)]).unwrap();
    let bits = |placed: &[Placed]| placed.iter().map(|placed| placed.bit).collect::<Vec<_>>();
    let behind = bits(&now);
    for mark in 0..8 {
        let desired: Vec<Rule> =
            std::iter::once(rule(mark)).chain(now.iter().map(|placed| placed.rule.clone())).collect();
        let steps = steps(&now, &desired).unwrap();
        assert_eq!(steps.len(), 1);
        now = steps.into_iter().last().unwrap();
        assert!(bits(&now).ends_with(&behind), "{:?}", bits(&now));
    }
}

#[test]
fn a_different_list_is_put_in_beside_the_rules_in_force() {
    let rules = |marks: std::ops::Range<u32>| {
        marks.map(|mark| Rule { fwmark: Some(mark), ..Rule::default() }).collect::<Vec<_>>()
    };
    let now = place(&rules(0..30)).unwrap();
    assert_eq!(steps(&now, &rules(100..130)).unwrap().last().unwrap().len(), 30);
    // Both sets together do not fit: the former rules are removed first.
    let both = steps(&now, &rules(100..140)).unwrap();
    assert_eq!((both[0].len(), both.last().unwrap().len()), (0, 40));
}

#[test]
fn spraying_another_protocol_than_tcp_has_to_be_asked_for() {
    let flags = |proto, policy, pin| {
        let (src_ports, dst_ports, tunnels) = (vec![], vec![], vec![]);
        let (src, dst, dscp, fwmark) = (None, None, None, None);
        let rule = Rule { src, dst, proto, src_ports, dst_ports, dscp, fwmark, policy, tunnels, pin };
        RuleTables::of(&[Placed { bit: 3, rule }], &names()).records[3].1
    };
    assert_eq!(flags(Some(17), Some(Policy::Spray), false), rule_flags::SPRAY_ANY);
    assert_eq!(flags(None, Some(Policy::Spray), false), 0, "no protocol named");
    assert_eq!(flags(Some(17), None, false), 0, "the peer's policy");
    assert_eq!(flags(Some(17), Some(Policy::Adaptive), true), rule_flags::PREFER);
}
