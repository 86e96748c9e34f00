//! Routes to the remote prefixes through the steering device.

use std::net::{IpAddr, Ipv6Addr};

use ipnet::IpNet;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};

use super::error::{During as _, HostError};
use super::journal::Journal;
use super::links::Links;
use super::netlink::Netlink;
use super::record::{LinkId, Undo};
use crate::plan::Route;

/// The protocol number of routes that ecmpvpn makes; not assigned to anybody. Source: include/uapi/linux/rtnetlink.h,
/// `rt_protos` of iproute2.
pub const PROTOCOL: u8 = 0xec;
/// Gateway of these routes in IPv6: on a device without neighbour discovery, a route without a gateway makes a
/// neighbour entry for every destination.
const GATEWAY: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);

/// Adds a route through the steering device.
pub async fn add(netlink: &Netlink, journal: &mut Journal, route: &Route, device: LinkId) -> Result<(), HostError> {
    let name = device.name.clone();
    let index = device.ifindex.unwrap_or(0);
    let is_new = journal.record_once(Undo::DeleteRoute { prefix: route.prefix, device })?;
    let message = RouteNetlinkMessage::NewRoute(message(route.prefix, route.source, index));
    let added = netlink.request(message, NLM_F_CREATE | NLM_F_EXCL).await;
    if added.is_err() && is_new {
        journal.retract()?;
    }
    added.during(|| format!("adding a route to {} through {name}", route.prefix))
}

/// Replaces an existing route by one through the steering device, in one step.
pub async fn replace(netlink: &Netlink, journal: &mut Journal, route: &Route, device: LinkId) -> Result<(), HostError> {
    let (name, index) = (device.name.clone(), device.ifindex.unwrap_or(0));
    let prefix = route.prefix;
    journal.record_once(Undo::DeleteRoute { prefix, device })?;
    let message = RouteNetlinkMessage::NewRoute(message(prefix, route.source, index));
    let replaced = netlink.request(message, NLM_F_CREATE | NLM_F_REPLACE).await;
    replaced.during(|| format!("replacing the route to {prefix} by one through {name}"))?;
    journal.forget(|undo| matches!(undo, Undo::DeleteRoute { prefix: other, device } if *other == prefix && device.ifindex != Some(index)))?;
    Ok(())
}

/// The netlink message that adds or removes a route that ecmpvpn makes.
pub fn message(prefix: IpNet, source: Option<IpAddr>, device: u32) -> RouteMessage {
    let mut message = to(prefix);
    message.header.kind = RouteType::Unicast;
    message.attributes.push(RouteAttribute::Oif(device));
    match prefix {
        IpNet::V4(_) => message.header.scope = RouteScope::Link,
        IpNet::V6(_) => {
            message.header.flags = RouteFlags::Onlink;
            message.attributes.push(RouteAttribute::Gateway(RouteAddress::Inet6(GATEWAY)));
        }
    }
    if let Some(source) = source {
        message.attributes.push(RouteAttribute::PrefSource(source.into()));
    }
    message
}

/// What every route that ecmpvpn makes to `prefix` has in common: family, prefix, table and protocol.
pub fn to(prefix: IpNet) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family(prefix);
    message.header.destination_prefix_length = prefix.prefix_len();
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = RouteProtocol::Other(PROTOCOL);
    message.attributes.push(RouteAttribute::Destination(prefix.network().into()));
    message
}

fn family(prefix: IpNet) -> AddressFamily {
    if prefix.addr().is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

/// Whether this is one of the unreachable routes that ecmpvpn makes beside the steered ones.
pub fn is_unreachable(route: &RouteMessage) -> bool {
    route.header.kind == RouteType::Unreachable && route.header.protocol == RouteProtocol::Other(PROTOCOL)
}

/// The output interfaces of a route: one, or one for each next hop.
pub fn output_interfaces(route: &RouteMessage) -> Vec<u32> {
    let mut interfaces = Vec::new();
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Oif(index) => interfaces.push(*index),
            RouteAttribute::MultiPath(hops) => interfaces.extend(hops.iter().map(|hop| hop.interface_index)),
            _ => {}
        }
    }
    interfaces
}

pub fn table(route: &RouteMessage) -> u32 {
    let wide = route.attributes.iter().find_map(|a| match a {
        RouteAttribute::Table(table) => Some(*table),
        _ => None,
    });
    wide.unwrap_or(u32::from(route.header.table))
}

/// The route to exactly `prefix` in the main table, if there is one. The unreachable route beside it does not count.
pub fn find(routes: &[RouteMessage], prefix: IpNet) -> Option<&RouteMessage> {
    routes.iter().filter(|route| !is_unreachable(route)).find(|route| leads_to(route, prefix))
}

/// Whether this is a route to exactly `prefix` in the main table.
pub fn leads_to(route: &RouteMessage, prefix: IpNet) -> bool {
    let destination = route.attributes.iter().find_map(|a| match a {
        RouteAttribute::Destination(RouteAddress::Inet(address)) => Some(IpAddr::V4(*address)),
        RouteAttribute::Destination(RouteAddress::Inet6(address)) => Some(IpAddr::V6(*address)),
        _ => None,
    });
    table(route) == u32::from(RouteHeader::RT_TABLE_MAIN)
        && route.header.address_family == family(prefix)
        && route.header.destination_prefix_length == prefix.prefix_len()
        && destination.is_none_or(|address| address == prefix.network())
}

/// The preferred source address of a route, for this host's own packets.
pub fn source(route: &RouteMessage) -> Option<IpAddr> {
    route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::PrefSource(RouteAddress::Inet(address)) => Some(IpAddr::V4(*address)),
        RouteAttribute::PrefSource(RouteAddress::Inet6(address)) => Some(IpAddr::V6(*address)),
        _ => None,
    })
}

/// Describes for an error where a route goes: its devices, or its type.
pub fn describe(route: &RouteMessage, links: &Links) -> String {
    let name = |index: &u32| links.iter().find(|link| link.ifindex == *index).map(|link| link.name.clone());
    let names: Vec<String> = output_interfaces(route).iter().filter_map(name).collect();
    if names.is_empty() { format!("a route of type {:?}", route.header.kind) } else { names.join(", ") }
}
