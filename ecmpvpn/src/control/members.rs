//! Attaches the arrival counters to the members of the bonds that carry the tunnels, also to members that join later.

use std::convert::Infallible;
use std::time::Duration;

use tokio::time::sleep;

use super::log_once::LogOnce;
use crate::config::{Config, InterfaceName};
use crate::dataplane::{Arrivals, Device, OuterTunnel, Pins};
use crate::error::chain;
use crate::host::Netlink;
use crate::host::underlay::bonds;
use crate::live::stats::StatsError;
use crate::plan::Plan;

/// How often to look for new members.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// Counts arrivals on every member. Never returns. Steering works without these counters: a failure is logged and tried
/// again.
pub async fn follow(config: &Config, plan: &Plan, pins: &Pins) -> Infallible {
    let tunnels: Vec<OuterTunnel> = plan
        .tunnels
        .iter()
        .map(|tunnel| OuterTunnel { id: tunnel.id(), remote: tunnel.remote_endpoint, listen_port: tunnel.listen_port })
        .collect();
    let netlink = match Netlink::open() {
        Ok(netlink) => netlink,
        Err(error) => {
            tracing::warn!("what arrives on the bond's members is not counted: {}", chain(&error));
            return std::future::pending().await;
        }
    };
    let mut log = LogOnce::default();
    loop {
        match attach_new_members(config, &netlink, &tunnels, pins).await {
            Ok(new) => {
                log.clear();
                for member in new {
                    tracing::info!("counting arrivals on {}", member.name);
                }
            }
            Err(error) => log.warn(format!("what arrives on the bond's members is not counted: {}", chain(&error))),
        }
        sleep(LOOK_EVERY).await;
    }
}

async fn attach_new_members(
    config: &Config,
    netlink: &Netlink,
    tunnels: &[OuterTunnel],
    pins: &Pins,
) -> Result<Vec<Device>, StatsError> {
    let members = members(config, netlink).await?;
    Ok(Arrivals::open(pins)?.follow(tunnels, &members)?)
}

/// The members of the tunnels' bonds, whether they are up or down.
async fn members(config: &Config, netlink: &Netlink) -> Result<Vec<Device>, StatsError> {
    let links = netlink.links().await.map_err(StatsError::Netlink)?;
    let members = bonds(&links, netlink, config).await.into_iter().flat_map(|bond| links.members(bond));
    let device = |ifindex, name: &str| Some(Device { name: InterfaceName::new(name).ok()?, ifindex });
    Ok(members.filter_map(|link| device(link.ifindex, &link.name)).collect())
}
