//! Says in words how two configurations of a site differ. Pure.

use crate::config::{Config, Peer, PrivateKey, PublicKey, Tunnel};

/// One phrase for each difference that a reload applies; empty if there is none. Both configurations have the same
/// peers.
pub fn changed(old: &Config, new: &Config) -> Vec<String> {
    let mut found = Vec::new();
    let mut differs = |differs: bool, phrase: &str| {
        if differs {
            found.push(phrase.to_owned());
        }
    };
    differs(old.site.addresses != new.site.addresses, "addresses in [site] changed");
    let bond = |config: &Config| config.bond.as_ref().map(|bond| bond.addresses.clone());
    differs(bond(old) != bond(new), "addresses in [bond] changed");
    let (a, b) = (&old.steering, &new.steering);
    differs(a.policy != b.policy, "policy in [steering] changed");
    differs(a.seed != b.seed, "seed in [steering] changed");
    differs(a.flowlet_gap_us != b.flowlet_gap_us, "flowlet_gap_us in [steering] changed");
    differs(a.mss_clamp != b.mss_clamp, "mss_clamp in [steering] changed");
    differs(a.spray_elephants != b.spray_elephants, "spray_elephants in [steering] changed");
    differs(a.restore_order != b.restore_order, "restore_order in [steering] changed");
    differs(a.restore_ms != b.restore_ms, "restore_ms in [steering] changed");
    for (a, b) in old.peers.iter().zip(&new.peers) {
        found.extend(of_peer((old, a), (new, b)));
    }
    let mut differs = |differs: bool, phrase: &str| {
        if differs {
            found.push(phrase.to_owned());
        }
    };
    differs(old.rules != new.rules, "[[rule]]s changed");
    differs(old.health != new.health, "[health] changed");
    differs(old.metrics != new.metrics, "[metrics] changed");
    found
}

/// The keys that a tunnel uses: its own, or else the site's and the peer's.
fn keys<'a>(
    config: &'a Config,
    peer: &'a Peer,
    tunnel: &'a Tunnel,
) -> (&'a PrivateKey, &'a PublicKey, Option<&'a crate::config::PresharedKey>) {
    (
        tunnel.private_key.as_ref().unwrap_or(&config.site.private_key),
        tunnel.public_key.as_ref().unwrap_or(&peer.public_key),
        tunnel.preshared_key.as_ref().or(peer.preshared_key.as_ref()),
    )
}

fn of_peer((old, a): (&Config, &Peer), (new, b): (&Config, &Peer)) -> Vec<String> {
    let mut found = Vec::new();
    let mut list = |names: Vec<&str>, what: &str| match names.as_slice() {
        [] => {}
        [one] => found.push(format!("tunnel {one} {what}")),
        several => found.push(format!("tunnels {} {what}", several.join(", "))),
    };
    let missing = |from: &Peer, tunnel: &Tunnel| from.tunnels.iter().all(|other| other.name != tunnel.name);
    list(a.tunnels.iter().filter(|tunnel| missing(b, tunnel)).map(|tunnel| tunnel.name.as_str()).collect(), "removed");
    list(b.tunnels.iter().filter(|tunnel| missing(a, tunnel)).map(|tunnel| tunnel.name.as_str()).collect(), "added");
    let pairs: Vec<(&Tunnel, &Tunnel)> =
        b.tunnels.iter().filter_map(|now| Some((a.tunnels.iter().find(|was| was.name == now.name)?, now))).collect();
    let mut of_those = |what: &str, differs: &dyn Fn(&Tunnel, &Tunnel) -> bool| {
        let names: Vec<&str> =
            pairs.iter().filter(|(was, now)| differs(was, now)).map(|(_, now)| now.name.as_str()).collect();
        if !names.is_empty() {
            found.push(format!("{what} changed for {}", names.join(", ")));
        }
    };
    of_those("keys", &|was, now| keys(old, a, was) != keys(new, b, now));
    of_those("ports", &|was, now| (was.listen_port, was.remote_port) != (now.listen_port, now.remote_port));
    of_those("the address", &|was, now| was.address != now.address);
    of_those("the weight", &|was, now| was.weight != now.weight);
    for (differs, what) in [
        ((a.local_endpoint, a.remote_endpoint) != (b.local_endpoint, b.remote_endpoint), "endpoints"),
        (a.prefixes != b.prefixes, "prefixes"),
        (a.policy != b.policy, "the policy"),
        (a.restore_order != b.restore_order, "restore_order"),
        (a.remote_bond != b.remote_bond, "remote_bond"),
    ] {
        if differs {
            found.push(format!("{what} of {} changed", b.name));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::tests::config;

    fn after(change: impl Fn(&mut Config)) -> Vec<String> {
        let old = config(4);
        let mut new = old.clone();
        change(&mut new);
        changed(&old, &new)
    }

    #[test]
    fn every_difference_is_named() {
        assert_eq!(after(|_| {}), [""; 0]);
        let removed = |config: &mut Config| drop(config.peers[0].tunnels.pop());
        assert_eq!(after(removed), ["tunnel wg3 removed"]);
        let site_key = |config: &mut Config| config.site.private_key = PrivateKey::generate();
        assert_eq!(after(site_key), ["keys changed for wg0, wg1, wg2, wg3"]);
        let one_key = |config: &mut Config| {
            config.peers[0].tunnels[1].public_key = Some(PrivateKey::generate().public_key());
            config.peers[0].tunnels[2].listen_port += 100;
            config.peers[0].prefixes.pop();
            config.rules.push(crate::config::Rule { dscp: Some(46), ..crate::config::Rule::default() });
        };
        let expected =
            ["keys changed for wg1", "ports changed for wg2", "prefixes of site-b changed", "[[rule]]s changed"];
        assert_eq!(after(one_key), expected);
    }
}
