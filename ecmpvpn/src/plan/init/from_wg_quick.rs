//! `init --from`: makes the configuration of one site from its wg-quick files. Texts in, values out; nothing here reads
//! or writes files.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};

use ipnet::{IpNet, Ipv4Net};

use super::sites::{self, TUNNEL_NETS};
use super::{InitError, Request, wrong};
use crate::config::wg_quick::{Host, Table, WgQuick};
use crate::config::{
    self, Config, InterfaceName, MAX_TUNNELS_PER_PEER, PresharedKey, PrivateKey, PublicKey, Tunnel, XmitHashPolicy,
    parse_prefix,
};
use crate::plan::ports::{self, End, LOWEST_PORT, PortPair, PortPlan};

/// A wg-quick file that was read.
#[derive(Debug)]
pub struct File {
    /// As the user named it.
    pub path: String,
    /// The name of the interface that wg-quick makes of it.
    pub name: InterfaceName,
    pub content: WgQuick,
}

/// The result for one set of files.
#[derive(Debug)]
pub struct Taken {
    pub config: Config,
    pub ports: PortPlan,
    /// The port that the search started from.
    pub base_port: u16,
    pub old: Vec<OldPorts>,
    /// One sentence for each setting of the files that is left out or changed.
    pub notes: Vec<String>,
}

/// The ports of a tunnel in its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OldPorts {
    /// `None`: the kernel picked a port.
    pub here: Option<u16>,
    pub there: u16,
}

impl OldPorts {
    fn pair(self) -> Option<PortPair> {
        Some(PortPair { a: self.here?, b: self.there })
    }
}

/// Turns `files` (at least one) into the configuration of site A.
pub fn take_over(asked: &Request, files: &[File]) -> Result<Taken, InitError> {
    if files.len() > MAX_TUNNELS_PER_PEER {
        return Err(wrong(format!("--from names {} files: give at most {MAX_TUNNELS_PER_PEER}", files.len())));
    }
    if asked.a_name == asked.b_name {
        let name = &asked.a_name;
        return Err(wrong(format!("--a-name and --b-name are both {name}: give every site a name of its own")));
    }
    sites::check_bond("a", asked.a_endpoint, asked.a_members.as_ref(), &asked.a_bond_addresses)?;
    for (at, file) in files.iter().enumerate() {
        if let Some(other) = files[..at].iter().find(|other| other.name == file.name) {
            let (path, other, name) = (&file.path, &other.path, &file.name);
            return Err(wrong(format!(
                "{path} and {other} are both named {name}: give every tunnel a name of its own"
            )));
        }
    }
    let keys = keys(files)?;
    let (remote, old) = endpoints(asked, files)?;
    let mut notes = left_out(files);
    let nets = tunnel_nets(files, &keys, &mut notes);
    let prefixes = prefixes(asked, files, remote, &nets, &mut notes)?;
    let base_port = base_port(asked, &old);
    let ports = plan_ports(asked, remote, &old, base_port)?;
    let tunnel = |((file, pair), address): ((&File, &PortPair), &Ipv4Net)| Tunnel {
        name: file.name.clone(),
        listen_port: pair.a,
        remote_port: pair.b,
        address: *address,
        weight: Some(1),
        private_key: None,
        public_key: None,
        preshared_key: None,
    };
    let tunnels = files.iter().zip(&ports.pairs).zip(&nets).map(tunnel).collect();
    let config = Config {
        site: config::Site {
            name: asked.a_name.clone(),
            private_key: keys.private.clone(),
            addresses: site_addresses(files, &nets),
        },
        bond: sites::bond(asked.a_members.as_ref(), &asked.a_bond_addresses),
        steering: sites::steering(mtu(asked, files)?, keys.seed()),
        peers: vec![config::Peer {
            name: asked.b_name.clone(),
            public_key: keys.public,
            preshared_key: keys.preshared,
            local_endpoint: asked.a_endpoint,
            remote_endpoint: remote,
            remote_name: None,
            remote_bond: asked.b_members.as_ref().map(sites::remote_bond),
            policy: None,
            restore_order: true,
            prefixes,
            tunnels,
        }],
        rules: Vec::new(),
        health: sites::HEALTH,
        metrics: None,
    };
    Ok(Taken { config, ports, base_port, old, notes })
}

struct Keys {
    private: PrivateKey,
    public: PublicKey,
    preshared: Option<PresharedKey>,
}

impl Keys {
    /// The seed, which both ends calculate alike without exchanging it. 63 bits: TOML guarantees only signed 64-bit
    /// integers.
    fn seed(&self) -> u64 {
        let first = |key: &PublicKey| u64::from_le_bytes(std::array::from_fn(|at| key.as_bytes()[at]));
        (first(&self.public) ^ first(&self.private.public_key())) >> 1
    }

    /// Which host of a two-host net this site is, 0 or 1. The far end calculates the other one.
    fn end(&self) -> u32 {
        u32::from(self.private.public_key().as_bytes() > self.public.as_bytes())
    }
}

/// The keys. All files must agree on them: a site has one key for all its tunnels.
fn keys(files: &[File]) -> Result<Keys, InitError> {
    const FIX: &str = "a site has one key for all its tunnels, so make both sites with `ecmpvpn init` without --from";
    for file in files {
        if file.content.peers.len() != 1 {
            let (path, count) = (&file.path, file.content.peers.len());
            return Err(wrong(format!(
                "{path} has {count} [Peer] sections: give files with one peer, the remote site"
            )));
        }
    }
    let peer = |file: &File| file.content.peers[0].clone();
    let first = &files[0];
    for file in files {
        let path = &file.path;
        if file.content.interface.private_key.is_none() {
            return Err(wrong(format!("{path} has no PrivateKey: put this site's into its [Interface]")));
        }
        let differs = if file.content.interface.private_key != first.content.interface.private_key {
            "PrivateKey"
        } else if peer(file).public_key != peer(first).public_key {
            "PublicKey"
        } else if peer(file).preshared_key != peer(first).preshared_key {
            "PresharedKey"
        } else {
            continue;
        };
        return Err(wrong(format!("{path} has another {differs} than {}: {FIX}", first.path)));
    }
    let private = first.content.interface.private_key.clone().expect("every file has one");
    let peer = peer(first);
    if private.public_key() == peer.public_key {
        return Err(wrong(format!(
            "{} has this site's own key as its peer's PublicKey: give the far end's",
            first.path
        )));
    }
    Ok(Keys { private, public: peer.public_key, preshared: peer.preshared_key })
}

/// The address of the far end, which is the same in all files, and the ports of every tunnel.
fn endpoints(asked: &Request, files: &[File]) -> Result<(IpAddr, Vec<OldPorts>), InitError> {
    let mut remote = asked.b_endpoint.map(|address| ("--b-endpoint", address));
    let mut old = Vec::new();
    for file in files {
        let path = &file.path;
        let Some(endpoint) = &file.content.peers[0].endpoint else {
            return Err(wrong(format!("{path} has no Endpoint: add the far end's address and port to its [Peer]")));
        };
        match (&endpoint.host, remote) {
            (Host::Address(address), None) => remote = Some((path, *address)),
            (Host::Address(address), Some((_, other))) if *address == other => {}
            (Host::Address(address), Some((place, other))) => {
                return Err(wrong(format!(
                    "{path} has the Endpoint {address}, {place} has {other}: all tunnels lead to one address of the far \
                     end, and only their ports differ"
                )));
            }
            (Host::Name(_), Some(_)) if asked.b_endpoint.is_some() => {}
            (Host::Name(name), _) => {
                return Err(wrong(format!(
                    "{path} has the Endpoint {name}, a name: the ports depend on the address, so add --b-endpoint ADDRESS"
                )));
            }
        }
        old.push(OldPorts { here: file.content.interface.listen_port, there: endpoint.port });
    }
    let (_, remote) = remote.expect("the first file has one");
    if remote == asked.a_endpoint {
        return Err(wrong(format!("--a-endpoint is {remote}, which is the far end's: give this site's own address")));
    }
    Ok((remote, old))
}

/// `--base-port`, otherwise the lowest port in the files that a plan may use.
fn base_port(asked: &Request, old: &[OldPorts]) -> u16 {
    let used = old.iter().flat_map(|ports| ports.here.into_iter().chain([ports.there]));
    asked.base_port.or(used.filter(|port| *port >= LOWEST_PORT).min()).unwrap_or(sites::BASE_PORT)
}

/// The old ports if no others are better, otherwise planned ones. Both ends get the same answer if they name the
/// tunnels in the same order.
fn plan_ports(asked: &Request, remote: IpAddr, old: &[OldPorts], base_port: u16) -> Result<PortPlan, InitError> {
    let tunnels = u8::try_from(old.len()).unwrap_or(u8::MAX);
    let end = |address, members: Option<_>| {
        End::new(address, members.map_or(tunnels, sites::member_count), XmitHashPolicy::Layer34)
    };
    let request = ports::Request {
        a: end(asked.a_endpoint, asked.a_members.as_ref()),
        b: end(remote, asked.b_members.as_ref()),
        tunnels: old.len(),
        base_port,
    };
    let fits = |pair: &PortPair| pair.a >= LOWEST_PORT;
    let pairs: Option<Vec<PortPair>> = old.iter().map(|ports| ports.pair().filter(fits)).collect();
    // If two tunnels have the same port at one end, the ports can be neither judged nor kept.
    if let Some(judged) = pairs.and_then(|pairs| ports::judge(&request, &pairs).ok()) {
        return Ok(ports::better(&request, &judged).map_err(InitError::from)?.map_or(judged, |better| better.plan));
    }
    ports::plan(&request).map_err(InitError::from)
}

/// A two-host net for each tunnel, with the address of this end: those in the files, otherwise link-local ones.
fn tunnel_nets(files: &[File], keys: &Keys, notes: &mut Vec<String>) -> Vec<Ipv4Net> {
    let of_two = |net: &IpNet| match net {
        IpNet::V4(net) => match net.prefix_len() {
            31 => Some(*net),
            30 if net.addr() != net.network() && net.addr() != net.broadcast() => Some(*net),
            _ => None,
        },
        IpNet::V6(_) => None,
    };
    let own: Option<Vec<Ipv4Net>> =
        files.iter().map(|file| file.content.interface.addresses.iter().find_map(of_two)).collect();
    let distinct = |nets: &Vec<Ipv4Net>| nets.iter().map(Ipv4Net::trunc).collect::<BTreeSet<_>>().len() == nets.len();
    if let Some(own) = own.filter(distinct) {
        return own;
    }
    notes.push(format!(
        "the tunnels' own addresses are new, from {TUNNEL_NETS} on: not every file has an IPv4 /31 or /30 of its own"
    ));
    let nets = (0..).step_by(2).map(|offset| Ipv4Addr::from_bits(TUNNEL_NETS.to_bits() + offset + keys.end()));
    nets.take(files.len()).map(|address| Ipv4Net::new_assert(address, 31)).collect()
}

fn overlap(net: &IpNet, tunnels: &[Ipv4Net]) -> bool {
    tunnels.iter().any(|tunnel| {
        let tunnel = IpNet::V4(tunnel.trunc());
        tunnel.contains(net) || net.contains(&tunnel)
    })
}

/// The addresses of the interfaces that are not in a tunnel's net, each as a single host.
fn site_addresses(files: &[File], tunnels: &[Ipv4Net]) -> Vec<IpNet> {
    let mut addresses: Vec<IpNet> = Vec::new();
    for address in files.iter().flat_map(|file| &file.content.interface.addresses) {
        let address = IpNet::from(address.addr());
        let link_local = matches!(address.addr(), IpAddr::V6(v6) if v6.is_unicast_link_local());
        if !link_local && !overlap(&address, tunnels) && !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    addresses
}

/// The nets to steer to the far end: `--b-prefix`, otherwise the `AllowedIPs` of the files.
fn prefixes(
    asked: &Request,
    files: &[File],
    remote: IpAddr,
    tunnels: &[Ipv4Net],
    notes: &mut Vec<String>,
) -> Result<Vec<IpNet>, InitError> {
    let mut prefixes: Vec<IpNet> = Vec::new();
    if asked.b_prefixes.is_empty() {
        for (file, net) in
            files.iter().flat_map(|file| file.content.peers[0].allowed_ips.iter().map(move |net| (file, net)))
        {
            if prefixes.contains(net) {
                continue;
            }
            if let Some(endpoint) = [asked.a_endpoint, remote].iter().find(|endpoint| net.contains(*endpoint)) {
                return Err(wrong(format!(
                    "{} has the AllowedIPs {net}, which contain the endpoint {endpoint}: the tunnels' own packets would \
                     be steered into the tunnels, so name the nets behind the far end with --b-prefix",
                    file.path
                )));
            }
            if overlap(net, tunnels) || parse_prefix(&net.to_string()).is_err() {
                notes.push(format!(
                    "{net} of {}'s AllowedIPs is left out: it belongs to a tunnel's own link",
                    file.path
                ));
            } else {
                prefixes.push(*net);
            }
        }
    } else {
        prefixes.clone_from(&asked.b_prefixes);
    }
    if prefixes.is_empty() {
        return Err(wrong(
            "no AllowedIPs are left to steer: name the nets behind the far end with --b-prefix".to_owned(),
        ));
    }
    Ok(prefixes)
}

/// `--mtu`, otherwise the lowest MTU in the files.
fn mtu(asked: &Request, files: &[File]) -> Result<u32, InitError> {
    let written = || files.iter().filter_map(|file| Some((file, file.content.interface.mtu?)));
    match (asked.mtu, written().min_by_key(|(_, mtu)| *mtu)) {
        (Some(mtu), _) => Ok(mtu),
        (None, None) => Ok(sites::MTU),
        (None, Some((_, mtu))) if (1280..=9000).contains(&mtu) => Ok(mtu),
        (None, Some((file, mtu))) => Err(wrong(format!("{} has the MTU {mtu}: give another with --mtu", file.path))),
    }
}

/// A note for the settings in each file that the configuration has no key for: why, and what to do instead.
fn left_out(files: &[File]) -> Vec<String> {
    const COMMANDS: &str = "`run` carries out no commands: put NAT, MSS clamping and firewall rules into this host's own \
        firewall";
    let mut notes = Vec::new();
    for File { path, content, .. } in files {
        let lines = |desired: &[&str]| -> Vec<String> {
            let unused = content.interface.unused.iter().filter(|(key, _)| desired.contains(key));
            unused.map(|(key, line)| format!("{key} (line {line})")).collect()
        };
        let if_set = |is_set: bool, key: &str| -> Vec<String> { is_set.then(|| key.to_owned()).into_iter().collect() };
        let notes_of: [(Vec<String>, &str); 6] = [
            (lines(&["PreUp", "PostUp", "PreDown", "PostDown"]), COMMANDS),
            (lines(&["DNS"]), "set the name server in this host's own resolver"),
            (lines(&["SaveConfig"]), "`run` never writes its configuration"),
            (
                if_set(content.interface.fwmark.is_some(), "FwMark"),
                "the tunnels' outer packets have no mark: match their UDP ports where rules matched the mark",
            ),
            (if_set(content.interface.table != Table::Auto, "Table"), "`run` makes links and routes by itself"),
            (
                if_set(content.peers[0].persistent_keepalive.is_some(), "PersistentKeepalive"),
                "the probes of every tunnel keep NAT and firewalls open",
            ),
        ];
        let said = notes_of.iter().filter(|(keys, _)| !keys.is_empty());
        notes.extend(said.map(|(keys, why)| format!("{} of {path} left out: {why}", keys.join(", "))));
    }
    notes
}
