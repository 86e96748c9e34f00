//! `[[rule]]`: which flows get a policy or tunnels of their own.

use toml::de::DeValue;

use super::crosscheck::Claims;
use super::section::{Parsed, Section, number, string, values, word};
use super::values::{interface, prefix};
use super::{MAX_PORT_RANGES, MAX_RULES, MAX_TUNNELS_PER_PEER, Policy, Rule};

/// Names of IP protocols that rules may use. Source: IANA protocol numbers.
pub(super) const PROTOCOLS: [(&str, u8); 10] = [
    ("icmp", 1),
    ("tcp", 6),
    ("udp", 17),
    ("dccp", 33),
    ("gre", 47),
    ("esp", 50),
    ("ah", 51),
    ("icmpv6", 58),
    ("sctp", 132),
    ("udplite", 136),
];

/// Whether the header of a protocol starts with two 16-bit ports: TCP, UDP, DCCP, SCTP and UDP-Lite, as the steering
/// program reads them.
pub fn has_ports(protocol: u8) -> bool {
    [6, 17, 33, 132, 136].contains(&protocol)
}

/// Reads the rules in order; problems are reported.
pub(super) fn read(top: &Section<'_>, claims: &mut Claims) -> Vec<Rule> {
    let known = ["src", "dst", "proto", "src_ports", "dst_ports", "dscp", "fwmark", "policy", "tunnels", "pin"];
    let sections = top.tables("rule", "[[rule]]", &known, MAX_RULES);
    sections.iter().map(|section| rule(section, claims)).collect()
}

fn rule(section: &Section<'_>, claims: &mut Claims) -> Rule {
    let src = section.get("src", prefix);
    let dst = section.get("dst", prefix);
    if let (Some(src), Some(dst)) = (&src, &dst)
        && src.value.addr().is_ipv4() != dst.value.addr().is_ipv4()
    {
        let phrase = format!("is {}, of another family than src {}: no packet has both", dst.value, src.value);
        section.report("dst", dst.at, &phrase);
    }
    let proto = section.get("proto", protocol);
    let src_ports = section.list("src_ports", MAX_PORT_RANGES, ports);
    let dst_ports = section.list("dst_ports", MAX_PORT_RANGES, ports);
    let can_have = proto.as_ref().is_some_and(|proto| has_ports(proto.value));
    for (key, ports) in [("src_ports", &src_ports), ("dst_ports", &dst_ports)] {
        if let (false, Some(first)) = (can_have || (section.has("proto") && proto.is_none()), ports.first()) {
            section.report(key, first.at, "needs a protocol that has ports: add a line such as `proto = \"tcp\"`");
        }
    }
    let policy = section.get("policy", word(Policy::ALL, Policy::as_str));
    let tunnels = section.list("tunnels", MAX_TUNNELS_PER_PEER, interface);
    let pin = section.get("pin", interface);
    if let (Some(pin), true) = (&pin, section.has("policy") || section.has("tunnels")) {
        section.report("pin", pin.at, "stands for a policy and tunnels: give either pin or those");
    }
    if !["policy", "tunnels", "pin"].into_iter().any(|key| section.has(key)) {
        section.report_whole("does nothing: add a policy, or tunnels");
    }
    claims.rule_tunnels.extend(tunnels.iter().chain(&pin).cloned());
    Rule {
        src: src.map(|found| found.value),
        dst: dst.map(|found| found.value),
        proto: proto.map(|found| found.value),
        src_ports: values(src_ports),
        dst_ports: values(dst_ports),
        dscp: section.get("dscp", number(0..=63)).map(|found| found.value),
        fwmark: section.get("fwmark", number(0..=u32::MAX)).map(|found| found.value),
        policy: if pin.is_some() { Some(Policy::Hash) } else { policy.map(|found| found.value) },
        pin: pin.is_some(),
        tunnels: pin.map_or_else(|| values(tunnels), |pin| vec![pin.value]),
    }
}

fn protocol(value: &DeValue<'_>) -> Parsed<u8> {
    if matches!(value, DeValue::Integer(_)) {
        return number(0..=255)(value);
    }
    named(&string(value)?)
}

fn named(name: &str) -> Parsed<u8> {
    PROTOCOLS.iter().find(|(known, _)| *known == name).map(|(_, number)| *number).ok_or_else(|| {
        let names: Vec<&str> = PROTOCOLS.iter().map(|(known, _)| *known).collect();
        format!("is {name:?}: give a protocol number, or one of {}", names.join(", "))
    })
}

/// Parses the name or number of a protocol. The error says what is wrong and the fix.
pub fn parse_protocol(text: &str) -> Result<u8, String> {
    text.parse().or_else(|_| named(text).map_err(|why| why.trim_start_matches("is ").to_owned()))
}

/// The name of a protocol. Its number, if ecmpvpn has no name for it.
pub fn protocol_name(protocol: u8) -> String {
    let known = PROTOCOLS.iter().find(|(_, number)| *number == protocol);
    known.map_or_else(|| protocol.to_string(), |(name, _)| (*name).to_owned())
}

/// A port as a number, or a range as a string of two ports with a dash between them.
fn ports(value: &DeValue<'_>) -> Parsed<(u16, u16)> {
    if matches!(value, DeValue::Integer(_)) {
        return number(0..=u16::MAX)(value).map(|port| (port, port));
    }
    let written = string(value)?;
    let range = written.split_once('-').and_then(|(low, high)| Some((low.parse().ok()?, high.parse().ok()?)));
    range
        .filter(|(low, high): &(u16, u16)| low <= high)
        .ok_or_else(|| format!("has {written:?}: give a port such as 873 or a range such as \"8000-8999\""))
}

/// Parses a port such as `873` or a range such as `8000-8999`. The error says what is wrong and the fix.
pub fn parse_ports(text: &str) -> Result<(u16, u16), String> {
    let (low, high) = text.split_once('-').unwrap_or((text, text));
    let range = low.parse().and_then(|low| Ok((low, high.parse()?)));
    let range: Option<(u16, u16)> = range.ok().filter(|(low, high)| low <= high);
    range.ok_or_else(|| format!("{text:?}: give a port such as 873 or a range such as 8000-8999"))
}

/// Writes ports in the form that [`parse_ports`] reads.
pub fn port_range((low, high): (u16, u16)) -> String {
    if low == high { low.to_string() } else { format!("{low}-{high}") }
}

/// Checks the fields of a rule against each other.
///
/// # Errors
/// No packet could match the rule, or it would do nothing.
pub fn check_rule(rule: &Rule) -> Result<(), String> {
    if let (Some(src), Some(dst)) = (rule.src, rule.dst)
        && src.addr().is_ipv4() != dst.addr().is_ipv4()
    {
        return Err(format!("{src} and {dst} are of different families: no packet has both"));
    }
    let asks_for_ports = !rule.src_ports.is_empty() || !rule.dst_ports.is_empty();
    if asks_for_ports && !rule.proto.is_some_and(has_ports) {
        return Err("ports need a protocol that has them: add one such as --proto tcp".to_owned());
    }
    if rule.policy.is_none() && rule.tunnels.is_empty() {
        return Err("the rule would do nothing: add --policy, or --tunnels".to_owned());
    }
    Ok(())
}
