//! What `run` changes on the host, in a network engineer's words.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use super::alteration::Alteration;
use super::saved::Saved;
use crate::config::{Bond, BondMode, InterfaceName, LacpRate};
use crate::plan::Backend;

/// One change, or the finding that none is needed.
#[derive(Clone, Debug)]
pub enum Change {
    /// Mount the BPF file system.
    MountBpffs,
    /// Make the bond.
    CreateBond {
        /// As configured.
        bond: Bond,
        /// Bytes: the least of its members'.
        mtu: u32,
    },
    /// The bond is there with these settings.
    ReuseBond {
        /// Its name.
        bond: InterfaceName,
    },
    /// Enslave a member.
    Enslave {
        /// The member.
        member: InterfaceName,
        /// Its bond.
        bond: InterfaceName,
        /// What it loses until `down`.
        addresses: Vec<String>,
    },
    /// The member is in the bond already.
    KeepMember {
        /// The member.
        member: InterfaceName,
        /// Its bond.
        bond: InterfaceName,
    },
    /// Add an address to the bond.
    AddAddress {
        /// The bond.
        device: InterfaceName,
        /// With its prefix length.
        address: IpNet,
    },
    /// The address is there already.
    KeepAddress {
        /// The bond.
        device: InterfaceName,
        /// With its prefix length.
        address: IpNet,
    },
    /// Set the bond up.
    SetUp {
        /// The bond.
        device: InterfaceName,
    },
    /// Go on with a member's route over its bond.
    MoveRoute {
        /// As it was.
        route: Saved,
        /// The bond.
        device: InterfaceName,
    },
    /// Make a tunnel.
    CreateTunnel {
        /// Its name.
        name: InterfaceName,
        /// Which WireGuard.
        backend: Backend,
        /// UDP port here.
        listen_port: u16,
        /// The far end.
        remote_endpoint: SocketAddr,
        /// This end's address.
        address: IpNet,
        /// Bytes.
        mtu: u32,
    },
    /// The tunnel is there as planned.
    KeepTunnel {
        /// Its name.
        name: InterfaceName,
        /// Interface index.
        ifindex: u32,
    },
    /// Change a tunnel of ours, or the steering device, that is there.
    Alter {
        /// Its name.
        name: InterfaceName,
        /// Interface index.
        ifindex: u32,
        /// In what it differs.
        alteration: Alteration,
    },
    /// Remove a tunnel of ours that is not planned any more.
    RemoveTunnel {
        /// Its name.
        name: InterfaceName,
        /// Interface index.
        ifindex: u32,
    },
    /// The steering device is there as planned.
    KeepSteering {
        /// Its name.
        name: InterfaceName,
        /// Interface index.
        ifindex: u32,
    },
    /// Make the steering device.
    CreateSteering {
        /// Its name.
        name: InterfaceName,
        /// Which WireGuard.
        backend: Backend,
        /// This gateway's addresses inside the VPN.
        addresses: Vec<IpNet>,
        /// Bytes.
        mtu: u32,
    },
    /// Route a prefix to the steering device.
    AddRoute {
        /// Destination.
        prefix: IpNet,
        /// The steering device.
        device: InterfaceName,
        /// Of this gateway's own traffic.
        source: Option<IpAddr>,
    },
    /// The route is there already.
    KeepRoute {
        /// Destination.
        prefix: IpNet,
        /// The steering device.
        device: InterfaceName,
    },
    /// Put a route in the place of one of ours that goes elsewhere or has another source.
    ReplaceRoute {
        /// Destination.
        prefix: IpNet,
        /// The steering device.
        device: InterfaceName,
        /// Of this gateway's own traffic.
        source: Option<IpAddr>,
    },
    /// Remove a route of ours that is not planned any more.
    RemoveRoute {
        /// Destination.
        prefix: IpNet,
        /// The steering device.
        device: String,
    },
    /// Remove an address that we added to the bond and that is not planned any more.
    RemoveAddress {
        /// The bond.
        device: InterfaceName,
        /// With its prefix length.
        address: IpNet,
    },
    /// Let a device go on using router advertisements.
    AcceptRouterAdvertisements {
        /// The device.
        device: String,
    },
    /// Turn forwarding on.
    EnableForwarding {
        /// Else IPv6.
        ipv4: bool,
    },
    /// Forwarding is on.
    KeepForwarding {
        /// Else IPv6.
        ipv4: bool,
    },
    /// Set a tunnel to loose reverse path filtering.
    LooseReversePath {
        /// The tunnel.
        device: InterfaceName,
    },
}

impl Change {
    /// Whether anything is changed at all.
    pub fn is_needed(&self) -> bool {
        !matches!(
            self,
            Self::ReuseBond { .. }
                | Self::KeepMember { .. }
                | Self::KeepAddress { .. }
                | Self::KeepForwarding { .. }
                | Self::KeepTunnel { .. }
                | Self::KeepSteering { .. }
                | Self::KeepRoute { .. }
        )
    }

    /// Whether something of ours goes: it is to go when nothing uses it any more.
    pub fn is_removal(&self) -> bool {
        match self {
            Self::RemoveTunnel { .. } | Self::RemoveRoute { .. } | Self::RemoveAddress { .. } => true,
            Self::Alter { alteration, .. } => alteration.is_removal(),
            _ => false,
        }
    }

    /// The changes that this one consists of where others come in between: what goes, goes at the end.
    pub fn staged(self) -> Vec<Self> {
        let Self::Alter { name, ifindex, alteration } = self else { return vec![self] };
        let (first, last) = alteration.staged();
        let parts = [first, last].into_iter().filter(|part| !part.is_empty());
        parts.map(|alteration| Self::Alter { name: name.clone(), ifindex, alteration }).collect()
    }
}

fn joined<T: fmt::Display>(items: &[T]) -> String {
    items.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

fn family(ipv4: bool) -> &'static str {
    if ipv4 { "IPv4" } else { "IPv6" }
}

fn switch(ipv4: bool) -> &'static str {
    if ipv4 { "net.ipv4.ip_forward" } else { "net.ipv6.conf.all.forwarding" }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::MountBpffs => write!(f, "mount the BPF file system at {}", super::bpffs::BPFFS),
            Self::CreateBond { bond, mtu } => {
                let mode = match (bond.mode, bond.lacp_rate) {
                    (BondMode::Lacp, LacpRate::Fast) => "802.3ad, fast LACP",
                    (BondMode::Lacp, LacpRate::Slow) => "802.3ad, slow LACP",
                    (BondMode::BalanceXor, _) => "balance-xor",
                };
                let (policy, miimon) = (bond.xmit_hash_policy.as_str(), bond.miimon_ms);
                write!(f, "create bond {} ({mode}, {policy}, miimon {miimon} ms, MTU {mtu})", bond.name)
            }
            Self::ReuseBond { bond } => write!(f, "reuse bond {bond}: it has these settings"),
            Self::Enslave { member, bond, addresses } if addresses.is_empty() => {
                write!(f, "enslave {member} to {bond}")
            }
            Self::Enslave { member, bond, addresses } => {
                let (noun, verb) = if addresses.len() == 1 { ("address", "comes") } else { ("addresses", "come") };
                write!(f, "enslave {member} to {bond} (its {noun} {} {verb} back on down)", joined(addresses))
            }
            Self::KeepMember { member, bond } => write!(f, "leave {member} in {bond}"),
            Self::AddAddress { device, address } => write!(f, "add address {address} to {device}"),
            Self::KeepAddress { device, address } => write!(f, "leave address {address} on {device}"),
            Self::MoveRoute { route, device } => write!(f, "move the route {} to {device}", route.text),
            Self::SetUp { device } => write!(f, "set {device} up"),
            Self::CreateTunnel { name, backend, listen_port, remote_endpoint, address, mtu } => {
                write!(
                    f,
                    "create tunnel {name} ({}, UDP port {listen_port} to {remote_endpoint}, ",
                    carrier(*backend)
                )?;
                write!(f, "address {address}, MTU {mtu})")
            }
            Self::CreateSteering { name, backend, addresses, mtu } => {
                let kind = match backend {
                    Backend::Kernel => "WireGuard without peers",
                    Backend::Userspace => "TUN",
                };
                write!(f, "create steering device {name} ({kind}, ")?;
                if !addresses.is_empty() {
                    write!(
                        f,
                        "{} {}, ",
                        if addresses.len() == 1 { "address" } else { "addresses" },
                        joined(addresses)
                    )?;
                }
                write!(f, "MTU {mtu})")
            }
            Self::KeepTunnel { name, .. } => write!(f, "leave tunnel {name}"),
            Self::Alter { name, alteration, .. } => write!(f, "change {name}: {alteration}"),
            Self::RemoveTunnel { name, .. } => write!(f, "remove tunnel {name}"),
            Self::KeepSteering { name, .. } => write!(f, "leave steering device {name}"),
            Self::KeepRoute { prefix, device } => write!(f, "leave the route of {prefix} to {device}"),
            Self::ReplaceRoute { prefix, device, source: None } => write!(f, "route {prefix} to {device} instead"),
            Self::ReplaceRoute { prefix, device, source: Some(source) } => {
                write!(f, "route {prefix} to {device} instead (source {source})")
            }
            Self::RemoveRoute { prefix, device } => write!(f, "remove the route of {prefix} to {device}"),
            Self::RemoveAddress { device, address } => write!(f, "remove address {address} from {device}"),
            Self::AddRoute { prefix, device, source: None } => write!(f, "route {prefix} to {device}"),
            Self::AddRoute { prefix, device, source: Some(source) } => {
                write!(f, "route {prefix} to {device} (source {source})")
            }
            Self::AcceptRouterAdvertisements { device } => {
                write!(f, "set net.ipv6.conf.{device}.accept_ra to 2 (keeps its default route once IPv6 is forwarded)")
            }
            Self::EnableForwarding { ipv4 } => {
                write!(f, "turn {} forwarding on ({} = 1)", family(*ipv4), switch(*ipv4))
            }
            Self::KeepForwarding { ipv4 } => write!(f, "leave {} forwarding on", family(*ipv4)),
            Self::LooseReversePath { device } => write!(f, "set net.ipv4.conf.{device}.rp_filter to 2"),
        }
    }
}

fn carrier(backend: Backend) -> &'static str {
    match backend {
        Backend::Kernel => "kernel WireGuard",
        Backend::Userspace => "userspace WireGuard",
    }
}
