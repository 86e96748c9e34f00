//! Plans ports that the *other* site should use, from the members that its tunnels were measured to arrive on.
//!
//! The switch in front of this site chooses the member that a packet arrives on, by a hash that is not known. The
//! measured members are compared with known hashes: Linux's `layer3+4`, and hashes that do not read ports. If one fits,
//! the ports are planned with it. If none fits, new ports that differ in many bits are a trial; the result must be
//! measured again.

use std::collections::BTreeSet;

use super::search::{Random, near};
use super::{Direction, LOWEST_PORT, PortError, PortPair, PortPlan, Request, judge};
use crate::config::XmitHashPolicy;
use crate::plan::bond_hash::{self, OuterFlow};
use crate::plan::measured::Measured;

/// Chance is ruled out as a cause if it would give the result at most once in this many times.
const UNLIKELY: u64 = 20;
/// Number of candidate ports beyond the number of tunnels.
const SLACK: usize = 48;
/// How many searches are done, each from another start. The first one starts at the present ports.
const STARTS: usize = 48;

/// What the measurement shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finding {
    /// This site has one member, so there is nothing to spread over.
    OneMember,
    /// No packet of these tunnels has arrived. Positions of the tunnels.
    Unmeasured(Vec<usize>),
    /// Each of these tunnels arrives on several members: the sender hashes the inner flows, or its hash has just
    /// changed. Positions of the tunnels.
    Several(Vec<usize>),
    /// The spread is as even as possible.
    Even,
    /// The arrivals fit Linux's `layer3+4` hash, perhaps with the members in another order.
    Layer34,
    /// All on one member. `layer3+4` explains this, and so does a hash that does not read ports.
    Layer34OrBlind,
    /// All on one member, although `layer3+4` would spread them. A hash that does not read ports explains this. With a
    /// hash that reads them it would be chance, once in `one_in` times.
    Blind {
        /// Saturates at `u64::MAX`.
        one_in: u64,
    },
    /// Uneven, and no known hash explains it.
    Unknown,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replan {
    pub finding: Finding,
    /// Number of tunnels that arrive on each member.
    pub loads: Vec<usize>,
    /// Ports for the other site. `None`: no change is needed, or no better ports are known.
    pub proposal: Option<Proposal>,
}

/// Port pairs with new ports at end B. The ports at end A stay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proposal {
    /// The pairs, and how the two bonds spread them.
    pub plan: PortPlan,
    /// `true`: it is not known whether the new ports help, so measure again.
    pub trial: bool,
    /// Number of tunnels that will arrive on each member, if the switch hashes like Linux.
    pub loads: Vec<usize>,
}

/// Finds the hash of the switch in front of end A, and ports that suit it. `measured` has one tunnel for each of
/// `pairs`.
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

/// How many tunnels would have to move to another member for an even spread.
fn excess(loads: &[usize], tunnels: usize) -> usize {
    let (even, extra) = (tunnels / loads.len(), tunnels % loads.len());
    let mut sorted = loads.to_vec();
    sorted.sort_unstable_by(|x, y| y.cmp(x));
    sorted.iter().enumerate().map(|(at, load)| load.saturating_sub(even + usize::from(at < extra))).sum()
}

/// The `layer3+4` hash of a tunnel's outer packets in one direction.
fn layer34(request: &Request, pair: PortPair, direction: Direction) -> u32 {
    let (a, b) = (request.a.address, request.b.address);
    let flow = match direction {
        Direction::AToB => OuterFlow { src: a, dst: b, sport: pair.a, dport: pair.b, macs: None },
        Direction::BToA => OuterFlow { src: b, dst: a, sport: pair.b, dport: pair.a, macs: None },
    };
    // Cannot fail: `check` made sure that both addresses are of one family.
    bond_hash::hash(XmitHashPolicy::Layer34, &flow).unwrap_or(0)
}

/// Number of tunnels that arrive on each member with `layer3+4`.
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

/// Whether `measured` is `predicted`, with the members in the same or another order.
pub fn is_relabelling(predicted: &[u8], measured: &[u8]) -> bool {
    let pairs = || predicted.iter().zip(measured);
    pairs().all(|(p, m)| pairs().all(|(q, n)| (p == q) == (m == n)))
}

/// The hash that the switch is assumed to use.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Model {
    Layer34,
    /// Any hash that reads ports: the tunnels should differ under as many hashes as possible.
    Any,
}

/// A search for ports at end B that make all views even: what each bond sends, and what arrives here; each with all
/// members and with one fewer.
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
            // Start above the present ports, so that no trial is repeated.
            Model::Any => current.last().copied().and_then(|port| port.checked_add(1)).unwrap_or(lowest).max(lowest),
        };
        match model {
            Model::Layer34 => candidates.extend(pairs.iter().map(|pair| pair.b)),
            Model::Any => {}
        }
        excluded.extend(current);
        candidates.extend(near(base, pairs.len() + SLACK, &excluded));
        // Near ports share their upper byte. With some addresses this makes some members unreachable.
        candidates.extend(near(base.saturating_add(256), pairs.len(), &excluded));
        let mut seen = BTreeSet::new();
        candidates.retain(|port| seen.insert(*port));
        Self { request, pairs, members, model, candidates }
    }

    /// The most even ports found. `None`: they are not better than the present ones, or there are too few candidates.
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
            self.descend(&mut chosen);
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

    /// Gives one tunnel after the other the port that makes the views most even, until no change helps.
    fn descend(&self, chosen: &mut [usize]) {
        let mut cost = self.cost(chosen);
        // This ends: each further round has lowered the cost, which is a small number.
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

    /// How many tunnels are on a wrong member, added up over all views with weights. What this site sends has the
    /// highest weight, then arrivals under known hashes.
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

/// Hashes of the ports that switches are known to use. Addresses are left out: they are the same for all tunnels.
const OTHER_HASHES: [fn(&Request, PortPair) -> u32; 4] = [
    // The XOR of both ports as numbers, with and without its lowest bit.
    |_, pair| u32::from(pair.a ^ pair.b),
    |_, pair| u32::from(pair.a ^ pair.b) >> 1,
    // The sender's port only.
    |_, pair| u32::from(pair.b),
    // CRC-16 (CCITT) of both ports.
    |_, pair| {
        let bytes = [pair.b.to_be_bytes(), pair.a.to_be_bytes()].concat();
        u32::from(bytes.iter().fold(0xffff_u16, |crc, byte| {
            (0..8).fold(crc ^ u16::from(*byte) << 8, |crc, _| crc << 1 ^ if crc & 0x8000 == 0 { 0 } else { 0x1021 })
        }))
    },
];

#[cfg(test)]
mod tests;
