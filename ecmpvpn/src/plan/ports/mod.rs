//! Plans port pairs that spread the tunnels over the bond members in both directions, and judges given port pairs.
//!
//! A plan has four [`View`]s: what the bond of each end sends, with all its members and with one fewer. Which member
//! fails does not matter for the spread, because the hash depends only on how many are left. Pure and deterministic:
//! both sites get the same ports, whichever of them is called A.

mod configured;
pub mod replan;
mod request;
mod search;
mod view;

use std::collections::BTreeSet;
use std::net::IpAddr;

pub use configured::{LocalBond, configured};
pub use request::{End, HIGHEST_BASE_PORT, LOWEST_PORT, PortPair, RESERVED_PORTS, Request};
pub use view::{Direction, Spread, View};

use crate::config::{MAX_MEMBERS, MAX_TUNNELS_PER_PEER as MAX_TUNNELS};

/// Port pairs, and how they spread the tunnels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortPlan {
    /// One pair for each tunnel.
    pub pairs: Vec<PortPair>,
    /// A to B, A to B with one member fewer, B to A, B to A with one member fewer.
    pub views: [View; 4],
}

impl PortPlan {
    /// How many tunnels are on a wrong member, added up over the four views. A view that cannot be more even counts as
    /// 0, and so does a view that is not known. 0: perfect, as far as is known.
    pub fn misses(&self) -> usize {
        self.views.iter().filter_map(View::miss).sum()
    }

    /// Whether every view is known, and as even as the numbers of tunnels and members allow.
    pub fn is_perfect(&self) -> bool {
        self.views.iter().all(|view| view.members == 0 || view.miss() == Some(0))
    }
}

/// One of the two ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    A,
    B,
}

impl std::fmt::Display for Side {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::A => "A",
            Self::B => "B",
        })
    }
}

/// Why ports cannot be planned or judged.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PortError {
    /// The number of tunnels is out of range.
    #[error("planning {0} tunnels: ask for 1 to {MAX_TUNNELS}")]
    Tunnels(usize),
    /// The number of members is out of range.
    #[error("planning for {members} members at endpoint {side}: a bond has 1 to {MAX_MEMBERS}")]
    Members { side: Side, members: u8 },
    /// One endpoint is IPv4 and the other is IPv6.
    #[error("planning between {0} and {1}: both endpoints must be IPv4, or both IPv6")]
    MixedFamilies(IpAddr, IpAddr),
    /// Both endpoints are the same address.
    #[error("planning between {0} and itself: give the addresses of two gateways")]
    SameAddress(IpAddr),
    /// The base port is below [`LOWEST_PORT`].
    #[error("planning from base port {0}: choose {LOWEST_PORT} or more, ports below belong to well-known services")]
    BasePort(u16),
    /// Too few ports are left.
    #[error("planning {desired} tunnels: only {available} ports at endpoint {side} are neither reserved nor excluded")]
    TooFewPorts {
        side: Side,
        /// Number of ports that may be used.
        available: usize,
        /// Number of ports needed.
        desired: usize,
    },
    /// A given port is used twice at one end.
    #[error("port {port} appears twice at endpoint {side}: WireGuard needs a port of its own for each tunnel")]
    Duplicate { side: Side, port: u16 },
    /// A given port is 0.
    #[error("port 0 at endpoint {0} is no UDP port: give 1 to 65535")]
    PortZero(Side),
}

/// Plans `request.tunnels` port pairs.
///
/// Both sites get the same plan: if A and B are exchanged in the request, they are exchanged in the answer. The ports
/// stay as near to the base port as an even spread allows. If no even spread is found, [`PortPlan::misses`] says by how
/// much.
pub fn plan(request: &Request) -> Result<PortPlan, PortError> {
    check(request)?;
    if !(1..=MAX_TUNNELS).contains(&request.tunnels) {
        return Err(PortError::Tunnels(request.tunnels));
    }
    if request.base_port < LOWEST_PORT {
        return Err(PortError::BasePort(request.base_port));
    }
    // The end with the smaller address comes first, so that both sites do the same search.
    let swapped = request.b.address < request.a.address;
    let (first, second) = if swapped { (&request.b, &request.a) } else { (&request.a, &request.b) };
    let candidates = |end: &End, side| {
        let ports = search::near(request.base_port, request.tunnels, &end.excluded);
        let available = ports.len();
        if available < request.tunnels {
            return Err(PortError::TooFewPorts { side, available, desired: request.tunnels });
        }
        Ok(ports)
    };
    let (side_first, side_second) = if swapped { (Side::B, Side::A) } else { (Side::A, Side::B) };
    let ports = [candidates(first, side_first)?, candidates(second, side_second)?];
    let mut pairs = search::search(first, second, request.tunnels, request.base_port, ports);
    if swapped {
        for pair in &mut pairs {
            *pair = PortPair { a: pair.b, b: pair.a };
        }
    }
    Ok(assess(request, pairs))
}

/// Ports with a more even spread than given ones.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Better {
    /// The ports and their spread, as far as it is known.
    pub plan: PortPlan,
    /// The bond of this end is not known: the ports suit it if it is like the other end's.
    pub assumed: Option<Side>,
}

/// A plan with fewer misses than `judged`, which is the judgement of `request`. `None`: none was found.
pub fn better(request: &Request, judged: &PortPlan) -> Result<Option<Better>, PortError> {
    let mut desired = Request { tunnels: judged.pairs.len(), ..request.clone() };
    let assumed = match (request.a.policy, request.b.policy) {
        (Some(_), None) => Some(Side::B),
        (None, Some(_)) => Some(Side::A),
        _ => None,
    };
    match assumed {
        Some(Side::A) => (desired.a.members, desired.a.policy) = (request.b.members, request.b.policy),
        Some(Side::B) => (desired.b.members, desired.b.policy) = (request.a.members, request.a.policy),
        None => {}
    }
    let planned = plan(&desired)?;
    let plan = judge(request, &planned.pairs)?;
    // An assumption alone is not a reason to change ports: the known views must improve.
    Ok((plan.misses() < judged.misses()).then_some(Better { plan, assumed }))
}

/// Judges given port pairs. `request.tunnels`, `base_port` and the excluded ports are not used.
pub fn judge(request: &Request, pairs: &[PortPair]) -> Result<PortPlan, PortError> {
    check(request)?;
    if !(1..=MAX_TUNNELS).contains(&pairs.len()) {
        return Err(PortError::Tunnels(pairs.len()));
    }
    for (side, port_of) in [(Side::A, (|pair| pair.a) as fn(&PortPair) -> u16), (Side::B, |pair| pair.b)] {
        let mut seen = BTreeSet::new();
        for port in pairs.iter().map(port_of) {
            if port == 0 {
                return Err(PortError::PortZero(side));
            }
            if !seen.insert(port) {
                return Err(PortError::Duplicate { side, port });
            }
        }
    }
    Ok(assess(request, pairs.to_vec()))
}

fn check(request: &Request) -> Result<(), PortError> {
    for (side, end) in [(Side::A, &request.a), (Side::B, &request.b)] {
        if !(1..=MAX_MEMBERS).contains(&end.members) {
            return Err(PortError::Members { side, members: end.members });
        }
    }
    if request.a.address.is_ipv4() == request.b.address.is_ipv4() {
        Ok(())
    } else {
        Err(PortError::MixedFamilies(request.a.address, request.b.address))
    }
}

fn assess(request: &Request, pairs: Vec<PortPair>) -> PortPlan {
    let view = |direction, degraded| View::new(request, &pairs, direction, degraded);
    let views = [
        view(Direction::AToB, false),
        view(Direction::AToB, true),
        view(Direction::BToA, false),
        view(Direction::BToA, true),
    ];
    PortPlan { pairs, views }
}

#[cfg(test)]
mod tests;
