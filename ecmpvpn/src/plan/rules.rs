//! Converts rules to the form of the steering maps, and back: the maps alone say which rules are in force. No I/O here.
//!
//! A rule is a bit in the maps. The lowest bit that matches a packet applies. Bits are placed far apart at first, so
//! that a rule can be inserted between two others without moving them: a flow's bucket depends on the bit of its rule.

mod place;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};

use ecmpvpn_common::layout::{MAX_PEERS, MAX_RULES, PEERS_OWN, rule_fields, rule_flags};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::config::{InterfaceName, Policy, Rule};

pub use place::{TooManyRules, place, steps};

/// A rule and its bit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placed {
    /// 0 to 63; the lower bit comes first.
    pub bit: u32,
    pub rule: Rule,
}

/// Names of tunnels by peer and slot. `None`: the slot is empty.
pub type TunnelNames = Vec<Vec<Option<InterfaceName>>>;

/// Content of the rules' maps. Each `u64` is a set of rules, by bit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleTables {
    /// Indexed by [`rule_fields`].
    pub fields: Vec<u64>,
    /// By source prefix. Each entry also has the rules of all prefixes that contain it.
    pub sources: BTreeMap<IpNet, u64>,
    /// By destination prefix, in the same way.
    pub destinations: BTreeMap<IpNet, u64>,
    /// By firewall mark. Each entry also has the rules without a mark.
    pub marks: BTreeMap<u32, u64>,
    /// Policy and flags of each rule.
    pub records: Vec<(u32, u32)>,
    /// Allowed tunnels, by rule and peer; a bit for each slot.
    pub tunnels: Vec<u32>,
    /// Rules that apply to each peer.
    pub peers: Vec<u64>,
}

/// Length of [`RuleTables::tunnels`].
const TUNNEL_MASKS: usize = (MAX_RULES * MAX_PEERS) as usize;
/// Number of ports in [`rule_fields`].
const PORTS: usize = 1 << 16;

/// Returns the source or destination port ranges of a rule.
type Ranges = fn(&Rule) -> &Vec<(u16, u16)>;

impl RuleTables {
    /// Tables without rules.
    pub fn empty(peers: usize) -> Self {
        Self {
            fields: vec![0; rule_fields::COUNT as usize],
            sources: BTreeMap::new(),
            destinations: BTreeMap::new(),
            marks: BTreeMap::new(),
            records: vec![(0, 0); MAX_RULES as usize],
            tunnels: vec![0; TUNNEL_MASKS],
            peers: vec![0; peers],
        }
    }

    /// Tables of `rules`, whose tunnels are among `names`. A rule that names tunnels applies only to the peers of these
    /// tunnels.
    pub fn of(rules: &[Placed], names: &TunnelNames) -> Self {
        let mut tables = Self::empty(names.len());
        if rules.is_empty() {
            return tables;
        }
        let set = |rules: &[Placed], meets: &dyn Fn(&Rule) -> bool| -> u64 {
            rules.iter().filter(|placed| meets(&placed.rule)).fold(0, |set, placed| set | 1 << placed.bit)
        };
        for protocol in 0..=u8::MAX {
            let at = rule_fields::PROTOCOL as usize + usize::from(protocol);
            tables.fields[at] = set(rules, &|rule| rule.proto.is_none_or(|proto| proto == protocol));
        }
        for dscp in 0..64u8 {
            let at = rule_fields::DSCP as usize + usize::from(dscp);
            tables.fields[at] = set(rules, &|rule| rule.dscp.is_none_or(|asked| asked == dscp));
        }
        let any_mark = set(rules, &|rule| rule.fwmark.is_none());
        tables.fields[rule_fields::NO_MARK as usize] = any_mark;
        for mark in rules.iter().filter_map(|placed| placed.rule.fwmark) {
            tables.marks.insert(mark, any_mark | set(rules, &|rule| rule.fwmark == Some(mark)));
        }
        tables.fields[rule_fields::NO_PORTS as usize] =
            set(rules, &|rule| rule.src_ports.is_empty() && rule.dst_ports.is_empty());
        let ranges: [(u32, Ranges); 2] = [
            (rule_fields::SOURCE_PORT, |rule| &rule.src_ports),
            (rule_fields::DESTINATION_PORT, |rule| &rule.dst_ports),
        ];
        for (first, ranges) in ranges {
            let ports = &mut tables.fields[first as usize..][..PORTS];
            ports.fill(set(rules, &|rule| ranges(rule).is_empty()));
            for placed in rules {
                for (low, high) in ranges(&placed.rule) {
                    ports[usize::from(*low)..=usize::from(*high)].iter_mut().for_each(|port| *port |= 1 << placed.bit);
                }
            }
        }
        tables.sources = prefixes(rules, |rule| rule.src);
        tables.destinations = prefixes(rules, |rule| rule.dst);
        for placed in rules {
            tables.add(placed, names);
        }
        tables
    }

    /// Adds what applies to the packets of a rule: policy, flags, allowed tunnels, and the peers.
    fn add(&mut self, Placed { bit, rule }: &Placed, names: &TunnelNames) {
        let pin = if rule.pin { rule_flags::PREFER } else { 0 };
        // Whoever names the protocol of what is to be sprayed has asked for it.
        let sprays_any = rule.policy == Some(Policy::Spray) && rule.proto.is_some();
        let flags = pin | if sprays_any { rule_flags::SPRAY_ANY } else { 0 };
        self.records[*bit as usize] = (rule.policy.map_or(PEERS_OWN, Policy::number), flags);
        for (peer, names) in names.iter().enumerate() {
            let is_allowed =
                |name: &Option<InterfaceName>| name.as_ref().is_some_and(|name| rule.tunnels.contains(name));
            let mask = if rule.tunnels.is_empty() {
                u32::MAX
            } else {
                names
                    .iter()
                    .enumerate()
                    .filter(|(_, name)| is_allowed(name))
                    .fold(0, |mask, (slot, _)| mask | 1 << slot)
            };
            self.tunnels[*bit as usize * MAX_PEERS as usize + peer] = mask;
            if mask != 0 {
                self.peers[peer] |= 1 << bit;
            }
        }
    }

    /// The rules, in order, in [`canonical`] form.
    pub fn rules(&self, names: &TunnelNames) -> Vec<Placed> {
        let used = self.peers.iter().fold(0, |used, rules| used | rules);
        let is_used = |bit: &u32| used >> bit & 1 == 1;
        (0..MAX_RULES).filter(is_used).map(|bit| Placed { bit, rule: self.rule(bit, names) }).collect()
    }

    fn rule(&self, bit: u32, names: &TunnelNames) -> Rule {
        let has = |set: u64| set >> bit & 1 == 1;
        let field = |at: u32| has(self.fields[at as usize]);
        let only = |all: Vec<u8>, of: usize| if all.len() == of { None } else { all.first().copied() };
        let ports = |first: u32| {
            let mut ranges: Vec<(u16, u16)> = Vec::new();
            for port in (0..=u16::MAX).filter(|port| field(first + u32::from(*port))) {
                match ranges.last_mut() {
                    Some((_, high)) if *high + 1 == port => *high = port,
                    _ => ranges.push((port, port)),
                }
            }
            ranges
        };
        let portless = field(rule_fields::NO_PORTS);
        let (record, flags) = self.records[bit as usize];
        let mut tunnels = Vec::new();
        let mask = |peer: usize| self.tunnels[bit as usize * MAX_PEERS as usize + peer];
        if (0..names.len()).any(|peer| mask(peer) != u32::MAX) {
            for (peer, names) in names.iter().enumerate() {
                let allowed = names.iter().enumerate().filter(|(slot, _)| mask(peer) >> slot & 1 == 1);
                tunnels.extend(allowed.filter_map(|(_, name)| name.clone()));
            }
        }
        simplified(Rule {
            src: prefix_of(&self.sources, bit),
            dst: prefix_of(&self.destinations, bit),
            proto: only((0..=255).filter(|proto| field(rule_fields::PROTOCOL + u32::from(*proto))).collect(), 256),
            src_ports: if portless { Vec::new() } else { ports(rule_fields::SOURCE_PORT) },
            dst_ports: if portless { Vec::new() } else { ports(rule_fields::DESTINATION_PORT) },
            dscp: only((0..64).filter(|dscp| field(rule_fields::DSCP + u32::from(*dscp))).collect(), 64),
            fwmark: if field(rule_fields::NO_MARK) {
                None
            } else {
                self.marks.iter().find(|(_, rules)| has(**rules)).map(|(mark, _)| *mark)
            },
            policy: Policy::of(record),
            tunnels,
            pin: flags & rule_flags::PREFER != 0,
        })
    }
}

/// The same rule as read back from the maps: ports sorted and without overlap, tunnels in the order of the peers'
/// slots.
pub fn canonical(rule: &Rule, names: &TunnelNames) -> Rule {
    let merged = |ranges: &[(u16, u16)]| {
        let mut ranges = ranges.to_vec();
        ranges.sort_unstable();
        let mut merged: Vec<(u16, u16)> = Vec::new();
        for (low, high) in ranges {
            match merged.last_mut() {
                Some((_, last)) if u32::from(low) <= u32::from(*last) + 1 => *last = high.max(*last),
                _ => merged.push((low, high)),
            }
        }
        merged
    };
    let all = names.iter().flatten().flatten();
    simplified(Rule {
        src_ports: merged(&rule.src_ports),
        dst_ports: merged(&rule.dst_ports),
        tunnels: all.filter(|name| rule.tunnels.contains(name)).cloned().collect(),
        ..rule.clone()
    })
}

/// Removes a condition "all ports" that adds nothing. If it alone separates packets with ports from others, it stays on
/// the source side.
fn simplified(mut rule: Rule) -> Rule {
    const ALL: (u16, u16) = (0, u16::MAX);
    if rule.src_ports == [ALL] && !rule.dst_ports.is_empty() && rule.dst_ports != [ALL] {
        rule.src_ports.clear();
    } else if rule.dst_ports == [ALL] && rule.src_ports.is_empty() {
        std::mem::swap(&mut rule.src_ports, &mut rule.dst_ports);
    } else if rule.dst_ports == [ALL] {
        rule.dst_ports.clear();
    }
    rule
}

/// The set of rules that match each prefix: for all prefixes in rules, and for each address family as a whole.
fn prefixes(rules: &[Placed], asked: impl Fn(&Rule) -> Option<IpNet>) -> BTreeMap<IpNet, u64> {
    let desired = rules.iter().filter_map(|placed| asked(&placed.rule)).chain(all_addresses());
    let met = |prefix: IpNet| {
        let meets = |placed: &&Placed| asked(&placed.rule).is_none_or(|asked| asked.contains(&prefix));
        rules.iter().filter(meets).fold(0, |set, placed| set | 1 << placed.bit)
    };
    desired.map(|prefix| (prefix, met(prefix))).filter(|(_, rules)| *rules != 0).collect()
}

/// The nets that contain all addresses of a family.
fn all_addresses() -> [IpNet; 2] {
    [Ipv4Net::new_assert(Ipv4Addr::UNSPECIFIED, 0).into(), Ipv6Net::new_assert(Ipv6Addr::UNSPECIFIED, 0).into()]
}

/// The prefix of a rule: the shortest one whose set contains it. `None`: the rule has no prefix.
fn prefix_of(prefixes: &BTreeMap<IpNet, u64>, bit: u32) -> Option<IpNet> {
    let mut met = prefixes.iter().filter(|(_, rules)| *rules >> bit & 1 == 1).map(|(prefix, _)| *prefix);
    if all_addresses().iter().all(|all| prefixes.get(all).is_some_and(|rules| rules >> bit & 1 == 1)) {
        return None;
    }
    let first = met.next()?;
    Some(
        met.fold(first, |shortest, prefix| if prefix.prefix_len() < shortest.prefix_len() { prefix } else { shortest }),
    )
}
