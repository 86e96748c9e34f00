//! `check`: validates a configuration without touching the kernel.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use crate::commands::{Failure, count_of, print, warn};
use crate::config::{self, Config, ConfigError};
use crate::error::chain;
use crate::host::firewall::{self, Judged};
use crate::host::{self, Netlink, managed};
use crate::plan::firewall::needed;
use crate::plan::ports::LocalBond;
use crate::plan::{Backend, Plan};
use crate::report::plan::Peer;

/// Reports that the configuration is valid, or fails with all its problems.
pub async fn run(path: &Path) -> Result<(), Failure> {
    let config = config::load(path).map_err(|error| match error {
        ConfigError::Invalid(_) => Failure::problems(error),
        ConfigError::Missing { .. } | ConfigError::Unreadable { .. } => error.into(),
    })?;
    let warnings = endpoint_warnings(&config).into_iter().chain(port_warning(&config)).chain(spread_warnings(&config));
    for warning in warnings {
        warn(warning);
    }
    let plan = Plan::new(&config, Backend::Kernel);
    for warning in host_warnings(&config, &plan).await {
        warn(warning);
    }
    let judged = firewall::judge(&plan).await;
    if let Judged::Findings(findings) = &judged {
        findings.iter().for_each(warn);
    }
    print(summary(&config))?;
    print(needed(&plan))?;
    match judged {
        Judged::NotLookedAt(why) => print(why),
        Judged::Findings(_) => Ok(()),
    }
}

fn summary(config: &Config) -> String {
    let tunnels = config.peers.iter().map(|peer| peer.tunnels.len()).sum();
    let prefixes = config.peers.iter().map(|peer| peer.prefixes.len()).sum();
    format!(
        "ok: {} to {}, {} steered by {} through {}",
        count_of(tunnels, "tunnel", "tunnels"),
        count_of(config.peers.len(), "peer", "peers"),
        count_of(prefixes, "prefix", "prefixes"),
        config.site.name,
        config.steering.device,
    )
}

/// Warnings about the ports that follow from the configuration alone: the same on every host.
fn spread_warnings(config: &Config) -> Vec<String> {
    let (local, in_use) = (LocalBond::configured(config), BTreeSet::new());
    let warning = |peer| match Peer::configured(config, peer, local, &in_use) {
        Ok(peer) => peer.warning(),
        Err(error) => Some(format!("the tunnels' bond members cannot be predicted: {}", chain(&error))),
    };
    // Without the remote address there is no hash.
    config.peers.iter().filter(|peer| !peer.remote_endpoint.is_unspecified()).filter_map(warning).collect()
}

/// What this host's links would make of the configuration. Says nothing of links that this host does not have.
async fn host_warnings(config: &Config, plan: &Plan) -> Vec<String> {
    let Ok(netlink) = Netlink::open() else { return Vec::new() };
    let mtu = host::mtu_conflict(plan, &netlink).await.ok().flatten();
    let managed = match netlink.links().await {
        Ok(links) if host::remember_namespace() != Some(false) => {
            managed::warnings(config, &links, Path::new(managed::RUN))
        }
        _ => Vec::new(),
    };
    mtu.into_iter().map(|conflict| format!("`run` would refuse this: {conflict}")).chain(managed).collect()
}

/// Warns about endpoints that the bond does not get. They may still be right: the bond may exist with that address, or
/// another interface may have it. Only the host can tell, before a run.
fn endpoint_warnings(config: &Config) -> Vec<String> {
    let Some(bond) = &config.bond else { return Vec::new() };
    let is_on_bond = |peer: &&config::Peer| bond.addresses.iter().any(|net| net.addr() == peer.local_endpoint);
    let warning = |peer: &config::Peer| {
        let (endpoint, name) = (peer.local_endpoint, &peer.name);
        format!(
            "local_endpoint {endpoint} of {name} is not in addresses in [bond]: add it there, unless this host has it \
             on the existing {} or on an interface that is no member",
            bond.name
        )
    };
    config.peers.iter().filter(|peer| !is_on_bond(peer)).map(warning).collect()
}

/// Warns about listen ports in the kernel's ephemeral range: before `run` starts, another program may be using one of
/// them.
fn port_warning(config: &Config) -> Option<String> {
    let setting = |name: &str| fs::read_to_string(format!("/proc/sys/net/ipv4/{name}")).ok();
    let lent = setting("ip_local_port_range")?;
    let (low, high) = lent.trim().split_once(char::is_whitespace)?;
    let lent = (low.parse().ok()?, high.trim().parse().ok()?);
    let kept = ranges(setting("ip_local_reserved_ports").unwrap_or_default().trim());
    let ports: Vec<u16> = config.peers.iter().flat_map(|peer| &peer.tunnels).map(|tunnel| tunnel.listen_port).collect();
    let listed: Vec<String> = at_risk(&ports, lent, &kept).iter().map(u16::to_string).collect();
    (!listed.is_empty()).then(|| {
        let listed = listed.join(",");
        format!(
            "listen ports {listed} are in the range {}-{} that the kernel lends to other programs: \
             reserve them with `sysctl -w net.ipv4.ip_local_reserved_ports={listed}`, and add to this list the ports \
             that are reserved already",
            lent.0, lent.1
        )
    })
}

/// The `ports` in the range `lent` that are not in `kept`.
fn at_risk(ports: &[u16], lent: (u16, u16), kept: &[(u16, u16)]) -> Vec<u16> {
    let within = |port: u16, (low, high): (u16, u16)| (low..=high).contains(&port);
    let risky = |port: &u16| within(*port, lent) && !kept.iter().any(|range| within(*port, *range));
    ports.iter().copied().filter(risky).collect()
}

/// Parses ranges as in `ip_local_reserved_ports`: `51820-51823,51830`.
fn ranges(text: &str) -> Vec<(u16, u16)> {
    let range = |range: &str| {
        let (low, high) = range.split_once('-').unwrap_or((range, range));
        Some((low.parse().ok()?, high.parse().ok()?))
    };
    text.split(',').filter_map(range).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{RemoteBond, XmitHashPolicy};

    #[test]
    fn only_ports_that_are_lent_and_not_kept_are_at_risk() {
        let kept = ranges("51820-51823,51830");
        assert_eq!(kept, [(51820, 51823), (51830, 51830)]);
        assert_eq!(ranges(""), []);
        assert_eq!(at_risk(&[5000, 51820, 51824, 51830, 61000], (32768, 60999), &kept), [51824]);
    }

    /// The usual recipe of equal ports, and the ports that `plan` proposes.
    #[test]
    fn equal_ports_are_warned_of_until_they_are_planned() {
        let mut config = crate::plan::tests::config(3);
        config.bond = Some(crate::plan::tests::bond(&["eno1", "eno2", "eno3"]));
        let peer = &mut config.peers[0];
        peer.remote_endpoint = "10.2.3.5".parse().unwrap();
        peer.remote_bond = Some(RemoteBond { members: 3, xmit_hash_policy: XmitHashPolicy::Layer34 });
        for (at, tunnel) in (0_u16..).zip(&mut peer.tunnels) {
            (tunnel.listen_port, tunnel.remote_port) = (5000 + at, 5000 + at);
        }
        let warnings = spread_warnings(&config);
        let [warning] = warnings.as_slice() else { panic!("{warnings:?}") };
        let (message, better) = warning.split_once("; use ").expect("better ports are named");
        assert_eq!(message, "the tunnels to site-b: all 3 tunnels share member 0: bonding gains nothing");

        let warnings = endpoint_warnings(&config);
        assert_eq!(warnings.len(), 1);
        let endpoint = config.peers[0].local_endpoint;
        let start = format!("local_endpoint {endpoint} of site-b is not in addresses in [bond]: ");
        assert!(warnings[0].starts_with(&start), "{warnings:?}");
        config.bond.as_mut().unwrap().addresses.push(ipnet::IpNet::new(endpoint, 24).unwrap());
        assert_eq!(endpoint_warnings(&config), [""; 0]);

        for (tunnel, pair) in config.peers[0].tunnels.iter_mut().zip(better.split(", ")) {
            let (here, there) = pair.split_once(':').unwrap();
            (tunnel.listen_port, tunnel.remote_port) = (here.parse().unwrap(), there.parse().unwrap());
        }
        assert_eq!(spread_warnings(&config), [""; 0]);
    }
}
