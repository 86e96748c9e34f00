//! Writes a [`Config`] as TOML with comments. Key files get conventional names; the keys themselves are not in the
//! text.

use std::fmt::{Display, Write as _};

use super::rules::{PROTOCOLS, port_range};
use super::{Bond, BondMode, Config, InterfaceName, Peer, Rule, Steering, Tunnel};

/// Name of the file with a site's private key.
pub fn private_key_file(site: &str) -> String {
    format!("{site}.key")
}

/// Name of the file with the key shared with a peer.
pub fn preshared_key_file(peer: &str) -> String {
    format!("{peer}.psk")
}

/// Name of the file with this site's key for one tunnel.
pub fn tunnel_key_file(tunnel: &InterfaceName) -> String {
    format!("{tunnel}.key")
}

/// Name of the file with the key shared for one tunnel.
pub fn tunnel_preshared_key_file(tunnel: &InterfaceName) -> String {
    format!("{tunnel}.psk")
}

/// Writes the text that [`parse`](super::parse) reads back as the same configuration. The keys must be in the files
/// named by [`private_key_file`], [`preshared_key_file`], [`tunnel_key_file`] and [`tunnel_preshared_key_file`].
pub fn render(config: &Config) -> String {
    let mut out = Text(String::new());
    out.line("# One site of an ecmpvpn. Every key: docs/configuration.md. Validate with: ecmpvpn check -c FILE");
    out.section("[site]");
    out.key("name", quoted(&config.site.name), "");
    out.key("private_key_file", quoted(private_key_file(&config.site.name)), "mode 0600, relative to this file");
    out.key("addresses", list(&config.site.addresses), "this gateway inside the VPN");
    if let Some(bond) = &config.bond {
        render_bond(&mut out, bond);
    }
    render_steering(&mut out, &config.steering);
    for peer in &config.peers {
        render_peer(&mut out, peer);
    }
    for rule in &config.rules {
        render_rule(&mut out, rule);
    }
    out.section("[health]");
    out.key("interval_ms", config.health.interval_ms, "between probes of one tunnel");
    out.key("down_after", config.health.down_after, "probes lost in a row");
    out.key("up_after", config.health.up_after, "probes answered in a row");
    if let Some(metrics) = &config.metrics {
        out.section("[metrics]");
        out.key("listen", quoted(metrics.listen), "");
    }
    out.0
}

fn render_bond(out: &mut Text, bond: &Bond) {
    out.section("[bond]");
    out.key("name", quoted(&bond.name), "");
    out.key("members", list(&bond.members), "enslaved in this order");
    out.key("mode", quoted(bond.mode.as_str()), "the switch must agree");
    out.key("xmit_hash_policy", quoted(bond.xmit_hash_policy.as_str()), "the ports below are planned for it");
    if bond.mode == BondMode::Lacp {
        out.key("lacp_rate", quoted(bond.lacp_rate.as_str()), "");
    }
    out.key("miimon_ms", bond.miimon_ms, "");
    out.key("addresses", list(&bond.addresses), "");
}

fn render_steering(out: &mut Text, steering: &Steering) {
    out.section("[steering]");
    out.key("device", quoted(&steering.device), "the peers' prefixes are routed to it");
    out.key("policy", quoted(steering.policy.as_str()), "hash, flowlet, adaptive or spray");
    out.key("backend", quoted(steering.backend.as_str()), "auto, kernel or userspace");
    out.key("mtu", steering.mtu, "of this device and of every tunnel");
    out.key("mss_clamp", steering.mss_clamp, "TCP connections begin with segments that fit");
    out.key("seed", format!("{:#018x}", steering.seed), "the same at both ends");
    match steering.flowlet_gap_us {
        None => out.key("flowlet_gap_us", quoted("auto"), ""),
        Some(gap) => out.key("flowlet_gap_us", gap, ""),
    }
    out.key("spray_elephants", steering.spray_elephants, "adaptive may put one flow onto several ports");
    out.key("restore_order", steering.restore_order, "at both sites: sprayed flows of any transport arrive in order");
    out.key("restore_ms", steering.restore_ms, "a packet is held no longer for that");
}

fn render_peer(out: &mut Text, peer: &Peer) {
    out.section("[[peer]]");
    out.key("name", quoted(&peer.name), "");
    out.key("public_key", quoted(peer.public_key), "");
    if peer.preshared_key.is_some() {
        out.key("preshared_key_file", quoted(preshared_key_file(&peer.name)), "the same key at both ends");
    }
    let remote = peer.remote_name.clone().unwrap_or_else(|| peer.remote_endpoint.to_string());
    out.key("local_endpoint", quoted(peer.local_endpoint), "where outer packets leave from");
    out.key("remote_endpoint", quoted(remote), "where they go");
    if let Some(bond) = &peer.remote_bond {
        let policy = quoted(bond.xmit_hash_policy.as_str());
        let value = format!("{{ members = {}, xmit_hash_policy = {policy} }}", bond.members);
        out.key("remote_bond", value, "what the port planner assumes");
    }
    if let Some(policy) = peer.policy {
        out.key("policy", quoted(policy.as_str()), "in place of the one in [steering]");
    }
    if !peer.restore_order {
        out.key("restore_order", peer.restore_order, "sprayed flows of this peer stay as they arrive");
    }
    out.key("prefixes", list(&peer.prefixes), "behind the peer");
    for tunnel in &peer.tunnels {
        render_tunnel(out, tunnel);
    }
}

fn render_tunnel(out: &mut Text, tunnel: &Tunnel) {
    out.line("[[peer.tunnel]]");
    out.key("name", quoted(&tunnel.name), "");
    out.key("listen_port", tunnel.listen_port, "");
    out.key("remote_port", tunnel.remote_port, "");
    out.key("address", quoted(tunnel.address), "the peer has the other one of this net");
    match tunnel.weight {
        None => out.key("weight", quoted("auto"), ""),
        Some(weight) => out.key("weight", weight, ""),
    }
    if tunnel.private_key.is_some() {
        out.key("private_key_file", quoted(tunnel_key_file(&tunnel.name)), "for this tunnel alone");
    }
    if let Some(key) = tunnel.public_key {
        out.key("public_key", quoted(key), "the far end's for this tunnel alone");
    }
    if tunnel.preshared_key.is_some() {
        out.key("preshared_key_file", quoted(tunnel_preshared_key_file(&tunnel.name)), "for this tunnel alone");
    }
}

/// A rule as `[[rule]]`.
pub(super) fn rule_text(rule: &Rule) -> String {
    let mut out = Text(String::new());
    render_rule(&mut out, rule);
    out.0
}

fn render_rule(out: &mut Text, rule: &Rule) {
    out.section("[[rule]]");
    if let Some(src) = &rule.src {
        out.key("src", quoted(src), "");
    }
    if let Some(dst) = &rule.dst {
        out.key("dst", quoted(dst), "");
    }
    if let Some(proto) = rule.proto {
        match PROTOCOLS.iter().find(|(_, number)| *number == proto) {
            Some((name, _)) => out.key("proto", quoted(name), ""),
            None => out.key("proto", proto, ""),
        }
    }
    for (key, ranges) in [("src_ports", &rule.src_ports), ("dst_ports", &rule.dst_ports)] {
        if !ranges.is_empty() {
            out.key(key, ports(ranges), "");
        }
    }
    if let Some(dscp) = rule.dscp {
        out.key("dscp", dscp, "");
    }
    if let Some(fwmark) = rule.fwmark {
        out.key("fwmark", format!("{fwmark:#x}"), "");
    }
    if let (true, [tunnel]) = (rule.pin, rule.tunnels.as_slice()) {
        out.key("pin", quoted(tunnel), "");
        return;
    }
    if let Some(policy) = rule.policy {
        out.key("policy", quoted(policy.as_str()), "");
    }
    if !rule.tunnels.is_empty() {
        out.key("tunnels", list(&rule.tunnels), "");
    }
}

/// For names, addresses and words: none of them needs an escape.
fn quoted(value: impl Display) -> String {
    format!("\"{value}\"")
}

/// Single ports are written as numbers, ranges as strings.
fn ports(ranges: &[(u16, u16)]) -> String {
    let range = |range: &(u16, u16)| if range.0 == range.1 { range.0.to_string() } else { quoted(port_range(*range)) };
    format!("[{}]", ranges.iter().map(range).collect::<Vec<_>>().join(", "))
}

fn list<T: Display>(values: impl IntoIterator<Item = T>) -> String {
    let values: Vec<String> = values.into_iter().map(quoted).collect();
    format!("[{}]", values.join(", "))
}

struct Text(String);

impl Text {
    fn line(&mut self, line: impl Display) {
        writeln!(self.0, "{line}").expect("a String takes everything");
    }

    fn section(&mut self, header: &str) {
        self.line(format_args!("\n{header}"));
    }

    fn key(&mut self, key: &str, value: impl Display, comment: &str) {
        if comment.is_empty() {
            self.line(format_args!("{key} = {value}"));
        } else {
            self.line(format_args!("{:<40} # {comment}", format!("{key} = {value}")));
        }
    }
}
