//! The parts of a lab.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use serde_json::Value;
use tempfile::TempDir;

use crate::dump::Dump;
use crate::netns::{Netns, unique};
use crate::topology::{Quality, Wires};

/// The network between the gateways.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Underlay {
    /// Each gateway has a real LACP bond, which ecmpvpn makes. The links are its members. Needs kernel bonding.
    Bonded,
    /// Emulates the bond, for kernels without bonding. A policy routing rule for each tunnel's UDP ports puts its outer
    /// packets on the link that the bond's layer3+4 hash would choose. The links and their rates are as real as with a
    /// bond. There is no LACP, and no bond that reacts when a member fails.
    Routed,
}

/// Settings of a lab.
#[derive(Clone, Debug)]
pub struct Options {
    /// The network between the gateways.
    pub underlay: Underlay,
    /// `steering.backend`
    pub backend: &'static str,
    /// `steering.policy`
    pub policy: &'static str,
    /// Number of links between the gateways.
    pub members: u8,
    /// Number of tunnels.
    pub tunnels: usize,
    /// Each link's rate in each direction, 10^6 bits a second. `None`: no limit.
    pub rate: Option<f64>,
    /// Each link's queue in each direction, bytes. `None`: what the link sends in 50 ms, but not less than 64 KiB.
    pub queue: Option<u32>,
    /// Delay, jitter and loss of each link, in each direction. `None`: the ports are joined directly, and links cannot
    /// be delayed, cut or unplugged.
    pub wires: Option<Quality>,
    /// UDP ports of the tunnels at A and B. `None`: as `init` plans them.
    pub ports: Option<Vec<[u16; 2]>>,
    /// `health.interval_ms`
    pub probe_ms: u32,
    /// What differs from the configurations that `init` writes.
    pub overrides: Overrides,
}

/// Changes of both sites' configurations.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Overrides {
    /// Another value, in TOML, for a key that `init` writes once in both configurations, as `restore_order=true`
    #[arg(long = "set", value_name = "KEY=VALUE", value_parser = key_and_value)]
    pub keys: Vec<(String, String)>,
    /// TOML text that is appended to both configurations, as `[[rule]]…`
    #[arg(long, default_value = "", value_name = "TOML")]
    pub extra: String,
}

fn key_and_value(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("not KEY=VALUE")?;
    Ok((key.trim().to_owned(), value.trim().to_owned()))
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
            overrides: Overrides::default(),
        }
    }
}

/// One tunnel between the sites.
#[derive(Clone, Debug)]
pub struct LabTunnel {
    /// Name of the interface at both sites.
    pub name: String,
    /// UDP ports at A and B.
    pub ports: [u16; 2],
    /// Tunnel addresses at A and B.
    pub addresses: [Ipv4Addr; 2],
    /// The links that A and B send on, counted from 0. The bond's hash chooses them.
    pub members: [u8; 2],
}

#[derive(Debug)]
pub struct Site {
    /// The site's name in the configuration. It is unique on this host, because pins and run files are named after it.
    pub name: String,
    /// The namespace in which ecmpvpn runs.
    pub gateway: Netns,
    /// The namespace of a host in the LAN.
    pub host: Netns,
    /// 10 or 20: the second byte of the site's IPv4 prefix.
    pub number: u8,
    /// Address of the outer packets.
    pub endpoint: Ipv4Addr,
    /// The gateway's addresses inside the VPN, as configured.
    pub addresses: Vec<IpAddr>,
    /// The configuration file.
    pub config: PathBuf,
}

/// Counters of a device since it was made.
#[derive(Clone, Copy, Debug)]
pub struct DeviceCounters {
    pub rx_packets: u64,
    pub rx_bytes: u64,
    pub tx_packets: u64,
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
                // A router without a link-local address solicits no neighbours for packets that it forwards.
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

    pub fn host_v4(&self) -> IpAddr {
        Ipv4Addr::new(10, self.number, 0, 10).into()
    }

    pub fn host_v6(&self) -> IpAddr {
        // The address shows the number as it is written in decimal: fd00:10::10.
        let n = u16::from_str_radix(&self.number.to_string(), 16).expect("decimal digits are hexadecimal ones");
        Ipv6Addr::new(0xfd00, n, 0, 0, 0, 0, 0, 0x10).into()
    }

    /// Reads the counters of a device of the gateway.
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

    /// Dumps the gateway, and the pins and run files of the site.
    pub fn dump(&self) -> Result<Dump> {
        Dump::take(&self.gateway, &[&self.name])
    }
}

/// A lab: two sites, their tunnels, and the links between them.
#[derive(Debug)]
pub struct Lab {
    pub sites: [Site; 2],
    pub tunnels: Vec<LabTunnel>,
    pub options: Options,
    /// The wires, numbered as the members are. `None` unless [`Options::wires`] is set.
    pub(super) wires: Option<Wires>,
    /// The program under test.
    pub(super) binary: PathBuf,
    pub(super) dir: TempDir,
}
