//! The bond and the members that outer packets use, as the host has them now.

use std::net::SocketAddr;

use rtnetlink::Handle;

use crate::config::{Config, Peer};
use crate::host::observe::{Link, Links, outgoing_interface};
use crate::plan::bond_hash::{self, Member, OuterFlow};

/// The bond that packets leave by which leave by this interface: itself, or the one below a VLAN device.
pub fn bond_below(links: &Links, outgoing: u32) -> Option<&Link> {
    let link = links.index(outgoing)?;
    let below = link.parent.and_then(|parent| links.index(parent));
    [Some(link), below].into_iter().flatten().find(|link| link.bond.is_some())
}

/// The interface that outer packets to `peer` leave by, as routing has it now.
pub async fn outgoing(handle: &Handle, peer: &Peer) -> Option<u32> {
    let tunnel = peer.tunnels.first()?;
    let local = SocketAddr::new(peer.local_endpoint, tunnel.listen_port);
    let remote = SocketAddr::new(peer.remote_endpoint, tunnel.remote_port);
    outgoing_interface(handle, local, remote).await
}

/// The bond that leads to `peer`: the configured one if it is there, else the one that routing leads to.
pub async fn bond_towards<'a>(links: &'a Links, handle: &Handle, config: &Config, peer: &Peer) -> Option<&'a Link> {
    match &config.bond {
        Some(bond) => links.named(bond.name.as_str()).filter(|link| link.bond.is_some()),
        None => bond_below(links, outgoing(handle, peer).await?),
    }
}

/// The bonds that carry `config`'s tunnels.
pub async fn bonds<'a>(links: &'a Links, handle: &Handle, config: &Config) -> Vec<&'a Link> {
    let mut bonds: Vec<&Link> = Vec::new();
    for peer in &config.peers {
        let found = bond_towards(links, handle, config, peer).await;
        bonds.extend(found.filter(|found| bonds.iter().all(|bond| bond.ifindex != found.ifindex)));
    }
    bonds
}

/// The ports that an outer flow can leave by: a bond's members, or the one interface that routing chose.
pub struct Carriers<'a> {
    bond: Option<&'a Link>,
    /// In the order of enslavement.
    pub ports: Vec<&'a Link>,
    usable: Vec<&'a Link>,
}

impl<'a> Carriers<'a> {
    /// Those behind this interface.
    pub fn of(links: &'a Links, outgoing: Option<u32>) -> Self {
        match outgoing.and_then(|outgoing| bond_below(links, outgoing)) {
            Some(bond) => Self::behind(links, bond),
            None => Self {
                bond: None,
                ports: outgoing.and_then(|ifindex| links.index(ifindex)).into_iter().collect(),
                usable: Vec::new(),
            },
        }
    }

    /// Whether they are members of a bond.
    pub fn are_bonded(&self) -> bool {
        self.bond.is_some()
    }

    /// Those that lead to a peer.
    pub async fn towards(links: &'a Links, handle: &Handle, config: &Config, peer: &Peer) -> Self {
        match bond_towards(links, handle, config, peer).await {
            Some(bond) => Self::behind(links, bond),
            None => Self::of(links, outgoing(handle, peer).await),
        }
    }

    fn behind(links: &'a Links, bond: &'a Link) -> Self {
        Self { bond: Some(bond), ports: links.members(bond), usable: links.usable_members(bond) }
    }

    /// The ports that are in use; all of them where none is.
    pub fn members(&self) -> &[&'a Link] {
        if self.usable.is_empty() { &self.ports } else { &self.usable }
    }

    /// The port that carries the flow; `None` where that cannot be known.
    pub fn carrier(&self, local: SocketAddr, remote: SocketAddr) -> Option<&'a Link> {
        let Some(bond) = self.bond else { return self.ports.first().copied() };
        let flow =
            OuterFlow { src: local.ip(), dst: remote.ip(), sport: local.port(), dport: remote.port(), macs: None };
        let count = u8::try_from(self.usable.len()).ok().filter(|count| *count > 0)?;
        match bond_hash::member(bond.bond.as_ref()?.xmit_hash_policy?, &flow, count) {
            Member::Index(index) => self.usable.get(usize::from(index)).copied(),
            Member::Unknown(_) => None,
        }
    }
}
