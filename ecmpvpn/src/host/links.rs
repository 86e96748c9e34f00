//! Reads what the host has: links, bonds and the ports that outer packets leave by. Changes nothing.

use std::net::{IpAddr, SocketAddr};

use futures_util::TryStreamExt as _;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::link::{
    BondAdInfo, BondMode, BondPortState, BondXmitHashPolicy, InfoBond, InfoBondPort, InfoData, InfoPortData, InfoVlan,
    LinkAttribute, LinkInfo, LinkMessage, Stats64,
};
use netlink_packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteVia};
use rtnetlink::{Handle, RouteMessageBuilder};

use crate::config::XmitHashPolicy;

/// A link as the kernel shows it.
#[derive(Clone, Debug, Default)]
pub struct Link {
    /// Interface index.
    pub ifindex: u32,
    /// Interface name.
    pub name: String,
    /// As `ip -d link` names it: `wireguard`, `tun`, `bond`.
    pub kind: Option<String>,
    /// Free text; ours is `ecmpvpn:<site>`.
    pub alias: Option<String>,
    /// The link below it: a VLAN device's, say, or a veth's other end.
    pub parent: Option<u32>,
    /// Its Ethernet address.
    pub address: Option<[u8; 6]>,
    /// A VLAN device's id.
    pub vlan: Option<u16>,
    /// The bond or bridge that it belongs to.
    pub master: Option<u32>,
    /// The interface's own byte counters.
    pub tx_bytes: u64,
    /// The interface's own byte counters.
    pub rx_bytes: u64,
    /// What a bond says of itself.
    pub bond: Option<BondInfo>,
    /// What a bond says of its member.
    pub port: Option<PortInfo>,
}

/// What a bond says of itself.
#[derive(Clone, Debug, Default)]
pub struct BondInfo {
    /// Its mode.
    pub mode: Option<BondMode>,
    /// `None`: one that this program does not know.
    pub xmit_hash_policy: Option<XmitHashPolicy>,
    /// In 802.3ad mode, the aggregator in use.
    pub aggregator: Option<u16>,
}

/// What a bond says of its member.
#[derive(Clone, Debug, Default)]
pub struct PortInfo {
    active: bool,
    aggregator: Option<u16>,
}

/// Every link in this network namespace.
#[derive(Clone, Debug, Default)]
pub struct Links(Vec<Link>);

impl Links {
    /// Reads them from the kernel.
    pub async fn read(handle: &Handle) -> Result<Self, rtnetlink::Error> {
        let messages: Vec<LinkMessage> = handle.link().get().execute().try_collect().await?;
        Ok(Self(messages.iter().map(Link::from_message).collect()))
    }

    /// The link of this name.
    pub fn named(&self, name: &str) -> Option<&Link> {
        self.0.iter().find(|link| link.name == name)
    }

    /// The link of this index.
    pub fn index(&self, ifindex: u32) -> Option<&Link> {
        self.0.iter().find(|link| link.ifindex == ifindex)
    }

    /// The bond's members in the order in which they were enslaved: the order that its transmit hash counts in.
    pub fn members(&self, bond: &Link) -> Vec<&Link> {
        // Netlink lists links by index; only /proc keeps the bond's own order (bond_info_seq_show(),
        // drivers/net/bonding/bond_procfs.c).
        let shown = std::fs::read_to_string(format!("/proc/net/bonding/{}", bond.name)).unwrap_or_default();
        let order: Vec<&str> = shown.lines().filter_map(|line| line.strip_prefix("Slave Interface: ")).collect();
        let mut members: Vec<&Link> = self.0.iter().filter(|link| link.master == Some(bond.ifindex)).collect();
        members.sort_by_key(|link| order.iter().position(|name| *name == link.name).unwrap_or(usize::MAX));
        members
    }

    /// Those of [`Self::members`] that the transmit hash chooses from.
    /// Source: `bond_update_slave_arr()` of the bonding driver.
    pub fn usable_members(&self, bond: &Link) -> Vec<&Link> {
        let Some(info) = &bond.bond else { return Vec::new() };
        let usable = |link: &&Link| {
            link.port.as_ref().is_some_and(|port| {
                port.active && (info.mode != Some(BondMode::Ieee8023Ad) || port.aggregator == info.aggregator)
            })
        };
        self.members(bond).into_iter().filter(usable).collect()
    }
}

/// Index of the interface that a UDP datagram from `local` to `remote` leaves by, as routing has it now; `None`: no route.
pub async fn outgoing_interface(handle: &Handle, local: SocketAddr, remote: SocketAddr) -> Option<u32> {
    next_hop(handle, local, remote).await.map(|(ifindex, _)| ifindex)
}

/// The Ethernet address that the neighbour table has for an address on an interface; `None`: it is not resolved.
pub async fn neighbour(handle: &Handle, ifindex: u32, address: IpAddr) -> Option<[u8; 6]> {
    let (family, wanted) = match address {
        IpAddr::V4(address) => (AddressFamily::Inet, NeighbourAddress::Inet(address)),
        IpAddr::V6(address) => (AddressFamily::Inet6, NeighbourAddress::Inet6(address)),
    };
    let entries: Vec<NeighbourMessage> =
        handle.neighbours().get().set_address_family(family).execute().try_collect().await.ok()?;
    let wanted = NeighbourAttribute::Destination(wanted);
    let unresolved = [NeighbourState::Incomplete, NeighbourState::Failed];
    let entry = entries.iter().find(|entry| {
        let header = &entry.header;
        header.ifindex == ifindex && !unresolved.contains(&header.state) && entry.attributes.contains(&wanted)
    })?;
    entry.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::LinkLayerAddress(address) => address.as_slice().try_into().ok(),
        _ => None,
    })
}

/// The interface that such a datagram leaves by, and the router or neighbour that it is handed to.
pub async fn next_hop(handle: &Handle, local: SocketAddr, remote: SocketAddr) -> Option<(u32, IpAddr)> {
    const UDP: u8 = 17;
    let request = match (local.ip(), remote.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => RouteMessageBuilder::<std::net::Ipv4Addr>::new()
            .source_prefix(from, 32)
            .destination_prefix(to, 32)
            .ip_protocol(UDP)
            .sport(local.port())
            .dport(remote.port())
            .build(),
        (IpAddr::V6(from), IpAddr::V6(to)) => RouteMessageBuilder::<std::net::Ipv6Addr>::new()
            .source_prefix(from, 128)
            .destination_prefix(to, 128)
            .ip_protocol(UDP)
            .sport(local.port())
            .dport(remote.port())
            .build(),
        _ => return None,
    };
    let mut replies = std::pin::pin!(handle.route().get(request).execute());
    let reply = replies.try_next().await.ok()??;
    let gateway = reply.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Gateway(RouteAddress::Inet(gateway)) | RouteAttribute::Via(RouteVia::Inet(gateway)) => {
            Some(IpAddr::from(*gateway))
        }
        RouteAttribute::Gateway(RouteAddress::Inet6(gateway)) | RouteAttribute::Via(RouteVia::Inet6(gateway)) => {
            Some(IpAddr::from(*gateway))
        }
        _ => None,
    });
    let outgoing = reply.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Oif(ifindex) => Some(*ifindex),
        _ => None,
    });
    Some((outgoing?, gateway.unwrap_or(remote.ip())))
}

impl Link {
    fn from_message(message: &LinkMessage) -> Self {
        let mut link = Self { ifindex: message.header.index, ..Self::default() };
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name.clone_from(name),
                LinkAttribute::IfAlias(alias) => link.alias = Some(alias.clone()),
                LinkAttribute::Address(address) => link.address = address.as_slice().try_into().ok(),
                LinkAttribute::Link(parent) => link.parent = Some(*parent),
                LinkAttribute::Controller(master) => link.master = Some(*master),
                LinkAttribute::Stats64(Stats64 { tx_bytes, rx_bytes, .. }) => {
                    (link.tx_bytes, link.rx_bytes) = (*tx_bytes, *rx_bytes);
                }
                LinkAttribute::LinkInfo(infos) => {
                    for info in infos {
                        match info {
                            LinkInfo::Kind(kind) => link.kind = Some(kind.to_string()),
                            LinkInfo::Data(InfoData::Bond(data)) => link.bond = Some(BondInfo::from_data(data)),
                            LinkInfo::Data(InfoData::Vlan(data)) => {
                                link.vlan = data.iter().find_map(|item| match item {
                                    InfoVlan::Id(id) => Some(*id),
                                    _ => None,
                                });
                            }
                            LinkInfo::PortData(InfoPortData::BondPort(data)) => {
                                link.port = Some(PortInfo::from_data(data));
                            }
                            _ => {}
                        }
                    }
                }
                _ => {}
            }
        }
        link
    }
}

impl BondInfo {
    fn from_data(data: &[InfoBond]) -> Self {
        let mut info = Self::default();
        for item in data {
            match item {
                InfoBond::Mode(mode) => info.mode = Some(*mode),
                InfoBond::XmitHashPolicy(policy) => info.xmit_hash_policy = known_policy(*policy),
                InfoBond::AdInfo(items) => {
                    info.aggregator = items.iter().find_map(|item| match item {
                        BondAdInfo::Aggregator(id) => Some(*id),
                        _ => None,
                    });
                }
                _ => {}
            }
        }
        info
    }
}

impl PortInfo {
    fn from_data(data: &[InfoBondPort]) -> Self {
        let mut info = Self::default();
        for item in data {
            match item {
                InfoBondPort::BondPortState(state) => info.active = *state == BondPortState::Active,
                InfoBondPort::AdAggregatorId(id) => info.aggregator = Some(*id),
                _ => {}
            }
        }
        info
    }
}

fn known_policy(policy: BondXmitHashPolicy) -> Option<XmitHashPolicy> {
    Some(match policy {
        BondXmitHashPolicy::Layer2 => XmitHashPolicy::Layer2,
        BondXmitHashPolicy::Layer23 => XmitHashPolicy::Layer23,
        BondXmitHashPolicy::Layer34 => XmitHashPolicy::Layer34,
        BondXmitHashPolicy::Encap23 => XmitHashPolicy::Encap23,
        BondXmitHashPolicy::Encap34 => XmitHashPolicy::Encap34,
        BondXmitHashPolicy::VlanSrcMac => XmitHashPolicy::VlanSrcmac,
        _ => return None,
    })
}
