//! A WireGuard tunnel between two hosts behind the gateways. To the gateways it is one UDP flow.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use anyhow::{Context as _, Result};
use ecmpvpn::config::{InterfaceName, PrivateKey};
use ecmpvpn::host::wireguard::kernel;
use ecmpvpn::plan::Tunnel;
use ipnet::Ipv4Net;

use crate::netns::Netns;
use crate::traffic::Path;

/// Name of the device at both ends.
const NAME: &str = "inner0";
/// UDP port at both ends.
const PORT: u16 = 51_900;
/// MTU of the gateways' tunnels, less the headers of IPv4, UDP and WireGuard with its tag.
const MTU: u32 = 1_420 - 60;
const ADDRESSES: [Ipv4Addr; 2] = [Ipv4Addr::new(192, 168, 77, 0), Ipv4Addr::new(192, 168, 77, 1)];

/// A tunnel of kernel WireGuard between the ends of a path. It is removed when this value is dropped.
#[derive(Debug)]
pub struct InnerTunnel<'a> {
    outer: Path<'a>,
}

impl<'a> InnerTunnel<'a> {
    /// Makes both ends.
    ///
    /// # Errors
    /// The kernel has no WireGuard, or there is already such a tunnel.
    pub fn new(outer: Path<'a>) -> Result<Self> {
        let keys = [PrivateKey::generate(), PrivateKey::generate()];
        let publics = [keys[0].public_key(), keys[1].public_key()];
        let ends = [(outer.from, outer.source), (outer.to, outer.destination)];
        // Dropped, and so removed, if something fails from here on.
        let tunnel = Self { outer };
        for (end, private_key) in keys.into_iter().enumerate() {
            let far = 1 - end;
            let tunnel = Tunnel {
                name: InterfaceName::new(NAME).map_err(anyhow::Error::msg)?,
                peer: 0,
                slot: 0,
                mtu: MTU,
                address: Ipv4Net::new(ADDRESSES[end], 31)?,
                private_key,
                public_key: publics[far],
                preshared_key: None,
                listen_port: PORT,
                local_endpoint: ends[end].1,
                remote_endpoint: SocketAddr::new(ends[far].1, PORT),
                allowed_ips: vec![IpAddr::from(ADDRESSES[far]).into()],
            };
            make(ends[end].0, &tunnel)?;
        }
        Ok(tunnel)
    }

    /// The path through the tunnel, in the direction of the path below it.
    #[must_use]
    pub fn path(&self) -> Path<'a> {
        Path { source: ADDRESSES[0].into(), destination: ADDRESSES[1].into(), ..self.outer }
    }
}

/// Makes one end of a tunnel, and sets it up.
pub(super) fn make(ns: &Netns, tunnel: &Tunnel) -> Result<()> {
    let Tunnel { name, mtu, address, .. } = tunnel;
    ns.ip(&format!("link add {name} mtu {mtu} type wireguard"))?;
    ns.run(|| kernel::configure(tunnel)).with_context(|| format!("configuring {name} in {}", ns.name()))?;
    ns.apply("ip", &[format!("address add {address} dev {name}"), format!("link set {name} up")])
}

impl Drop for InnerTunnel<'_> {
    fn drop(&mut self) {
        for end in [self.outer.from, self.outer.to] {
            // One end may not have been made.
            let _ = end.ip(&format!("link delete {NAME}"));
        }
    }
}
