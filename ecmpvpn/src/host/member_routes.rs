//! Moves routes of a member to its bond. Without that a host would lose its gateway when its port is enslaved.

use std::net::IpAddr;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteType};
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL};

use super::error::{During as _, HostError};
use super::journal::Journal;
use super::netlink::{Netlink, errno_of};
use super::record::{LinkId, Undo};
use super::route;
use super::saved::Saved;
use crate::config::Bond;

/// The routes of all tables through one of `members` that can move: they have a single gateway, in a network of the
/// bond's addresses.
pub fn movable(routes: &[RouteMessage], members: &[u32], bond: &Bond) -> Vec<Saved> {
    let fits = |route: &&RouteMessage| {
        let lasting = !matches!(route.header.protocol, RouteProtocol::Kernel | RouteProtocol::Ra);
        let single = matches!(route::output_interfaces(route).as_slice(), [one] if members.contains(one));
        let local = route::table(route) == u32::from(libc::RT_TABLE_LOCAL);
        let reached = gateway(route).is_some_and(|gateway| bond.addresses.iter().any(|net| net.contains(&gateway)));
        lasting && single && !local && reached && route.header.kind == RouteType::Unicast
    };
    routes.iter().filter(fits).map(Saved::route).collect()
}

/// Adds a member's route on its bond. A route that exists there already stays.
pub async fn add(netlink: &Netlink, journal: &mut Journal, saved: &Saved, bond: &LinkId) -> Result<(), HostError> {
    let operation = || format!("moving the route {} to {bond}", saved.text);
    let message: RouteMessage = saved.message().during(operation)?;
    let route = Saved::route(&via_device(message, bond.ifindex.unwrap_or(0)));
    let message = RouteNetlinkMessage::NewRoute(route.message().during(operation)?);
    journal.record(Undo::DeleteMovedRoute { route, device: bond.clone() })?;
    let added = netlink.request(message, NLM_F_CREATE | NLM_F_EXCL).await;
    if added.is_err() {
        journal.retract()?;
    }
    match added {
        Err(e) if errno_of(&e) == Some(libc::EEXIST) => Ok(()),
        added => added.during(operation),
    }
}

/// The route with another output interface. The kernel chooses the source address: that of the member is gone.
fn via_device(mut route: RouteMessage, device: u32) -> RouteMessage {
    route.attributes.retain(|attribute| !matches!(attribute, RouteAttribute::PrefSource(_)));
    for attribute in &mut route.attributes {
        if let RouteAttribute::Oif(index) = attribute {
            *index = device;
        }
    }
    route
}

/// The gateway of a route, if it has one.
pub fn gateway(route: &RouteMessage) -> Option<IpAddr> {
    route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Gateway(RouteAddress::Inet(address)) => Some(IpAddr::V4(*address)),
        RouteAttribute::Gateway(RouteAddress::Inet6(address)) => Some(IpAddr::V6(*address)),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{BondMode, InterfaceName, LacpRate, XmitHashPolicy};
    use netlink_packet_route::route::RouteHeader;

    fn bond(address: &str) -> Bond {
        Bond {
            name: InterfaceName::new("bond0").unwrap(),
            members: vec![InterfaceName::new("eno1").unwrap()],
            mode: BondMode::Lacp,
            xmit_hash_policy: XmitHashPolicy::Layer34,
            lacp_rate: LacpRate::Fast,
            miimon_ms: 100,
            addresses: vec![address.parse().unwrap()],
        }
    }

    fn default_route(gateway: [u8; 4], device: u32, protocol: RouteProtocol) -> RouteMessage {
        let mut route = RouteMessage::default();
        route.header.table = RouteHeader::RT_TABLE_MAIN;
        route.header.kind = RouteType::Unicast;
        route.header.protocol = protocol;
        route.attributes = vec![
            RouteAttribute::Gateway(RouteAddress::Inet(gateway.into())),
            RouteAttribute::Oif(device),
            RouteAttribute::PrefSource(RouteAddress::Inet([10, 2, 3, 4].into())),
        ];
        route
    }

    #[test]
    fn a_route_moves_if_the_bond_reaches_its_gateway() {
        let routes = [
            default_route([10, 2, 3, 1], 2, RouteProtocol::Static),
            default_route([10, 9, 9, 1], 2, RouteProtocol::Static),
            default_route([10, 2, 3, 1], 7, RouteProtocol::Static),
            default_route([10, 2, 3, 1], 2, RouteProtocol::Kernel),
        ];
        let texts = |address: &str| -> Vec<String> {
            movable(&routes, &[2, 3], &bond(address)).into_iter().map(|saved| saved.text).collect()
        };
        assert_eq!(texts("10.2.3.4/24"), ["default via 10.2.3.1"]);
        assert_eq!(texts("172.16.0.1/24"), Vec::<String>::new());
        let in_table = |table: u32| {
            let mut route = default_route([10, 2, 3, 1], 2, RouteProtocol::Static);
            route.attributes.push(RouteAttribute::Table(table));
            movable(&[route], &[2], &bond("10.2.3.4/24")).len()
        };
        assert_eq!([in_table(1000), in_table(u32::from(libc::RT_TABLE_LOCAL))], [1, 0]);
    }

    #[test]
    fn a_moved_route_leaves_by_the_bond_with_the_kernels_choice_of_source() {
        let moved = via_device(default_route([10, 2, 3, 1], 2, RouteProtocol::Static), 9);
        assert_eq!(route::output_interfaces(&moved), [9]);
        assert!(!moved.attributes.iter().any(|attribute| matches!(attribute, RouteAttribute::PrefSource(_))));
    }
}
