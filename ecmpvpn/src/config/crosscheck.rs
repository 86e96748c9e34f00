//! Checks between keys: names, ports and addresses that are used twice, and nets that would make a routing loop.

use std::collections::HashMap;
use std::fmt::Display;
use std::hash::Hash;
use std::net::{IpAddr, SocketAddr};

use ipnet::{IpNet, Ipv4Net};

use super::problems::Collector;
use super::section::At;
use super::{InterfaceName, PublicKey};

/// A value that a part of the configuration uses.
pub(super) struct Claim<T> {
    pub(super) value: T,
    /// The key and section, such as `name in [[peer]]`.
    pub(super) place: &'static str,
    /// Byte offset in the text. `None`: a default that is not in the text.
    pub(super) at: Option<usize>,
}

/// All values that are checked against each other, collected while the sections are read.
#[derive(Default)]
pub(super) struct Claims {
    pub(super) interfaces: Vec<Claim<InterfaceName>>,
    pub(super) peer_names: Vec<Claim<String>>,
    pub(super) public_keys: Vec<Claim<PublicKey>>,
    /// Keys of single tunnels; several tunnels may share one.
    pub(super) tunnel_public_keys: Vec<Claim<PublicKey>>,
    pub(super) listen_ports: Vec<Claim<u16>>,
    pub(super) remote_sockets: Vec<Claim<SocketAddr>>,
    /// The net of each tunnel, with the address of this end.
    pub(super) tunnel_nets: Vec<Claim<Ipv4Net>>,
    /// Prefixes that are steered to a peer.
    pub(super) prefixes: Vec<Claim<IpNet>>,
    /// Source and destination addresses of outer packets.
    pub(super) endpoints: Vec<Claim<IpAddr>>,
    /// Addresses of this site inside the VPN. Their nets are routed to the steering device too.
    pub(super) site_addresses: Vec<Claim<IpNet>>,
    pub(super) bond_addresses: Vec<Claim<IpNet>>,
    /// Tunnels that rules name.
    pub(super) rule_tunnels: Vec<At<InterfaceName>>,
    /// All tunnels; a subset of `interfaces`.
    pub(super) tunnels: Vec<InterfaceName>,
}

/// Adds a claim, if a value was found.
pub(super) fn claim<T: Clone>(claims: &mut Vec<Claim<T>>, place: &'static str, found: Option<&At<T>>) {
    claims.extend(found.map(|found| Claim { value: found.value.clone(), place, at: Some(found.at) }));
}

/// Reports values that conflict.
pub(super) fn check(claims: &Claims, own_key: Option<&PublicKey>, collector: &Collector<'_>) {
    unique(&claims.interfaces, "give every interface a name of its own", collector);
    unique(&claims.peer_names, "give every site a name of its own", collector);
    unique(&claims.public_keys, "every site has a key of its own", collector);
    unique(&claims.listen_ports, "give every tunnel a port of its own", collector);
    unique(&claims.remote_sockets, "give every tunnel to one endpoint a remote_port of its own", collector);
    unique(&claims.prefixes, "a prefix can lead to one peer only", collector);

    for key in claims.public_keys.iter().chain(&claims.tunnel_public_keys) {
        if Some(&key.value) == own_key {
            report(collector, key, "which is this site's own key: give the remote site's, which `ecmpvpn init` prints");
        }
    }
    let known: Vec<&str> = claims.tunnels.iter().map(InterfaceName::as_str).collect();
    for tunnel in &claims.rule_tunnels {
        // If there is no tunnel at all, only this is reported.
        if !known.is_empty() && !known.contains(&tunnel.value.as_str()) {
            let message = format!(
                "tunnels in [[rule]] names {}, which is no tunnel: tunnels are {}",
                tunnel.value,
                known.join(", ")
            );
            collector.add(tunnel.at, message);
        }
    }
    loops(claims, collector);
    tunnel_nets(claims, collector);
}

/// Reports routes that would lead outer packets back into the tunnels. The kernel does not catch such a loop: each
/// round goes through the crypto queue, which the recursion limit does not count.
fn loops(claims: &Claims, collector: &Collector<'_>) {
    const LOOP: &str = "the tunnels' own packets would be steered into the tunnels, so leave that address out";
    for steered in claims.prefixes.iter().chain(&claims.site_addresses) {
        for endpoint in claims.endpoints.iter().filter(|endpoint| steered.value.contains(&endpoint.value)) {
            let (value, seen) = (endpoint.value, describe_claim(endpoint, collector));
            report(collector, steered, &format!("which contains {value}, {seen}: {LOOP}"));
        }
    }
    for steered in &claims.prefixes {
        let is_endpoint = |bond: &IpNet| claims.endpoints.iter().any(|endpoint| endpoint.value == bond.addr());
        let inside = |bond: &IpNet| steered.value.contains(&bond.addr()) && !is_endpoint(bond);
        for bond in claims.bond_addresses.iter().filter(|bond| inside(&bond.value)) {
            let (value, seen) = (bond.value, describe_claim(bond, collector));
            report(collector, steered, &format!("which contains {value}, {seen}: that net is not the peer's"));
        }
        for site in claims.site_addresses.iter().filter(|site| site.value == steered.value) {
            let seen = describe_claim(site, collector);
            report(collector, steered, &format!("as {seen}: give every site addresses of its own"));
        }
    }
}

/// Reports tunnel nets that overlap each other or anything else.
fn tunnel_nets(claims: &Claims, collector: &Collector<'_>) {
    for (position, net) in claims.tunnel_nets.iter().enumerate() {
        let whole = IpNet::V4(net.value.trunc());
        let overlaps = |other: IpNet| other.contains(&whole) || whole.contains(&other);
        let earlier = claims.tunnel_nets[..position].iter().find(|other| overlaps(IpNet::V4(other.value)));
        let mut nets = claims.prefixes.iter().chain(&claims.site_addresses).chain(&claims.bond_addresses);
        let phrase = if let Some(earlier) = earlier {
            format!("the same net as on {}: give every tunnel a /31 of its own", line(earlier, collector))
        } else if let Some(other) = nets.find(|other| overlaps(other.value)) {
            let (value, seen) = (other.value, describe_claim(other, collector));
            format!("which overlaps {value}, {seen}: give the tunnel a /31 that nothing else uses")
        } else if let Some(endpoint) = claims.endpoints.iter().find(|endpoint| whole.contains(&endpoint.value)) {
            let (value, seen) = (endpoint.value, describe_claim(endpoint, collector));
            format!("which contains {value}, {seen}: give the tunnel a /31 that nothing else uses")
        } else {
            continue;
        };
        report(collector, net, &phrase);
    }
}

fn unique<T: Display + Eq + Hash>(claims: &[Claim<T>], fix: &str, collector: &Collector<'_>) {
    let mut first: HashMap<&T, &Claim<T>> = HashMap::new();
    for claim in claims {
        let earlier = *first.entry(&claim.value).or_insert(claim);
        if !std::ptr::eq(earlier, claim) {
            let seen = if earlier.place == claim.place {
                line(earlier, collector)
            } else {
                describe_claim(earlier, collector)
            };
            report(collector, claim, &format!("taken already by {seen}: {fix}"));
        }
    }
}

/// Reports a problem of one claim; `phrase` continues its value.
fn report<T: Display>(collector: &Collector<'_>, claim: &Claim<T>, phrase: &str) {
    let is = if ["prefixes ", "addresses ", "members "].iter().any(|list| claim.place.starts_with(list)) {
        "has"
    } else {
        "is"
    };
    let message = format!("{} {is} {}, {phrase}", claim.place, claim.value);
    match claim.at {
        Some(at) => collector.add(at, message),
        None => collector.add_to_file(message),
    }
}

/// Where a claim is in the configuration, for a message about another claim.
fn describe_claim<T>(claim: &Claim<T>, collector: &Collector<'_>) -> String {
    match claim.at {
        Some(_) => format!("{} on {}", claim.place, line(claim, collector)),
        None => format!("{} by default", claim.place),
    }
}

fn line<T>(claim: &Claim<T>, collector: &Collector<'_>) -> String {
    claim.at.map_or_else(|| "the default".to_owned(), |at| format!("line {}", collector.line(at)))
}
