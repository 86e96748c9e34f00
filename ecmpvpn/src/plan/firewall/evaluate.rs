//! Whether a chain can drop a packet. Rules are followed as far as they are understood. A rule of which it is not known
//! whether it holds accepts nothing, and drops nothing by itself; where it jumps, both ways are followed.

use std::collections::BTreeMap;

use super::packet::Packet;
use super::ruleset::{Chain, Element, Operator, Ruleset, Set, Step, Verdict};

/// The kernel's own limit of nested jumps. Source: `NFT_JUMP_STACK_SIZE`, `include/net/netfilter/nf_tables.h`.
const DEPTH: usize = 16;

/// How a chain may end for a packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fates {
    /// A rule drops it.
    pub drops: bool,
    /// No rule decides.
    pub falls: bool,
}

impl Fates {
    const fn or(self, other: Self) -> Self {
        Self { drops: self.drops || other.drops, falls: self.falls || other.falls }
    }
}

/// How the rules of `chain` may end for `packet`.
pub fn fates(ruleset: &Ruleset, chain: &Chain, packet: &Packet<'_>) -> Fates {
    run(ruleset, chain, packet, 0)
}

fn run(ruleset: &Ruleset, chain: &Chain, packet: &Packet<'_>, depth: usize) -> Fates {
    const FALLS: Fates = Fates { drops: false, falls: true };
    let mut fates = Fates::default();
    for rule in &chain.rules {
        let (holds, verdict) = rule_of(ruleset, chain, rule, packet);
        let is_certain = holds == Some(true);
        if holds == Some(false) {
            continue;
        }
        let called = |name: &str| {
            let is_it =
                |other: &&Chain| other.family == chain.family && other.table == chain.table && other.name == name;
            let called = ruleset.chains.iter().find(is_it).filter(|_| depth < DEPTH);
            called.map_or(FALLS, |called| run(ruleset, called, packet, depth + 1))
        };
        match verdict {
            Verdict::Accept | Verdict::Other if is_certain => return fates,
            Verdict::Drop if is_certain => return Fates { drops: true, ..fates },
            Verdict::Continue | Verdict::Accept | Verdict::Other | Verdict::Drop => {}
            Verdict::Return if is_certain => return Fates { falls: true, ..fates },
            Verdict::Return => fates.falls = true,
            Verdict::Jump(name) => {
                let called = called(&name);
                fates.drops |= called.drops;
                if is_certain && !called.falls {
                    return fates;
                }
            }
            Verdict::Goto(name) => {
                fates = fates.or(called(&name));
                if is_certain {
                    return fates;
                }
            }
        }
    }
    fates.or(FALLS)
}

/// Whether a rule holds for the packet (`None`: not known), and its verdict.
fn rule_of(ruleset: &Ruleset, chain: &Chain, rule: &[Step], packet: &Packet<'_>) -> (Option<bool>, Verdict) {
    let mut registers: BTreeMap<u32, Option<Vec<u8>>> = BTreeMap::new();
    let mut is_certain = true;
    let value = |registers: &BTreeMap<u32, Option<Vec<u8>>>, at: &u32| registers.get(at).cloned().flatten();
    for step in rule {
        let holds = match step {
            Step::Load { register, field, length } => {
                registers.insert(*register, packet.field(*field, *length));
                Some(true)
            }
            Step::Mask { from, to, mask, xor } => {
                let masked = value(&registers, from).map(|value| {
                    let pairs = mask.iter().zip(xor);
                    value.iter().zip(pairs).map(|(byte, (mask, xor))| byte & mask ^ xor).collect()
                });
                registers.insert(*to, masked);
                Some(true)
            }
            Step::Compare { register, operator, data } => {
                value(&registers, register).map(|value| compares(&value, *operator, data))
            }
            Step::Within { register, ranges, is_inverted } => value(&registers, register)
                .map(|value| ranges.iter().any(|(from, to)| *from <= value && value <= *to) != *is_inverted),
            Step::Lookup { register, set, is_inverted, is_map } => {
                let is_it =
                    |other: &&Set| other.family == chain.family && other.table == chain.table && other.name == *set;
                let elements = ruleset.sets.iter().find(is_it).and_then(|set| set.elements.as_ref());
                // Keys of another length are of several fields.
                let fits = |(all, value): &(&Vec<Element>, Vec<u8>)| all.iter().all(|one| one.key.len() == value.len());
                let known = elements.zip(value(&registers, register)).filter(fits);
                let found = known.map(|(all, value)| find(all, &value));
                if *is_map {
                    // The element's verdict ends the rule.
                    return match found {
                        Some(Some(Element { verdict: Some(verdict), .. })) => {
                            (is_certain.then_some(true), verdict.clone())
                        }
                        Some(_) => (Some(false), Verdict::Continue),
                        None => (None, Verdict::Other),
                    };
                }
                found.map(|found| found.is_some() != *is_inverted)
            }
            Step::Verdict(verdict) => return (is_certain.then_some(true), verdict.clone()),
            Step::Unknown => None,
        };
        match holds {
            Some(true) => {}
            Some(false) => return (Some(false), Verdict::Continue),
            None => is_certain = false,
        }
    }
    (Some(true), Verdict::Continue)
}

fn compares(value: &[u8], operator: Operator, data: &[u8]) -> bool {
    // A register is padded with zeros.
    let mut start = value.to_vec();
    start.resize(data.len(), 0);
    let order = start.as_slice().cmp(data);
    match operator {
        Operator::Equal => order.is_eq(),
        Operator::NotEqual => order.is_ne(),
        Operator::Less => order.is_lt(),
        Operator::LessOrEqual => order.is_le(),
        Operator::Greater => order.is_gt(),
        Operator::GreaterOrEqual => order.is_ge(),
    }
}

/// The element that has `value`.
fn find<'a>(elements: &'a [Element], value: &[u8]) -> Option<&'a Element> {
    if !elements.iter().any(|element| element.is_end) {
        return elements.iter().find(|element| element.key == value);
    }
    // Intervals: the nearest border at or below the value. Where one interval ends and the next begins, the latter.
    let below = elements.iter().filter(|element| element.key.as_slice() <= value);
    let nearest = below.max_by(|a, b| a.key.cmp(&b.key).then(b.is_end.cmp(&a.is_end)));
    nearest.filter(|element| !element.is_end)
}
