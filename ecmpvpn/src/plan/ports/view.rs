//! How tunnels spread over the members that one end sends on.

use super::{End, PortPair, Request};
use crate::config::XmitHashPolicy;
use crate::plan::bond_hash::{self, Member, OuterFlow, Unknown};

/// The direction of packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Sent by end A's bond.
    AToB,
    /// Sent by end B's bond.
    BToA,
}

/// The members that one end's bond sends the tunnels on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    /// The sending end.
    pub direction: Direction,
    /// With one member fewer than the end has.
    pub degraded: bool,
    /// Number of usable members; 0 if the only one is down. Has no meaning if the bond is not known.
    pub members: u8,
    /// The member of each tunnel, in the order of the pairs.
    pub tunnels: Vec<Member>,
    /// How many tunnels each member carries.
    pub spread: Spread,
}

/// How tunnels spread over members.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Spread {
    /// Number of tunnels on each member, by position.
    Known(Vec<usize>),
    /// The policy does not read ports: one member carries all tunnels, but it is not known which one.
    OneOfThem(Unknown),
    /// The spread cannot be known.
    Unknown(Unknown),
}

impl View {
    pub(super) fn new(request: &Request, pairs: &[PortPair], direction: Direction, degraded: bool) -> Self {
        let (from, to) = match direction {
            Direction::AToB => (&request.a, &request.b),
            Direction::BToA => (&request.b, &request.a),
        };
        let members = from.members - u8::from(degraded);
        let tunnels: Vec<Member> = pairs
            .iter()
            .map(|pair| match direction {
                Direction::AToB => member(from, to, pair.a, pair.b, members),
                Direction::BToA => member(from, to, pair.b, pair.a, members),
            })
            .collect();
        let spread = spread(members, &tunnels);
        Self { direction, degraded, members, tunnels, spread }
    }

    /// The highest and lowest number of tunnels on one member, if known.
    pub fn max_min(&self) -> Option<(usize, usize)> {
        match &self.spread {
            Spread::Known(loads) => Some((loads.iter().copied().max()?, loads.iter().copied().min()?)),
            Spread::OneOfThem(_) => Some((self.tunnels.len(), 0)),
            Spread::Unknown(_) => None,
        }
    }

    /// How many tunnels would have to move to another member for an even spread, if known.
    pub fn miss(&self) -> Option<usize> {
        let count = usize::from(self.members);
        let mut loads = match &self.spread {
            Spread::Known(loads) => loads.clone(),
            Spread::OneOfThem(_) => {
                let mut loads = vec![0; count];
                *loads.first_mut()? = self.tunnels.len();
                loads
            }
            Spread::Unknown(_) => return None,
        };
        loads.sort_unstable_by(|x, y| y.cmp(x));
        let (even, extra) = (self.tunnels.len() / count, self.tunnels.len() % count);
        Some(loads.iter().enumerate().map(|(at, load)| load.saturating_sub(even + usize::from(at < extra))).sum())
    }
}

fn member(from: &End, to: &End, sport: u16, dport: u16, count: u8) -> Member {
    match (count, from.policy) {
        (_, None) => Member::Unknown(Unknown::Policy),
        (0, _) => Member::Unknown(Unknown::NoMember),
        (1, _) => Member::Index(0),
        // `layer2` and `vlan+srcmac` hash neither the addresses nor the ports that NAT changes.
        (_, Some(policy)) if to.rewritten && !matches!(policy, XmitHashPolicy::Layer2 | XmitHashPolicy::VlanSrcmac) => {
            Member::Unknown(Unknown::Rewritten)
        }
        (_, Some(policy)) => {
            let flow = OuterFlow { src: from.address, dst: to.address, sport, dport, macs: from.macs };
            bond_hash::member(policy, &flow, count)
        }
    }
}

fn spread(members: u8, tunnels: &[Member]) -> Spread {
    let mut loads = vec![0; usize::from(members)];
    for tunnel in tunnels {
        match *tunnel {
            Member::Index(index) => loads[usize::from(index)] += 1,
            // Only policies that do not read ports need these, so all tunnels share one member, but it is not known
            // which.
            Member::Unknown(why @ (Unknown::Macs | Unknown::Vlan)) => return Spread::OneOfThem(why),
            Member::Unknown(why) => return Spread::Unknown(why),
        }
    }
    Spread::Known(loads)
}
