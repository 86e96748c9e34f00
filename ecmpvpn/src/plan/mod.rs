//! What the host must look like: [`Plan`], made of a [`Config`] by a pure function. No I/O here.

pub mod bond_hash;
pub mod ports;

use std::net::{IpAddr, SocketAddr};

use ipnet::{IpNet, Ipv4Net};

use crate::config::{Bond, Config, InterfaceName, Policy, PresharedKey, PrivateKey, PublicKey};

/// Which WireGuard carries the tunnels, decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// The kernel's WireGuard.
    Kernel,
    /// gotatun in this process, on TUN devices.
    Userspace,
}

/// Everything that `run` makes on the host, in the order in which it makes it.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The site's name; directories and pins carry it.
    pub site: String,
    /// Which WireGuard carries the tunnels.
    pub backend: Backend,
    /// The bond, made or reused.
    pub bond: Option<Bond>,
    /// The tunnels of all peers; a tunnel's id is `peer * MAX_TUNNELS_PER_PEER + slot`.
    pub tunnels: Vec<Tunnel>,
    /// The device that remote prefixes are routed to.
    pub steering: SteeringDevice,
    /// Routes to the remote prefixes.
    pub routes: Vec<Route>,
    /// Kernel settings that forwarding through the tunnels needs.
    pub sysctls: Vec<Sysctl>,
    /// What the steering maps hold.
    pub table: SteeringTable,
}

/// One WireGuard device with one peer.
#[derive(Clone, Debug)]
pub struct Tunnel {
    /// Interface name.
    pub name: InterfaceName,
    /// Position of its peer in [`SteeringTable::peers`].
    pub peer: usize,
    /// Position among its peer's tunnels.
    pub slot: usize,
    /// MTU, bytes.
    pub mtu: u32,
    /// This end's address with its prefix length.
    pub address: Ipv4Net,
    /// This site's key.
    pub private_key: PrivateKey,
    /// The remote site's key.
    pub public_key: PublicKey,
    /// Shared with the remote site.
    pub preshared_key: Option<PresharedKey>,
    /// UDP port here.
    pub listen_port: u16,
    /// Address that the outer packets leave from.
    pub local_endpoint: IpAddr,
    /// Where the outer packets go.
    pub remote_endpoint: SocketAddr,
    /// Inner addresses that the peer may send from: its prefixes and the far end of `address`.
    pub allowed_ips: Vec<IpNet>,
}

/// The device that remote prefixes are routed to.
#[derive(Clone, Debug)]
pub struct SteeringDevice {
    /// Interface name.
    pub name: InterfaceName,
    /// MTU, bytes; the tunnels' own.
    pub mtu: u32,
    /// This gateway's addresses inside the VPN.
    pub addresses: Vec<IpNet>,
}

/// A route into the steering device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// Destination.
    pub prefix: IpNet,
    /// Source address of this gateway's own traffic.
    pub source: Option<IpAddr>,
}

/// A kernel setting below `/proc/sys/net`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sysctl {
    /// `net.ipv4.ip_forward = 1`
    Ipv4Forwarding,
    /// `net.ipv6.conf.all.forwarding = 1`, with `accept_ra = 2` first where router advertisements are in use.
    Ipv6Forwarding,
    /// `net.ipv4.conf.DEVICE.rp_filter = 2`
    LooseReversePath(InterfaceName),
}

/// What the steering maps hold.
#[derive(Clone, Debug)]
pub struct SteeringTable {
    /// Keys the flow hash.
    pub seed: u64,
    /// Remote sites, by position.
    pub peers: Vec<PeerTable>,
}

/// One remote site's part of the steering maps.
#[derive(Clone, Debug)]
pub struct PeerTable {
    /// The peer's name.
    pub name: String,
    /// How its flows are put onto tunnels.
    pub policy: Policy,
    /// Destinations that are this peer's.
    pub prefixes: Vec<IpNet>,
    /// Its tunnels by slot: interface and weight.
    pub tunnels: Vec<(InterfaceName, u16)>,
}

impl Plan {
    /// The plan that `config` asks for, carried by `backend`.
    pub fn new(config: &Config, backend: Backend) -> Self {
        let _ = (config, backend);
        unimplemented!("filled in next")
    }

    /// The alias of every link that `run` makes: it marks them as ours.
    pub fn link_alias(site: &str) -> String {
        format!("ecmpvpn:{site}")
    }
}
