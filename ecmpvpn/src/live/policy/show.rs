//! Gathers what `policy show` reports, from the maps and the configuration.

use std::collections::BTreeMap;

use ecmpvpn_common::layout::{Load, TunnelId, tunnel_flags};

use super::{Live, PolicyError};
use crate::config::{Config, Policy};
use crate::plan::rules::canonical;
use crate::report::policy::{Peer, Report, Rule, Tunnel};

/// The policy in force, and whether `config` agrees with it. Without a configuration nothing counts as saved.
///
/// # Errors
/// The maps cannot be read.
pub fn report(live: &Live, config: Option<&Config>) -> Result<Report, PolicyError> {
    let seen = live.view.tunnels()?;
    let names: BTreeMap<TunnelId, &str> = seen.iter().map(|tunnel| (tunnel.id, tunnel.name.as_str())).collect();
    let default = config.map(|config| config.steering.policy);
    let mut peers = Vec::new();
    for (number, peer) in (0..).zip(live.view.peers()) {
        let configured = config.and_then(|config| config.peers.iter().find(|configured| configured.name == peer.name));
        let open = live.view.peer(number).map_or(0, |record| record.open.get());
        let tunnels = seen.iter().filter(|tunnel| tunnel.id.peer() == number).map(|tunnel| {
            let learned = tunnel.flags & tunnel_flags::AUTO_WEIGHT != 0;
            let link = live.view.load(tunnel.id).map_or(tunnel.id, Load::link);
            let weight = configured.and_then(|peer| {
                peer.tunnels
                    .iter()
                    .find(|configured| configured.name.as_str() == tunnel.name)
                    .map(|tunnel| tunnel.weight)
            });
            Tunnel {
                name: tunnel.name.clone(),
                weight: tunnel.weight,
                weight_is_learned: learned,
                live: tunnel.live,
                open: open >> tunnel.id.slot() & 1 == 1,
                buckets: u64::from(tunnel.buckets),
                link: names.get(&link).copied().unwrap_or_default().to_owned(),
                saved: weight == Some((!learned).then_some(tunnel.weight)),
            }
        });
        let in_force = peer.policy;
        peers.push(Peer {
            policy: peer.policy.map_or("unknown", Policy::as_str).to_owned(),
            saved: configured.is_some_and(|peer| peer.policy.or(default) == in_force),
            restore_order: peer.restore_order,
            restore_order_saved: configured.is_some_and(|configured| configured.restore_order == peer.restore_order),
            tunnels: tunnels.collect(),
            name: peer.name,
        });
    }
    let saved: Vec<_> =
        config.iter().flat_map(|config| &config.rules).map(|rule| canonical(rule, live.names())).collect();
    let rules =
        (1..).zip(live.rules()?).map(|(number, placed)| Rule::of(number, &placed.rule, saved.contains(&placed.rule)));
    Ok(Report { site: live.site.clone(), peers, rules: rules.collect(), is_compared: config.is_some() })
}
