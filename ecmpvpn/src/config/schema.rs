//! Reads the sections of the configuration, each into its type. Checks between sections are in `crosscheck`.
//!
//! A function here reports what is wrong and continues as well as it can, so that all problems are reported at once.
//! Its result is used only if nothing was reported.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use toml::de::{DeTable, DeValue};
use zeroize::Zeroizing;

use super::crosscheck::{self, Claim, Claims, claim};
use super::key_file::KeyFileError;
use super::problems::Collector;
use super::section::{At, Parsed, Section, number, text, values, word};
use super::values::{
    Remote, boolean, endpoint, flowlet_gap, host_address, interface, key_file_name, listen_port, prefix, public_key,
    remote_endpoint, site_name, tunnel_address, weight,
};
use super::{
    BackendChoice, Bond, BondMode, Config, Health, InterfaceName, KeyError, LacpRate, MAX_MEMBERS, MAX_PEERS,
    MAX_PREFIXES_PER_PEER, MAX_RESTORE_MS, MAX_TUNNELS_PER_PEER, Metrics, Peer, Policy, PrivateKey, PublicKey,
    RESTORE_MS, RemoteBond, Site, Steering, Tunnel, XmitHashPolicy, rules,
};

/// Returns the content of a key file, given its name in the configuration.
pub(super) type KeyReader<'k> = &'k dyn Fn(&str) -> Result<Zeroizing<String>, KeyFileError>;

/// Reads the whole document. `None` only if a problem was reported.
pub(super) fn config<'a>(
    document: &'a DeTable<'a>,
    keys: KeyReader<'_>,
    collector: &'a Collector<'a>,
) -> Option<Config> {
    let known = ["site", "bond", "steering", "peer", "rule", "health", "metrics"];
    let top = Section::new("", document, 0, &known, collector);
    let mut claims = Claims::default();

    let site_keys = ["name", "private_key_file", "addresses"];
    let site = top.table("site", "[site]", &site_keys).and_then(|section| site(&section, keys, &mut claims));
    if !top.has("site") {
        collector.add_to_file("there is no [site]: add one with name and private_key_file, or run `ecmpvpn init`");
    }
    let bond_keys = ["name", "members", "mode", "xmit_hash_policy", "lacp_rate", "miimon_ms", "addresses"];
    let bond = top.table("bond", "[bond]", &bond_keys).and_then(|section| bond(&section, &mut claims));
    let own_key = site.as_ref().map(|site| site.private_key.public_key());
    let steering = steering(&top, own_key.as_ref(), &mut claims);

    let peer_keys = [
        "name",
        "public_key",
        "preshared_key_file",
        "local_endpoint",
        "remote_endpoint",
        "remote_bond",
        "policy",
        "restore_order",
        "prefixes",
        "tunnel",
    ];
    let sections = top.tables("peer", "[[peer]]", &peer_keys, MAX_PEERS);
    if !top.has("peer") {
        collector.add_to_file("there is no [[peer]]: add one for each remote site, or run `ecmpvpn init`");
    }
    let peers = sections.iter().filter_map(|section| peer(section, keys, &mut claims)).collect();
    let rules = rules::read(&top, &mut claims);
    let health = health(&top);
    let metrics = metrics(&top);
    crosscheck::check(&claims, own_key.as_ref(), collector);

    Some(Config { site: site?, bond, steering: steering?, peers, rules, health, metrics })
}

fn site(section: &Section<'_>, keys: KeyReader<'_>, claims: &mut Claims) -> Option<Site> {
    let name = section.need("name", "\"site-a\"", site_name);
    let private_key = section
        .need("private_key_file", "\"site-a.key\"", key_file_name)
        .and_then(|file| key_from_file::<PrivateKey>(section, "private_key_file", &file, keys));
    let addresses = section.list("addresses", MAX_PREFIXES_PER_PEER, host_address);
    claim(&mut claims.peer_names, "name in [site]", name.as_ref());
    for address in &addresses {
        claim(&mut claims.site_addresses, "addresses in [site]", Some(address));
    }
    Some(Site { name: name?.value, private_key: private_key?, addresses: values(addresses) })
}

fn bond(section: &Section<'_>, claims: &mut Claims) -> Option<Bond> {
    let name = section.need("name", "\"bond0\"", interface);
    let members = section.list("members", usize::from(MAX_MEMBERS), interface);
    if !section.has("members") {
        section.report_whole("has no members: add a line such as `members = [\"eno1\", \"eno2\"]`");
    } else if members.is_empty() {
        section.report_whole("has no usable members: name at least one interface");
    }
    let mode = section.or("mode", BondMode::Lacp, word(BondMode::ALL, BondMode::as_str));
    let lacp_rate = section.get("lacp_rate", word(LacpRate::ALL, LacpRate::as_str));
    if let (BondMode::BalanceXor, Some(rate)) = (mode, &lacp_rate) {
        section.report("lacp_rate", rate.at, "is for mode \"802.3ad\" only: remove it");
    }
    let addresses = section.list("addresses", MAX_PREFIXES_PER_PEER, host_address);
    claim(&mut claims.interfaces, "name in [bond]", name.as_ref());
    for member in &members {
        claim(&mut claims.interfaces, "members in [bond]", Some(member));
    }
    for address in &addresses {
        claim(&mut claims.bond_addresses, "addresses in [bond]", Some(address));
    }
    let xmit_hash_policy = section.or("xmit_hash_policy", XmitHashPolicy::Layer34, xmit_hash_policy);
    let miimon_ms = section.or("miimon_ms", 100, number(1..=10_000));
    Some(Bond {
        name: name?.value,
        members: values(members),
        mode,
        xmit_hash_policy,
        lacp_rate: lacp_rate.map_or(LacpRate::Fast, |rate| rate.value),
        miimon_ms,
        addresses: values(addresses),
    })
}

/// The default seed comes from `own_key`: it differs between VPNs, and is the same at each start.
fn steering(top: &Section<'_>, own_key: Option<&PublicKey>, claims: &mut Claims) -> Option<Steering> {
    let known = [
        "device",
        "policy",
        "backend",
        "mtu",
        "mss_clamp",
        "seed",
        "flowlet_gap_us",
        "spray_elephants",
        "restore_order",
        "restore_ms",
    ];
    let empty = DeTable::new();
    let section = match top.table("steering", "[steering]", &known) {
        Some(section) => section,
        None if top.has("steering") => return None,
        None => top.absent("[steering]", &empty),
    };
    let default_device = InterfaceName::new("ecmp0").ok()?;
    let device = section.get("device", interface);
    claims.interfaces.push(Claim {
        value: device.as_ref().map_or_else(|| default_device.clone(), |found| found.value.clone()),
        place: "device in [steering]",
        at: device.as_ref().map(|found| found.at),
    });
    let default_seed = || own_key.map(|key| u64::from_le_bytes(std::array::from_fn(|i| key.as_bytes()[i])));
    let seed = section.get("seed", number(0..=u64::MAX)).map(|found| found.value);
    Some(Steering {
        device: device.map_or(default_device, |found| found.value),
        policy: section.or("policy", Policy::Adaptive, word(Policy::ALL, Policy::as_str)),
        backend: section.or("backend", BackendChoice::Auto, word(BackendChoice::ALL, BackendChoice::as_str)),
        mtu: section.or("mtu", 1420, number(1280..=9000)),
        mss_clamp: section.or("mss_clamp", true, boolean),
        flowlet_gap_us: section.or("flowlet_gap_us", None, flowlet_gap),
        spray_elephants: section.or("spray_elephants", true, boolean),
        restore_order: section.or("restore_order", true, boolean),
        restore_ms: section.or("restore_ms", RESTORE_MS, number(1..=MAX_RESTORE_MS)),
        seed: seed.or_else(default_seed)?,
    })
}

fn peer(section: &Section<'_>, keys: KeyReader<'_>, claims: &mut Claims) -> Option<Peer> {
    let name = section.need("name", "\"site-b\"", site_name);
    let public_key = section.need("public_key", "\"…\"", public_key);
    let preshared_key = section
        .get("preshared_key_file", key_file_name)
        .and_then(|file| key_from_file(section, "preshared_key_file", &file, keys));
    let local = section.need("local_endpoint", "\"10.2.3.4\"", endpoint);
    let written = section.need("remote_endpoint", "\"10.5.6.7\"", remote_endpoint);
    let (remote, remote_name) = match written {
        Some(At { value: Remote::Address(value), at }) => (Some(At { value, at }), None),
        Some(At { value: Remote::Name(name), .. }) => (None, Some(name)),
        None => (None, None),
    };
    if let (Some(local), Some(remote)) = (&local, &remote) {
        endpoints_fit(section, local, remote);
    }
    let remote_bond = section
        .table("remote_bond", "remote_bond", &["members", "xmit_hash_policy"])
        .and_then(|bond| remote_bond(&bond));
    let policy = section.get("policy", word(Policy::ALL, Policy::as_str));
    let restore_order = section.or("restore_order", true, boolean);
    let prefixes = section.list("prefixes", MAX_PREFIXES_PER_PEER, prefix);
    if !section.has("prefixes") {
        section.report_whole("has no prefixes: add a line such as `prefixes = [\"10.20.0.0/16\"]`");
    }

    claim(&mut claims.peer_names, "name in [[peer]]", name.as_ref());
    claim(&mut claims.public_keys, "public_key in [[peer]]", public_key.as_ref());
    claim(&mut claims.endpoints, "local_endpoint in [[peer]]", local.as_ref());
    claim(&mut claims.endpoints, "remote_endpoint in [[peer]]", remote.as_ref());
    for prefix in &prefixes {
        claim(&mut claims.prefixes, "prefixes in [[peer]]", Some(prefix));
    }

    let tunnel_keys = [
        "name",
        "listen_port",
        "remote_port",
        "address",
        "weight",
        "private_key_file",
        "public_key",
        "preshared_key_file",
    ];
    let sections = section.tables("tunnel", "[[peer.tunnel]]", &tunnel_keys, MAX_TUNNELS_PER_PEER);
    if sections.is_empty() && !section.has("tunnel") {
        section.report_whole("has no [[peer.tunnel]]: add one below it for each tunnel");
    }
    let remote_address = remote.as_ref().map(|found| found.value);
    let tunnels = sections.iter().filter_map(|section| tunnel(section, remote_address, keys, claims)).collect();
    Some(Peer {
        name: name?.value,
        public_key: public_key?.value,
        preshared_key,
        local_endpoint: local.as_ref()?.value,
        remote_endpoint: match (remote, &remote_name) {
            (Some(remote), _) => remote.value,
            (None, Some(_)) if local?.value.is_ipv4() => Ipv4Addr::UNSPECIFIED.into(),
            (None, Some(_)) => Ipv6Addr::UNSPECIFIED.into(),
            (None, None) => return None,
        },
        remote_name,
        remote_bond,
        policy: policy.map(|found| found.value),
        restore_order,
        prefixes: values(prefixes),
        tunnels,
    })
}

fn endpoints_fit(section: &Section<'_>, local: &At<IpAddr>, remote: &At<IpAddr>) {
    if local.value.is_ipv4() != remote.value.is_ipv4() {
        let phrase = format!(
            "is {}, of another family than local_endpoint {}: both must be IPv4, or both IPv6",
            remote.value, local.value
        );
        section.report("remote_endpoint", remote.at, &phrase);
    } else if local.value == remote.value {
        let phrase = format!("is {}, as is local_endpoint: give the remote site's address", remote.value);
        section.report("remote_endpoint", remote.at, &phrase);
    }
}

fn remote_bond(section: &Section<'_>) -> Option<RemoteBond> {
    let members = section.need("members", "2", number(1..=MAX_MEMBERS));
    let xmit_hash_policy = section.or("xmit_hash_policy", XmitHashPolicy::Layer34, xmit_hash_policy);
    Some(RemoteBond { members: members?.value, xmit_hash_policy })
}

fn tunnel(section: &Section<'_>, remote: Option<IpAddr>, keys: KeyReader<'_>, claims: &mut Claims) -> Option<Tunnel> {
    let name = section.need("name", "\"wg0\"", interface);
    let listen_port = section.need("listen_port", "51820", listen_port);
    let remote_port = section.need("remote_port", "51820", number(1..=u16::MAX));
    let address = section.need("address", "\"169.254.77.0/31\"", tunnel_address);
    let weight = section.or("weight", Some(1), weight);
    let private_key = section
        .get("private_key_file", key_file_name)
        .and_then(|file| key_from_file::<PrivateKey>(section, "private_key_file", &file, keys));
    let public_key = section.get("public_key", public_key);
    let preshared_key = section
        .get("preshared_key_file", key_file_name)
        .and_then(|file| key_from_file(section, "preshared_key_file", &file, keys));
    if let (Some(own), Some(found)) = (&private_key, &public_key)
        && own.public_key() == found.value
    {
        section.report("public_key", found.at, "is that of private_key_file here: give the remote site's");
    }
    claim(&mut claims.tunnel_public_keys, "public_key in [[peer.tunnel]]", public_key.as_ref());
    claim(&mut claims.interfaces, "name in [[peer.tunnel]]", name.as_ref());
    claim(&mut claims.listen_ports, "listen_port in [[peer.tunnel]]", listen_port.as_ref());
    claim(&mut claims.tunnel_nets, "address in [[peer.tunnel]]", address.as_ref());
    if let (Some(remote), Some(port)) = (remote, &remote_port) {
        let socket = At { value: SocketAddr::new(remote, port.value), at: port.at };
        claim(&mut claims.remote_sockets, "remote_port in [[peer.tunnel]]", Some(&socket));
    }
    claims.tunnels.extend(name.as_ref().map(|name| name.value.clone()));
    Some(Tunnel {
        name: name?.value,
        listen_port: listen_port?.value,
        remote_port: remote_port?.value,
        address: address?.value,
        weight,
        private_key,
        public_key: public_key.map(|found| found.value),
        preshared_key,
    })
}

fn health(top: &Section<'_>) -> Health {
    let default = Health { interval_ms: 100, down_after: 3, up_after: 5 };
    let section = top.table("health", "[health]", &["interval_ms", "down_after", "up_after"]);
    section.map_or(default, |section| Health {
        interval_ms: section.or("interval_ms", default.interval_ms, number(10..=60_000)),
        down_after: section.or("down_after", default.down_after, number(1..=100)),
        up_after: section.or("up_after", default.up_after, number(1..=100)),
    })
}

fn metrics(top: &Section<'_>) -> Option<Metrics> {
    let section = top.table("metrics", "[metrics]", &["listen"])?;
    let listen = section.need("listen", "\"127.0.0.1:9586\"", |value| {
        let listen: SocketAddr = text("an address and port such as \"127.0.0.1:9586\"")(value)?;
        if listen.port() == 0 { Err("has port 0: give a port from 1 to 65535".to_owned()) } else { Ok(listen) }
    });
    Some(Metrics { listen: listen?.value })
}

/// Reads the key in the file that `key` names.
fn key_from_file<K: std::str::FromStr<Err = KeyError>>(
    section: &Section<'_>,
    key: &str,
    file: &At<String>,
    keys: KeyReader<'_>,
) -> Option<K> {
    let found = match keys(&file.value) {
        Ok(text) => text.parse().map_err(|error| format!("names {}, whose content {error}", file.value)),
        Err(error) => Err(error.to_string()),
    };
    found.map_err(|phrase| section.report(key, file.at, &phrase)).ok()
}

fn xmit_hash_policy(value: &DeValue<'_>) -> Parsed<XmitHashPolicy> {
    word(&XmitHashPolicy::ALL, XmitHashPolicy::as_str)(value)
}
