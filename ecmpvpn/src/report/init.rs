//! The output of `init --from`: what changes here, and what the other site must set.

use std::net::SocketAddr;

use crate::config::{Peer, Tunnel};
use crate::plan::far_address;
use crate::plan::init::Request;
use crate::plan::init::from_wg_quick::{OldPorts, Taken};
use crate::plan::init::sites::member_count;

/// Name of the file for the other site.
pub const OTHER_SITE: &str = "other-site.txt";

/// What changes here, one line each.
pub fn changes(taken: &Taken) -> Vec<String> {
    let (config, peer) = (&taken.config, &taken.config.peers[0]);
    let mut lines: Vec<String> =
        peer.tunnels.iter().zip(&taken.old).map(|(tunnel, old)| change(peer, tunnel, *old)).collect();
    let shared = if peer.preshared_key.is_some() { ", preshared key" } else { "" };
    let prefixes: Vec<String> = peer.prefixes.iter().map(ToString::to_string).collect();
    lines.push(format!(
        "taken over: private key{shared}, {}'s public key, its endpoint {}; steered to it: {}",
        peer.name,
        peer.remote_endpoint,
        prefixes.join(", ")
    ));
    lines.extend(taken.notes.iter().cloned());
    if !keeps_file(taken) {
        lines.push(format!("{} must change its ports as well: {}/{OTHER_SITE} says how", peer.name, config.site.name));
    }
    lines
}

/// Whether every tunnel keeps its ports.
fn keeps_file(taken: &Taken) -> bool {
    let same =
        |(tunnel, old): (&Tunnel, &OldPorts)| Some(tunnel.listen_port) == old.here && tunnel.remote_port == old.there;
    taken.config.peers[0].tunnels.iter().zip(&taken.old).all(same)
}

fn change(peer: &Peer, tunnel: &Tunnel, old: OldPorts) -> String {
    let moved = |old: Option<u16>, new: u16| match old {
        Some(old) if old == new => format!("{new} stays"),
        Some(old) => format!("{old} -> {new}"),
        None => format!("any -> {new}"),
    };
    format!(
        "{}: port here {}, at {} {}",
        tunnel.name,
        moved(old.here, tunnel.listen_port),
        peer.name,
        moved(Some(old.there), tunnel.remote_port)
    )
}

/// The text of [`OTHER_SITE`]: what the other site must set. It contains no secret.
pub fn other_site(asked: &Request, taken: &Taken) -> String {
    let (config, peer) = (&taken.config, &taken.config.peers[0]);
    let tunnels = peer.tunnels.len();
    let [near, far] = [&asked.a_members, &asked.b_members].map(|given| given.as_ref().map(member_count));
    let count =
        |flag: &str, count: Option<u8>| count.map_or(String::new(), |count| format!(" --{flag}-members {count}"));
    let mut lines = vec![
        format!("What {} must set to fit {}. There are {tunnels} tunnels.", peer.name, config.site.name),
        String::new(),
        format!("With ecmpvpn there, on {}'s own wg-quick files, in the same order of tunnels:", peer.name),
        format!(
            "  ecmpvpn init --from FILE... --a-name {} --b-name {} --a-endpoint {}{}{} --base-port {} --mtu {}",
            peer.name,
            config.site.name,
            peer.remote_endpoint,
            count("a", far),
            count("b", near),
            taken.base_port,
            config.steering.mtu,
        ),
        "This gives the ports and addresses below. By hand, in its configuration:".to_owned(),
        format!("  [steering]  seed = {:#018x}  mtu = {}", config.steering.seed, config.steering.mtu),
        format!("  [[peer]]    public_key = \"{}\"", config.site.private_key.public_key()),
        format!("              local_endpoint = \"{}\"", peer.remote_endpoint),
        format!("              remote_endpoint = \"{}\"", peer.local_endpoint),
    ];
    for tunnel in &peer.tunnels {
        let address = far_address(tunnel.address)
            .map_or_else(String::new, |far| format!("  address = \"{far}/{}\"", tunnel.address.prefix_len()));
        lines.push(format!(
            "  {}: listen_port = {}  remote_port = {}{address}",
            tunnel.name, tunnel.remote_port, tunnel.listen_port
        ));
    }
    lines.push(String::new());
    lines.push(format!(
        "As long as {} has plain wg-quick, in its files (the probes need Address and AllowedIPs, without which tunnels are \
         judged by their handshakes, which takes minutes):",
        peer.name
    ));
    for tunnel in &peer.tunnels {
        let endpoint = SocketAddr::new(peer.local_endpoint, tunnel.listen_port);
        let own = tunnel.address.addr();
        let address = far_address(tunnel.address).map_or_else(String::new, |far| {
            format!("  Address = {far}/{}  AllowedIPs = {own}/32 and those that it has", tunnel.address.prefix_len())
        });
        lines.push(format!("  {}: ListenPort = {}  Endpoint = {endpoint}{address}", tunnel.name, tunnel.remote_port));
    }
    lines.join("\n")
}
