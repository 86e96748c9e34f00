//! Which changes of a configuration a running site cannot apply. Pure.

use super::Backend;
use crate::config::{Config, Peer, Rule};

/// What differs between the two configurations and takes effect only after a restart, by its name in the configuration.
pub fn unreloadable(old: &Config, new: &Config, backend: Backend) -> Vec<String> {
    let mut found = Vec::new();
    let mut differs = |differs: bool, name: &str| {
        if differs {
            found.push(name.to_owned());
        }
    };
    differs(old.site.name != new.site.name, "name in [site]");
    match (&old.bond, &new.bond) {
        (Some(old), Some(new)) => {
            differs(old.name != new.name, "name in [bond]");
            differs(old.members != new.members, "members in [bond]");
            differs(old.mode != new.mode, "mode in [bond]");
            differs(old.xmit_hash_policy != new.xmit_hash_policy, "xmit_hash_policy in [bond]");
            differs(old.lacp_rate != new.lacp_rate, "lacp_rate in [bond]");
            differs(old.miimon_ms != new.miimon_ms, "miimon_ms in [bond]");
        }
        (None, None) => {}
        _ => differs(true, "[bond]"),
    }
    differs(old.steering.device != new.steering.device, "device in [steering]");
    differs(old.steering.backend != new.steering.backend, "backend in [steering]");
    differs(old.steering.mtu != new.steering.mtu, "mtu in [steering]");
    let names = |config: &Config| config.peers.iter().map(|peer| peer.name.clone()).collect::<Vec<_>>();
    if names(old) != names(new) {
        differs(true, "the names of the [[peer]]s and their order");
    } else if backend == Backend::Userspace {
        // The sockets of the userspace backend are bound to this address; those of the kernel are not.
        let moved = old.peers.iter().zip(&new.peers).find(|(old, new)| old.local_endpoint != new.local_endpoint);
        differs(moved.is_some(), "local_endpoint with the userspace backend");
    }
    found
}

/// What differs between the two configurations in how flows are steered and tunnels probed, in words.
pub fn steering_changes(old: &Config, new: &Config) -> Vec<String> {
    let mut found = Vec::new();
    for (before, now) in old.peers.iter().zip(&new.peers) {
        let policy = |config: &Config, peer: &Peer| peer.policy.unwrap_or(config.steering.policy);
        let (was, is) = (policy(old, before), policy(new, now));
        if was != is {
            let (is, was) = (is.as_str(), was.as_str());
            found.push(format!("change the policy of {}: {is} instead of {was}", now.name));
        }
        if before.restore_order != now.restore_order {
            let what = if now.restore_order { "restore" } else { "no longer restore" };
            found.push(format!("{what} the order of sprayed flows of {}", now.name));
        }
        for tunnel in &now.tunnels {
            let Some(former) = before.tunnels.iter().find(|former| former.name == tunnel.name) else { continue };
            if former.weight != tunnel.weight {
                let text = |weight: Option<u16>| weight.map_or("auto".to_owned(), |weight| weight.to_string());
                let (is, was) = (text(tunnel.weight), text(former.weight));
                found.push(format!("change the weight of {}: {is} instead of {was}", tunnel.name));
            }
        }
    }
    let count = |some: &[Rule], others: &[Rule]| some.iter().filter(|rule| !others.contains(rule)).count();
    if old.rules != new.rules {
        let (added, removed) = (count(&new.rules, &old.rules), count(&old.rules, &new.rules));
        found.push(format!("change the rules: {added} added, {removed} removed, {} in all", new.rules.len()));
    }
    let mut differs = |differs: bool, name: &str| {
        if differs {
            found.push(format!("change {name}"));
        }
    };
    differs(old.steering.seed != new.steering.seed, "seed in [steering]");
    differs(old.steering.flowlet_gap_us != new.steering.flowlet_gap_us, "flowlet_gap_us in [steering]");
    differs(old.steering.mss_clamp != new.steering.mss_clamp, "mss_clamp in [steering]");
    let health = |config: &Config| (config.health.interval_ms, config.health.down_after, config.health.up_after);
    differs(health(old) != health(new), "[health]");
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{InterfaceName, Policy};
    use crate::plan::tests::config;

    fn after(change: impl Fn(&mut Config), backend: Backend) -> Vec<String> {
        let old = config(2);
        let mut new = old.clone();
        change(&mut new);
        unreloadable(&old, &new, backend)
    }

    #[test]
    fn what_only_a_restart_can_change_is_named() {
        let device = |config: &mut Config| config.steering.device = InterfaceName::new("ecmp1").unwrap();
        assert_eq!(after(device, Backend::Kernel), ["device in [steering]"]);
        let two = |config: &mut Config| {
            config.site.name = "other".into();
            config.steering.mtu = 1400;
        };
        assert_eq!(after(two, Backend::Kernel), ["name in [site]", "mtu in [steering]"]);
        let peer = |config: &mut Config| config.peers[0].name = "site-c".into();
        assert_eq!(after(peer, Backend::Kernel), ["the names of the [[peer]]s and their order"]);
        let endpoint = |config: &mut Config| config.peers[0].local_endpoint = "10.2.3.9".parse().unwrap();
        assert_eq!(after(endpoint, Backend::Userspace), ["local_endpoint with the userspace backend"]);
    }

    #[test]
    fn changes_of_steering_are_named() {
        let old = config(2);
        let mut new = old.clone();
        assert_eq!(steering_changes(&old, &new), Vec::<String>::new());
        new.steering.policy = Policy::Spray;
        new.peers[0].tunnels[1].weight = None;
        new.rules.push(Rule { dscp: Some(46), ..Rule::default() });
        new.health.up_after += 1;
        let found = steering_changes(&old, &new);
        let words = ["spray instead of", "auto instead of 1", "1 added, 0 removed", "[health]"];
        assert!(found.len() == 4 && found.iter().zip(words).all(|(text, word)| text.contains(word)), "{found:?}");
    }

    #[test]
    fn tunnels_prefixes_keys_and_addresses_can_change() {
        let much = |config: &mut Config| {
            config.site.private_key = crate::config::PrivateKey::generate();
            config.site.addresses.clear();
            config.steering.seed = 8;
            config.steering.policy = Policy::Spray;
            let peer = &mut config.peers[0];
            peer.tunnels.remove(0);
            peer.tunnels[0].listen_port = 9999;
            peer.tunnels[0].weight = Some(7);
            peer.prefixes.pop();
            peer.local_endpoint = "10.2.3.9".parse().unwrap();
            config.health.interval_ms = 50;
            config.rules.push(crate::config::Rule { dscp: Some(46), ..crate::config::Rule::default() });
        };
        assert_eq!(after(much, Backend::Kernel), Vec::<String>::new());
        assert_eq!(after(|_| {}, Backend::Userspace), Vec::<String>::new());
    }
}
