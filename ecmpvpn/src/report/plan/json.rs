//! The output of `plan --json`. Members are counted from 0 in enslave order; `null`: cannot be known.

use serde::Serialize;

use super::{Peer, Report, Setting};
use crate::plan::bond_hash::Member;
use crate::plan::ports::replan::Finding;
use crate::plan::ports::{End, PortPair, PortPlan, View};

#[derive(Debug, Serialize)]
pub struct Json {
    /// Number of members of this site's bond; of several bonds, the largest.
    members: Option<u8>,
    tunnels: Vec<Tunnel>,
    spread: Spread,
    /// What `run` would change. Empty if there is no configuration.
    changes: Vec<String>,
    peers: Vec<PeerJson>,
}

#[derive(Debug, Serialize)]
struct Tunnel {
    name: String,
    peer: String,
    listen_port: u16,
    remote_port: u16,
    /// The member that this site sends on.
    tx_member: Option<u8>,
    /// The member of its own bond that the remote site sends on.
    rx_member: Option<u8>,
    /// With `--measured`: the member of this site's bond that the tunnel arrives on. `null`: nothing arrived, or it
    /// arrives on several.
    rx_member_measured: Option<u8>,
    /// With `--measured`: every member that it arrives on now.
    rx_members_measured: Vec<String>,
    /// With `--measured`: number of outer packets that arrived on these members.
    rx_packets_measured: u64,
    /// The member that this site sends on while a member is down, by position of the member that is down. Empty:
    /// nothing is known about the bond.
    tx_member_degraded: Vec<Option<u8>>,
    /// The member that the remote site sends on while one of its members is down, by position of the member that is
    /// down.
    rx_member_degraded: Vec<Option<u8>>,
}

/// The highest and lowest number of tunnels on one member; of several peers, the worst.
#[derive(Debug, Serialize)]
struct Spread {
    tx_max: Option<usize>,
    tx_min: Option<usize>,
    rx_max: Option<usize>,
    rx_min: Option<usize>,
    tx_max_degraded: Option<usize>,
    tx_min_degraded: Option<usize>,
    rx_max_degraded: Option<usize>,
    rx_min_degraded: Option<usize>,
}

#[derive(Debug, Serialize)]
struct PeerJson {
    name: String,
    /// Number of members of the remote site's bond; `null`: not known.
    members: Option<u8>,
    spread: Spread,
    /// Number of tunnels on a wrong member, added up over both directions, with all members and with one fewer. 0: as
    /// even as possible, as far as is known.
    misses: usize,
    /// Whether both directions are known and as even as possible.
    perfect: bool,
    verdict: String,
    /// Ports with a more even spread. Empty: none were found.
    better: Vec<Ports>,
    /// With `--measured`: the verdict on where the tunnels arrive.
    measured: Option<String>,
    /// With `--replan-rx`: what both sites should change.
    replan: Option<ReplanJson>,
}

#[derive(Debug, Serialize)]
struct ReplanJson {
    /// What the arrivals fit: `one_member`, `unmeasured`, `several`, `even`, `layer3+4`, `layer3+4_or_addresses`,
    /// `addresses` or `unknown`.
    finding: &'static str,
    verdict: String,
    /// Number of tunnels that arrive on each member.
    loads: Vec<usize>,
    /// `true`: it is not known whether the ports help.
    trial: bool,
    /// The ports of all tunnels, also those that stay. Empty: no ports are proposed.
    ports: Vec<Ports>,
    changes: Vec<Setting>,
}

#[derive(Debug, Serialize)]
struct Ports {
    listen_port: u16,
    remote_port: u16,
}

impl Report {
    /// The report in the form that `--json` prints.
    pub fn json(&self) -> Json {
        Json {
            members: self.peers.iter().filter_map(|peer| members(&peer.request.a)).max(),
            tunnels: self.peers.iter().flat_map(tunnels).collect(),
            spread: Spread::worst(self.peers.iter().map(|peer| &peer.plan)),
            changes: self.changes.clone().unwrap_or_default(),
            peers: self.peers.iter().map(PeerJson::new).collect(),
        }
    }
}

impl PeerJson {
    fn new(peer: &Peer) -> Self {
        let better = peer.better.iter().flat_map(|better| &better.plan.pairs);
        Self {
            name: peer.there.clone(),
            members: members(&peer.request.b),
            spread: Spread::worst([&peer.plan]),
            misses: peer.plan.misses(),
            perfect: peer.plan.is_perfect(),
            verdict: peer.verdict(),
            better: better.map(|&PortPair { a, b }| Ports { listen_port: a, remote_port: b }).collect(),
            measured: peer.arrival_verdict(),
            replan: ReplanJson::new(peer),
        }
    }
}

impl ReplanJson {
    fn new(peer: &Peer) -> Option<Self> {
        let replan = peer.arrivals.as_ref()?.replan.as_ref()?;
        let proposal = replan.proposal.as_ref();
        let ports = proposal.iter().flat_map(|proposal| &proposal.plan.pairs);
        Some(Self {
            finding: match replan.finding {
                Finding::OneMember => "one_member",
                Finding::Unmeasured(_) => "unmeasured",
                Finding::Several(_) => "several",
                Finding::Even => "even",
                Finding::Layer34 => "layer3+4",
                Finding::Layer34OrBlind => "layer3+4_or_addresses",
                Finding::Blind { .. } => "addresses",
                Finding::Unknown => "unknown",
            },
            verdict: peer.replan_text().unwrap_or_default(),
            loads: replan.loads.clone(),
            trial: proposal.is_some_and(|proposal| proposal.trial),
            ports: ports.map(|&PortPair { a, b }| Ports { listen_port: a, remote_port: b }).collect(),
            changes: proposal.map(|proposal| peer.settings(proposal)).unwrap_or_default(),
        })
    }
}

impl Spread {
    fn worst<'a>(plans: impl IntoIterator<Item = &'a PortPlan>) -> Self {
        let mut views = [None; 4];
        for (at, plan) in plans.into_iter().enumerate() {
            for (worst, view) in views.iter_mut().zip(&plan.views) {
                *worst = match (at, *worst, view.max_min()) {
                    (0, _, max_min) => max_min,
                    (_, Some((max, min)), Some((other_max, other_min))) => {
                        Some((other_max.max(max), other_min.min(min)))
                    }
                    _ => None,
                };
            }
        }
        let [tx, tx_degraded, rx, rx_degraded] = views.map(Option::unzip);
        Self {
            tx_max: tx.0,
            tx_min: tx.1,
            rx_max: rx.0,
            rx_min: rx.1,
            tx_max_degraded: tx_degraded.0,
            tx_min_degraded: tx_degraded.1,
            rx_max_degraded: rx_degraded.0,
            rx_min_degraded: rx_degraded.1,
        }
    }
}

fn members(end: &End) -> Option<u8> {
    end.policy.map(|_| end.members)
}

fn tunnels(peer: &Peer) -> impl Iterator<Item = Tunnel> {
    let [tx, tx_degraded, rx, rx_degraded] = &peer.plan.views;
    peer.names.iter().zip(&peer.plan.pairs).enumerate().map(move |(at, (name, pair))| Tunnel {
        name: name.clone(),
        peer: peer.there.clone(),
        listen_port: pair.a,
        remote_port: pair.b,
        tx_member: tx.tunnels[at].index(),
        rx_member: rx.tunnels[at].index(),
        rx_member_measured: peer.rx_member_measured(at).and_then(Member::index),
        rx_members_measured: peer.arrivals.as_ref().map(|arrivals| arrivals.measured.names_of(at)).unwrap_or_default(),
        rx_packets_measured: peer.arrival(at).map_or(0, |(_, packets)| packets),
        tx_member_degraded: by_failure(members(&peer.request.a), tx_degraded, at),
        rx_member_degraded: by_failure(members(&peer.request.b), rx_degraded, at),
    })
}

/// The hash chooses among the remaining members. With `down` gone, the members after it move up by one.
fn by_failure(members: Option<u8>, degraded: &View, tunnel: usize) -> Vec<Option<u8>> {
    let left = degraded.tunnels[tunnel].index();
    (0..members.unwrap_or(0)).map(|down| left.map(|index| index + u8::from(index >= down))).collect()
}
