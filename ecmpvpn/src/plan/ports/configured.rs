//! The ports of a configuration, in the form that the planner judges.

use super::{End, LOWEST_PORT, PortPair, Request};
use crate::config::{Config, Peer, XmitHashPolicy};
use crate::plan::bond_hash::Macs;

/// The bond that sends this site's outer packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LocalBond {
    /// Number of members; 1 if there is no bond.
    pub members: u8,
    /// Its `xmit_hash_policy`. `None`: not known.
    pub policy: Option<XmitHashPolicy>,
    /// The Ethernet header of packets that this site sends, if it is known.
    pub macs: Option<Macs>,
    /// The Ethernet header of packets that the far end sends, if it is known.
    pub remote_macs: Option<Macs>,
}

impl LocalBond {
    /// The bond in the configuration. `None`: the configuration has no `[bond]`.
    pub fn configured(config: &Config) -> Option<Self> {
        let bond = config.bond.as_ref()?;
        let members = u8::try_from(bond.members.len()).unwrap_or(u8::MAX);
        Some(Self { members, policy: Some(bond.xmit_hash_policy), macs: None, remote_macs: None })
    }
}

/// The ends and the port pairs of `peer`, one of `config`'s peers. This site is end A. `local` is the bond that leads
/// to the peer, if it is known. Ports of other peers are excluded.
pub fn configured(config: &Config, peer: &Peer, local: Option<LocalBond>) -> (Request, Vec<PortPair>) {
    let mut a = match local {
        Some(LocalBond { members, policy: Some(policy), .. }) => End::new(peer.local_endpoint, members, policy),
        _ => End::unknown(peer.local_endpoint),
    };
    let mut b = match peer.remote_bond {
        Some(bond) => End::new(peer.remote_endpoint, bond.members, bond.xmit_hash_policy),
        None => End::unknown(peer.remote_endpoint),
    };
    a.macs = local.and_then(|local| local.macs);
    b.macs = local.and_then(|local| local.remote_macs);
    let others = || config.peers.iter().filter(|other| other.name != peer.name);
    a.excluded = others().flat_map(|other| &other.tunnels).map(|tunnel| tunnel.listen_port).collect();
    b.excluded = others()
        .filter(|other| other.remote_endpoint == peer.remote_endpoint)
        .flat_map(|other| &other.tunnels)
        .map(|tunnel| tunnel.remote_port)
        .collect();
    let pairs: Vec<_> =
        peer.tunnels.iter().map(|tunnel| PortPair { a: tunnel.listen_port, b: tunnel.remote_port }).collect();
    let lowest = pairs.iter().map(|pair| pair.a).min().unwrap_or(LOWEST_PORT);
    (Request { a, b, tunnels: pairs.len(), base_port: lowest.max(LOWEST_PORT) }, pairs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::RemoteBond;
    use crate::plan::ports::{better, judge};
    use crate::plan::tests::config;

    #[test]
    fn ports_of_other_peers_are_taken() {
        let mut config = config(3);
        let mut other = config.peers[0].clone();
        other.name = "site-c".into();
        other.tunnels[0].listen_port = 51900;
        config.peers.push(other);
        let (request, pairs) = configured(&config, &config.peers[0], None);
        assert!(request.a.excluded.contains(&51900) && request.b.excluded.contains(&51920), "{request:?}");
        assert_eq!((pairs[0].a, pairs[0].b, pairs.len()), (51820, 51920, 3));
        assert_eq!((request.a.policy, request.b.policy), (None, None));

        config.peers[1].remote_endpoint = "10.9.9.9".parse().unwrap();
        let (request, _) = configured(&config, &config.peers[0], None);
        assert!(request.b.excluded.is_empty(), "another host's ports are its own");
    }

    #[test]
    fn known_addresses_show_which_member_carries_all() {
        let config = config(3);
        let macs = |src| Macs { src: [2, 0, 0, 0, 0, src], dst: [2, 0, 0, 0, 0, 9], vlan_tci: Some(0) };
        let local =
            |macs, remote_macs| LocalBond { members: 3, policy: Some(XmitHashPolicy::Layer2), macs, remote_macs };
        let judged = |local| {
            let (mut request, pairs) = configured(&config, &config.peers[0], Some(local));
            (request.b.members, request.b.policy) = (3, Some(XmitHashPolicy::Layer23));
            judge(&request, &pairs).unwrap().views
        };
        let [out, _, back, _] = judged(local(Some(macs(1)), Some(macs(2))));
        for view in [out, back] {
            let first = view.tunnels[0].index().expect("all that the policy reads is known");
            assert!(view.tunnels.iter().all(|member| member.index() == Some(first)), "{view:?}");
            assert_eq!(view.miss(), Some(2));
        }
        let [out, _, back, _] = judged(local(Some(macs(1)), None));
        assert!(out.tunnels[0].index().is_some() && back.tunnels[0].index().is_none());
        let [out, ..] = judged(local(None, None));
        assert_eq!(out.tunnels[0].index(), None, "unknown is said to be unknown");
    }

    /// Nothing is known about the far end. Better ports suit this end, and also the far end if its bond is like this
    /// one.
    #[test]
    fn an_unknown_far_end_is_assumed_to_be_alike() {
        let mut config = config(3);
        for (at, tunnel) in (0_u16..).zip(&mut config.peers[0].tunnels) {
            (tunnel.listen_port, tunnel.remote_port) = (5000 + at, 5000 + at);
        }
        config.peers[0].remote_endpoint = "10.2.3.5".parse().unwrap();
        let local = LocalBond { members: 3, policy: Some(XmitHashPolicy::Layer34), macs: None, remote_macs: None };
        let (request, pairs) = configured(&config, &config.peers[0], Some(local));
        let judged = judge(&request, &pairs).unwrap();
        assert_eq!(judged.views.each_ref().map(super::super::View::miss), [Some(2), Some(1), None, None]);
        let found = better(&request, &judged).unwrap().expect("equal ports are easily bettered");
        assert_eq!((found.plan.misses(), found.assumed), (0, Some(super::super::Side::B)));

        config.peers[0].remote_bond = Some(RemoteBond { members: 3, xmit_hash_policy: XmitHashPolicy::Layer34 });
        let (request, _) = configured(&config, &config.peers[0], Some(local));
        assert!(judge(&request, &found.plan.pairs).unwrap().is_perfect());
    }
}
