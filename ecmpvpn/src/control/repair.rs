//! Makes devices again that somebody else deleted while the site is up.

use std::convert::Infallible;
use std::time::Duration;

use super::reconcile;
use super::site::{SessionError, Site};
use crate::config::InterfaceName;
use crate::error::chain;
use crate::host::{HostError, Netlink};

/// How often to look for deleted devices.
const LOOK: Duration = Duration::from_secs(1);
/// How long to wait after a device could not be made again.
const PAUSE: Duration = Duration::from_secs(5);

/// Watches the site's devices.
#[derive(Debug, Default)]
pub struct Repair {
    paused: bool,
}

impl Repair {
    /// Waits until at least one device is gone, and returns the names of all that are.
    pub async fn missing(&mut self, site: &Site) -> Vec<InterfaceName> {
        if self.paused {
            tokio::time::sleep(PAUSE).await;
            self.paused = false;
        }
        let netlink = match Netlink::open() {
            Ok(netlink) => netlink,
            Err(error) => match wait_forever(&error).await {},
        };
        loop {
            tokio::time::sleep(LOOK).await;
            // If this fails nothing is known: look again later.
            let Ok(links) = netlink.links().await else { continue };
            let there = |index: u32| links.iter().any(|link| link.ifindex == index);
            let tunnels = site.links.tunnels.iter().filter(|(_, index)| !there(*index)).map(|(name, _)| name.clone());
            let mut missing: Vec<InterfaceName> = tunnels.collect();
            if !there(site.links.steering) {
                missing.push(site.plan.steering.name.clone());
            }
            if !missing.is_empty() {
                return missing;
            }
        }
    }

    /// Makes these devices again, with their addresses, routes and programs.
    pub async fn restore(&mut self, missing: &[InterfaceName], site: &mut Site) {
        let names: Vec<&str> = missing.iter().map(InterfaceName::as_str).collect();
        let names = names.join(", ");
        match make(missing, site).await {
            Ok(()) => tracing::warn!("{names}: deleted by somebody else, made again"),
            Err(error) => {
                self.paused = true;
                tracing::error!(
                    "{names}: deleted by somebody else, and cannot be made again: {}; trying again in {} s",
                    chain(&error),
                    PAUSE.as_secs()
                );
            }
        }
    }
}

async fn wait_forever(error: &HostError) -> Infallible {
    tracing::warn!("devices that somebody deletes are not made again: {}", chain(error));
    std::future::pending().await
}

async fn make(missing: &[InterfaceName], site: &mut Site) -> Result<(), SessionError> {
    let io = |source| SessionError::Io { operation: "looking for deleted devices", source };
    if let Some(userspace) = &mut site.links.userspace {
        for name in missing {
            userspace.forget(name).await;
        }
    }
    // Removes the records of these devices, and of what was on them.
    site.journal.prune(&Netlink::open()?).await.map_err(io)?;
    let (config, mut plan, former) = (site.config.clone(), site.plan.clone(), site.plan.clone());
    reconcile::reconcile(site, &config, &mut plan, &former).await
}
