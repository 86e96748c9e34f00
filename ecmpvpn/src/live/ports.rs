//! Judges the configured tunnels' ports by the bond that the host has now.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::fs;
use std::net::SocketAddr;
use std::time::Duration;

use netlink_packet_route::link::BondMode;
use tokio::time::{Instant, sleep};

use crate::config::{self, Config, XmitHashPolicy};
use crate::error::chain;
use crate::host::Netlink;
use crate::host::links::{Link, Links};
use crate::host::underlay;
use crate::plan::ports::{LocalBond, PortError};
use crate::report::plan::{Peer, Report};

/// How long the members of a new bond may take to negotiate with their switch before the ports are judged.
const LACP_PATIENCE: Duration = Duration::from_secs(10);
/// How often the members are checked meanwhile.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// How the configured tunnels' ports fit the bonds' present state.
#[derive(Clone, Debug)]
pub struct Judged {
    /// The report, without its changes.
    pub report: Report,
    /// Bonds that do not use all their members now, one sentence each.
    pub degraded: Vec<String>,
}

/// Which of a bond's members count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Count {
    /// Those that the bond sends on now, if it sends at all.
    Usable,
    /// All of them: ports are chosen for the bond at full strength.
    All,
}

/// Judges the ports of `config`'s tunnels. It reads the host's links, routes and sockets, which needs no privilege.
/// What it cannot read it takes from the configuration.
pub async fn judge(config: &Config, count: Count) -> Result<Judged, PortError> {
    let host = Host::read().await;
    let in_use = ports_in_use();
    let mut judged = Judged { report: Report { peers: Vec::new(), changes: None }, degraded: Vec::new() };
    for peer in &config.peers {
        let found = match &host {
            Some(host) => host.bond_towards(config, peer, count).await,
            None => None,
        };
        let local = match found {
            Some(Found { bond, degraded }) => {
                judged.degraded.extend(degraded.filter(|degraded| !judged.degraded.contains(degraded)));
                Some(bond)
            }
            None => LocalBond::configured(config),
        };
        judged.report.peers.push(Peer::configured(config, peer, local, &in_use)?);
    }
    Ok(judged)
}

/// Warnings about the ports of a site that is up; empty if they cannot be judged.
pub async fn warnings(config: &Config) -> Vec<String> {
    judge(config, Count::All).await.map_or_else(|_| Vec::new(), |judged| judged.report.warnings().collect())
}

/// Logs warnings about the ports of a site that has just come up, then waits forever.
pub async fn advise(config: &Config) -> Infallible {
    let until = Instant::now() + LACP_PATIENCE;
    loop {
        match judge(config, Count::All).await {
            Ok(judged) if judged.degraded.is_empty() || Instant::now() >= until => {
                judged.degraded.iter().for_each(|degraded| tracing::warn!("{degraded}"));
                judged.report.warnings().for_each(|warning| tracing::warn!("{warning}"));
                break;
            }
            Ok(_) => sleep(LOOK_EVERY).await,
            Err(error) => {
                tracing::warn!("the tunnels' bond members cannot be predicted: {}", chain(&error));
                break;
            }
        }
    }
    std::future::pending().await
}

/// The host's links, and a socket to query more.
struct Host {
    netlink: Netlink,
    links: Links,
}

/// The bond that leads to a peer.
struct Found {
    bond: LocalBond,
    degraded: Option<String>,
}

impl Host {
    /// `None` if the kernel cannot be queried.
    async fn read() -> Option<Self> {
        let netlink = Netlink::open().ok()?;
        let links = netlink.links().await.ok()?;
        Some(Self { netlink, links })
    }

    /// The configured bond, if it exists. If none is configured: what outer packets to `peer` leave by according to the
    /// present routes. `None` if there is no bond or route yet.
    async fn bond_towards(&self, config: &Config, peer: &config::Peer, count: Count) -> Option<Found> {
        let tunnel = peer.tunnels.first()?;
        let local = SocketAddr::new(peer.local_endpoint, tunnel.listen_port);
        let remote = SocketAddr::new(peer.remote_endpoint, tunnel.remote_port);
        let bond = underlay::bond_towards(&self.links, &self.netlink, config, peer).await;
        let (macs, remote_macs) = underlay::macs(&self.links, &self.netlink, local, remote).await;
        match bond {
            Some(bond) => {
                let found = found(&self.links, bond, count)?;
                Some(Found { bond: LocalBond { macs, remote_macs, ..found.bond }, ..found })
            }
            None if config.bond.is_some() => None,
            None => {
                self.netlink.outgoing_interface(local, remote).await?;
                let policy = Some(XmitHashPolicy::Layer34);
                Some(Found { bond: LocalBond { members: 1, policy, macs, remote_macs }, degraded: None })
            }
        }
    }
}

fn found(links: &Links, bond: &Link, count: Count) -> Option<Found> {
    let info = bond.bond.as_ref()?;
    let hashes = matches!(info.mode, Some(BondMode::Ieee8023Ad | BondMode::BalanceXor));
    let (all, usable) = (links.members(bond).len(), links.usable_members(bond).len());
    let degraded = hashes && usable < all;
    let members = if degraded && usable > 0 && count == Count::Usable { usable } else { all };
    let members = u8::try_from(members).ok().filter(|members| *members > 0)?;
    let degraded = degraded.then(|| format!("{} sends on {usable} of its {all} members now", bond.name));
    Some(Found {
        bond: LocalBond { members, policy: info.xmit_hash_policy.filter(|_| hashes), macs: None, remote_macs: None },
        degraded,
    })
}

/// UDP ports that sockets on this host listen on.
fn ports_in_use() -> BTreeSet<u16> {
    // The thread's own network namespace, as netlink sees it.
    let tables = ["udp", "udp6"].map(|table| fs::read_to_string(format!("/proc/thread-self/net/{table}")));
    tables.iter().flatten().flat_map(|table| listeners(table)).collect()
}

/// The local ports of unconnected sockets in a table such as `/proc/net/udp`. The port of a connected socket is soon
/// free again.
fn listeners(table: &str) -> impl Iterator<Item = u16> + '_ {
    table.lines().skip(1).filter_map(|line| {
        let mut fields = line.split_whitespace().skip(1);
        let (local, _remote, state) = (fields.next()?, fields.next()?, fields.next()?);
        // TCP_CLOSE, include/net/tcp_states.h
        if state != "07" {
            return None;
        }
        u16::from_str_radix(local.rsplit_once(':')?.1, 16).ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listening_ports_are_in_use_and_connected_ones_are_not() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid\n\
             6: 00000000:1388 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 1 2 0 0\n\
             7: 0100007F:D431 0100007F:0035 01 00000000:00000000 00:00000000 00000000     0        0 1 2 0 0\n\
             9: 00000000000000000000000000000000:CA6C 00000000000000000000000000000000:0000 07 0:0 0:0 0 0 0 1 2 0 0\n";
        assert_eq!(listeners(table).collect::<Vec<_>>(), [5000, 51820]);
        assert_eq!(listeners("").count(), 0);
    }

    #[test]
    fn a_socket_of_our_own_is_seen() {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        assert!(ports_in_use().contains(&socket.local_addr().unwrap().port()));
    }
}
