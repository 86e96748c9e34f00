//! Finds the bond and the members that outer packets use now.

use std::net::SocketAddr;

use super::links::{Link, Links};
use super::netlink::Netlink;
use crate::config::{Config, Peer};
use crate::plan::bond_hash::{self, Macs, Member, OuterFlow};

/// The bond that packets through this interface use: the interface itself, or the bond below a VLAN device.
pub fn bond_below(links: &Links, outgoing: u32) -> Option<&Link> {
    let link = links.index(outgoing)?;
    let below = link.lower.and_then(|lower| links.index(lower));
    [Some(link), below].into_iter().flatten().find(|link| link.bond.is_some())
}

/// The index of the interface that outer packets to `peer` use, by the current routes.
pub async fn outgoing(netlink: &Netlink, peer: &Peer) -> Option<u32> {
    let tunnel = peer.tunnels.first()?;
    let local = SocketAddr::new(peer.local_endpoint, tunnel.listen_port);
    let remote = SocketAddr::new(peer.remote_endpoint, tunnel.remote_port);
    netlink.outgoing_interface(local, remote).await
}

/// The Ethernet headers of outer packets to `remote`, and of those that come back, as far as they are known. Both are
/// `None` while the next hop is not resolved. The second is `None` if the next hop is not the remote end itself.
pub async fn macs(
    links: &Links,
    netlink: &Netlink,
    local: SocketAddr,
    remote: SocketAddr,
) -> (Option<Macs>, Option<Macs>) {
    let out = async {
        let (ifindex, hop) = netlink.next_hop(local, remote).await?;
        let link = links.index(ifindex)?;
        let dst = netlink.neighbour(ifindex, hop).await?;
        Some((Macs { src: link.address?, dst, vlan_tci: Some(link.vlan.unwrap_or(0)) }, hop))
    };
    match out.await {
        Some((out, hop)) if hop == remote.ip() => (Some(out), Some(Macs { src: out.dst, dst: out.src, ..out })),
        Some((out, _)) => (Some(out), None),
        None => (None, None),
    }
}

/// The bond towards `peer`: the configured one, if it exists; without `[bond]` in the configuration, the one that the
/// routes use.
pub async fn bond_towards<'a>(links: &'a Links, netlink: &Netlink, config: &Config, peer: &Peer) -> Option<&'a Link> {
    match &config.bond {
        Some(bond) => links.named(bond.name.as_str()).filter(|link| link.bond.is_some()),
        None => bond_below(links, outgoing(netlink, peer).await?),
    }
}

/// The bonds that carry `config`'s tunnels.
pub async fn bonds<'a>(links: &'a Links, netlink: &Netlink, config: &Config) -> Vec<&'a Link> {
    let mut bonds: Vec<&Link> = Vec::new();
    for peer in &config.peers {
        let found = bond_towards(links, netlink, config, peer).await;
        bonds.extend(found.filter(|found| bonds.iter().all(|bond| bond.ifindex != found.ifindex)));
    }
    bonds
}

/// The ports that an outer flow can use: a bond's members, or the single interface that the routes use.
pub struct Carriers<'a> {
    bond: Option<&'a Link>,
    /// In the order of enslavement.
    pub ports: Vec<&'a Link>,
    usable: Vec<&'a Link>,
    /// The Ethernet header, for hash policies that read it.
    pub macs: Option<Macs>,
}

impl<'a> Carriers<'a> {
    /// The ports behind the interface with this index.
    pub fn of(links: &'a Links, outgoing: Option<u32>) -> Self {
        match outgoing.and_then(|outgoing| bond_below(links, outgoing)) {
            Some(bond) => Self::behind(links, bond),
            None => Self {
                bond: None,
                ports: outgoing.and_then(|ifindex| links.index(ifindex)).into_iter().collect(),
                usable: Vec::new(),
                macs: None,
            },
        }
    }

    /// Whether the ports are members of a bond.
    pub fn are_bonded(&self) -> bool {
        self.bond.is_some()
    }

    /// The ports towards a peer.
    pub async fn towards(links: &'a Links, netlink: &Netlink, config: &Config, peer: &Peer) -> Self {
        match bond_towards(links, netlink, config, peer).await {
            Some(bond) => Self::behind(links, bond),
            None => Self::of(links, outgoing(netlink, peer).await),
        }
    }

    fn behind(links: &'a Links, bond: &'a Link) -> Self {
        Self { bond: Some(bond), ports: links.members(bond), usable: links.usable_members(bond), macs: None }
    }

    /// The ports that are usable; all ports if none is.
    pub fn members(&self) -> &[&'a Link] {
        if self.usable.is_empty() { &self.ports } else { &self.usable }
    }

    /// Whether the bond's hash policy reads [`Self::macs`].
    pub fn read_macs(&self) -> bool {
        let policy = self.bond.and_then(|bond| bond.bond.as_ref()?.xmit_hash_policy);
        policy.is_some_and(bond_hash::one_member_for_all)
    }

    /// The port that carries the flow. `None`: that cannot be known.
    pub fn carrier(&self, local: SocketAddr, remote: SocketAddr) -> Option<&'a Link> {
        let Some(bond) = self.bond else { return self.ports.first().copied() };
        let flow =
            OuterFlow { src: local.ip(), dst: remote.ip(), sport: local.port(), dport: remote.port(), macs: self.macs };
        let count = u8::try_from(self.usable.len()).ok().filter(|count| *count > 0)?;
        match bond_hash::member(bond.bond.as_ref()?.xmit_hash_policy?, &flow, count) {
            Member::Index(index) => self.usable.get(usize::from(index)).copied(),
            Member::Unknown(_) => None,
        }
    }
}
