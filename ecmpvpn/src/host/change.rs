//! The changes that `run` makes on the host, and their texts for the log and for `--dry-run`.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use super::alteration::{Alteration, Part};
use super::saved::Saved;
use crate::config::{Bond, BondMode, InterfaceName, LacpRate};
use crate::plan::Backend;

/// One change, or the finding that something is as planned already.
#[derive(Clone, Debug)]
pub enum Change {
    MountBpffs,
    CreateBond {
        bond: Bond,
        /// Bytes: the lowest MTU of its members.
        mtu: u32,
    },
    /// The bond exists, with the configured settings.
    ReuseBond {
        bond: InterfaceName,
    },
    Enslave {
        member: InterfaceName,
        bond: InterfaceName,
        /// The addresses that it loses until `down`.
        addresses: Vec<String>,
    },
    /// The member is already in the bond.
    KeepMember {
        member: InterfaceName,
        bond: InterfaceName,
    },
    AddAddress {
        /// The bond.
        device: InterfaceName,
        /// With its prefix length.
        address: IpNet,
    },
    /// The bond already has the address.
    KeepAddress {
        /// The bond.
        device: InterfaceName,
        /// With its prefix length.
        address: IpNet,
    },
    SetUp {
        /// The bond.
        device: InterfaceName,
    },
    /// Move a member's route to its bond.
    MoveRoute {
        /// The route as it is on the member.
        route: Saved,
        /// The bond.
        device: InterfaceName,
    },
    CreateTunnel {
        name: InterfaceName,
        backend: Backend,
        /// UDP port at this end.
        listen_port: u16,
        remote_endpoint: SocketAddr,
        /// This end's address.
        address: IpNet,
        /// Bytes.
        mtu: u32,
    },
    /// The tunnel exists as planned.
    KeepTunnel {
        name: InterfaceName,
        ifindex: u32,
    },
    /// Change an existing tunnel, or the steering device.
    Alter {
        name: InterfaceName,
        ifindex: u32,
        /// How it differs.
        alteration: Alteration,
    },
    /// Remove a tunnel that is no longer planned.
    RemoveTunnel {
        name: InterfaceName,
        ifindex: u32,
    },
    /// The steering device exists as planned.
    KeepSteering {
        name: InterfaceName,
        ifindex: u32,
    },
    CreateSteering {
        name: InterfaceName,
        backend: Backend,
        /// This gateway's addresses inside the VPN.
        addresses: Vec<IpNet>,
        /// Bytes.
        mtu: u32,
    },
    /// Make a prefix unreachable wherever no other route leads to it.
    AddUnreachable {
        prefix: IpNet,
    },
    /// The unreachable route exists already.
    KeepUnreachable {
        prefix: IpNet,
    },
    /// Remove an unreachable route that ecmpvpn made and that is no longer planned.
    RemoveUnreachable {
        prefix: IpNet,
    },
    /// Route a prefix to the steering device.
    AddRoute {
        prefix: IpNet,
        /// The steering device.
        device: InterfaceName,
        /// Source address for this gateway's own traffic.
        source: Option<IpAddr>,
    },
    /// The route exists already.
    KeepRoute {
        prefix: IpNet,
        /// The steering device.
        device: InterfaceName,
    },
    /// Replace a route that ecmpvpn made: it has another device or another source.
    ReplaceRoute {
        prefix: IpNet,
        /// The steering device.
        device: InterfaceName,
        /// Source address for this gateway's own traffic.
        source: Option<IpAddr>,
    },
    /// Remove a route that ecmpvpn made and that is no longer planned.
    RemoveRoute {
        prefix: IpNet,
        /// The steering device.
        device: String,
    },
    /// Remove an address that ecmpvpn added to the bond and that is no longer planned.
    RemoveAddress {
        /// The bond.
        device: InterfaceName,
        /// With its prefix length.
        address: IpNet,
    },
    /// Let a device use router advertisements also while IPv6 is forwarded.
    AcceptRouterAdvertisements {
        device: String,
    },
    EnableForwarding {
        /// `true`: IPv4; `false`: IPv6.
        ipv4: bool,
    },
    /// Forwarding is already on.
    KeepForwarding {
        /// `true`: IPv4; `false`: IPv6.
        ipv4: bool,
    },
    /// Set a tunnel to loose reverse path filtering.
    LooseReversePath {
        /// The tunnel.
        device: InterfaceName,
    },
}

impl Change {
    /// Whether this changes anything.
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
                | Self::KeepUnreachable { .. }
        )
    }

    /// Whether this only removes something. Removals come last, when nothing uses the thing any more.
    pub fn is_removal(&self) -> bool {
        match self {
            Self::RemoveTunnel { .. }
            | Self::RemoveRoute { .. }
            | Self::RemoveUnreachable { .. }
            | Self::RemoveAddress { .. } => true,
            Self::Alter { alteration, .. } => alteration.is_removal(),
            _ => false,
        }
    }

    /// What this change of a running site would mend: somebody else has changed something of the tunnels, the steering
    /// device, the routes or the kernel's settings. `None`: something else, such as bond members and keys.
    pub fn damage(&self) -> Option<String> {
        match self {
            Self::CreateTunnel { name, .. } | Self::CreateSteering { name, .. } => Some(format!("{name} was deleted")),
            Self::Alter { name, alteration, .. } => {
                let mut words = Vec::new();
                for part in &alteration.parts {
                    match part {
                        Part::Down => words.push(format!("{name} was set down")),
                        Part::Mtu => words.push(format!("{name} had another MTU")),
                        Part::Key
                        | Part::Port
                        | Part::Peer
                        | Part::PresharedKey
                        | Part::Endpoint
                        | Part::AllowedIps => {}
                    }
                }
                words.extend(alteration.add.iter().map(|address| format!("{name} had lost its address {address}")));
                (!words.is_empty()).then(|| words.join(", "))
            }
            Self::AddUnreachable { prefix } => Some(format!("the unreachable route to {prefix} was deleted")),
            Self::AddRoute { prefix, device, .. } => Some(format!("the route of {prefix} to {device} was deleted")),
            Self::ReplaceRoute { prefix, .. } => Some(format!("the route of {prefix} was changed")),
            Self::EnableForwarding { ipv4 } => Some(format!("{} forwarding was turned off", family(*ipv4))),
            Self::LooseReversePath { device } => Some(format!("net.ipv4.conf.{device}.rp_filter was changed")),
            Self::MountBpffs
            | Self::CreateBond { .. }
            | Self::ReuseBond { .. }
            | Self::Enslave { .. }
            | Self::KeepMember { .. }
            | Self::AddAddress { .. }
            | Self::KeepAddress { .. }
            | Self::SetUp { .. }
            | Self::MoveRoute { .. }
            | Self::KeepTunnel { .. }
            | Self::RemoveTunnel { .. }
            | Self::KeepSteering { .. }
            | Self::KeepUnreachable { .. }
            | Self::RemoveUnreachable { .. }
            | Self::KeepRoute { .. }
            | Self::RemoveRoute { .. }
            | Self::RemoveAddress { .. }
            | Self::AcceptRouterAdvertisements { .. }
            | Self::KeepForwarding { .. } => None,
        }
    }

    /// The part of this change that mends damage (see [`Self::damage`]), or the finding that something is as planned.
    /// What remains of a tunnel's change may be nothing: its keys may differ because they are being renewed. `steering`:
    /// the steering device.
    pub fn repair(self, steering: &InterfaceName) -> Option<Self> {
        match self {
            Self::Alter { name, ifindex, mut alteration } => {
                alteration.parts.retain(|part| matches!(part, Part::Down | Part::Mtu));
                alteration.remove.clear();
                if !alteration.is_empty() {
                    return Some(Self::Alter { name, ifindex, alteration });
                }
                (name != *steering).then_some(Self::KeepTunnel { name, ifindex })
            }
            other => (!other.is_needed() || other.damage().is_some()).then_some(other),
        }
    }

    /// Splits this change into the part to do first and the part to do last: removals come last.
    pub fn split_removals(self) -> Vec<Self> {
        let Self::Alter { name, ifindex, alteration } = self else { return vec![self] };
        let (first, last) = alteration.split_removals();
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
                write!(f, "enslave {member} to {bond} (its {noun} {} {verb} back on `ecmpvpn down`)", joined(addresses))
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
            Self::AddUnreachable { prefix } => {
                write!(f, "add an unreachable route to {prefix}, so that it never leaves unencrypted")
            }
            Self::KeepUnreachable { prefix } => write!(f, "leave the unreachable route to {prefix}"),
            Self::RemoveUnreachable { prefix } => write!(f, "remove the unreachable route to {prefix}"),
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
