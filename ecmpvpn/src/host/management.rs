//! Protects the port that the person who runs this is connected through: enslaving it could cut them off.

use std::net::IpAddr;

use ipnet::IpNet;
use netlink_packet_route::route::{RouteHeader, RouteMessage, RouteType};

use super::change::Change;
use super::error::{Conflict, HostError};
use super::links::Link;
use super::netlink::Netlink;
use super::saved::local_address;
use super::sessions::{Session, ssh_sessions};
use super::survey::Survey;
use super::{member_routes, route};
use crate::plan::Plan;

/// Refuses `changes` that enslave a port with the default route or an SSH session. With `may_take` such a port is
/// accepted if the bond gets its addresses and reaches its gateway.
pub async fn check_management(plan: &Plan, changes: &[Change], may_take: bool) -> Result<(), HostError> {
    let Some(bond) = &plan.bond else { return Ok(()) };
    if !changes.iter().any(|change| matches!(change, Change::Enslave { .. })) {
        return Ok(());
    }
    let netlink = Netlink::open()?;
    let survey = Survey::take(&netlink).await?;
    let sessions = ssh_sessions();
    for change in changes {
        let Change::Enslave { member, .. } = change else { continue };
        let Some(link) = survey.link(member) else { continue };
        let addresses = survey.nets_of(link);
        let default = default_route(&survey, link);
        let gateway = default.and_then(member_routes::gateway);
        let carries = match default {
            Some(default) => describe(default),
            None => match session_through(&netlink, &survey, link, &sessions).await {
                Some(session) => format!("an SSH session from {} to {}", session.remote.ip(), session.local),
                None => continue,
            },
        };
        let missing: Vec<IpNet> = addresses.into_iter().filter(|net| !bond.addresses.contains(net)).collect();
        let reached = |gateway: &IpAddr| bond.addresses.iter().any(|net| net.contains(gateway));
        let gateway = gateway.filter(|gateway| !reached(gateway));
        if !may_take || !missing.is_empty() || gateway.is_some() {
            return Err(Conflict::ManagementPort { member: member.clone(), carries, missing, gateway }.into());
        }
    }
    Ok(())
}

/// A default route through `link`, if there is one: of the main table, or else of another table.
fn default_route<'a>(survey: &'a Survey, link: &Link) -> Option<&'a RouteMessage> {
    let is_default = |header: &RouteHeader| header.destination_prefix_length == 0 && header.kind == RouteType::Unicast;
    let through =
        |route: &&RouteMessage| is_default(&route.header) && route::output_interfaces(route).contains(&link.ifindex);
    survey.routes.iter().filter(through).min_by_key(|route| !is_in_main(route))
}

fn is_in_main(route: &RouteMessage) -> bool {
    route::table(route) == u32::from(RouteHeader::RT_TABLE_MAIN)
}

fn describe(default: &RouteMessage) -> String {
    let via = member_routes::gateway(default).map_or_else(String::new, |gateway| format!(" via {gateway}"));
    let table = if is_in_main(default) { String::new() } else { format!(" of table {}", route::table(default)) };
    format!("the default route{via}{table}")
}

/// A session to an address of `link`, or whose packets leave through it by the kernel's own choice of route.
async fn session_through(netlink: &Netlink, survey: &Survey, link: &Link, sessions: &[Session]) -> Option<Session> {
    let on_link = survey.addresses.iter().filter(|address| address.header.index == link.ifindex);
    let addresses: Vec<IpAddr> = on_link.filter_map(local_address).collect();
    for session in sessions {
        let here = addresses.contains(&session.local.ip());
        if here || netlink.interface_of_tcp(session.local, session.remote).await == Some(link.ifindex) {
            return Some(*session);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use netlink_packet_route::route::{RouteAddress, RouteAttribute};

    use super::*;

    #[test]
    fn a_default_route_is_described_with_gateway_and_table() {
        let mut route = RouteMessage::default();
        route.header.table = RouteHeader::RT_TABLE_MAIN;
        assert_eq!(describe(&route), "the default route");
        route.attributes =
            vec![RouteAttribute::Gateway(RouteAddress::Inet([10, 2, 3, 1].into())), RouteAttribute::Table(1000)];
        assert_eq!(describe(&route), "the default route via 10.2.3.1 of table 1000");
    }
}
