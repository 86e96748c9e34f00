//! What a lab consists of.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use serde_json::Value;
use tempfile::TempDir;

use crate::dump::Dump;
use crate::netns::{Netns, unique};
use crate::topology::{Quality, Wires};

/// What joins the gateways.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Underlay {
    /// The links are members of a real LACP bond at each end, which ecmpvpn makes. Needs kernel bonding.
    Bonded,
    /// Emulates the bond where the kernel has none: a policy routing rule for each tunnel's UDP ports puts its outer
    /// packets on the link that the bond's layer3+4 hash would. The links and their rates are as real as with a bond;
    /// LACP, and what a bond does when a member fails, are not there.
    Routed,
}

/// How a lab is built.
#[derive(Clone, Debug)]
pub struct Options {
    /// What joins the gateways.
    pub underlay: Underlay,
    /// `steering.backend`
    pub backend: &'static str,
    /// `steering.policy`
    pub policy: &'static str,
    /// Links between the gateways.
    pub members: u8,
    /// Tunnels.
    pub tunnels: usize,
    /// Each link's rate in each direction, 10^6 bits a second; `None`: unshaped.
    pub rate: Option<f64>,
    /// Each link's queue in each direction, bytes; `None`: what it sends in 50 ms, but not less than 64 KiB.
    pub queue: Option<u32>,
    /// What happens to packets on each link, in each direction; `None`: the ports are joined directly, and links cannot be
    /// delayed, cut or unplugged.
    pub wires: Option<Quality>,
    /// UDP ports of the tunnels at A and B; `None`: as `init` plans them.
    pub ports: Option<Vec<[u16; 2]>>,
    /// `health.interval_ms`
    pub probe_ms: u32,
    /// Added to both configurations.
    pub extra: String,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            underlay: Underlay::Routed,
            backend: "userspace",
            policy: "hash",
            members: 3,
            tunnels: 3,
            rate: None,
            queue: None,
            wires: None,
            ports: None,
            probe_ms: 100,
            extra: String::new(),
        }
    }
}

/// One tunnel as both sites see it.
#[derive(Clone, Debug)]
pub struct LabTunnel {
    /// Its interface at both sites.
    pub name: String,
    /// UDP ports at A and B.
    pub ports: [u16; 2],
    /// Its addresses at A and B.
    pub addresses: [Ipv4Addr; 2],
    /// The link that A and B send on, counted from 0, by the bond's hash.
    pub members: [u8; 2],
}

/// One site.
#[derive(Debug)]
pub struct Site {
    /// Its name in the configuration; unique on this host, as pins and run files carry it.
    pub name: String,
    /// Where ecmpvpn runs.
    pub gateway: Netns,
    /// A machine in its LAN.
    pub host: Netns,
    /// 10 or 20: the middle of its addresses.
    pub number: u8,
    /// Where outer packets come from and go to.
    pub endpoint: Ipv4Addr,
    /// The gateway inside the VPN, as configured.
    pub addresses: Vec<IpAddr>,
    /// Its configuration file.
    pub config: PathBuf,
}

/// What a device has counted since it exists.
#[derive(Clone, Copy, Debug)]
pub struct DeviceCounters {
    /// Packets received.
    pub rx_packets: u64,
    /// Bytes received.
    pub rx_bytes: u64,
    /// Packets sent.
    pub tx_packets: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
}

impl Site {
    pub(super) fn new(index: u8) -> Result<Self> {
        let letter = ["a", "b"][usize::from(index)];
        let site = Self {
            name: unique(&format!("lab-{letter}")),
            gateway: Netns::new(&format!("gw-{letter}"))?,
            host: Netns::new(&format!("host-{letter}"))?,
            number: 10 * (index + 1),
            endpoint: Ipv4Addr::new(10, 2, 3, 4 + index),
            addresses: Vec::new(),
            config: PathBuf::new(),
        };
        let n = site.number;
        let lan = |last: u8| {
            [
                "link set lan0 addrgenmode none".to_owned(),
                format!("address add 10.{n}.0.{last}/16 dev lan0"),
                format!("address add fd00:{n}::{last}/48 dev lan0 nodad"),
                // A router needs it: without one it solicits no neighbours for what it forwards.
                format!("address add fe80::{last}/64 dev lan0 nodad"),
                "link set lan0 up".to_owned(),
            ]
        };
        let veth = format!("link add lan0 type veth peer name lan0 netns {}", site.host.name());
        site.gateway.apply("ip", &[&[veth][..], &lan(1)].concat())?;
        let routes = [format!("route add default via 10.{n}.0.1"), format!("route add default via fd00:{n}::1")];
        site.host.apply("ip", &[&lan(10)[..], &routes].concat())?;
        Ok(site)
    }

    /// The LAN host's address.
    pub fn host_v4(&self) -> IpAddr {
        Ipv4Addr::new(10, self.number, 0, 10).into()
    }

    /// The LAN host's address.
    pub fn host_v6(&self) -> IpAddr {
        // The number is written in the address as it reads in decimal: fd00:10::10.
        let n = u16::from_str_radix(&self.number.to_string(), 16).expect("decimal digits are hexadecimal ones");
        Ipv6Addr::new(0xfd00, n, 0, 0, 0, 0, 0, 0x10).into()
    }

    /// Counters of a device of the gateway.
    pub fn device(&self, name: &str) -> Result<DeviceCounters> {
        let links: Value = serde_json::from_str(&self.gateway.query("ip", &format!("-s -j link show {name}"))?)?;
        let count = |side: &str, what: &str| {
            links[0]["stats64"][side][what].as_u64().with_context(|| format!("{name} has no {side} {what}"))
        };
        Ok(DeviceCounters {
            rx_packets: count("rx", "packets")?,
            rx_bytes: count("rx", "bytes")?,
            tx_packets: count("tx", "packets")?,
            tx_bytes: count("tx", "bytes")?,
        })
    }

    /// What the gateway, its pins and its run files look like.
    pub fn dump(&self) -> Result<Dump> {
        Dump::take(&self.gateway, &[&self.name])
    }
}

/// Both sites.
#[derive(Debug)]
pub struct Lab {
    /// Sites A and B.
    pub sites: [Site; 2],
    /// The tunnels between them.
    pub tunnels: Vec<LabTunnel>,
    /// How it was built.
    pub options: Options,
    /// The links, numbered as the members are, where [`Options::wires`] asks for them.
    pub(super) wires: Option<Wires>,
    /// The program under test.
    pub(super) binary: PathBuf,
    pub(super) dir: TempDir,
}
