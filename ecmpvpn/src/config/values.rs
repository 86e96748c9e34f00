//! Parsers of single values. Each returns the value, or a phrase that continues `KEY in [SECTION]` and ends with the
//! fix.

use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net};
use toml::de::DeValue;

use super::section::{Parsed, number, string, text};
use super::{InterfaceName, KeyError, MAX_WEIGHT, PrivateKey, PublicKey};

pub(super) fn key_file_name(value: &DeValue<'_>) -> Parsed<String> {
    let name = string(value)?;
    if name.is_empty() {
        Err("is empty: name a file that holds one key".to_owned())
    } else if name.parse::<PrivateKey>().is_ok() {
        Err("holds a key itself: write the key to a file of mode 0600 and name that file".to_owned())
    } else {
        Ok(name)
    }
}

pub(super) fn public_key(value: &DeValue<'_>) -> Parsed<PublicKey> {
    let key: PublicKey = string(value)?.parse().map_err(|error: KeyError| error.to_string())?;
    // Curve25519's zero point: every exchange with it gives zero, and WireGuard never completes a handshake.
    if key.as_bytes() == &[0; 32] { Err("is all zeros: give the remote site's key".to_owned()) } else { Ok(key) }
}

pub(super) fn site_name(value: &DeValue<'_>) -> Parsed<String> {
    let name = string(value)?;
    if is_site_name(&name) {
        Ok(name)
    } else {
        Err(format!("is {name:?}: give 1 to 32 letters, digits, dots, dashes or underscores, no dot first"))
    }
}

/// Whether `name` is a valid site name. It becomes part of file names and link aliases.
pub fn is_site_name(name: &str) -> bool {
    (1..=32).contains(&name.len())
        && !name.starts_with('.')
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
}

pub(super) fn interface(value: &DeValue<'_>) -> Parsed<InterfaceName> {
    let name = string(value)?;
    if ["all", "default", "lo"].contains(&name.as_str()) {
        return Err(format!("is {name:?}, which the kernel keeps for itself: give another name"));
    }
    InterfaceName::new(&name).map_err(|why| format!("is {name:?}, which {why}: give 1 to 15 letters, digits or dashes"))
}

pub(super) fn listen_port(value: &DeValue<'_>) -> Parsed<u16> {
    let port = number(0..=u16::MAX)(value)?;
    match port {
        0 => Err("is 0, which lets the kernel pick one that the far end cannot know: give 1024 to 65535".to_owned()),
        1..1024 => Err(format!("is {port}, a port reserved for system services: give 1024 to 65535")),
        _ => Ok(port),
    }
}

pub(super) fn flowlet_gap(value: &DeValue<'_>) -> Parsed<Option<u32>> {
    match value {
        DeValue::String(word) if word == "auto" => Ok(None),
        DeValue::Integer(_) => number(1..=10_000_000)(value).map(Some),
        _ => Err("is neither \"auto\" nor a number of microseconds: give one of the two".to_owned()),
    }
}

pub(super) fn boolean(value: &DeValue<'_>) -> Parsed<bool> {
    match value {
        DeValue::Boolean(value) => Ok(*value),
        _ => Err("is neither true nor false, without quotes: give one of the two".to_owned()),
    }
}

pub(super) fn weight(value: &DeValue<'_>) -> Parsed<Option<u16>> {
    match value {
        DeValue::String(word) if word == "auto" => Ok(None),
        DeValue::String(_) => Err("is neither \"auto\" nor a number from 1 to 1000: give one of the two".to_owned()),
        _ => number(1..=MAX_WEIGHT)(value).map(Some),
    }
}

pub(super) fn endpoint(value: &DeValue<'_>) -> Parsed<IpAddr> {
    let address: IpAddr = text("an IPv4 or IPv6 address such as \"10.2.3.4\"")(value)?;
    match why_unusable(address) {
        None => Ok(address),
        Some(why) => Err(format!("is {address}, which {why}: give the gateway's own unicast address")),
    }
}

/// Why an address cannot be the source or destination of outer packets. `None`: it can.
pub(super) fn why_unusable(address: IpAddr) -> Option<&'static str> {
    match address {
        _ if address.is_unspecified() => Some("stands for any address"),
        _ if address.is_loopback() => Some("never leaves the host"),
        _ if address.is_multicast() => Some("is multicast"),
        IpAddr::V4(v4) if v4.is_broadcast() => Some("is broadcast"),
        IpAddr::V6(v6) if v6.is_unicast_link_local() => Some("is valid on one link only"),
        IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some() => Some("is an IPv4 address in disguise"),
        _ => None,
    }
}

/// The destination of outer packets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Remote {
    Address(IpAddr),
    Name(String),
}

pub(super) fn remote_endpoint(value: &DeValue<'_>) -> Parsed<Remote> {
    let written = string(value)?;
    if written.parse::<IpAddr>().is_ok() {
        endpoint(value).map(Remote::Address)
    } else if is_host_name(&written) {
        Ok(Remote::Name(written))
    } else {
        Err(format!("is {written:?}: give an address such as \"10.2.3.4\", or a host name, without a port"))
    }
}

/// Whether `name` is a host name: labels of letters, digits, dashes and underscores, and the last label is not a
/// number.
fn is_host_name(name: &str) -> bool {
    let name = name.strip_suffix('.').unwrap_or(name);
    let is_label = |label: &str| {
        (1..=63).contains(&label.len())
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
    };
    let last = name.rsplit('.').next().unwrap_or(name);
    name.len() <= 253 && name.split('.').all(is_label) && !last.bytes().all(|byte| byte.is_ascii_digit())
}

/// An address of this host with its prefix length.
pub(super) fn host_address(value: &DeValue<'_>) -> Parsed<IpNet> {
    let written = string(value)?;
    if let Ok(address) = written.parse::<IpAddr>() {
        return Err(format!(
            "has {written:?}, which has no prefix length: write {:?}",
            IpNet::from(address).to_string()
        ));
    }
    let net: IpNet = text("an address and its prefix length such as \"10.100.0.1/32\"")(value)?;
    let host = net.addr();
    let whole_net = match net {
        IpNet::V4(v4) => v4.prefix_len() < 31 && (host == v4.network() || host == v4.broadcast()),
        IpNet::V6(v6) => v6.prefix_len() < 127 && host == v6.network(),
    };
    if whole_net || host.is_unspecified() || host.is_multicast() || host.is_loopback() {
        return Err(format!("has {net}, which no host can have: give the address of this host in that net"));
    }
    Ok(net)
}

/// A net with its host bits zero.
pub(super) fn prefix(value: &DeValue<'_>) -> Parsed<IpNet> {
    parse_prefix(&string(value)?).map_err(|why| format!("has {why}"))
}

/// A net that can be steered. The error says what is wrong and the fix: `10.20.0.1/16, with bits set behind …`.
pub fn parse_prefix(written: &str) -> Result<IpNet, String> {
    if let Ok(address) = written.parse::<IpAddr>() {
        let net = IpNet::from(address).to_string();
        return Err(format!("{written:?}, which has no prefix length: write {net:?}"));
    }
    let Ok(net) = written.parse::<IpNet>() else {
        return Err(format!("{written:?}: give a net such as \"10.20.0.0/16\" or \"fd00:20::/48\""));
    };
    if net.trunc() != net {
        return Err(format!("{net}, with bits set behind the prefix: write {:?}", net.trunc().to_string()));
    }
    let within = |parent: &str| parent.parse::<IpNet>().is_ok_and(|parent| parent.contains(&net));
    if ["127.0.0.0/8", "224.0.0.0/4", "::1/128", "fe80::/10", "ff00::/8"].into_iter().any(within) {
        return Err(format!("{net}, which never leaves its own link: take it out"));
    }
    Ok(net)
}

/// An address of a point-to-point net, /31 or /30.
pub(super) fn tunnel_address(value: &DeValue<'_>) -> Parsed<Ipv4Net> {
    let net: Ipv4Net = text("an address of a /31 such as \"169.254.77.0/31\"")(value)?;
    let trouble = match net.prefix_len() {
        31 => None,
        30 if net.addr() != net.network() && net.addr() != net.broadcast() => None,
        30 => Some("which names a net and no host in it"),
        _ => Some("a net of other than two hosts"),
    };
    match trouble {
        Some(trouble) => Err(format!("is {net}, {trouble}: give an address of a /31 such as \"169.254.77.0/31\"")),
        None => Ok(net),
    }
}
