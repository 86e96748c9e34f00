//! Protects the port that the person who runs this is connected through: enslaving it could cut them off.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use netlink_packet_route::route::{RouteHeader, RouteMessage, RouteType};

use super::change::Change;
use super::error::{Conflict, HostError};
use super::links::Link;
use super::netlink::Netlink;
use super::survey::Survey;
use super::{member_routes, route};
use crate::plan::Plan;

const SSH: u16 = 22;
/// Set by `sshd` for its sessions: remote address and port, local address and port.
const SSH_CONNECTION: &str = "SSH_CONNECTION";

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
        let session = sessions.iter().find(|session| addresses.iter().any(|net| net.addr() == **session));
        let gateway = default.and_then(member_routes::gateway);
        let carries = match (default, gateway, session) {
            (Some(_), Some(gateway), _) => format!("the default route via {gateway}"),
            (Some(_), None, _) => "the default route".to_owned(),
            (None, _, Some(session)) => format!("an SSH session to {session}"),
            (None, _, None) => continue,
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

/// A default route in the main table through `link`, if there is one.
fn default_route<'a>(survey: &'a Survey, link: &Link) -> Option<&'a RouteMessage> {
    let is_default = |header: &RouteHeader| header.destination_prefix_length == 0 && header.kind == RouteType::Unicast;
    let through = |route: &&RouteMessage| {
        is_default(&route.header)
            && route::table(route) == u32::from(RouteHeader::RT_TABLE_MAIN)
            && route::output_interfaces(route).contains(&link.ifindex)
    };
    survey.routes.iter().find(through)
}

/// Local addresses of SSH sessions: of this process's session, if there is one, and of all established ones.
fn ssh_sessions() -> Vec<IpAddr> {
    let own = std::env::var(SSH_CONNECTION).ok();
    let own = own.as_deref().and_then(|text| text.split_whitespace().nth(2)?.parse().ok());
    // Of the thread's network namespace: the same as for netlink.
    let tables = ["tcp", "tcp6"].map(|table| fs::read_to_string(format!("/proc/thread-self/net/{table}")));
    let established = tables.iter().flatten().flat_map(|table| established_to(table, SSH));
    own.into_iter().chain(established).collect()
}

/// Local addresses of established connections to a local port, from a table such as `/proc/net/tcp`.
fn established_to(table: &str, port: u16) -> impl Iterator<Item = IpAddr> + '_ {
    table.lines().skip(1).filter_map(move |line| {
        let mut fields = line.split_whitespace().skip(1);
        let (local, _remote, state) = (fields.next()?, fields.next()?, fields.next()?);
        let (address, local_port) = local.rsplit_once(':')?;
        // TCP_ESTABLISHED, include/net/tcp_states.h
        (state == "01" && u16::from_str_radix(local_port, 16).ok()? == port).then(|| address_of(address))?
    })
}

/// Parses an address as the kernel prints it: 32-bit words in hexadecimal, in the host's byte order.
fn address_of(text: &str) -> Option<IpAddr> {
    let word = |at: usize| Some(u32::from_str_radix(text.get(at..at + 8)?, 16).ok()?.to_ne_bytes());
    if text.len() == 8 {
        return Some(Ipv4Addr::from(word(0)?).into());
    }
    let mut octets = [0; 16];
    for (at, quarter) in octets.chunks_exact_mut(4).enumerate() {
        quarter.copy_from_slice(&word(8 * at)?);
    }
    Some(Ipv6Addr::from(octets).to_canonical())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ssh_sessions_are_found_in_both_families() {
        let v4 = "  sl  local_address rem_address   st\n\
             0: 0403020A:0016 0100007F:C350 01 0\n   1: 00000000:0016 00000000:0000 0A 0\n   2: 0100007F:0050 0100007F:1234 01 0\n";
        let v6 = "  sl  local_address rem_address   st\n\
             0: 000000FD000000000000000004000000:0016 00000000000000000000000001000000:C350 01 0\n\
             1: 0000000000000000FFFF00000403020A:0016 0000000000000000FFFF00000100000A:C350 01 0\n";
        assert_eq!(established_to(v4, SSH).collect::<Vec<_>>(), ["10.2.3.4".parse::<IpAddr>().unwrap()]);
        let found: Vec<IpAddr> = established_to(v6, SSH).collect();
        assert_eq!(found, ["fd00::4".parse::<IpAddr>().unwrap(), "10.2.3.4".parse().unwrap()]);
        assert_eq!(established_to("", SSH).count(), 0);
    }
}
