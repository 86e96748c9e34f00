//! What the log says about this host's firewall, and about other programs that manage its links.

use std::path::Path;

use crate::config::Config;
use crate::host::firewall::{self, Judged};
use crate::host::{self, Netlink, managed};
use crate::plan::Plan;
use crate::plan::firewall::needed;

/// Says what a firewall must let pass, and warns of chains that could drop it.
pub async fn report(plan: &Plan) {
    tracing::info!("{}", needed(plan));
    match firewall::judge(plan).await {
        Judged::Findings(findings) => {
            for finding in findings {
                tracing::warn!("{finding}");
            }
        }
        Judged::NotLookedAt(why) => tracing::info!("{why}"),
    }
}

/// Warns of bond members that another program manages.
pub async fn warn_of_managers(config: &Config) {
    if host::remember_namespace() == Some(false) {
        return;
    }
    let Ok(netlink) = Netlink::open() else { return };
    let Ok(links) = netlink.links().await else { return };
    for warning in managed::warnings(config, &links, Path::new(managed::RUN)) {
        tracing::warn!("{warning}");
    }
}

/// The chains of this host that could drop the tunnels' packets, to be added to a sentence; empty if there are none.
pub async fn suspects(plan: &Plan) -> String {
    let Judged::Findings(findings) = firewall::judge(plan).await else { return String::new() };
    let chains: Vec<String> =
        findings.iter().map(|finding| format!("chain {} could drop {}", finding.chain, finding.what)).collect();
    if chains.is_empty() { String::new() } else { format!(" (at this one, {})", chains.join(", and ")) }
}
