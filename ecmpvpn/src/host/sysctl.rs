//! Kernel settings below `/proc/sys/net`, in the calling thread's network namespace.
//!
//! The forwarding switch has many effects: it sets `forwarding` of every device and, in IPv4, `accept_redirects` of
//! `all`. Everything that it changes is saved first and restored later.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use netlink_packet_route::route::{RouteMessage, RouteProtocol};

use super::error::{During as _, HostError};
use super::journal::Journal;
use super::links::{Link, Links};
use super::{route, shared};
use crate::fault;
use crate::plan::Sysctl;

const ROOT: &str = "/proc/sys/net";
const IPV4_FORWARDING: &str = "ipv4/ip_forward";
const IPV6_FORWARDING: &str = "ipv6/conf/all/forwarding";
const SEND_REDIRECTS: &str = "ipv4/conf/all/send_redirects";

fn path(key: &str) -> PathBuf {
    Path::new(ROOT).join(key)
}

/// The value at `key`, such as `ipv4/ip_forward`.
pub fn read(key: &str) -> io::Result<String> {
    fs::read_to_string(path(key)).map(|value| value.trim_end().to_owned())
}

fn write(key: &str, value: &str) -> io::Result<()> {
    fault::point("sysctl");
    fs::write(path(key), value)?;
    fault::point("sysctl");
    Ok(())
}

/// Writes `value` if the setting differs. A kernel or device without the setting is not an error.
pub fn write_if_there(key: &str, value: &str) -> io::Result<()> {
    match read(key) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Ok(current) if current == value => Ok(()),
        _ => write(key, value),
    }
}

/// Writes each value that differs, in this order. Ignores settings of devices that are gone.
///
/// # Errors
/// The first failure, after all values were tried.
pub fn write_back(values: &[(String, String)]) -> io::Result<()> {
    let mut first_error = Ok(());
    for (key, value) in values {
        if let Err(e) = write_if_there(key, value) {
            first_error = first_error.and(Err(io::Error::new(e.kind(), format!("writing {value} to net/{key}: {e}"))));
        }
    }
    first_error
}

/// Whether packets of this family are forwarded; `None`: the kernel lacks the family.
pub fn forwards(ipv4: bool) -> io::Result<Option<bool>> {
    match read(if ipv4 { IPV4_FORWARDING } else { IPV6_FORWARDING }) {
        Ok(value) => Ok(Some(value != "0")),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

/// Whether a setting that `plan` needs has another value now. Cheap: reads a few files.
pub fn differ(settings: &[Sysctl]) -> bool {
    settings.iter().any(|setting| match setting {
        Sysctl::Ipv4Forwarding => forwards(true).is_ok_and(|on| on == Some(false)),
        Sysctl::Ipv6Forwarding => forwards(false).is_ok_and(|on| on == Some(false)),
        Sysctl::LooseReversePath(device) => !is_loose(device.as_str()),
    })
}

/// Turns IPv4 forwarding on.
///
/// The kernel also turns off large receive offload (LRO) of every device, and undoing does not turn it on again.
/// Forwarding requires that, and no packets are lost by it. Source: `inet_forward_change()`, net/ipv4/devinet.c.
pub fn enable_ipv4_forwarding(journal: &mut Journal) -> Result<(), HostError> {
    shared::record(journal, IPV4_FORWARDING, || {
        let mut values = values_of(&[IPV4_FORWARDING, "ipv4/conf/all/accept_redirects"])?;
        values.extend(values_of_each("ipv4/conf", "forwarding")?);
        Ok(values)
    })?;
    write(IPV4_FORWARDING, "1").during(|| "turning IPv4 forwarding on".to_owned())
}

/// Turns IPv6 forwarding on. Call [`accept_router_advertisements`] first.
/// Source: `addrconf_fixup_forwarding()`, net/ipv6/addrconf.c.
pub fn enable_ipv6_forwarding(journal: &mut Journal) -> Result<(), HostError> {
    shared::record(journal, IPV6_FORWARDING, || {
        let mut values = values_of(&[IPV6_FORWARDING])?;
        values.extend(values_of_each("ipv6/conf", "forwarding")?);
        Ok(values)
    })?;
    write(IPV6_FORWARDING, "1").during(|| "turning IPv6 forwarding on".to_owned())
}

/// Forwarding is on already. If another site turned it on, its former value becomes this site's to restore as well, with
/// that of [`accept_router_advertisements`].
pub fn keep_forwarding(journal: &mut Journal, ipv4: bool) -> Result<(), HostError> {
    let is_accept_ra = |key: &str| key.starts_with("ipv6/conf/") && key.ends_with("/accept_ra");
    let is_needed = |key: &str| if ipv4 { key == IPV4_FORWARDING } else { key == IPV6_FORWARDING || is_accept_ra(key) };
    shared::adopt(journal, is_needed)
}

/// Lets `device` keep using router advertisements when IPv6 forwarding is on. Otherwise the kernel removes its default
/// route at that moment. Source: `rt6_purge_dflt_routers()`, net/ipv6/route.c.
pub fn accept_router_advertisements(journal: &mut Journal, device: &str) -> Result<(), HostError> {
    let key = format!("ipv6/conf/{device}/accept_ra");
    shared::record(journal, &key, || values_of(&[&key]))?;
    write(&key, "2").during(|| format!("letting {device} accept router advertisements"))
}

/// Devices that use router advertisements now, and would stop when forwarding is turned on.
pub fn router_advertisement_devices(routes: &[RouteMessage], links: &Links) -> Vec<String> {
    let used: BTreeSet<u32> = routes
        .iter()
        .filter(|route| route.header.protocol == RouteProtocol::Ra)
        .flat_map(route::output_interfaces)
        .collect();
    let accepts_as_host = |link: &&Link| read(&format!("ipv6/conf/{}/accept_ra", link.name)).is_ok_and(|v| v == "1");
    let devices = links.iter().filter(|link| used.contains(&link.ifindex)).filter(accepts_as_host);
    devices.map(|link| link.name.clone()).collect()
}

/// Records what a WireGuard device changes when it is set up: it turns sending of ICMP redirects off for all devices.
/// Source: `wg_open()`, drivers/net/wireguard/device.c.
pub fn expect_wireguard(journal: &mut Journal) -> Result<(), HostError> {
    let values = values_of(&[SEND_REDIRECTS])?;
    if values.iter().any(|(_, value)| value != "0") {
        return shared::record(journal, SEND_REDIRECTS, || Ok(values));
    }
    shared::adopt(journal, |key| key == SEND_REDIRECTS)
}

/// Sets a tunnel to loose reverse path filtering. The setting disappears with the device. The kernel uses the greater
/// of this value and that of `all`, and 2 (loose) is the greatest.
pub fn loose_reverse_path(device: &str) -> Result<(), HostError> {
    write(&format!("ipv4/conf/{device}/rp_filter"), "2").during(|| format!("setting rp_filter of {device} to 2"))
}

/// Whether the device's own setting is loose reverse path filtering.
pub fn is_loose(device: &str) -> bool {
    read(&format!("ipv4/conf/{device}/rp_filter")).is_ok_and(|value| value == "2")
}

fn values_of(keys: &[&str]) -> Result<Vec<(String, String)>, HostError> {
    keys.iter()
        .map(|key| read(key).map(|value| ((*key).to_owned(), value)).during(|| format!("reading net/{key}")))
        .collect()
}

/// `setting` of `default` and of every device.
fn values_of_each(family: &str, setting: &str) -> Result<Vec<(String, String)>, HostError> {
    let mut values = Vec::new();
    for entry in fs::read_dir(path(family)).during(|| format!("listing net/{family}"))? {
        let name = entry.during(|| format!("listing net/{family}"))?.file_name().to_string_lossy().into_owned();
        let key = format!("{family}/{name}/{setting}");
        match read(&key) {
            _ if name == "all" => {}
            Ok(value) => values.push((key, value)),
            // The device was removed just now.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(HostError::Step { operation: format!("reading net/{key}"), source }),
        }
    }
    values.sort();
    Ok(values)
}
