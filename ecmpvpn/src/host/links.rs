//! The host's links as the kernel reports them. Values only.

use netlink_packet_route::link::{
    BondAdInfo, BondMode, BondPortState, BondXmitHashPolicy, InfoBond, InfoBondPort, InfoData, InfoKind, InfoPortData,
    InfoVlan, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage, Stats64,
};

use crate::config::XmitHashPolicy;

/// A link as the kernel reports it.
#[derive(Clone, Debug, Default)]
pub struct Link {
    pub ifindex: u32,
    pub name: String,
    /// `ifalias`; links that ecmpvpn made have `ecmpvpn:<site>`.
    pub alias: Option<String>,
    /// As `ip -d link` names it: `bond`, `wireguard`, `tun`. `None`: a physical device.
    pub kind: Option<String>,
    /// Administratively up.
    pub up: bool,
    pub carrier: bool,
    /// An Ethernet device: bond members must be.
    pub ethernet: bool,
    /// Bytes.
    pub mtu: u32,
    /// Its Ethernet address.
    pub address: Option<[u8; 6]>,
    /// The bond, bridge or VRF that it belongs to.
    pub master: Option<u32>,
    /// The device below, for example of a VLAN device. Not the other end of a veth pair.
    pub lower: Option<u32>,
    /// A VLAN device's id.
    pub vlan: Option<u16>,
    /// Its root queueing discipline, for example `mq`.
    pub qdisc: Option<String>,
    /// Bytes sent, by the interface's own counter.
    pub tx_bytes: u64,
    /// Bytes received, by the interface's own counter.
    pub rx_bytes: u64,
    /// Only for a bond.
    pub bond: Option<BondInfo>,
    /// Only for a member of a bond.
    pub port: Option<PortInfo>,
}

/// State and settings of a bond.
#[derive(Clone, Debug, Default)]
pub struct BondInfo {
    pub mode: Option<BondMode>,
    /// `None`: a policy that this program does not know.
    pub xmit_hash_policy: Option<XmitHashPolicy>,
    /// The active aggregator, in 802.3ad mode.
    pub aggregator: Option<u16>,
    /// All settings, as the kernel reports them.
    pub settings: Vec<InfoBond>,
}

/// State of a bond member.
#[derive(Clone, Debug, Default)]
pub struct PortInfo {
    active: bool,
    aggregator: Option<u16>,
}

/// Every link in this network namespace.
#[derive(Clone, Debug, Default)]
pub struct Links(pub Vec<Link>);

impl<'a> IntoIterator for &'a Links {
    type Item = &'a Link;
    type IntoIter = std::slice::Iter<'a, Link>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl Links {
    pub fn iter(&self) -> std::slice::Iter<'_, Link> {
        self.0.iter()
    }

    pub fn named(&self, name: &str) -> Option<&Link> {
        self.0.iter().find(|link| link.name == name)
    }

    pub fn index(&self, ifindex: u32) -> Option<&Link> {
        self.0.iter().find(|link| link.ifindex == ifindex)
    }

    /// The bond's members in the order in which they were enslaved: the order that its transmit hash uses.
    pub fn members(&self, bond: &Link) -> Vec<&Link> {
        // Netlink lists links by index; only /proc keeps the bond's own order (bond_info_seq_show(),
        // drivers/net/bonding/bond_procfs.c).
        let shown = std::fs::read_to_string(format!("/proc/net/bonding/{}", bond.name)).unwrap_or_default();
        let order: Vec<&str> = shown.lines().filter_map(|line| line.strip_prefix("Slave Interface: ")).collect();
        let mut members: Vec<&Link> = self.0.iter().filter(|link| link.master == Some(bond.ifindex)).collect();
        members.sort_by_key(|link| order.iter().position(|name| *name == link.name).unwrap_or(usize::MAX));
        members
    }

    /// The members that the transmit hash chooses from, in the order of [`Self::members`].
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

impl From<LinkMessage> for Link {
    fn from(message: LinkMessage) -> Self {
        let flags = message.header.flags;
        let mut link = Self {
            ifindex: message.header.index,
            up: flags.contains(LinkFlags::Up),
            carrier: flags.contains(LinkFlags::LowerUp),
            ethernet: message.header.link_layer_type == LinkLayerType::Ether,
            ..Self::default()
        };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name = name,
                LinkAttribute::IfAlias(alias) => link.alias = Some(alias),
                LinkAttribute::Address(address) => link.address = address.as_slice().try_into().ok(),
                LinkAttribute::Mtu(mtu) => link.mtu = mtu,
                LinkAttribute::Qdisc(qdisc) => link.qdisc = Some(qdisc),
                LinkAttribute::Controller(master) if master != 0 => link.master = Some(master),
                LinkAttribute::Link(lower) if lower != 0 => link.lower = Some(lower),
                LinkAttribute::Stats64(Stats64 { tx_bytes, rx_bytes, .. }) => {
                    (link.tx_bytes, link.rx_bytes) = (tx_bytes, rx_bytes);
                }
                LinkAttribute::LinkInfo(infos) => link.add_info(infos),
                _ => {}
            }
        }
        if link.is(&InfoKind::Veth) {
            link.lower = None;
        }
        link
    }
}

impl Link {
    fn add_info(&mut self, infos: Vec<LinkInfo>) {
        for info in infos {
            match info {
                LinkInfo::Kind(kind) => self.kind = Some(kind.to_string()),
                LinkInfo::Data(InfoData::Bond(data)) => self.bond = Some(BondInfo::from_data(data)),
                LinkInfo::Data(InfoData::Vlan(data)) => {
                    self.vlan = data.iter().find_map(|item| match item {
                        InfoVlan::Id(id) => Some(*id),
                        _ => None,
                    });
                }
                LinkInfo::PortData(InfoPortData::BondPort(data)) => self.port = Some(PortInfo::from_data(&data)),
                _ => {}
            }
        }
    }

    /// Whether it is of this kind, as `ip -d link` names it.
    pub fn is(&self, kind: &InfoKind) -> bool {
        self.kind.as_deref() == Some(kind.to_string().as_str())
    }
}

impl BondInfo {
    fn from_data(settings: Vec<InfoBond>) -> Self {
        let mut info = Self::default();
        for item in &settings {
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
        Self { settings, ..info }
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
