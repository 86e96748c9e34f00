//! Ports that the *other* site should use, from where its tunnels were measured to arrive.
//!
//! The switch before this site chooses the member that a packet arrives on, by a hash that nobody tells. Measured pairs
//! of ports and member are held against what is known: Linux's `layer3+4`, and hashes that read no ports. Where one fits,
//! the ports are planned with it. Where none does, fresh ports that differ in many ways are a trial, to be measured again.

use std::collections::BTreeSet;

use super::search::{Random, near};
use super::{Direction, LOWEST_PORT, PortError, PortPair, PortPlan, Request, judge};
use crate::config::XmitHashPolicy;
use crate::plan::bond_hash::{self, OuterFlow};
use crate::plan::measured::Measured;

/// So many to one against chance, and it is no chance.
const UNLIKELY: u64 = 20;
/// Candidates for each tunnel's port beyond the number of tunnels.
const SLACK: usize = 48;
/// Searches from different starts; the first starts at the present ports.
const STARTS: usize = 48;

/// What the measurement says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finding {
    /// There is one member: nothing to spread over.
    OneMember,
    /// Nothing has arrived of these tunnels, by position.
    Unmeasured(Vec<usize>),
    /// These tunnels arrive on several members each: the switch hashes what is inside of them, or is changing its mind.
    Several(Vec<usize>),
    /// As even as can be.
    Even,
    /// As Linux's `layer3+4` hash has it, if its members are in another order here.
    Layer34,
    /// On one member, which `layer3+4` and a hash that reads no ports both explain.
    Layer34OrBlind,
    /// On one member, where `layer3+4` would spread: a hash that reads no ports explains it, and one that reads them
    /// would do so by chance, once in so many.
    Blind {
        /// Saturates.
        one_in: u64,
    },
    /// Uneven, in a way that no known hash explains.
    Unknown,
}

/// What to do about the arrivals.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replan {
    /// What the measurement says.
    pub finding: Finding,
    /// Tunnels that arrive on each member.
    pub loads: Vec<usize>,
    /// What the other site should use.
    pub proposal: Option<Proposal>,
}

/// Ports with new ones at end B; those at end A stay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proposal {
    /// What the two bonds make of them.
    pub plan: PortPlan,
    /// It is not known whether they help: measure again.
    pub trial: bool,
    /// Tunnels that will arrive on each member, if the switch hashes as Linux does.
    pub loads: Vec<usize>,
}

/// What `measured`, one tunnel for each of `pairs`, says of the switch before end A, and ports that suit it.
pub fn replan(request: &Request, pairs: &[PortPair], measured: &Measured) -> Result<Replan, PortError> {
    let members = measured.members();
    let at = |desired: fn(usize) -> bool| -> Vec<usize> {
        let tunnels = measured.tunnels.iter().enumerate();
        tunnels.filter(|(_, tunnel)| desired(tunnel.on.len())).map(|(at, _)| at).collect()
    };
    let loads = measured.loads();
    let done = |finding| Ok(Replan { finding, loads: loads.clone(), proposal: None });
    if members <= 1 {
        return done(Finding::OneMember);
    }
    let (silent, several) = (at(|count| count == 0), at(|count| count > 1));
    if !several.is_empty() {
        return done(Finding::Several(several));
    }
    if !silent.is_empty() || pairs.len() != measured.tunnels.len() {
        return done(Finding::Unmeasured(silent));
    }
    if excess(&loads, pairs.len()) == 0 {
        return done(Finding::Even);
    }
    let on: Vec<u8> = measured.tunnels.iter().map(|tunnel| tunnel.on[0]).collect();
    let finding = explain(request, pairs, &on, members);
    let model = match finding {
        Finding::Blind { one_in } if one_in >= UNLIKELY => return done(finding),
        Finding::Layer34 | Finding::Layer34OrBlind => Model::Layer34,
        _ => Model::Any,
    };
    let chosen = Search::new(request, pairs, members, model).best();
    let trial = finding != Finding::Layer34;
    let proposal = match chosen {
        Some(pairs) => {
            let loads = arriving(request, &pairs, members);
            Some(Proposal { plan: judge(request, &pairs)?, trial, loads })
        }
        None => None,
    };
    Ok(Replan { finding, loads, proposal })
}

/// How many tunnels would have to move for an even spread.
fn excess(loads: &[usize], tunnels: usize) -> usize {
    let (even, extra) = (tunnels / loads.len(), tunnels % loads.len());
    let mut sorted = loads.to_vec();
    sorted.sort_unstable_by(|x, y| y.cmp(x));
    sorted.iter().enumerate().map(|(at, load)| load.saturating_sub(even + usize::from(at < extra))).sum()
}

/// The hash of what B sends to A, as Linux's `layer3+4` has it.
fn layer34(request: &Request, pair: PortPair, direction: Direction) -> u32 {
    let (a, b) = (request.a.address, request.b.address);
    let flow = match direction {
        Direction::AToB => OuterFlow { src: a, dst: b, sport: pair.a, dport: pair.b, macs: None },
        Direction::BToA => OuterFlow { src: b, dst: a, sport: pair.b, dport: pair.a, macs: None },
    };
    // Two addresses of one family, which `check` has seen to.
    bond_hash::hash(XmitHashPolicy::Layer34, &flow).unwrap_or(0)
}

/// Tunnels that arrive on each member by `layer3+4`.
fn arriving(request: &Request, pairs: &[PortPair], members: u8) -> Vec<usize> {
    let mut loads = vec![0; usize::from(members)];
    for pair in pairs {
        loads[usize::from(bond_hash::slot(layer34(request, *pair, Direction::BToA), members))] += 1;
    }
    loads
}

fn explain(request: &Request, pairs: &[PortPair], on: &[u8], members: u8) -> Finding {
    let predicted: Vec<u8> =
        pairs.iter().map(|pair| bond_hash::slot(layer34(request, *pair, Direction::BToA), members)).collect();
    let fits = is_relabelling(&predicted, on);
    let one = on.iter().all(|member| *member == on[0]);
    let others = u32::try_from(on.len() - 1).unwrap_or(u32::MAX);
    match (fits, one) {
        (true, false) => Finding::Layer34,
        (true, true) => Finding::Layer34OrBlind,
        (false, true) => Finding::Blind { one_in: u64::from(members).saturating_pow(others) },
        (false, false) => Finding::Unknown,
    }
}

/// Whether `measured` is `predicted` with the members in another order, or in the same.
pub fn is_relabelling(predicted: &[u8], measured: &[u8]) -> bool {
    let pairs = || predicted.iter().zip(measured);
    pairs().all(|(p, m)| pairs().all(|(q, n)| (p == q) == (m == n)))
}

/// What is taken for the switch's hash.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Model {
    Layer34,
    /// One of many that read ports: whichever it is, the tunnels should differ.
    Any,
}

/// Each tunnel's slot in every view that is to be even: what either bond sends, and what arrives; each with all members
/// and with one fewer.
struct Search<'a> {
    request: &'a Request,
    pairs: &'a [PortPair],
    members: u8,
    model: Model,
    candidates: Vec<u16>,
}

impl<'a> Search<'a> {
    fn new(request: &'a Request, pairs: &'a [PortPair], members: u8, model: Model) -> Self {
        let current: BTreeSet<u16> = pairs.iter().map(|pair| pair.b).collect();
        let mut excluded = request.b.excluded.clone();
        let mut candidates = Vec::new();
        let lowest = current.first().copied().unwrap_or(LOWEST_PORT).max(LOWEST_PORT);
        let base = match model {
            Model::Layer34 => lowest,
            // Onwards from the present ports, so that no trial is made twice.
            Model::Any => current.last().copied().and_then(|port| port.checked_add(1)).unwrap_or(lowest).max(lowest),
        };
        match model {
            Model::Layer34 => candidates.extend(pairs.iter().map(|pair| pair.b)),
            Model::Any => {}
        }
        excluded.extend(current);
        candidates.extend(near(base, pairs.len() + SLACK, &excluded));
        // The upper byte that near ports share may keep some members out of reach.
        candidates.extend(near(base.saturating_add(256), pairs.len(), &excluded));
        let mut seen = BTreeSet::new();
        candidates.retain(|port| seen.insert(*port));
        Self { request, pairs, members, model, candidates }
    }

    /// The evenest ports found, `None` if they are no better than the present ones or there are too few.
    fn best(&self) -> Option<Vec<PortPair>> {
        if self.candidates.len() < self.pairs.len() {
            return None;
        }
        let seed = self.pairs.iter().fold(u64::from(self.members), |seed, pair| {
            seed.rotate_left(7) ^ u64::from(pair.a) << 16 ^ u64::from(pair.b)
        });
        let mut random = Random::seeded(seed);
        let mut best: Option<(usize, usize, Vec<usize>)> = None;
        for start in 0..STARTS {
            let mut chosen: Vec<usize> = (0..self.pairs.len()).collect();
            if start > 0 {
                let mut order: Vec<usize> = (0..self.candidates.len()).collect();
                for at in 0..chosen.len() {
                    let other = at + random.below(order.len() - at);
                    order.swap(at, other);
                    chosen[at] = order[at];
                }
            }
            self.settle(&mut chosen);
            let changed = chosen.iter().zip(self.pairs).filter(|(at, pair)| self.candidates[**at] != pair.b).count();
            let score = (self.cost(&chosen), changed);
            if best.as_ref().is_none_or(|(cost, changed, _)| score < (*cost, *changed)) {
                best = Some((score.0, score.1, chosen));
            }
        }
        let (_, changed, chosen) = best?;
        let pair = |(at, pair): (&usize, &PortPair)| PortPair { a: pair.a, b: self.candidates[*at] };
        (changed > 0).then(|| chosen.iter().zip(self.pairs).map(pair).collect())
    }

    /// Gives one tunnel after another the port that leaves the views the most even, until none gains by it.
    fn settle(&self, chosen: &mut [usize]) {
        let mut cost = self.cost(chosen);
        // Each round that goes on has lowered the cost, which is a small number.
        while cost > 0 {
            let before = cost;
            for tunnel in 0..chosen.len() {
                for candidate in 0..self.candidates.len() {
                    let old = chosen[tunnel];
                    if chosen.contains(&candidate) {
                        continue;
                    }
                    chosen[tunnel] = candidate;
                    let new = self.cost(chosen);
                    if new < cost {
                        cost = new;
                    } else {
                        chosen[tunnel] = old;
                    }
                }
            }
            if cost == before {
                break;
            }
        }
    }

    /// Tunnels on a wrong member, added up over all views; this site's own sending counts most, then what is known to
    /// be the switch's hash.
    fn cost(&self, chosen: &[usize]) -> usize {
        let views = self.views();
        let mut cost = 0;
        for view in &views {
            let mut loads = vec![0; usize::from(view.members)];
            for (at, pair) in chosen.iter().zip(self.pairs) {
                let pair = PortPair { a: pair.a, b: self.candidates[*at] };
                loads[usize::from(bond_hash::slot((view.hash)(self.request, pair), view.members))] += 1;
            }
            cost += view.weight * excess(&loads, chosen.len());
        }
        cost
    }

    fn views(&self) -> Vec<View> {
        let (a, b) = (&self.request.a, &self.request.b);
        let out: fn(&Request, PortPair) -> u32 = |request, pair| layer34(request, pair, Direction::AToB);
        let back: fn(&Request, PortPair) -> u32 = |request, pair| layer34(request, pair, Direction::BToA);
        let mut views = Vec::new();
        let mut add = |weight, members: u8, hash| {
            views.extend(
                [(weight, members), (1, members - 1)]
                    .into_iter()
                    .filter(|(_, members)| *members > 1)
                    .map(|(weight, members)| View { weight, members, hash }),
            );
        };
        if a.spreads_by_ports(b) {
            add(8, a.members, out);
        }
        if b.spreads_by_ports(a) {
            add(4, b.members, back);
        }
        add(4, self.members, back);
        if self.model == Model::Any {
            for hash in OTHER_HASHES {
                add(2, self.members, hash);
            }
        }
        views
    }
}

struct View {
    weight: usize,
    members: u8,
    hash: fn(&Request, PortPair) -> u32,
}

/// What switches are known to do with ports, apart from the addresses, which are the same for all tunnels.
const OTHER_HASHES: [fn(&Request, PortPair) -> u32; 4] = [
    // The XOR of both ports, as they are numbers, and without its lowest bit.
    |_, pair| u32::from(pair.a ^ pair.b),
    |_, pair| u32::from(pair.a ^ pair.b) >> 1,
    // The sender's port alone.
    |_, pair| u32::from(pair.b),
    // CRC-16 (CCITT) of both.
    |_, pair| {
        let bytes = [pair.b.to_be_bytes(), pair.a.to_be_bytes()].concat();
        u32::from(bytes.iter().fold(0xffff_u16, |crc, byte| {
            (0..8).fold(crc ^ u16::from(*byte) << 8, |crc, _| crc << 1 ^ if crc & 0x8000 == 0 { 0 } else { 0x1021 })
        }))
    },
];

#[cfg(test)]
mod tests;
